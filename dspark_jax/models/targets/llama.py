"""Llama and its kin: Mistral, Qwen2, Qwen3, SmolLM3.

A layer is the norm, attention with or without biases, norms of q and k, window and RoPE, and a
gated MLP; which of the kin a model is shows in these alone.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from dspark_jax import axes
from dspark_jax.config import RopeConfig, TargetConfig, TransformerConfig
from dspark_jax.models.cache import Room
from dspark_jax.models.draft_blocks import DraftBlocks
from dspark_jax.models.layers import (
    Layer,
    declare_layers,
    declare_mlp,
    finish_kv,
    finish_layer,
    project_qkv,
    rms_norm,
)
from dspark_jax.models.reading import (
    Attention,
    Blocks,
    Cache,
    declare_caches,
    read_beside,
    read_rows,
    read_sequences,
)
from dspark_jax.models.rope import Table, rope_table
from dspark_jax.models.stacks import Place, Sections, make_sections, map_stacks
from dspark_jax.models.targets.config_json import (
    block_config,
    block_config_dict,
    count_field,
    field,
    layer_windows,
    window_of,
)
from dspark_jax.models.targets.family import TargetParams
from dspark_jax.models.vocab import Vocab, embed, embedding_axes


@dataclass(frozen=True)
class Config(TargetConfig):
    """Sizes of a target, and what its layers have.

    Attributes:
        mlp_bias: whether the MLP has biases.
        rotary: of every layer, whether its queries and keys are rotated; empty: all are.
    """

    mlp_bias: bool = False
    rotary: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Kind:
    """What the layers of a stack have in common."""

    attention: Attention
    rotary: bool


def config(hf: Mapping[str, Any]) -> Config:
    """The configuration out of a ``config.json`` of Llama, Mistral, Qwen2, Qwen3 or SmolLM3.

    Raises:
        ValueError: a field is missing or wrong, or asks for something that is not supported.
    """
    kind, bias = hf["model_type"], field(hf, "attention_bias", bool, False)
    no_rope = kind == "smollm3"
    theta = 2_000_000.0 if no_rope else 10_000.0
    sizes = block_config(hf, theta=theta, head_dim=128 if kind == "qwen3" else None)
    layers = sizes["num_layers"]
    rotary = _rotary(hf, layers) if no_rope else (True,) * layers
    return Config(
        **sizes,
        windows=_windows(hf, kind, rotary),
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2" or (bias and kind != "mistral"),
        out_bias=bias and kind not in ("qwen2", "mistral"),
        mlp_bias=kind in ("llama", "smollm3") and field(hf, "mlp_bias", bool, False),
        rotary=() if all(rotary) else rotary,
        tied=field(hf, "tie_word_embeddings", bool, no_rope),
    )


def _rotary(hf: Mapping[str, Any], layers: int) -> tuple[bool, ...]:
    """Which layers of SmolLM3 rotate."""
    listed = hf.get("no_rope_layers")
    if listed is None:
        interval = field(hf, "no_rope_layer_interval", int, 4)
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    if (
        not isinstance(listed, list)
        or len(listed) != layers
        or not all(n in (0, 1) for n in listed)
    ):
        raise ValueError(
            f"no_rope_layers {listed!r} must list 1 (RoPE) or 0 for each of the {layers} layers"
        )
    return tuple(bool(rotates) for rotates in listed)


def _windows(hf: Mapping[str, Any], kind: str, rotary: Sequence[bool]) -> tuple[int, ...]:
    """The window of every layer; empty where none has one."""
    layers = len(rotary)
    if kind == "mistral":  # whose layers are all of one kind
        return (window_of(hf),) * layers if window_of(hf) else ()
    used = kind != "llama" and field(hf, "use_sliding_window", bool, False)
    first = count_field(hf, "max_window_layers", 28)
    slides = [not r if kind == "smollm3" else i >= first for i, r in enumerate(rotary)]
    return layer_windows(hf, window_of(hf) if used else 0, slides)


def architecture(cfg: Config) -> str:
    """The class of transformers that computes the same."""
    if cfg.qk_norm:
        return "Qwen3ForCausalLM"
    if cfg.rotary:
        return "SmolLM3ForCausalLM"
    if cfg.qkv_bias and not cfg.out_bias:
        return "Qwen2ForCausalLM"
    return "MistralForCausalLM" if cfg.windows else "LlamaForCausalLM"


def draft_fields(cfg: TargetConfig) -> dict[str, Any]:
    """What a drafter takes over from its target: the base of RoPE."""
    return {"rope": RopeConfig(theta=cfg.rope.theta)}


def layer_sections(cfg: TransformerConfig, rotary: Sequence[bool] = ()) -> Sections:
    """Layers of these sizes by their kinds."""

    def kind(layer: int) -> Kind:
        window = cfg.window(layer)
        return Kind(
            Attention(cfg.num_kv_heads, cfg.head_dim, window), rotary[layer] if rotary else True
        )

    return make_sections(tuple(kind(layer) for layer in range(cfg.num_layers)))


def declare(cfg: Config) -> TargetParams:
    """Declaration of every parameter under its Hugging Face name."""

    def stack_of(stack: Any) -> Layer:
        mlp = declare_mlp(cfg.sizes, "model.layers", stack.layers, bias=cfg.mlp_bias)
        return declare_layers(cfg, "model.layers", stack.layers, mlp)

    return declare_model(cfg, map_stacks(stack_of, sections(cfg)))


def declare_model(cfg: TargetConfig, layers: Any) -> TargetParams:
    """Declaration of a target around the declaration of its layers."""

    def param(letters: str, name: str, init: str) -> axes.Param:
        return axes.declare(letters, cfg.sizes, name, init=init)

    head = None if cfg.tied else param("VD", "lm_head.weight", "embed")
    return TargetParams(
        vocab=Vocab(param(embedding_axes(cfg.tied), "model.embed_tokens.weight", "embed"), head),
        layers=layers,
        norm_D=param("D", "model.norm.weight", "ones"),
    )


def declare_cache(cfg: Config, room: Room) -> Cache:
    """Declaration of what :func:`extend` keeps."""
    return declare_caches(sections(cfg), room)


def sections(cfg: Config) -> Sections:
    """The layers by their kinds."""
    return layer_sections(cfg, cfg.rotary)


def enter(
    target: TargetParams, token_X: jax.Array, position_X: jax.Array, cfg: Config
) -> tuple[jax.Array, Table]:
    """The embedding, and the table of RoPE; see :class:`Blocks`."""
    return embed(target.vocab, token_X), rope_table(position_X, cfg.rope, cfg.head_dim)


def project(
    layer: Any, x_XD: jax.Array, place: Place, table: Table, cfg: TransformerConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values; see :class:`Blocks`."""
    h_XD = rms_norm(x_XD, layer.input_norm_D, cfg.rms_norm_eps)
    return _heads(layer, h_XD, place, table, cfg)


