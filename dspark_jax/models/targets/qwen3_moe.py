"""Qwen3-MoE: Qwen3's attention, and a mixture of experts in most layers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from flax import struct

from dspark_jax.axes import declare as declare_param
from dspark_jax.config import TargetConfig
from dspark_jax.models.cache import Room
from dspark_jax.models.layers import (
    Layer,
    declare_layers,
    finish_layer,
    matmul,
)
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
from dspark_jax.models.rope import Table
from dspark_jax.models.stacks import Place, Sections, Stack, make_sections, map_stacks
from dspark_jax.models.targets.config_json import block_config, count_field, field, window_of
from dspark_jax.models.targets.family import TargetParams
from dspark_jax.models.targets.llama import declare_model, enter, project
from dspark_jax.models.targets.llama import draft_fields as draft_fields
from dspark_jax.models.targets.llama import leave as leave


@dataclass(frozen=True)
class Config(TargetConfig):
    """Sizes of a target, and its experts.

    Attributes:
        num_experts: E of a sparse layer.
        num_chosen: experts of a token.
        expert_size: M of an expert.
        normalise: whether the weights of a token's experts add up to 1.
        dense_layers: the layers that have an MLP instead.
    """

    num_experts: int = 1
    num_chosen: int = 1
    expert_size: int = 1
    normalise: bool = False
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_chosen <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_chosen} must lie in 1..{self.num_experts}, the "
                "number of experts"
            )


@dataclass(frozen=True)
class Kind:
    """What the layers of a stack have in common."""

    attention: Attention
    sparse: bool
    rotary: bool = True


@struct.dataclass
class Mixture:
    """Weights of a sparse layer's MLP."""

    router_DE: Any
    experts: Experts


def config(hf: Mapping[str, Any]) -> Config:
    """The configuration out of a ``config.json``.

    Raises:
        ValueError: a field is missing or wrong, or asks for something that is not supported.
    """
    sizes, bias = block_config(hf), field(hf, "attention_bias", bool, False)
    layers, step = sizes["num_layers"], field(hf, "decoder_sparse_step", int, 1)
    dense = hf.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ValueError(f"mlp_only_layers {dense!r} must be a list of integers")
    window = window_of(hf) if field(hf, "use_sliding_window", bool, False) else 0
    return Config(
        **sizes,
        windows=(window,) * layers if window else (),
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        tied=field(hf, "tie_word_embeddings", bool, False),
        num_experts=field(hf, "num_experts", int, count_field(hf, "num_local_experts", 128)),
        num_chosen=field(hf, "num_experts_per_tok", int, 8),
        expert_size=field(hf, "moe_intermediate_size", int, 768),
        normalise=field(hf, "norm_topk_prob", bool, False),
        dense_layers=tuple(n for n in range(layers) if n in dense or (n + 1) % step),
    )


def architecture(cfg: Config) -> str:
    """The class of transformers that computes the same."""
    return "Qwen3MoeForCausalLM"


def sections(cfg: Config) -> Sections:
    """The layers by their kinds."""

    def kind(layer: int) -> Kind:
        attention = Attention(cfg.num_kv_heads, cfg.head_dim, cfg.window(layer))
        return Kind(attention, layer not in cfg.dense_layers)

    return make_sections(tuple(map(kind, range(cfg.num_layers))))


def declare(cfg: Config) -> TargetParams:
    """Declaration of every parameter under its Hugging Face name."""
    sizes = cfg.sizes | {"E": cfg.num_experts, "M": cfg.expert_size}
    prefix = "model.layers"

    def stack_of(stack: Stack) -> Layer:
        if not stack.kind.sparse:
            return declare_layers(cfg, prefix, stack.layers)
        name, layers = f"{prefix}.{{layer}}.mlp", stack.layers
        router = declare_param("LDE", sizes, f"{name}.gate.weight", out="E", layers=layers)
        experts = declare_experts(sizes, f"{name}.experts", layers)
        return declare_layers(cfg, prefix, layers, Mixture(router, experts))

    return declare_model(cfg, map_stacks(stack_of, sections(cfg)))


def declare_cache(cfg: Config, room: Room) -> Cache:
    """Declaration of what :func:`extend` keeps."""
    return declare_caches(sections(cfg), room)


def _finish(
    layer: Layer, x_XD: jax.Array, attended_XNH: jax.Array, place: Place, table: Table, cfg: Config
) -> jax.Array:
    if not place.kind.sparse:
        return finish_layer(layer, x_XD, attended_XNH, cfg)

    def mix(mixture: Mixture, h_XD: jax.Array) -> jax.Array:
        logits_XE = matmul(h_XD, mixture.router_DE)
        chosen = choose_experts(logits_XE, cfg.num_chosen, normalise=cfg.normalise)
        return mix_experts(mixture.experts, h_XD, *chosen, jax.nn.silu)

    return finish_layer(layer, x_XD, attended_XNH, cfg, mix)


_BLOCKS = Blocks(sections, enter, project, _finish, leave)


encode = functools.partial(read_sequences, _BLOCKS)
extend = functools.partial(read_rows, _BLOCKS)
beside = functools.partial(read_beside, _BLOCKS)
