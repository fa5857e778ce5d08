"""A layer of DeepSeek-V4, but for which keys its rows see: mixing, attention, experts.

Attention has one key for all heads, which is the value too: what comes out of it is rotated back by
the row's own position. Heads are projected in groups. A sink takes part in the softmax, without a
value. The function that attends is an argument: whole sequences, decoding and drafters differ in it
alone.

Source: DeepSeek-V4 (2026), sections 2.1 to 2.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.axes import Param
from dspark_jax.axes import declare as declare_param
from dspark_jax.models import hyper_connections as streams
from dspark_jax.models.hyper_connections import Mixing
from dspark_jax.models.layers import Mlp, flat, gated_mlp, grouped, matmul, project, rms_norm
from dspark_jax.models.moe import Experts, declare_experts, mix_experts
from dspark_jax.models.reading import Attention
from dspark_jax.models.rope import Table, rotate_pairs
from dspark_jax.models.targets.deepseek_v4_config import Config


@dataclass(frozen=True)
class Kind:
    """What the layers of a stack have in common.

    Attributes:
        attention: of the uncompressed keys.
        ratio: positions of a compressed entry; 0 for none.
        sparse: whether an indexer chooses among them.
        hashed: whether the token alone says which experts.
    """

    attention: Attention
    ratio: int = 0
    sparse: bool = False
    hashed: bool = False


@struct.dataclass
class Heads:
    """Weights of attention.

    Attributes:
        query_a_DI: of the queries, into their latent.
        query_norm_I: of the latent.
        query_b_INH: of the queries, out of it.
        key_DH: of the one key.
        key_norm_H: likewise.
        sink_N: float32.
        out_a_KXHO: of K groups of X heads each.
        out_b_KOD: likewise.
    """

    query_a_DI: Any
    query_norm_I: Any
    query_b_INH: Any
    key_DH: Any
    key_norm_H: Any
    sink_N: Any
    out_a_KXHO: Any
    out_b_KOD: Any


@struct.dataclass
class Compressor:
    """Weights that make an entry of several positions, float32 but for the norm; O is the width of
    an entry, or twice that where windows overlap.

    Attributes:
        value_DO: what is summed.
        weight_DO: its weights before their softmax.
        bias_XO: added to the weights, by the place in the window.
        norm_H: of the entry.
    """

    value_DO: Any
    weight_DO: Any
    bias_XO: Any
    norm_H: Any


@struct.dataclass
class Indexer:
    """Weights that choose entries.

    Attributes:
        query_IXH: X heads, of the queries' latent.
        head_DX: float32, the weight of each head.
        compressor: of its keys.
    """

    query_IXH: Any
    head_DX: Any
    compressor: Compressor


@struct.dataclass
class Router:
    """Weights that choose experts, float32.

    Attributes:
        gate_DE: of the scores.
        bias_E: added to them for the choice alone; None where it is by table.
        table_ZX: int32 experts of every token; None where it is by score.
    """

    gate_DE: Any
    bias_E: Any = None
    table_ZX: Any = None


@struct.dataclass
class Layer:
    """Weights of one layer, or of several stacked on a leading L; missing parts are None."""

    attention_mixing: Mixing
    attention_norm_D: Any
    heads: Heads
    compressor: Any
    indexer: Any
    mlp_mixing: Mixing
    mlp_norm_D: Any
    router: Router
    experts: Experts
    shared: Mlp


@struct.dataclass
class Inputs:
    """What attention is given of some rows: normed inputs, the queries' latent, queries and the
    key, both rotated."""

    u_XD: jax.Array
    latent_XI: jax.Array
    q_XNH: jax.Array
    key_XH: jax.Array


# -> what the rows attend to [X, N, H], and anything else.
Attend = Callable[[Inputs], tuple[jax.Array, Any]]


def declare_layers(cfg: Config, kind: Kind, layers: range, prefix: str = "layers") -> Layer:
    """Declaration of layers of one kind under the names ``prefix.{layer}`` of released files."""
    sizes = cfg.sizes | {"X": cfg.num_heads // cfg.output_groups}

    def param(
        letters: str, name: str, out: str = "", init: str = "normal", dtype: Any = None, **own: int
    ) -> Param:
        name = f"{prefix}.{{layer}}.{name}"
        options: Any = {"out": out, "init": init, "layers": layers, "dtype": dtype}
        return declare_param("L" + letters, sizes | own, name, **options)

    def compressor(name: str, width: int) -> Compressor:
        wide: Any = {"O": (2 if kind.sparse else 1) * width, "X": kind.ratio, "H": width}
        return Compressor(
            param("DO", f"{name}.wkv.weight", "O", dtype=jnp.float32, **wide),
            param("DO", f"{name}.wgate.weight", "O", dtype=jnp.float32, **wide),
            param("XO", f"{name}.ape", init="zeros", dtype=jnp.float32, **wide),
            param("H", f"{name}.norm.weight", init="ones", **wide),
        )

    def indexer() -> Indexer:
        name = "attn.indexer"
        own: Any = {"X": cfg.index_heads, "H": cfg.index_dim}
        return Indexer(
            param("IXH", f"{name}.wq_b.weight", "XH", **own),
            param("DX", f"{name}.weights_proj.weight", "X", dtype=jnp.float32, **own),
            compressor(f"{name}.compressor", cfg.index_dim),
        )

    def router() -> Router:
        gate = param("DE", "ffn.gate.weight", "E", dtype=jnp.float32)
        if not kind.hashed:
            return Router(gate, bias_E=param("E", "ffn.gate.bias", "", "zeros", jnp.float32))
        own: Any = {"Z": cfg.vocab_size, "X": cfg.num_chosen}
        table = param("ZX", "ffn.gate.tid2eid", "", "choices", jnp.int32, **own)
        return Router(gate, table_ZX=table.below(cfg.num_experts))

    def shared() -> Mlp:
        name = "ffn.shared_experts"
        own: Any = {"M": cfg.num_shared * cfg.expert_size}
        return Mlp(
            param("DM", f"{name}.w1.weight", "M", **own),
            param("DM", f"{name}.w3.weight", "M", **own),
            param("MD", f"{name}.w2.weight", "D", **own),
        )

    return Layer(
        streams.declare_mixing(sizes, f"{prefix}.{{layer}}.hc_attn", layers),
        param("D", "attn_norm.weight", init="ones"),
        Heads(
            param("DI", "attn.wq_a.weight", "I"),
            param("I", "attn.q_norm.weight", init="ones"),
            param("INH", "attn.wq_b.weight", "NH"),
            param("DH", "attn.wkv.weight", "H"),
            param("H", "attn.kv_norm.weight", init="ones"),
            param("N", "attn.attn_sink", init="zeros", dtype=jnp.float32),
            param("KXHO", "attn.wo_a.weight", "KO"),
            param("KOD", "attn.wo_b.weight", "D"),
        ),
        compressor("attn.compressor", cfg.head_dim) if kind.ratio else None,
        indexer() if kind.sparse else None,
        streams.declare_mixing(sizes, f"{prefix}.{{layer}}.hc_ffn", layers),
        param("D", "ffn_norm.weight", init="ones"),
        router(),
        declare_experts(sizes, f"{prefix}.{{layer}}.ffn.experts", layers, ("w1", "w3", "w2")),
        shared(),
    )


def read_layer(
    layer: Layer,
    x_XJD: jax.Array,
    token_X: Any,
    table: Table,
    cfg: Config,
    attend: Attend,
) -> tuple[jax.Array, Any]:
    """The residual streams after a layer, and what ``attend`` gave besides.

    Args:
        layer: weights.
        x_XJD: the streams before it.
        token_X: int32 ids of the rows, which hashed layers alone read; None where none is.
        table: RoPE of the layer's kind at the rows' positions.
        cfg: sizes.
        attend: which keys the rows see.
    """
    mix = streams.mix(layer.attention_mixing, x_XJD, cfg.streams)
    u_XD = rms_norm(streams.join(mix, x_XJD), layer.attention_norm_D, cfg.rms_norm_eps)
    key_XH = keys(layer.heads, u_XD, table, cfg)
    out_XNH, more = attend(Inputs(u_XD, *queries(layer.heads, u_XD, table, cfg), key_XH))
    x_XJD = streams.part(mix, x_XJD, output(layer.heads, out_XNH, table))
    mix = streams.mix(layer.mlp_mixing, x_XJD, cfg.streams)
    u_XD = rms_norm(streams.join(mix, x_XJD), layer.mlp_norm_D, cfg.rms_norm_eps)
    return streams.part(mix, x_XJD, experts(layer, u_XD, token_X, cfg)), more


def queries(
    heads: Heads, u_XD: jax.Array, table: Table, cfg: Config
) -> tuple[jax.Array, jax.Array]:
    """The queries' latent [X, I], and the queries [X, N, H]: normalised, rotated."""
    latent_XI = rms_norm(matmul(u_XD, heads.query_a_DI), heads.query_norm_I, cfg.rms_norm_eps)
    q_XNH = project(latent_XI, heads.query_b_INH)
    one_H = jnp.ones((), q_XNH.dtype)
    return latent_XI, rotate_pairs(rms_norm(q_XNH, one_H, cfg.rms_norm_eps), table)


