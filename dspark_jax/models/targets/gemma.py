"""Gemma 2, 3 and 4, dense and with experts: the text part.

A layer has a norm before and after each of its halves. What the generations have of their own:

- 2: soft caps on scores and logits. 2 and 3: norms of 1 + w. 3 and 4: norms of q and k, and another
  RoPE in layers with a window than in those without.
- 4: values are normalised, without a weight; the layer ends in a scalar; layers without a window
  have heads of their own width and number, whose values may be the projected keys. Beside the MLP
  there may be experts. In small models the last layers read the keys and values of earlier ones,
  and every layer adds an embedding of its own of the token.

Sources: Gemma 2 (2024), Gemma 3 (2025) and Gemma 4 (2026) technical reports.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.axes import declare as declare_param
from dspark_jax.config import RopeConfig
from dspark_jax.models.cache import Room
from dspark_jax.models.layers import Mlp, declare_mlp, gated_mlp, matmul, output, project_heads
from dspark_jax.models.moe import Experts, choose_experts, declare_experts, mix_experts
from dspark_jax.models.reading import (
    Attention,
    Blocks,
    Cache,
    declare_caches,
    read_beside,
    read_rows,
    read_sequences,
)
from dspark_jax.models.rope import Table, rope_table, rotate
from dspark_jax.models.stacks import Place, Sections, Stack, make_sections, map_stacks
from dspark_jax.models.targets.family import TargetParams
from dspark_jax.models.targets.gemma_config import DRAFT_LAYERS
from dspark_jax.models.targets.gemma_config import Config as Config
from dspark_jax.models.targets.gemma_config import config as config
from dspark_jax.models.vocab import Vocab, embed, embedding_axes

_gelu = functools.partial(jax.nn.gelu, approximate=True)


@dataclass(frozen=True)
class Kind:
    """What the layers of a stack have in common."""

    attention: Attention
    wide: bool = False


@struct.dataclass
class Mixture:
    """Weights of what stands beside a layer's MLP."""

    router_DE: Any
    router_scale_D: Any
    expert_scale_E: Any
    experts: Experts
    dense_norm_D: Any
    before_norm_D: Any
    after_norm_D: Any


@struct.dataclass
class TokenLayer:
    """Weights with which a layer adds its own embedding of the token."""

    gate_DO: Any
    out_OD: Any
    norm_D: Any


@struct.dataclass
class TokenTables:
    """Weights that make every layer's own embedding of a token; I is layers times width."""

    table_VI: Any
    context_DI: Any
    norm_O: Any


@struct.dataclass
class Layer:
    """Weights of one layer, or of several stacked on a leading L; missing parts are None. For
    decoding q, k and v may be :class:`~dspark_jax.models.layers.Merged`."""

    input_norm_D: Any
    q_DNH: Any
    k_DKH: Any
    v_DKH: Any
    o_NHD: Any
    q_norm_H: Any
    k_norm_H: Any
    attention_norm_D: Any
    mlp_norm_D: Any
    mlp: Mlp
    output_norm_D: Any
    scalar_X: Any
    mixture: Any = None
    token: Any = None


def architecture(cfg: Config) -> str:
    """The class of transformers that computes the same."""
    return f"Gemma{cfg.generation}ForCausalLM"


def draft_fields(cfg: Config) -> dict[str, Any]:
    """What a drafter takes over from its target: the vocabulary's scale and cap, and from Gemma 4
    the layers, too."""
    fields: dict[str, Any] = {"embed_scale": cfg.hidden_size**0.5, "softcap": cfg.softcap}
    if cfg.generation == 4:
        return fields | {"rope": cfg.rope, "value_is_key": cfg.value_is_key, "blocks": DRAFT_LAYERS}
    return fields | {"rope": RopeConfig(theta=cfg.rope.theta)}


