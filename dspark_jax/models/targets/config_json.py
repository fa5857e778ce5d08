"""Decoder blocks in the words of a Hugging Face ``config.json``, of this or an older transformers.

Targets are read from such files, and drafters, whose blocks are those of Qwen3, are written too.
What is not supported must not be ignored in silence.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from dspark_jax.config import RopeConfig, RopeKind, TransformerConfig

MAX_LAYERS = 4096
QUANTISATION = ("quantization_config", "compression_config", "quantization")
BLOCK_TYPE = "qwen3"  # the ``model_type`` of drafters' blocks
PLAIN_TYPE = "llama"  # that of blocks without norms of q and k


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


def block_config(
    config: Mapping[str, Any], *, theta: float = 10000.0, head_dim: int | None = None
) -> dict[str, Any]:
    """The fields of ``TransformerConfig`` that all families spell alike.

    Args:
        config: the configuration.
        theta: of RoPE, where the configuration names none.
        head_dim: likewise; None for the width over the heads.

    Raises:
        ValueError: a field is missing or wrong, or the blocks are of a kind that is not supported.
    """
    activation = config.get("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        raise ValueError(f"hidden_act {activation!r} is not supported: only silu")
    sizes = size_config(config, head_dim)
    rope = rope_config(config, theta=theta)
    if rope.kind == "longrope":
        # Beyond it transformers computes everything anew with other frequencies.
        sizes["max_positions"] = min(sizes["max_positions"], rope.original_max_positions)
        if len(rope.short_factors) != sizes["head_dim"] // 2:
            raise ValueError(
                f"short_factor has {len(rope.short_factors)} values: it must have half as many as "
                f"a head, {sizes['head_dim'] // 2}"
            )
    return {**sizes, "rope": rope}


def size_config(config: Mapping[str, Any], head_dim: int | None = None) -> dict[str, Any]:
    """The sizes among these fields; ``head_dim`` as in :func:`block_config`.

    Raises:
        ValueError: a size is missing or wrong, or the weights are quantised.
    """
    _check_unquantised(config)
    layers = field(config, "num_hidden_layers", int)
    if layers > MAX_LAYERS:  # each is planned for before a weight is missed
        raise ValueError(f"num_hidden_layers is {layers}: it must be at most {MAX_LAYERS}")
    width, heads = field(config, "hidden_size", int), field(config, "num_attention_heads", int)
    head_dim = max(width // heads, 1) if head_dim is None else head_dim
    return {
        "vocab_size": field(config, "vocab_size", int),
        "hidden_size": width,
        "intermediate_size": field(config, "intermediate_size", int),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": field(config, "num_key_value_heads", int, heads),
        "head_dim": field(config, "head_dim", int, head_dim),
        "rms_norm_eps": field(config, "rms_norm_eps", float, 1e-6),
        "max_positions": field(config, "max_position_embeddings", int),
    }


def _check_unquantised(config: Mapping[str, Any]) -> None:
    """Refuse quantised weights, by the name of their method."""
    for key in QUANTISATION:
        value = config.get(key)
        if value:
            method = value.get("quant_method") if isinstance(value, dict) else value
            named = "without a quant_method" if method is None else f"of the method {method!r}"
            raise ValueError(
                f"{key} is set, {named}: quantised weights are not supported, take the unquantised "
                "checkpoint, or a GGUF file of the model"
            )


def window_of(config: Mapping[str, Any]) -> int:
    """``sliding_window``; 0 for null, and 4096, where transformers has it, for a missing one.

    Raises:
        ValueError: it is neither of these nor a positive integer.
    """
    value = config.get("sliding_window", 4096)
    return 0 if value is None else int(field({"sliding_window": value}, "sliding_window", int))


def layer_windows(
    config: Mapping[str, Any], window: int, slides: Sequence[bool]
) -> tuple[int, ...]:
    """The window of every layer; empty where none has one.

    Args:
        config: the configuration, whose ``layer_types`` hold where they are listed.
        window: of the layers that have one; 0 where there can be none.
        slides: which layers these are where nothing is listed.

    Raises:
        ValueError: kinds of attention that cannot be.
    """
    types = config.get("layer_types")
    if types is None:
        return tuple(window if slide else 0 for slide in slides) if window and any(slides) else ()
    known = ["full_attention", "sliding_attention"] if window else ["full_attention"]
    listed = isinstance(types, list) and all(name in known for name in types)
    if not listed or len(types) != len(slides):
        raise ValueError(
            f"layer_types {types!r} must list {' or '.join(known)} for each of the {len(slides)} "
            f"layers, where sliding_window is {window or 'null or not used'}"
        )
    windows = tuple(window if name == "sliding_attention" else 0 for name in types)
    return windows if any(windows) else ()


def rope_config(
    config: Mapping[str, Any], layer_type: str = "", *, theta: float = 10000.0
) -> RopeConfig:
    """RoPE out of ``rope_parameters``, or of the older ``rope_theta`` and ``rope_scaling``.

    Where a file has both spellings, ``rope_scaling`` holds and ``rope_theta`` is looked for there
    and beside it, as transformers does.

    Args:
        config: the configuration.
        layer_type: whose parameters are meant where they differ by layer.
        theta: the base, where none is named.

    Raises:
        ValueError: a kind of RoPE that is not supported, or a value that makes none.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = field(config, key, dict, {})
    if any(isinstance(value, dict) for value in rope.values()):
        if not layer_type:
            raise ValueError(f"{key} differ by layer: not supported for this model_type")
        rope = field(rope, layer_type, dict, {})
    theta = field(rope, "rope_theta", float, field(config, "rope_theta", float, theta))
    kind: Any = rope.get("rope_type") or rope.get("type") or "default"
    kinds = typing.get_args(RopeKind)
    if kind not in kinds:
        raise ValueError(f"rope_type {kind!r} is not supported: only {', '.join(kinds)}")
    rotated = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    if rotated != 1 and kind != "proportional":
        raise ValueError(f"partial_rotary_factor is {rotated}: not supported with {kind!r} RoPE")
    longest = field(config, "max_position_embeddings", int)
    original = field(rope, "original_max_position_embeddings", int, longest)

    def ratio() -> float:
        """What the older files of YaRN and longrope leave to be divided."""
        return field(rope, "factor", float, longest / original)

    if kind == "linear":
        return RopeConfig(theta, kind, field(rope, "factor", float))
    if kind == "llama3":
        low, high = field(rope, "low_freq_factor", float), field(rope, "high_freq_factor", float)
        if low >= high:
            raise ValueError(f"low_freq_factor {low} must be below high_freq_factor {high}")
        return RopeConfig(theta, kind, field(rope, "factor", float), low, high, original)
    if kind == "yarn":
        return RopeConfig(
            theta,
            kind,
            factor := ratio(),
            original_max_positions=original,
            beta_fast=field(rope, "beta_fast", float, 32.0),
            beta_slow=field(rope, "beta_slow", float, 1.0),
            truncate=field(rope, "truncate", bool, True),
            attention_factor=field(rope, "attention_factor", float, _mscale(rope, factor)),
        )
    if kind == "longrope":
        factors = field(rope, "short_factor", list)
        if not all(type(f) in (int, float) and 0 < f < math.inf for f in factors):
            raise ValueError("short_factor must list positive numbers")
        factor = ratio()
        growth = 1 + math.log(factor) / math.log(original) if factor > 1 and original > 1 else 1.0
        return RopeConfig(
            theta,
            kind,
            factor,
            original_max_positions=original,
            attention_factor=field(rope, "attention_factor", float, math.sqrt(growth)),
            short_factors=tuple(map(float, factors)),
        )
    if kind == "proportional":
        if type(rotated) not in (int, float) or not 0 < rotated <= 1:
            raise ValueError(f"partial_rotary_factor is {rotated!r}: it must lie in (0, 1]")
        factor = field(rope, "factor", float, 1.0)
        return RopeConfig(theta, kind, factor, rotated=float(rotated))
    return RopeConfig(theta, kind)