def _heads(
    layer: Any, h_XD: jax.Array, place: Place, table: Table, cfg: TransformerConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return project_qkv(layer, h_XD, table if place.kind.rotary else None, cfg)


def _finish(
    layer: Layer, x_XD: jax.Array, attended_XNH: jax.Array, place: Place, table: Table, cfg: Any
) -> jax.Array:
    return finish_layer(layer, x_XD, attended_XNH, cfg)


def leave(target: TargetParams, x_XD: jax.Array, cfg: TargetConfig) -> jax.Array:
    """The final norm; see :class:`Blocks`."""
    return rms_norm(x_XD, target.norm_D, cfg.rms_norm_eps)


_BLOCKS = Blocks(sections, enter, project, _finish, leave)


def _inject(
    layer: Layer,
    k_XKH: jax.Array,
    v_XKH: jax.Array,
    place: Place,
    table: Table,
    cfg: TransformerConfig,
) -> tuple[jax.Array, jax.Array]:
    return finish_kv(layer, k_XKH, v_XKH, table, cfg)


def read_drafter(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``DrafterConfig`` that describe a drafter's layers, windows included.

    Raises:
        ValueError: a field is missing or wrong, or asks for something that is not supported.
    """
    sizes = block_config(config, head_dim=128)
    listed = "sliding_attention" in field(config, "layer_types", list, [])
    used = listed or field(config, "use_sliding_window", bool, False)
    first = count_field(config, "max_window_layers", 28)
    slides = [layer >= first for layer in range(sizes["num_layers"])]
    bias = field(config, "attention_bias", bool, False)
    windows = layer_windows(config, window_of(config) if used else 0, slides)
    return {**sizes, "windows": windows, "qkv_bias": bias, "out_bias": bias}


DRAFT_BLOCKS = DraftBlocks(
    architecture="Qwen3DSparkModel",
    read=read_drafter,
    write=block_config_dict,
    sections=layer_sections,
    declare=lambda cfg, stack: declare_layers(cfg, "layers", stack.layers),
    shared=lambda position_X, cfg: rope_table(position_X, cfg.rope, cfg.head_dim),
    project=project,
    heads=_heads,
    inject=_inject,
    finish=_finish,
)


encode = functools.partial(read_sequences, _BLOCKS)
extend = functools.partial(read_rows, _BLOCKS)
beside = functools.partial(read_beside, _BLOCKS)