def sections(cfg: Config) -> Sections:
    """The layers by their kinds."""
    own = cfg.num_layers - cfg.num_shared

    def kind(layer: int) -> Kind:
        window, reads = cfg.window(layer), None
        if layer >= own:
            reads = max(n for n in range(own) if cfg.window(n) == window)
        heads = cfg.local_heads if window else cfg.num_kv_heads
        width = cfg.local_head_dim if window else cfg.head_dim
        attention = Attention(heads, width, window, cfg.scale, cfg.score_softcap, reads)
        return Kind(attention, cfg.wide_shared and layer >= own)

    return make_sections(tuple(map(kind, range(cfg.num_layers))))


def declare(cfg: Config) -> TargetParams:
    """Declaration of every parameter under its Hugging Face name."""

    def param(letters: str, name: str, init: str, out: str = "") -> Any:
        return declare_param(letters, sizes, f"model.{name}", init=init, out=out)

    sizes, tokens = dict(cfg.sizes), None
    if cfg.token_size:
        sizes["I"] = cfg.num_layers * cfg.token_size
        table = declare_param(
            "VI",
            sizes | {"V": cfg.token_vocab},
            "model.embed_tokens_per_layer.weight",
            init="embed",
        )
        tokens = TokenTables(
            table,
            param("DI", "per_layer_model_projection.weight", "normal", "I"),
            param("O", "per_layer_projection_norm.weight", "ones"),
        )
    head = None if cfg.tied else declare_param("VD", sizes, "lm_head.weight", init="embed")
    return TargetParams(
        vocab=Vocab(
            param(embedding_axes(cfg.tied), "embed_tokens.weight", "embed"),
            head,
            embed_scale=cfg.hidden_size**0.5,
            softcap=cfg.softcap,
        ),
        layers=map_stacks(
            functools.partial(declare_stack, cfg, prefix="model.layers"), sections(cfg)
        ),
        norm_D=param("D", "norm.weight", _unit(cfg)),
        extra=tokens,
    )


def _unit(cfg: Any) -> str:
    """The initialiser of a norm that leaves its input as it is."""
    return "ones" if cfg.generation == 4 else "zeros"


def declare_stack(cfg: Config, stack: Stack, prefix: str) -> Layer:
    """Declaration of the layers of a stack under the names ``prefix.{layer}``."""
    own, wide = stack.kind.attention, 2 if stack.kind.wide else 1
    sizes = cfg.sizes | {"K": own.num_heads, "H": own.head_dim, "M": wide * cfg.intermediate_size}

    def param(letters: str, name: str, out: str = "", init: str = "normal", **changed: int) -> Any:
        name = f"{prefix}.{{layer}}.{name}"
        layers = stack.layers
        return declare_param(
            "L" + letters, sizes | changed, name, out=out, init=init, layers=layers
        )

    def norm(name: str, letters: str = "D") -> Any:
        return param(letters, f"{name}.weight", init=_unit(cfg))

    keys, values = own.reads is None, own.reads is None
    if not own.window and cfg.value_is_key:
        values = False
    mixture = token = None
    if cfg.num_experts:
        mixture = Mixture(
            param("DE", "router.proj.weight", "E"),
            param("D", "router.scale", init="ones"),
            param("E", "router.per_expert_scale", init="ones"),
            declare_experts(
                sizes | {"M": cfg.expert_size}, f"{prefix}.{{layer}}.experts", stack.layers
            ),
            norm("post_feedforward_layernorm_1"),
            norm("pre_feedforward_layernorm_2"),
            norm("post_feedforward_layernorm_2"),
        )
    if cfg.token_size:
        token = TokenLayer(
            param("DO", "per_layer_input_gate.weight", "O"),
            param("OD", "per_layer_projection.weight", "D"),
            norm("post_per_layer_input_norm"),
        )
    normed = cfg.generation > 2
    return Layer(
        input_norm_D=norm("input_layernorm"),
        q_DNH=param("DNH", "self_attn.q_proj.weight", "NH"),
        k_DKH=param("DKH", "self_attn.k_proj.weight", "KH") if keys else None,
        v_DKH=param("DKH", "self_attn.v_proj.weight", "KH") if values else None,
        o_NHD=param("NHD", "self_attn.o_proj.weight", "D"),
        q_norm_H=norm("self_attn.q_norm", "H") if normed else None,
        k_norm_H=norm("self_attn.k_norm", "H") if normed and keys else None,
        attention_norm_D=norm("post_attention_layernorm"),
        mlp_norm_D=norm("pre_feedforward_layernorm"),
        mlp=declare_mlp(sizes, prefix, stack.layers),
        output_norm_D=norm("post_feedforward_layernorm"),
        scalar_X=param("X", "layer_scalar", init="ones") if cfg.generation == 4 else None,
        mixture=mixture,
        token=token,
    )


