"""Drafters whose blocks are layers of Gemma 4, all of them without a window."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from dspark_jax.config import DrafterConfig, TransformerConfig
from dspark_jax.models.draft_blocks import DraftBlocks
from dspark_jax.models.targets import gemma
from dspark_jax.models.targets.config_json import rope_config_dict, size_config
from dspark_jax.models.targets.gemma_config import (
    DRAFT_LAYERS,
    FULL,
    WINDOWED,
    Config,
    full_heads,
    full_rope,
    soft_cap,
)


@functools.cache
def _layers_of(cfg: DrafterConfig) -> Config:
    """A drafter's layers: those of Gemma 4 without a window."""
    names = [f.name for f in dataclasses.fields(TransformerConfig)]
    return Config(
        **{name: getattr(cfg, name) for name in names},
        value_is_key=cfg.value_is_key,
        local_rope=cfg.rope,
        local_heads=cfg.num_kv_heads,
        local_head_dim=cfg.head_dim,
    )


def read_drafter(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``DrafterConfig`` that describe a drafter's layers, whose ``layer_types`` mean
    nothing: all are without a window.

    Raises:
        ValueError: a field is missing or wrong, or asks for something that is not supported.
    """
    for key in ("enable_moe_block", "hidden_size_per_layer_input", "num_kv_shared_layers"):
        if hf.get(key):
            raise ValueError(f"{key} is {hf[key]!r}: drafters have no such layers")
    sizes = size_config(hf, head_dim=256)
    heads, width, value_is_key = full_heads(hf, [FULL] * sizes["num_layers"])
    return {
        **sizes,
        "num_kv_heads": heads,
        "head_dim": width,
        "rope": full_rope(hf),
        "value_is_key": value_is_key,
        "embed_scale": sizes["hidden_size"] ** 0.5,
        "softcap": soft_cap(hf, "final_logit_softcapping", None),
        "blocks": DRAFT_LAYERS,
    }


def write_drafter(cfg: DrafterConfig) -> dict[str, Any]:
    """Inverse of :func:`read_drafter`."""
    rope = rope_config_dict(cfg.rope)
    return {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_k_eq_v": cfg.value_is_key,
        "enable_moe_block": False,
        "final_logit_softcapping": cfg.softcap,
        "global_head_dim": cfg.head_dim,
        "head_dim": cfg.head_dim,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": cfg.hidden_size,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": cfg.intermediate_size,
        "layer_types": [FULL] * cfg.num_layers,
        "max_position_embeddings": cfg.max_positions,
        "model_type": cfg.blocks,
        "num_attention_heads": cfg.num_heads,
        "num_global_key_value_heads": cfg.num_kv_heads,
        "num_hidden_layers": cfg.num_layers,
        "num_key_value_heads": cfg.num_kv_heads,
        "num_kv_shared_layers": 0,
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_theta": cfg.rope.theta,
        "rope_parameters": {FULL: rope, WINDOWED: {"rope_theta": 1e4, "rope_type": "default"}},
        "tie_word_embeddings": False,
        "vocab_size": cfg.vocab_size,
    }


DRAFT_BLOCKS = DraftBlocks(
    architecture="Gemma4DSparkModel",
    read=read_drafter,
    write=write_drafter,
    sections=lambda cfg: gemma.sections(_layers_of(cfg)),
    declare=lambda cfg, stack: gemma.declare_stack(_layers_of(cfg), stack, "layers"),
    shared=lambda position_X, cfg: gemma.tables(position_X, _layers_of(cfg)),
    project=lambda layer, x_XD, place, shared, cfg: gemma.project(
        layer, x_XD, place, shared, _layers_of(cfg)
    ),
    heads=lambda layer, h_XI, place, shared, cfg: gemma.heads(
        layer, h_XI, place, shared, _layers_of(cfg)
    ),
    inject=lambda layer, k_XKH, v_XKH, place, shared, cfg: gemma.finish_kv(
        layer, k_XKH, v_XKH, shared.full, _layers_of(cfg)
    ),
    finish=lambda layer, x_XD, attended_XNH, place, shared, cfg: gemma.finish(
        layer, x_XD, attended_XNH, place, shared, _layers_of(cfg)
    ),
)
