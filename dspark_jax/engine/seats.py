"""Who sits in which slot, and whose prompt is read next."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dspark_jax.engine.grammar import Guide
from dspark_jax.engine.inputs import RoundReport
from dspark_jax.engine.plan import Chunk, Move
from dspark_jax.engine.prefix import NOTHING, Prefix
from dspark_jax.engine.reader import Reader
from dspark_jax.engine.request import Request
from dspark_jax.engine.stream import Mailbox
from dspark_jax.scheduler.history import Kind
from dspark_jax.scheduler.shape import Shape, Sizes


@dataclass(eq=False)
class Tenant:
    """A request in a slot, as far as the host knows.

    Attributes:
        mailbox: where its text goes.
        reader: what makes the text.
        kind: of its confidences.
        arrival: its place among all requests.
        request: what is left of it: its prompt has all tokens that were committed when it entered.
        length: committed tokens after the last round that was read.
        generation: a number that nobody else ever has, another one each time that it enters.
        slot: counted over all data shards; -1 without one.
        pending: most tokens that the rounds in flight may add.
        read: positions of the prompt that were given to a round.
        decoding: whether the prompt was read to the end.
        pages: that it holds of its data shard's, in the order of its positions.
        prefix: what was stored of its text when it entered.
        committed: tokens behind the request's prompt that rounds which were read have committed,
            whatever of them is shown.
        current: whether the weights of now have read all of it.
        since_s: when it entered first, on a monotonic clock.
    """

    mailbox: Mailbox
    reader: Reader
    kind: Kind
    arrival: int
    request: Request
    length: int
    generation: int = -1
    slot: int = -1
    pending: int = 0
    read: int = 0
    decoding: bool = False
    pages: list[int] = field(default_factory=list)
    prefix: Prefix = NOTHING
    committed: list[int] = field(default_factory=list)
    current: bool = True
    since_s: float = 0.0

    def enter(self, generation: int, prefix: Prefix) -> None:
        """Wait for a slot no longer; what is stored of the text need not be read."""
        if not self.since_s:
            self.reader.result.cached_tokens = prefix.count
        self.generation, self.since_s = generation, self.since_s or time.perf_counter()
        self.prefix, self.read, self.current = prefix, prefix.count, True

    @property
    def guide(self) -> Guide | None:
        """By which it decodes, if it has a grammar."""
        return self.reader.guide

    def take(
        self, report: RoundReport, slot: int, first: bool, num_rows: int, seconds: float
    ) -> None:
        """What a round has brought; arguments as for ``Reader.note``."""
        self.length = int(report.length_B[slot])
        self.committed += report.token_BC[slot, : report.count_B[slot]].tolist()
        if self.reader.request.trace:
            self.reader.note(report, slot, first, num_rows, seconds)
        self.mailbox.report(self.reader.read(report, slot, first))

    def leave(self) -> None:
        """Give up slot and pages, with all tokens so far behind the prompt of what is left."""
        self.slot, self.pending, self.read, self.decoding, self.pages = -1, 0, 0, False, []
        self.committed = []
        asked, new_ids = self.reader.request, self.reader.result.token_ids
        if new_ids:
            left = self.reader.limit - len(new_ids)
            ids = (*asked.prompt_ids, *new_ids)
            self.request = replace(asked, prompt_ids=ids, max_new_tokens=left)
        if self.guide is not None:  # which may have failed on its way along some drafts
            self.guide.restart(new_ids)
        self.length = len(self.request.prompt_ids)


@dataclass(frozen=True)
class InFlight:
    """A round that was launched and not read: what it was to take, who decodes in which slot, and
    who for the first time."""

    number: int
    report: RoundReport
    shape: Shape
    steady: bool
    launched_s: float
    predicted_s: float
    members: tuple[tuple[Tenant, int, bool], ...]


def spread(
    tenants: Sequence[Tenant], joining: Sequence[Tenant], num_slots: int, num_shards: int
) -> list[list[Tenant]]:
    """Everybody by data shard; who joins goes where the fewest are."""
    shards: list[list[Tenant]] = [[] for _ in range(num_shards)]
    for tenant in tenants:
        shards[tenant.slot // num_slots].append(tenant)
    for tenant in joining:
        min(shards, key=len).append(tenant)
    return shards


def room(tenant: Tenant, columns: int) -> int:
    """Positions that a request needs in the next round, whatever those in flight bring."""
    limit = len(tenant.reader.request.prompt_ids) + tenant.reader.limit
    return min(tenant.length + tenant.pending, limit) + columns


def plan_moves(shards: Sequence[Sequence[Tenant]], old: Sizes, new: Sizes) -> tuple[Move, ...]:
    """The moves of a state from old to new sizes, one size at a time; seats everybody.

    Who has a slot that the new state has too keeps it; the others get the first free ones.
    """
    origin = []
    for shard, part in enumerate(shards):
        seats = {t: t.slot - shard * old.slots for t in part if t.slot >= 0}
        kept = {seat for seat in seats.values() if seat < new.slots}
        free = [seat for seat in range(new.slots) if seat not in kept]
        seated = [-1] * new.slots
        for tenant in part:
            seat = seats.get(tenant, -1)
            place = seat if seat in kept else free.pop(0)
            seated[place] = seat
            tenant.slot = shard * new.slots + place
        origin += seated
    moves = []
    if new.slots != old.slots:
        between = Sizes(new.slots, old.positions)
        moves.append(Move(old, between, np.array(origin, np.int32)))
        old = between
    if new.positions != old.positions:
        same = np.tile(np.arange(new.slots, dtype=np.int32), len(shards))
        moves.append(Move(old, new, same))
    return tuple(moves)


def plan_chunks(
    tenants: Sequence[Tenant], num_slots: int, rows: int, buckets: Sequence[int]
) -> tuple[Chunk, ...]:
    """The pieces of prompts that a round of a data shard reads, in order of arrival.

    Who has no more of them begins to decode.

    Args:
        tenants: of the shard.
        num_slots: of a shard.
        rows: positions of a piece.
        buckets: how many pieces a round may read.
    """
    waiting = [tenant for tenant in tenants if not tenant.decoding]
    pieces = [_pieces(tenant, tenant.slot % num_slots, rows) for tenant in waiting]
    limit = _choose_chunks(sum(map(len, pieces)), buckets)
    chunks: list[Chunk] = []
    for tenant, own in zip(waiting, pieces, strict=True):
        taken = own[: limit - len(chunks)]
        chunks += taken
        if taken:
            tenant.read += sum(chunk.count for chunk in taken)
            tenant.decoding = taken[-1].last
    return tuple(chunks)


def _pieces(tenant: Tenant, slot: int, rows: int) -> list[Chunk]:
    """What is left of a prompt, without the anchor, which decoding reads, or of what shall be
    stored before the rest is read; at least one piece."""
    whole = len(tenant.request.prompt_ids) - 1
    end = tenant.prefix.branch or whole
    starts = list(range(tenant.read, end, rows)) or [tenant.read]
    last = starts[-1] if end == whole else -1
    return [Chunk(slot, start, min(rows, end - start), start == last) for start in starts]


def _choose_chunks(wanted: int, buckets: Sequence[int]) -> int:
    """How many pieces a round reads: as many as are waiting where that wastes little, else less."""
    full = [bucket for bucket in buckets if bucket <= wanted] or [buckets[0]]
    larger = [bucket for bucket in buckets if wanted < bucket <= 4 * wanted / 3]
    return larger[0] if larger and full[-1] < wanted else full[-1]