def keys(heads: Heads, u_XD: jax.Array, table: Table, cfg: Config) -> jax.Array:
    """The key of every row [X, H], rotated."""
    key_XH = rms_norm(matmul(u_XD, heads.key_DH), heads.key_norm_H, cfg.rms_norm_eps)
    return rotate_pairs(key_XH[..., None, :], table)[..., 0, :]


def attend_to(
    q_PCNH: jax.Array,
    seen: Sequence[tuple[jax.Array, jax.Array]],
    sink_N: jax.Array,
) -> jax.Array:
    """Attention to keys that are their own values, with a sink.

    Args:
        q_PCNH: queries of P groups of C rows.
        seen: keys [P, S, H] of every group, or [P, C, S, H] of every row, and which of them a row
            sees, bool [P, C, S]; several such sets are one, and a row may see nothing of a set.
            What nobody sees may hold anything.
        sink_N: float32 scores of what has no value.

    Returns:
        [P, C, N, H] in the dtype of the queries; softmax in float32.
    """
    scores = []
    for key_XSH, visible_PCS in seen:
        axes = "psh" if key_XSH.ndim == 3 else "pcsh"
        score_PCNS = jnp.einsum(
            f"pcnh,{axes}->pcns", q_PCNH, key_XSH, preferred_element_type=jnp.float32
        )
        score_PCNS *= q_PCNH.shape[-1] ** -0.5
        scores.append(jnp.where(visible_PCS[:, :, None], score_PCNS, -jnp.inf))
    sink_N1 = sink_N[:, None]
    highest = sink_N1
    for score_PCNS in scores:
        highest = jnp.maximum(highest, score_PCNS.max(-1, keepdims=True))
    weights = [jnp.exp(score_PCNS - highest) for score_PCNS in scores]
    total = jnp.exp(sink_N1 - highest) + sum(w.sum(-1, keepdims=True) for w in weights)
    out = jnp.zeros(q_PCNH.shape, jnp.float32)
    for weight_PCNS, (key_XSH, _) in zip(weights, seen, strict=True):
        axes = "psh" if key_XSH.ndim == 3 else "pcsh"
        # A weight of 0 would not do away with a value that is not a number.
        value_XSH = jnp.where(jnp.isfinite(key_XSH), key_XSH, 0)
        weight_PCNS = (weight_PCNS / total).astype(value_XSH.dtype)
        out += jnp.einsum(
            f"pcns,{axes}->pcnh", weight_PCNS, value_XSH, preferred_element_type=jnp.float32
        )
    return out.astype(q_PCNH.dtype)


