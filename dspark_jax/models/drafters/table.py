"""Which family a drafter is of."""

from __future__ import annotations

from typing import Any

from dspark_jax.config import TargetConfig
from dspark_jax.drafting import AnyDrafterConfig
from dspark_jax.models.drafters import dspark, lookup
from dspark_jax.models.drafters.family import DrafterFamily

DRAFTERS: tuple[DrafterFamily, ...] = (dspark, lookup)

_BY_CONFIG = {family.Config: family for family in DRAFTERS}


def drafter_of(cfg: AnyDrafterConfig) -> DrafterFamily:
    """The family of a configuration."""
    return _BY_CONFIG[type(cfg)]


def without_checkpoint(source: str, target: TargetConfig) -> tuple[AnyDrafterConfig, Any] | None:
    """Configuration and parameters of a drafter that has a name in the place of files; None for
    other sources.

    Raises:
        ValueError: the name has numbers that make no sense.
    """
    cfg = lookup.named(source, target)
    return None if cfg is None else (cfg, lookup.declare_drafter(cfg))
