"""The configuration of an engine, and the sizes that follow from it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dspark_jax.engine.request import Request
from dspark_jax.rules import AcceptanceRule, Rule
from dspark_jax.scheduler.policy import Policy
from pallas_kernels import dispatch
from pallas_kernels.dispatch import Kernels
from pallas_kernels.ragged_attention.pages import PAGE

POSITION_STEP = PAGE  # cache lengths are multiples of it
SLOT_GROWTH = 4  # between two numbers of slots
PAGED_SLOT_GROWTH = 8
ROWS_PER_SLOT = (2, 3, 5, 8, 13)
FREE_ROWS = 128  # that a GPU multiplies while it reads the weights: fewer cost the same


@dataclass(frozen=True)
class EngineConfig:
    """How an engine serves. Lengths in tokens.

    Attributes:
        slots: most requests that are decoded at once, over all data shards.
        positions: longest request, its prompt and new tokens together.
        queue: most requests that wait; further ones are refused.
        policy: which drafts are verified, see ``policy.py``. Empty is delayed, for a drafter with
            a confidence head. Or a rule, ``(confidence_BG) -> length_B``: float32 confidences after
            calibration (1 without a confidence head), int32 numbers of drafts. Lossless under
            rejection where whether a draft is verified does not depend on its token.
        acceptance: rejection sampling, or coupled by a common noise field. Or a rule, ``(logits_TV,
            floor_T, plan, drafts, requests) -> Acceptance`` with the arguments of
            ``pallas_kernels.accept_block.api.accept_block``, at temperature 0 too.
        draft_law: a rule ``(logits_BU, slot) -> logits_BU`` for the law that drafts are drawn from
            and verified against; None is the drafter's own. All of them are lossless.
        chunk_rows: positions of a prompt that are read in one piece; 0 for 32 on a CPU, and for 256
            elsewhere.
        chunk_buckets: how many pieces a round may read, over all requests of a data shard.
        slot_buckets: numbers of slots of a data shard that programs are compiled for; the last is
            all of them. Empty chooses some.
        row_buckets: rows of a round with drafts as multiples of the slots, besides the largest,
            which holds all that the policy may verify. Empty chooses some.
        position_buckets: cache lengths that programs are compiled for; the last one holds
            ``positions`` and a block. Empty chooses two. Slots that hold pages have one, the last.
        stop_ids: most stop ids of a request.
        memory_bytes: that states and logits may take beside the weights; 0 for no limit, and for
            most of what a GPU has left where slots hold pages.
        paged: whether slots hold pages of 64 positions, as many as their texts need, in place of
            room for ``positions`` each; None where the kernels read pages (``mosaic_gpu``), which
            XLA copies.
        pages: how many there are, over all data shards; 0 for as many as all slots could need, or
            fit into the memory. Where they are used up, the requests that came last wait until
            there are some again, and go on from what they have.
        prefix_bytes: memory, over all devices, for what was read of texts that are over, so that
            requests that begin like them need not read it again; 0 stores nothing.
        max_stall_s: seconds that a round may take that reads prompts while others decode, as far as
            it is known what rounds take: fewer pieces are read then, but one at least.
        min_tokens_per_s_user: tokens a second that the delayed policy keeps up for every request,
            where that is possible, before it looks for the best total; 0 for the best total.
        recalibrate: let the temperatures of the confidences follow what is accepted, from those of
            the calibration on (``temperatures.OnlineCalibration``).
        kernels: the implementation of the operations of ``pallas_kernels``; "auto" is the kernels
            for GPUs wherever they can run.

    Raises:
        ValueError: a field has no meaning; names it, its value and the remedy.

    >>> EngineConfig(slots=4, policy="threshold:0.5").lossless
    True
    """

    slots: int = 8
    positions: int = 1024
    queue: int = 256
    policy: str | Rule = ""
    acceptance: AcceptanceRule = "rejection"
    draft_law: Rule | None = None
    chunk_rows: int = 0
    chunk_buckets: tuple[int, ...] = (1, 4)
    slot_buckets: tuple[int, ...] = ()
    row_buckets: tuple[int, ...] = ()
    position_buckets: tuple[int, ...] = ()
    stop_ids: int = 8
    memory_bytes: int = 0
    paged: bool | None = None
    pages: int = 0
    prefix_bytes: int = 0
    max_stall_s: float = 0.5
    min_tokens_per_s_user: float = 0.0
    recalibrate: bool = False
    kernels: Kernels = "auto"

    def __post_init__(self) -> None:
        for field in ("slots", "positions", "queue", "stop_ids"):
            value = getattr(self, field)
            if type(value) is not int or value < 1:
                raise ValueError(f"{field} is {value!r}: it must be a positive integer")
        for field, zero in (("chunk_rows", "to choose"), ("pages", "to choose"),
                            ("prefix_bytes", "for no store")):  # fmt: skip
            value = getattr(self, field)
            if type(value) is not int or value < 0:
                raise ValueError(f"{field} is {value!r}: give a positive integer, or 0 {zero}")
        if self.pages and self.paged is False:
            raise ValueError(f"pages is {self.pages} and paged is False: leave one of them out")
        for field in ("chunk_buckets", "slot_buckets", "row_buckets", "position_buckets"):
            sizes = getattr(self, field)
            if any(b <= a for a, b in itertools.pairwise((0, *sizes))):
                raise ValueError(f"{field} is {sizes}: give positive sizes that increase")
        if not self.chunk_buckets:
            raise ValueError("chunk_buckets is empty: prompts must be read somehow, give (1,)")
        if not isinstance(self.acceptance, Rule) and self.acceptance not in (
            "rejection",
            "coupled",
        ):
            raise ValueError(f"acceptance is {self.acceptance!r}: choose 'rejection' or 'coupled'")
        dispatch.check_setting(self.kernels)
        for field in ("memory_bytes", "max_stall_s", "min_tokens_per_s_user"):
            if not 0 <= getattr(self, field) < math.inf:
                raise ValueError(f"{field} is {getattr(self, field)}: give 0 or more")

    @property
    def lossless(self) -> bool:
        """Whether texts keep the target's distribution."""
        rules = self.policy, self.acceptance, self.draft_law
        return all(rule.lossless for rule in rules if isinstance(rule, Rule))

    def check(self, request: Request, context: int) -> None:
        """Refuse a request that an engine of these sizes has no room for.

        Args:
            request: in ids.
            context: positions of the target's context, where a text ends in any case.

        Raises:
            ValueError: names the value and the remedy.
        """
        total = len(request.prompt_ids) + request.max_new_tokens
        if min(total, context) > self.positions:
            raise ValueError(
                f"the prompt has {len(request.prompt_ids)} tokens and max_new_tokens is "
                f"{request.max_new_tokens}, together more than the engine's {self.positions} "
                "positions: shorten one of them, or start the engine with more positions"
            )
        if len(request.stop_ids) > self.stop_ids:
            raise ValueError(
                f"the request has {len(request.stop_ids)} stop ids and the engine takes "
                f"{self.stop_ids}: give fewer, or start the engine with more stop_ids"
            )