def output(heads: Heads, out_XNH: jax.Array, table: Table) -> jax.Array:
    """The output of attention [X, D]: rotated back, then by groups of heads."""
    groups, members, width, rank = heads.out_a_KXHO.shape
    turned_XNH = rotate_pairs(out_XNH, table, back=True)
    grouped_XKI = turned_XNH.reshape(*out_XNH.shape[:-2], groups, members * width)
    out_XKO = grouped(grouped_XKI, heads.out_a_KXHO)
    flat_XI = out_XKO.reshape(*out_XNH.shape[:-2], groups * rank)
    return matmul(flat_XI, flat(heads.out_b_KOD, groups * rank))


def route(
    router: Router, u_XD: jax.Array, token_X: Any, cfg: Config
) -> tuple[jax.Array, jax.Array]:
    """The experts of every row, int32 [X, k], and their float32 weights."""
    score_XE = jnp.matmul(u_XD.astype(jnp.float32), router.gate_DE, precision="highest")
    score_XE = jnp.sqrt(jax.nn.softplus(score_XE))
    if router.table_ZX is not None:
        expert_XC = jnp.take(router.table_ZX, token_X, axis=0, mode="clip")
    else:
        _, expert_XC = jax.lax.top_k(score_XE + router.bias_E, cfg.num_chosen)
    weight_XC = jnp.take_along_axis(score_XE, expert_XC, axis=-1)
    weight_XC = cfg.route_scale * weight_XC / weight_XC.sum(-1, keepdims=True)
    return expert_XC.astype(jnp.int32), weight_XC


def experts(layer: Layer, u_XD: jax.Array, token_X: Any, cfg: Config) -> jax.Array:
    """The output of a layer's experts [X, D], the shared one among them."""
    chosen = route(layer.router, u_XD, token_X, cfg)
    mixed_XD = mix_experts(layer.experts, u_XD, *chosen, jax.nn.silu, cfg.limit)
    return mixed_XD + gated_mlp(layer.shared, u_XD, jax.nn.silu, cfg.limit)
