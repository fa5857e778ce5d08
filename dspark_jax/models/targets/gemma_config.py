"""Configurations of Gemma targets, out of ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

from dspark_jax.config import RopeConfig, TargetConfig
from dspark_jax.models.targets.config_json import (
    count_field,
    field,
    layer_windows,
    rope_config,
    size_config,
    window_of,
)

WINDOWED, FULL = "sliding_attention", "full_attention"
DRAFT_LAYERS = "gemma4_text"  # name of the layers of drafters


@dataclass(frozen=True)
class Config(TargetConfig):
    """Sizes of a target; heads, ``rope`` and the like are those of layers without a window.

    Attributes:
        generation: 2, 3 or 4.
        local_heads: K of layers with a window.
        local_head_dim: their H.
        local_rope: their RoPE.
        scale: of the scores.
        score_softcap: of scores; None for none.
        softcap: of logits, likewise.
        value_is_key: in layers without a window the values are the projected keys.
        num_shared: last layers that read the keys and values of the last layer of their kind
            before them.
        wide_shared: these have MLPs of twice the width.
        token_size: width of the layers' own embeddings; 0 for none.
        token_vocab: how many of them there are.
        num_experts: E; 0 for none.
        num_chosen: experts of a token.
        expert_size: their M.
    """

    generation: int = 4
    local_heads: int = 1
    local_head_dim: int = 2
    local_rope: RopeConfig = dataclass_field(default_factory=RopeConfig)
    scale: float = 1.0
    score_softcap: float | None = None
    softcap: float | None = None
    value_is_key: bool = False
    num_shared: int = 0
    wide_shared: bool = False
    token_size: int = 0
    token_vocab: int = 0
    num_experts: int = 0
    num_chosen: int = 0
    expert_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads % self.local_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_key_value_heads "
                f"{self.local_heads} of layers with a window"
            )
        if self.num_experts and not 1 <= self.num_chosen <= self.num_experts:
            raise ValueError(f"top_k_experts {self.num_chosen} must lie in 1..{self.num_experts}")
        own = range(self.num_layers - self.num_shared)
        for layer in range(len(own), self.num_layers):
            if not any(self.window(n) == self.window(layer) for n in own):
                raise ValueError(
                    f"num_kv_shared_layers {self.num_shared}: no layer of the kind of layer {layer}"
                    " has keys and values of its own"
                )

    @property
    def sizes(self) -> dict[str, int]:
        """Axis letter -> size, for the declaration of parameters."""
        return super().sizes | {"E": self.num_experts, "O": self.token_size, "X": 1}


def config(text: Mapping[str, Any]) -> Config:
    """The configuration out of the ``config.json`` of a text model.

    Raises:
        ValueError: a field is missing or wrong, or asks for something that is not supported.
    """
    name = text["model_type"]
    generation = 2 if name == "gemma2" else 3 if name.startswith("gemma3") else 4
    for key in ("attention_bias", "use_bidirectional_attention"):
        if text.get(key) not in (None, False, "vision"):  # which is about images alone
            raise ValueError(f"{key} is {text[key]!r}: such models are not supported")
    activation = text.get("hidden_activation") or "gelu_pytorch_tanh"
    if activation != "gelu_pytorch_tanh":
        raise ValueError(f"hidden_activation {activation!r}: only gelu_pytorch_tanh is supported")
    sizes = size_config(text, head_dim=256)
    types = _layer_types(text, sizes["num_layers"], generation)
    window = window_of(text)
    windows = layer_windows({"layer_types": types}, window, [False] * sizes["num_layers"])
    common = {
        **sizes,
        "tied": field(text, "tie_word_embeddings", bool, True),
        "windows": windows,
        "generation": generation,
        "local_heads": sizes["num_kv_heads"],
        "local_head_dim": sizes["head_dim"],
        "softcap": soft_cap(text, "final_logit_softcapping", 30.0 if generation == 2 else None),
    }
    if generation == 4:
        return Config(**common | _generation_4(text, types, sizes))
    scalar = field(text, "query_pre_attn_scalar", float, 256.0)
    common |= {"scale": scalar**-0.5, "rope": rope_config(text, FULL)}
    if generation == 2:
        capped = soft_cap(text, "attn_logit_softcapping", 50.0)
        return Config(**common, local_rope=common["rope"], score_softcap=capped)
    capped = soft_cap(text, "attn_logit_softcapping", None)
    full, local = _two_ropes(text)
    return Config(**common | {"rope": full, "local_rope": local, "score_softcap": capped})


def _layer_types(text: Mapping[str, Any], layers: int, generation: int) -> list[Any]:
    """The kinds of the layers, which older files leave to a pattern."""
    types = text.get("layer_types")
    if types is None:
        period = 2 if generation == 2 else 6
        period = field(text, "sliding_window_pattern", int, period)
        types = [FULL if (layer + 1) % period == 0 else WINDOWED for layer in range(layers)]
    if not isinstance(types, list):
        raise ValueError(f"layer_types {types!r} must be a list")
    # transformers forces the last layer of Gemma 4.
    return [*types[:-1], FULL] if generation == 4 and types else types


def soft_cap(text: Mapping[str, Any], key: str, default: float | None) -> float | None:
    """A soft cap: null is none, and a missing one is what transformers has."""
    if key not in text:
        return default
    return None if text[key] is None else float(field(text, key, float))


def _two_ropes(text: Mapping[str, Any]) -> tuple[Any, Any]:
    """RoPE of layers without and with a window of Gemma 3, in the old and the new spelling."""
    both = text.get("rope_parameters") or {}
    if any(isinstance(value, dict) for value in both.values()):
        full = {**field(both, FULL, dict, {}), **(text.get("rope_scaling") or {})}
        local = field(both, WINDOWED, dict, {})
    else:
        full, local = {**both, **(text.get("rope_scaling") or {})}, {}
    base = {"max_position_embeddings": text.get("max_position_embeddings")}
    theta = field(text, "rope_theta", float, 1e6)
    local_theta = field(text, "rope_local_base_freq", float, 1e4)
    return (
        rope_config({**base, "rope_parameters": full}, theta=theta),
        rope_config({**base, "rope_parameters": local}, theta=local_theta),
    )


def _generation_4(
    text: Mapping[str, Any], types: list[Any], sizes: Mapping[str, Any]
) -> dict[str, Any]:
    """The fields that only Gemma 4 has."""
    heads, width, value_is_key = full_heads(text, types)
    fields: dict[str, Any] = {
        "num_kv_heads": heads,
        "head_dim": width,
        "value_is_key": value_is_key,
        "rope": full_rope(text),
        "local_rope": rope_config(_ropes(text), WINDOWED),
        "num_shared": count_field(text, "num_kv_shared_layers", 0),
        "wide_shared": field(text, "use_double_wide_mlp", bool, False),
        "token_size": count_field(text, "hidden_size_per_layer_input", 256),
    }
    if text["model_type"].startswith("gemma4_unified"):  # which has no such embeddings
        fields["token_size"] = count_field(text, "hidden_size_per_layer_input", 0)
    if fields["token_size"]:
        fields["token_vocab"] = field(text, "vocab_size_per_layer_input", int, 262144)
    if field(text, "enable_moe_block", bool, False):
        fields["num_experts"] = field(text, "num_experts", int)
        fields["num_chosen"] = field(text, "top_k_experts", int)
        fields["expert_size"] = field(text, "moe_intermediate_size", int)
    return fields


def full_heads(text: Mapping[str, Any], types: list[Any]) -> tuple[int, int, bool]:
    """Key/value heads and head width of Gemma 4's layers without a window, and whether their
    values are their keys; in the newer spelling by layer, or in the older.

    Raises:
        ValueError: layers of one kind that differ.
    """
    heads = field(text, "num_key_value_heads", int)
    value_is_key = field(text, "attention_k_eq_v", bool, False)
    if text.get("per_layer_config") is None:
        if value_is_key:
            heads = field(text, "num_global_key_value_heads", int, heads)
        return heads, field(text, "global_head_dim", int, 512), value_is_key
    # The numbers of the layers may be of equal length: 05, 11.
    listed = field(text, "per_layer_config", dict)
    given = {str(key).lstrip("0") or "0": own for key, own in listed.items()}
    width = field(text, "head_dim", int, 256)
    full = [layer for layer, name in enumerate(types) if name == FULL]
    found = set()
    for layer in full:
        own = field(given, str(layer), dict, {})
        if not set(own) <= {"head_dim", "num_key_value_heads"}:
            raise ValueError(f"per_layer_config of layer {layer} has {sorted(own)}: not supported")
        found.add(
            (field(own, "num_key_value_heads", int, heads), field(own, "head_dim", int, width))
        )
    if len(found) != 1 or not {str(layer) for layer in full} >= set(given):
        raise ValueError("per_layer_config must say the same of every layer of full_attention")
    return *found.pop(), value_is_key


def _ropes(text: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` with what Gemma 4 has where a file says nothing."""
    given = text.get("rope_parameters") or {
        FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
        WINDOWED: {"rope_type": "default", "rope_theta": 1e4},
    }
    longest = text.get("max_position_embeddings")
    return {"rope_parameters": given, "max_position_embeddings": longest}


def full_rope(text: Mapping[str, Any]) -> Any:
    """RoPE of Gemma 4's layers without a window."""
    return rope_config(_ropes(text), FULL)
