"""Policies by name: how many drafts of a round are verified.

none           no drafts: plain decoding
block          all drafts of every block
fixed:K        the first K drafts of every block
threshold:P    those before the first whose confidence lies below P
gate:P         all drafts of blocks whose first confidence is at least P
causal         as many of the batch as Algorithm 1 asks for by the round's own confidences
delayed        as many of the batch as pay, or no drafts, by the confidences of two rounds ago
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from dspark_jax.drafting import AnyDrafterConfig
from dspark_jax.rules import Rule

NUMBER = r"-?\d*\.?\d+(e-?\d+)?"
FORMS = re.compile(rf"none|block|fixed:\d+|(threshold|gate):{NUMBER}|causal|delayed", re.ASCII)


@dataclass(frozen=True)
class Policy:
    """A policy for one drafter.

    Attributes:
        kind: its name without the number.
        num_draft: most drafts of a request in a round; 0 for plain decoding.
        threshold: of every confidence; 0 is none.
        gate: of the first confidence of a block; 0 is none.
        lengths: a rule that says how many drafts are verified; None for the product's own ways.
    """

    kind: Literal["none", "fixed", "threshold", "gate", "causal", "delayed", "rule"]
    num_draft: int
    threshold: float = 0.0
    gate: float = 0.0
    lengths: Rule | None = None

    @property
    def needs_seconds(self) -> bool:
        """Whether it decides by the measured seconds of rounds."""
        return self.kind in ("causal", "delayed")


def make_policy(name: str | Rule, drafter: AnyDrafterConfig | None) -> Policy:
    """The policy of a name, or of a rule for the lengths of verified prefixes.

    Args:
        name: as above. Empty is ``"delayed"``, or ``"block"`` for a drafter without a confidence
            head, or ``"none"`` without a drafter.
        drafter: sizes; None where there is no drafter, so that only ``"none"`` works.

    Raises:
        ValueError: there is no such policy, or the drafter cannot serve it.
    """
    if isinstance(name, Rule):
        if drafter is None:
            raise ValueError("policy is a rule, but there is no drafter: load one")
        return Policy("rule", drafter.block_size, lengths=name)
    if not name:
        confident = drafter is not None and drafter.confidence
        name = "delayed" if confident else "none" if drafter is None else "block"
    kind, _, value = check_name(name).partition(":")
    if kind == "none":
        return Policy("none", 0)
    if drafter is None:
        raise ValueError(f"policy is {name!r}, but there is no drafter: load one or choose 'none'")
    if kind == "block":
        return Policy("fixed", drafter.block_size)
    if kind == "fixed":
        if not 1 <= int(value) <= drafter.block_size:
            raise ValueError(
                f"policy is {name!r}: the number of drafts must lie in 1..{drafter.block_size}, "
                "the block size; 'none' decodes without drafts"
            )
        return Policy("fixed", int(value))
    if not drafter.confidence:
        raise ValueError(
            f"policy is {name!r}, but the drafter has no confidence head: choose 'none', 'block' "
            "or 'fixed:K'"
        )
    if value and not 0 < float(value) <= 1:
        raise ValueError(f"policy is {name!r}: the confidence must lie in (0, 1]")
    given = {kind: float(value)} if value else {}
    return Policy(kind, drafter.block_size, **given)  # type: ignore[arg-type]


def check_name(name: str) -> str:
    """A name that has one of the forms above, as it is.

    Raises:
        ValueError: it has none of them.
    """
    if FORMS.fullmatch(name):
        return name
    raise ValueError(
        f"policy is {name!r}: choose none, block, fixed:K, threshold:P, gate:P, causal or delayed"
    )
