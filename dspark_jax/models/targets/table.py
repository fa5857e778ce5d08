"""Which family a target is of."""

from __future__ import annotations

from collections.abc import Mapping

from dspark_jax.config import TargetConfig
from dspark_jax.models.targets import llama
from dspark_jax.models.targets.family import TargetFamily

# ``model_type`` of a config.json, or ``general.architecture`` of a GGUF file -> its family.
FAMILIES: Mapping[str, TargetFamily] = {"llama": llama, "qwen2": llama, "qwen3": llama}

# GGUF files of these hold the rows of q and k in pairs, for interleaved RoPE.
GGUF_PAIRS = frozenset({"llama"})

_BY_CONFIG = {family.Config: family for family in FAMILIES.values()}


def family_of(cfg: TargetConfig) -> TargetFamily:
    """The family of a configuration."""
    return _BY_CONFIG[type(cfg)]