def declare_cache(cfg: Config, room: Room) -> Cache:
    """Declaration of what :func:`extend` keeps."""
    return declare_caches(sections(cfg), room)


@struct.dataclass
class Shared:
    """What all layers share: RoPE with and without a window, and their embeddings of the token."""

    local: Table
    full: Table
    token_LXO: Any = None


def _norm(x_XD: jax.Array, weight_D: jax.Array | None, cfg: Any) -> jax.Array:
    """RMSNorm in float32, times w, 1 + w or nothing; in the dtype of ``x_XD``."""
    x32 = x_XD.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + cfg.rms_norm_eps)
    if weight_D is not None:
        weight_D = weight_D.astype(jnp.float32)
        x32 = x32 * (weight_D if cfg.generation == 4 else 1 + weight_D)
    return x32.astype(x_XD.dtype)


def _enter(
    target: TargetParams, token_X: jax.Array, position_X: jax.Array, cfg: Config
) -> tuple[jax.Array, Shared]:
    x_XD, shared = embed(target.vocab, token_X), tables(position_X, cfg)
    if target.extra is not None:
        own_LXO = token_inputs(target.extra, token_X, x_XD, cfg)
        shared = shared.replace(token_LXO=own_LXO)  # type: ignore[attr-defined]
    return x_XD, shared


def tables(position_X: jax.Array, cfg: Config) -> Shared:
    """RoPE of both kinds of layers at some positions."""
    local = rope_table(position_X, cfg.local_rope, cfg.local_head_dim)
    return Shared(local, rope_table(position_X, cfg.rope, cfg.head_dim))


def token_inputs(
    tables: TokenTables, token_X: jax.Array, x_XD: jax.Array, cfg: Config
) -> jax.Array:
    """Every layer's own embedding of some tokens, [L, X, O].

    Args:
        tables: weights.
        token_X: int32 ids.
        x_XD: their embeddings, scaled.
        cfg: sizes.
    """
    sizes = cfg.num_layers, cfg.token_size
    own_XI = jnp.take(tables.table_VI, token_X, axis=0, mode="clip")
    own_XI = own_XI * jnp.asarray(cfg.token_size**0.5, own_XI.dtype)
    context_XI = matmul(x_XD, tables.context_DI) * jnp.asarray(cfg.hidden_size**-0.5, x_XD.dtype)
    context_XLO = _norm(context_XI.reshape(*token_X.shape, *sizes), tables.norm_O, cfg)
    both_XLO = context_XLO + own_XI.reshape(context_XLO.shape)
    return jnp.moveaxis(both_XLO * jnp.asarray(2**-0.5, x_XD.dtype), -2, 0)


def project(
    layer: Layer, x_XD: jax.Array, place: Place, shared: Shared, cfg: Config
) -> tuple[jax.Array, Any, Any]:
    """Queries, and keys and values where the layer has its own; see :class:`Blocks`."""
    return heads(layer, _norm(x_XD, layer.input_norm_D, cfg), place, shared, cfg)


