"""Sizes of states and rounds: every one has a program of its own, and seconds that it takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Of a state: slots of a data shard, and positions of a slot."""

    slots: int
    positions: int


@dataclass(frozen=True)
class Shape:
    """Which program runs a round; all sizes are those of a data shard.

    Attributes:
        sizes: of the state.
        num_draft: most drafts that a request verifies; 0 for a round without a draft.
        num_rows: anchors and verified drafts.
        num_chunks: pieces of prompts; 0 for none.
    """

    sizes: Sizes
    num_draft: int
    num_rows: int
    num_chunks: int


def holds(large: Shape, small: Shape) -> bool:
    """Whether a round does all that another one does, for as many slots."""
    return (
        small.sizes.slots == large.sizes.slots
        and small.sizes.positions <= large.sizes.positions
        and small.num_draft <= large.num_draft
        and small.num_rows <= large.num_rows
        and small.num_chunks <= large.num_chunks
    )
