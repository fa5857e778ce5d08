"""What the host decides about a round: one small value, which is told to other processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dspark_jax.engine.inputs import ASKS, Asks, Chunks, RoundInput
from dspark_jax.engine.prefix import NOTHING, Kept, Prefix
from dspark_jax.engine.request import Request
from dspark_jax.engine.shaping import Shaping, is_shaped
from dspark_jax.scheduler.shape import Shape, Sizes


@dataclass(frozen=True, eq=False)
class Move:
    """Other sizes of the state.

    Attributes:
        old: sizes.
        new: other ones, which differ from them in one.
        origin_B: int32, for each new slot the old one that it continues, -1 for a free slot; both
            are counted within their data shard.
    """

    old: Sizes
    new: Sizes
    origin_B: np.ndarray


@dataclass(frozen=True)
class Keep:
    """What is copied out of a slot, whose text is over, before somebody else has it."""

    slot: int
    kept: Kept


@dataclass(frozen=True)
class Admission:
    """A request that takes a slot, under a number that no other request has, and what is stored of
    the beginning of its prompt."""

    slot: int
    generation: int
    request: Request
    prefix: Prefix = NOTHING


@dataclass(frozen=True)
class Chunk:
    """A piece of a prompt: ``count`` positions from ``start`` on.

    The slot is counted within its data shard. With the last piece the request begins to decode, in
    the same round.
    """

    slot: int
    start: int
    count: int
    last: bool


@dataclass(frozen=True)
class HostPlan:
    """Everything that the host decides about one round.

    Attributes:
        number: of the round.
        moves: of the state, before the round.
        admissions: before the round, after the moves.
        occupied: slots whose request goes on; all others end.
        chunks: of each data shard.
        shape: of the round.
        page_BX: int32 pages of every slot, counted within its data shard; None without pages.
        asks: the most that anybody who decodes asks for.
        shaping: of every slot, where that is a shaped law.
        start: sizes of a new state, which takes the place of the one there is; None goes on.
        keeps: texts to be stored, before anything else.
    """

    number: int
    moves: tuple[Move, ...]
    admissions: tuple[Admission, ...]
    occupied: frozenset[int]
    chunks: tuple[tuple[Chunk, ...], ...]
    shape: Shape
    page_BX: np.ndarray | None = None
    asks: Asks = "greedy"
    shaping: Shaping | None = None
    start: Sizes | None = None
    keeps: tuple[Keep, ...] = ()

    @property
    def sizes_before(self) -> Sizes:
        """Of the state before the moves."""
        return self.moves[0].old if self.moves else self.shape.sizes

    @property
    def beginning(self) -> frozenset[int]:
        """Slots whose request begins to decode, over all data shards."""
        return frozenset(
            shard * self.shape.sizes.slots + chunk.slot
            for shard, part in enumerate(self.chunks)
            for chunk in part
            if chunk.last
        )


def asked_by(requests: Iterable[Request]) -> Asks:
    """The most that any of the requests that decode asks for; "greedy" of none."""

    def one(request: Request) -> Asks:
        if is_shaped(request):
            return "shaped"
        sampled = request.temperature > 0
        if sampled and (request.top_k > 0 or request.top_p < 1 or request.min_p > 0):
            return "filtered"
        return "sampled" if sampled or request.logprobs else "greedy"

    return max(map(one, requests), key=ASKS.index, default="greedy")


def round_input(plan: HostPlan, temperature_BG: np.ndarray | None) -> RoundInput:
    """A plan as arrays for the device.

    Args:
        plan: of the round.
        temperature_BG: float32, see :class:`RoundInput`.
    """
    num_slots, num_chunks = plan.shape.sizes.slots, plan.shape.num_chunks
    keep_B = [slot in plan.occupied for slot in range(num_slots * len(plan.chunks))]
    given: Any = {"keep_B": np.array(keep_B, bool), "temperature_BG": temperature_BG}
    given["page_BX"] = plan.page_BX
    if num_chunks:
        unused = [Chunk(num_slots, 0, 0, False)] * num_chunks
        chunks = [chunk for part in plan.chunks for chunk in (*part, *unused[len(part) :])]
        given["chunks"] = Chunks(
            slot_P=_array([chunk.slot for chunk in chunks], np.int32),
            start_P=_array([chunk.start for chunk in chunks], np.int32),
            count_P=_array([chunk.count for chunk in chunks], np.int32),
            last_P=_array([chunk.last for chunk in chunks], bool),
        )
    return RoundInput(**given)


def _array(values: Sequence[Any], dtype: Any) -> Any:
    return np.array(values, dtype)