@dataclass(frozen=True)
class Ladder:
    """The sizes that programs are compiled for; slots, rows and chunks are those of a data shard.

    Attributes:
        slots: ascending.
        positions: likewise.
        chunks: likewise.
        rows_per_slot: rows of a round with drafts, ascending; empty for plain decoding.
        least_rows: fewer are no cheaper.
    """

    slots: tuple[int, ...]
    positions: tuple[int, ...]
    rows_per_slot: tuple[int, ...]
    chunks: tuple[int, ...]
    least_rows: int = 1

    def drafted_rows(self, num_slots: int, num_chunks: int) -> tuple[int, ...]:
        """Numbers of rows of rounds with drafts.

        With pieces of prompts a round is long in any case, and has all rows: fewer programs.
        """
        rows = tuple(num_slots * multiple for multiple in self.rows_per_slot)
        large = tuple(count for count in rows if count >= self.least_rows)
        return large if large and not num_chunks else rows[-1:]


def make_ladder(cfg: EngineConfig, policy: Policy, num_shards: int) -> Ladder:
    """The sizes of an engine.

    Raises:
        ValueError: buckets do not end with the size that everything must fit into.
    """
    if cfg.slots % num_shards:
        raise ValueError(
            f"slots is {cfg.slots}: it must be a multiple of the {num_shards} data shards"
        )
    slots = cfg.slots // num_shards
    columns = policy.num_draft + 1
    room = round_up(cfg.positions + columns, POSITION_STEP)
    half = round_up(room // 2, POSITION_STEP)
    positions = cfg.position_buckets or tuple(sorted({half, room}))
    asked = cfg.row_buckets or ROWS_PER_SLOT
    ladder = Ladder(
        slots=cfg.slot_buckets or _powers(slots, PAGED_SLOT_GROWTH if cfg.pages else SLOT_GROWTH),
        positions=positions[-1:] if cfg.pages else positions,
        rows_per_slot=(*(rows for rows in asked if 1 < rows < columns), columns)
        if policy.num_draft
        else (),
        chunks=cfg.chunk_buckets,
        least_rows=FREE_ROWS if cfg.pages else 1,
    )
    if ladder.slots[-1] != slots:
        raise ValueError(f"slot_buckets is {ladder.slots}: the last must be {slots}")
    if ladder.positions[-1] < cfg.positions + columns:
        raise ValueError(
            f"position_buckets is {ladder.positions}: the last must hold positions and a block, "
            f"{cfg.positions + columns}"
        )
    in_pages = cfg.pages or cfg.prefix_bytes
    if in_pages and any(positions % POSITION_STEP for positions in ladder.positions):
        raise ValueError(
            f"position_buckets is {ladder.positions}: pages have {POSITION_STEP} positions, give "
            "multiples"
        )
    return ladder


def _powers(most: int, growth: int) -> tuple[int, ...]:
    """most, most / growth, ... down to 1, ascending."""
    sizes = {1, most}
    while most > 1:
        most = math.ceil(most / growth)
        sizes.add(most)
    return tuple(sorted(sizes))


def fit(size: int, sizes: Sequence[int]) -> int:
    """The smallest of ascending sizes that holds so much."""
    return next(bucket for bucket in sizes if bucket >= size)


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple
