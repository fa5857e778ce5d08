"""Hugging Face directories and hub ids: checkpoints, and Llama, Qwen2 and Qwen3 targets.

The tensors follow from the declaration (``tensors.py``). What is spelled out here is what names
alone cannot say: which ``config.json``, of this or an older transformers, means which
:class:`TargetConfig`, and what in it is not supported and must not be ignored in silence.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save

from dspark_jax.checkpoints.tensors import (
    WEIGHTS_FILE,
    LoadError,
    Tensors,
    read_json,
    read_params,
    read_tensors,
)
from dspark_jax.config import RopeConfig, TargetConfig, TransformerConfig
from dspark_jax.models.targets.llama import TargetParams, declare_target

ConfigT = TypeVar("ConfigT")

FAMILIES = ("llama", "qwen2", "qwen3")
CONFIG_FILE = "config.json"
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "vocab*", "merges.txt"]
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def field(config: Mapping[str, Any], key: str, kind: Any, default: Any = None) -> Any:
    """A value of an untrusted configuration, checked for its type.

    Args:
        config: the configuration.
        key: its key.
        kind: ``int`` and ``float`` must be positive and finite; an integer will do for a float.
        default: for a key that is missing or null; None makes the key required.

    Raises:
        LoadError: the key is missing or its value is of another kind.
    """
    value: Any = config.get(key)
    value = default if value is None else value
    if value is None:
        raise LoadError(f"{key} is missing")
    if kind is float and type(value) is int:
        value = float(value) if abs(value) < 1e300 else math.inf
    if type(value) is not kind:  # isinstance would take True for an integer
        raise LoadError(f"{key} is {value!r}: it must be of type {kind.__name__}")
    if kind in (int, float) and not (math.isfinite(value) and value > 0):
        raise LoadError(f"{key} is {value!r}: it must be positive")
    return value


def count_field(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An integer field that may be 0.

    Raises:
        LoadError: the key is missing without a default, or its value is not such an integer.
    """
    return 0 if config.get(key, default) == 0 else int(field(config, key, int, default))


