"""Which family a drafter is of."""

from __future__ import annotations

from dspark_jax.config import DrafterConfig
from dspark_jax.models.drafters import deepseek_v4, deepseek_v4_mtp, dspark
from dspark_jax.models.drafters.family import DrafterFamily

DRAFTERS: tuple[DrafterFamily, ...] = (dspark, deepseek_v4, deepseek_v4_mtp)

_BY_CONFIG = {family.Config: family for family in DRAFTERS}


def drafter_of(cfg: DrafterConfig) -> DrafterFamily:
    """The family of a configuration."""
    return _BY_CONFIG[type(cfg)]
