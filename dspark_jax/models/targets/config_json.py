"""Decoder blocks in the words of a Hugging Face ``config.json``, of this or an older transformers.

Targets are read from such files, and drafters, whose blocks are those of Qwen3, are written too.
What is not supported must not be ignored in silence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dspark_jax.config import RopeConfig, TransformerConfig

BLOCK_TYPE = "qwen3"  # the ``model_type`` of drafters' blocks


def field(config: Mapping[str, Any], key: str, kind: Any, default: Any = None) -> Any:
    """A value of an untrusted configuration, checked for its type.

    Args:
        config: the configuration.
        key: its key.
        kind: ``int`` and ``float`` must be positive and finite; an integer will do for a float.
        default: for a key that is missing or null; None makes the key required.

    Raises:
        ValueError: the key is missing or its value is of another kind.
    """
    value: Any = config.get(key)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"{key} is missing")
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf
    if type(value) is not kind:  # isinstance would take True for an integer
        raise ValueError(f"{key} is {value!r}: it must be of type {kind.__name__}")
    if kind in (int, float) and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{key} is {value!r}: it must be positive")
    return value


def count_field(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An integer field that may be 0.

    Raises:
        ValueError: the key is missing without a default, or its value is not such an integer.
    """
    return 0 if config.get(key, default) == 0 else int(field(config, key, int, default))


def block_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``TransformerConfig`` that all families spell alike.

    Raises:
        ValueError: a field is missing or wrong, or the blocks are of a kind that is not supported.
    """
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ValueError(f"hidden_act {activation!r} is not supported: only silu")
    for key in ("mlp_bias", "quantization_config"):
        if config.get(key):
            raise ValueError(f"{key} is set: such models are not supported")
    width, heads = field(config, "hidden_size", int), field(config, "num_attention_heads", int)
    layers, kinds = field(config, "num_hidden_layers", int), config.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise ValueError(f"layer_types {kinds}: only full attention in every layer is supported")
    windows = not kinds and config.get("use_sliding_window") and config.get("sliding_window")
    if windows and field(config, "max_window_layers", int, 28) < layers:
        raise ValueError("use_sliding_window is set: only full attention is supported")
    head_dim = 128 if config.get("model_type") == "qwen3" else max(width // heads, 1)
    return {
        "vocab_size": field(config, "vocab_size", int),
        "hidden_size": width,
        "intermediate_size": field(config, "intermediate_size", int),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": field(config, "num_key_value_heads", int, heads),
        "head_dim": field(config, "head_dim", int, head_dim),
        "rms_norm_eps": field(config, "rms_norm_eps", float, 1e-6),
        "rope": rope_config(config),
        "max_positions": field(config, "max_position_embeddings", int),
    }


def rope_config(config: Mapping[str, Any]) -> RopeConfig:
    """RoPE out of ``rope_parameters``, or of the older ``rope_theta`` and ``rope_scaling``.

    Raises:
        ValueError: a kind of RoPE that is not supported.
    """
    rope = field(config, "rope_parameters", dict, config.get("rope_scaling") or {})
    theta = field(rope, "rope_theta", float, config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError("rope_parameters differ by layer: not supported")
    for options in (rope, config):
        if options.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ValueError("partial_rotary_factor is not 1: not supported")
    if kind == "default":
        return RopeConfig(theta)
    if kind != "llama3":
        raise ValueError(f"rope_type {kind!r} is not supported: only default and llama3")
    low, high = field(rope, "low_freq_factor", float), field(rope, "high_freq_factor", float)
    if low >= high:
        raise ValueError(f"low_freq_factor {low} must be below high_freq_factor {high}")
    positions = field(rope, "original_max_position_embeddings", int)
    return RopeConfig(theta, field(rope, "factor", float), low, high, positions)


def rope_config_dict(rope: RopeConfig) -> dict[str, Any]:
    """RoPE as ``rope_parameters``; inverse of :func:`rope_config`."""
    if rope.factor == 1.0:
        return {"rope_theta": rope.theta, "rope_type": "default"}
    return {
        "rope_theta": rope.theta,
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_positions,
    }


def block_config_dict(cfg: TransformerConfig) -> dict[str, Any]:
    """The blocks in the words of a Qwen3 ``config.json``; :func:`block_config` reads them back."""
    return {
        "attention_bias": cfg.qkv_bias,
        "attention_dropout": 0.0,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "layer_types": ["full_attention"] * cfg.num_layers,
        "max_position_embeddings": cfg.max_positions,
        "model_type": BLOCK_TYPE,
        "num_attention_heads": cfg.num_heads,
        "num_hidden_layers": cfg.num_layers,
        "num_key_value_heads": cfg.num_kv_heads,
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_parameters": rope_config_dict(cfg.rope),
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": cfg.vocab_size,
    }