def heads(
    layer: Layer, h_XD: jax.Array, place: Place, shared: Shared, cfg: Config
) -> tuple[jax.Array, Any, Any]:
    """:func:`project` of inputs that are normalised already."""
    own = place.kind.attention
    table = shared.local if own.window else shared.full
    q_XNH, k_XKH, v_XKH = project_heads(layer, h_XD)
    if layer.q_norm_H is not None:
        q_XNH = _norm(q_XNH, layer.q_norm_H, cfg)
    q_XNH = rotate(q_XNH, table)
    if own.reads is not None:
        return q_XNH, None, None
    return q_XNH, *finish_kv(layer, k_XKH, v_XKH, table, cfg)


def finish_kv(
    layer: Layer, k_XKH: jax.Array, v_XKH: jax.Array | None, table: Table, cfg: Config
) -> tuple[jax.Array, jax.Array]:
    """Keys and values [X, K, H] after their products; values None are the keys."""
    v_XKH = k_XKH if v_XKH is None else v_XKH
    if layer.k_norm_H is not None:
        k_XKH = _norm(k_XKH, layer.k_norm_H, cfg)
    if cfg.generation == 4:
        v_XKH = _norm(v_XKH, None, cfg)
    return rotate(k_XKH, table), v_XKH


def finish(
    layer: Layer,
    x_XD: jax.Array,
    attended_XNH: jax.Array,
    place: Place,
    shared: Shared,
    cfg: Config,
) -> jax.Array:
    """The residual stream after a layer; see :class:`Blocks`."""
    x_XD = x_XD + _norm(output(attended_XNH, layer.o_NHD), layer.attention_norm_D, cfg)
    out_XD = gated_mlp(layer.mlp, _norm(x_XD, layer.mlp_norm_D, cfg), _gelu)
    if layer.mixture is not None:
        mixed_XD = mix(layer.mixture, x_XD, *route(layer.mixture, x_XD, cfg), cfg)
        out_XD = _norm(out_XD, layer.mixture.dense_norm_D, cfg) + mixed_XD
    x_XD = x_XD + _norm(out_XD, layer.output_norm_D, cfg)
    if layer.token is not None:
        gate_XO = _gelu(matmul(x_XD, layer.token.gate_DO)) * shared.token_LXO[place.layer]
        x_XD = x_XD + _norm(matmul(gate_XO, layer.token.out_OD), layer.token.norm_D, cfg)
    if layer.scalar_X is None:
        return x_XD
    return x_XD * jax.lax.stop_gradient(layer.scalar_X)  # a constant of the reference


def route(mixture: Mixture, x_XD: jax.Array, cfg: Config) -> tuple[jax.Array, jax.Array]:
    """The experts of every row, int32 [X, k], and their float32 weights."""
    scale_D = mixture.router_scale_D * jnp.asarray(cfg.hidden_size**-0.5, x_XD.dtype)
    logits_XE = matmul(_norm(x_XD, None, cfg) * scale_D, mixture.router_DE)
    expert_XC, weight_XC = choose_experts(logits_XE, cfg.num_chosen, normalise=True)
    return expert_XC, weight_XC * mixture.expert_scale_E.astype(jnp.float32)[expert_XC]


def mix(
    mixture: Mixture, x_XD: jax.Array, expert_XC: jax.Array, weight_XC: jax.Array, cfg: Config
) -> jax.Array:
    """What the experts add to the MLP, between their norms."""
    h_XD = _norm(x_XD, mixture.before_norm_D, cfg)
    mixed_XD = mix_experts(mixture.experts, h_XD, expert_XC, weight_XC, _gelu)
    return _norm(mixed_XD, mixture.after_norm_D, cfg)


def leave(target: TargetParams, x_XD: jax.Array, cfg: Config) -> jax.Array:
    """The final norm; see :class:`Blocks`."""
    return _norm(x_XD, target.norm_D, cfg)


_BLOCKS = Blocks(sections, _enter, project, finish, leave)


encode = functools.partial(read_sequences, _BLOCKS)
extend = functools.partial(read_rows, _BLOCKS)
beside = functools.partial(read_beside, _BLOCKS)