def _mscale(rope: Mapping[str, Any], factor: float) -> float:
    """YaRN's attention factor where the file names none."""

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        above, below = (field(rope, key, float) for key in ("mscale", "mscale_all_dim"))
        return scale(above) / scale(below)
    return scale(1.0)


def rope_config_dict(rope: RopeConfig) -> dict[str, Any]:
    """RoPE as ``rope_parameters``; inverse of :func:`rope_config`."""
    fields: dict[str, Any] = {"rope_theta": rope.theta, "rope_type": rope.kind}
    if rope.kind in ("linear", "llama3", "yarn", "longrope", "proportional"):
        fields["factor"] = rope.factor
    if rope.kind in ("llama3", "yarn", "longrope"):
        fields["original_max_position_embeddings"] = rope.original_max_positions
    if rope.kind == "llama3":
        fields["low_freq_factor"] = rope.low_freq_factor
        fields["high_freq_factor"] = rope.high_freq_factor
    if rope.kind in ("yarn", "longrope"):
        fields["attention_factor"] = rope.attention_factor
    if rope.kind == "yarn":
        band = {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow}
        fields |= band | {"truncate": rope.truncate}
    if rope.kind == "longrope":  # nothing is computed beyond the original length
        fields["short_factor"] = fields["long_factor"] = list(rope.short_factors)
    if rope.kind == "proportional":
        fields["partial_rotary_factor"] = rope.rotated
    return fields


def rope_spellings(rope: RopeConfig) -> dict[str, Any]:
    """RoPE in the words of new and of older readers, who would fall back to defaults."""
    fields = rope_config_dict(rope)
    old = {"rope_theta": rope.theta, "rope_parameters": fields}
    if rope.kind != "default":
        old["rope_scaling"] = {key: v for key, v in fields.items() if key != "rope_theta"}
    return old


def block_config_dict(cfg: TransformerConfig) -> dict[str, Any]:
    """The blocks in the words of a Qwen3 ``config.json``; :func:`block_config` reads them back."""
    return {
        "attention_bias": cfg.qkv_bias,
        "attention_dropout": 0.0,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "layer_types": [
            "sliding_attention" if cfg.window(layer) else "full_attention"
            for layer in range(cfg.num_layers)
        ],
        "max_position_embeddings": cfg.max_positions,
        "model_type": BLOCK_TYPE if cfg.qk_norm else PLAIN_TYPE,
        "num_attention_heads": cfg.num_heads,
        "num_hidden_layers": cfg.num_layers,
        "num_key_value_heads": cfg.num_kv_heads,
        "rms_norm_eps": cfg.rms_norm_eps,
        **rope_spellings(cfg.rope),
        "sliding_window": max(cfg.windows, default=0) or None,
        "tie_word_embeddings": False,
        "use_sliding_window": any(cfg.windows),
        "vocab_size": cfg.vocab_size,
    }