def block_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``TransformerConfig`` that all families spell alike.

    Raises:
        LoadError: a field is missing or wrong, or the blocks are of a kind that is not supported.
    """
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise LoadError(f"hidden_act {activation!r} is not supported: only silu")
    for key in ("mlp_bias", "quantization_config"):
        if config.get(key):
            raise LoadError(f"{key} is set: such models are not supported")
    width, heads = field(config, "hidden_size", int), field(config, "num_attention_heads", int)
    layers, kinds = field(config, "num_hidden_layers", int), config.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise LoadError(f"layer_types {kinds}: only full attention in every layer is supported")
    windows = not kinds and config.get("use_sliding_window") and config.get("sliding_window")
    if windows and field(config, "max_window_layers", int, 28) < layers:
        raise LoadError("use_sliding_window is set: only full attention is supported")
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
        LoadError: a kind of RoPE that is not supported.
    """
    rope = field(config, "rope_parameters", dict, config.get("rope_scaling") or {})
    theta = field(rope, "rope_theta", float, config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if any(isinstance(value, dict) for value in rope.values()):
        raise LoadError("rope_parameters differ by layer: not supported")
    for options in (rope, config):
        if options.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise LoadError("partial_rotary_factor is not 1: not supported")
    if kind == "default":
        return RopeConfig(theta)
    if kind != "llama3":
        raise LoadError(f"rope_type {kind!r} is not supported: only default and llama3")
    low, high = field(rope, "low_freq_factor", float), field(rope, "high_freq_factor", float)
    if low >= high:
        raise LoadError(f"low_freq_factor {low} must be below high_freq_factor {high}")
    positions = field(rope, "original_max_position_embeddings", int)
    return RopeConfig(theta, field(rope, "factor", float), low, high, positions)


def block_config_dict(cfg: TransformerConfig) -> dict[str, Any]:
    """The blocks in the words of a Qwen3 ``config.json``; :func:`block_config` reads them back."""
    rope: dict[str, Any] = {"rope_theta": cfg.rope.theta, "rope_type": "default"}
    if cfg.rope.factor != 1.0:
        rope |= {
            "rope_type": "llama3",
            "factor": cfg.rope.factor,
            "low_freq_factor": cfg.rope.low_freq_factor,
            "high_freq_factor": cfg.rope.high_freq_factor,
            "original_max_position_embeddings": cfg.rope.original_max_positions,
        }
    return {
        "attention_bias": cfg.qkv_bias,
        "attention_dropout": 0.0,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "layer_types": ["full_attention"] * cfg.num_layers,
        "max_position_embeddings": cfg.max_positions,
        "model_type": "qwen3",
        "num_attention_heads": cfg.num_heads,
        "num_hidden_layers": cfg.num_layers,
        "num_key_value_heads": cfg.num_kv_heads,
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_parameters": rope,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": cfg.vocab_size,
    }


def target_config(config: Mapping[str, Any]) -> TargetConfig:
    """The configuration of a Llama, Qwen2 or Qwen3 target out of its ``config.json``.

    Raises:
        ValueError: a field is missing or wrong, or asks for something that is not supported.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise LoadError(
            f"model_type {family!r} is not supported: use a model of {', '.join(FAMILIES)}"
        )
    bias = field(config, "attention_bias", bool, False)
    return TargetConfig(
        **block_config(config),
        qk_norm=family == "qwen3",
        qkv_bias=bias or family == "qwen2",
        out_bias=bias and family != "qwen2",
        family=family,
        tied=field(config, "tie_word_embeddings", bool, False),
    )


def model_directory(source: str | Path) -> Path:
    """The directory of a model: ``source`` itself, or a snapshot of that hub id.

    Raises:
        LoadError: it is neither a directory nor a model that the hub gives out.
    """
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        raise LoadError(f"{source}: no such directory; name a model directory or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=HUB_FILES))
    except Exception as error:  # its own errors, the HTTP library's, the operating system's
        raise LoadError(
            f"{source}: no such directory, and the Hugging Face hub did not give it out "
            f"({type(error).__name__}): check the name, the network and your access"
        ) from None


def read_checkpoint(
    source: str | Path, parse: Callable[[Mapping[str, Any]], ConfigT]
) -> tuple[ConfigT, Tensors]:
    """Configuration and tensors of a directory or hub id.

    Args:
        source: the directory, or ``owner/name`` on the hub.
        parse: makes the configuration out of ``config.json``; ValueError where it cannot.

    Raises:
        LoadError: something is missing, broken or not supported; the message names the file.
    """
    directory = model_directory(source)
    path = directory / CONFIG_FILE
    config = read_json(path)
    try:
        cfg = parse(config)
    except ValueError as error:
        raise LoadError(f"{path}: {error}") from None
    return cfg, read_tensors(directory)


def write_checkpoint(
    directory: str | Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Write a configuration and tensors that :func:`read_checkpoint` reads.

    Each file is written beside its place and renamed into it, the configuration last: whoever
    reads meanwhile sees a whole checkpoint or a directory without one. Other files stay.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in (
        (WEIGHTS_FILE, save(dict(tensors), metadata={"format": "pt"})),
        (CONFIG_FILE, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()),
    ):
        beside = directory / f".{name}.{os.getpid()}"
        beside.write_bytes(content)
        beside.replace(directory / name)


def load_hf_target(
    source: str | Path, dtype: Any, mesh: Mesh | None = None
) -> tuple[TargetConfig, TargetParams]:
    """A target out of a Hugging Face directory or hub id.

    Args:
        source: the directory, or ``owner/name`` on the hub.
        dtype: dtype of the parameters.
        mesh: as in :func:`~dspark_jax.checkpoints.tensors.read_params`.

    Raises:
        LoadError: something is missing, broken or not supported.
    """
    cfg, tensors = read_checkpoint(source, target_config)
    if cfg.tied and HEAD in tensors.shapes and EMBEDDING in tensors.shapes:
        if not np.array_equal(tensors.read(HEAD), tensors.read(EMBEDDING)):
            raise LoadError(
                f"{tensors.origin}: tie_word_embeddings is true, but {HEAD} differs from "
                f"{EMBEDDING}"
            )
        tensors = tensors.without(HEAD)
    return cfg, read_params(declare_target(cfg), tensors, dtype, mesh)
