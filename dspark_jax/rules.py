"""Pure functions in the place of a part of a round, so that an experiment needs no patches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Rule:
    """A part of a round that is not the product's own. One program is compiled for each function.

    Attributes:
        function: pure, of arrays, called while a program is traced. What it takes and gives is said
            where it is used: ``acceptance``, ``policy`` and ``draft_law`` of ``EngineConfig``.
        lossless: whether texts keep the target's distribution; results repeat what it says.

    >>> first = Rule(lambda confidence_BG: jnp.ones(len(confidence_BG), int), lossless=True)
    >>> EngineConfig(policy=first).lossless
    True
    """

    function: Callable[..., Any]
    lossless: bool


# How drafts are accepted.
AcceptanceRule = Literal["rejection", "coupled"] | Rule


def known_acceptance(acceptance: AcceptanceRule) -> str:
    """The rule of the product that calibration tables are looked up for."""
    return "rejection" if isinstance(acceptance, Rule) else acceptance
