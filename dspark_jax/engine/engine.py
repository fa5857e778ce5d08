"""The serving engine: requests arrive and leave, and share the rounds of one state.

The host plans a round, launches it and reads the report of the round before the last, so that the
device never waits for the host: two rounds are in flight. Everything that it decides passes
through one :class:`~dspark_jax.engine.plan.HostPlan`.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import queue
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from dspark_jax.engine.compiled import Programs
from dspark_jax.engine.config import EngineConfig, fit, make_ladder
from dspark_jax.engine.decoder import Decoder
from dspark_jax.engine.inputs import RoundReport, Weights
from dspark_jax.engine.memory import check_memory
from dspark_jax.engine.plan import Admission, HostPlan, Move, Shape, Sizes, round_input
from dspark_jax.engine.policy import make_policy
from dspark_jax.engine.programs import BY_SLOT, EVERYWHERE, num_shards
from dspark_jax.engine.reader import Reader
from dspark_jax.engine.seats import Tenant, plan_chunks, plan_moves, room, spread
from dspark_jax.engine.state import DecodeState, Request, slot_values
from dspark_jax.engine.stream import Stream

IN_FLIGHT = 2  # rounds that the host launches before it reads the first of them
SHRINK_AFTER = 16  # rounds that a smaller state must have sufficed before it is moved there


@dataclass(frozen=True)
class InFlight:
    """A round that was launched and not read: who decodes in which slot, and who for the first
    time."""

    number: int
    report: RoundReport
    columns: int
    members: tuple[tuple[Tenant, int, bool], ...]


class Engine:
    """Serves requests with one set of weights. Use as a context manager, or call :meth:`close`.

    Every method may be called from any thread; one of them works at a time.
    """

    def __init__(self, decoder: Decoder, config: EngineConfig) -> None:
        """Allocate the smallest state; :meth:`compile` compiles all programs ahead.

        Args:
            decoder: weights, tokenizer and mesh.
            config: sizes and policy.

        Raises:
            ValueError: the sizes do not fit the models, the mesh or the memory.
        """
        self.config = config
        self.policy = make_policy(config.policy, decoder.drafter)
        if self.policy.kind == "none":  # no features are extracted either
            decoder = replace(decoder, weights=Weights(decoder.weights.target), drafter=None)
        if config.positions > decoder.target.max_positions:
            raise ValueError(
                f"positions is {config.positions}, but the target's context ends at "
                f"{decoder.target.max_positions}: give at most that"
            )
        self._shards = num_shards(decoder.mesh)
        self._ladder = make_ladder(config, self.policy, self._shards)
        check_memory(decoder, config, self._ladder)
        self._weights, self._tokenizer = decoder.weights, decoder.tokenizer
        self._max_positions = decoder.target.max_positions
        self._programs = Programs(decoder, config, self.policy, self._ladder)
        self._sizes = Sizes(self._ladder.slots[0], self._ladder.positions[0])
        self._state: DecodeState | None = self._programs.new_state(self._sizes)
        self._queue: list[tuple[int, int, Request, Stream, Reader]] = []
        self._tenants: list[Tenant] = []
        self._in_flight: deque[InFlight] = deque()
        self._history: dict[int, dict[int, np.ndarray]] = {}
        self._numbers, self._arrivals = itertools.count(), itertools.count()
        self._roomy_rounds = 0
        self._lock = threading.RLock()
        self._stepping: asyncio.Task[Any] | None = None
        self._closed = False

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What callers do.

    def submit(self, request: Request, priority: int = 0) -> Stream:
        """Queue a request: higher priorities first, then by arrival.

        Raises:
            ValueError: the request cannot be served by this engine; the message has the remedy.
            queue.Full: ``config.queue`` requests wait already.
        """
        request.check(self._max_positions)
        total, config = len(request.prompt_ids) + request.max_new_tokens, self.config
        if total > config.positions:
            raise ValueError(
                f"the prompt has {len(request.prompt_ids)} tokens and max_new_tokens is "
                f"{request.max_new_tokens}, together more than the engine's {config.positions} "
                "positions: shorten one of them, or start the engine with more positions"
            )
        if len(request.stop_ids) > config.stop_ids:
            raise ValueError(
                f"the request has {len(request.stop_ids)} stop ids and the engine takes "
                f"{config.stop_ids}: give fewer, or start the engine with more stop_ids"
            )
        with self._lock:
            if self._closed:
                raise ValueError("the engine is closed: start another one")
            self._drop_cancelled()
            if len(self._queue) >= config.queue:
                raise queue.Full(
                    f"{config.queue} requests wait already: try again later, or start the engine "
                    "with a longer queue"
                )
            reader = Reader(request, request.max_new_tokens, self._tokenizer)
            stream = Stream(reader, self.step, self._step_async, self._lock)
            entry = (-priority, next(self._arrivals), request, stream, reader)
            heapq.heappush(self._queue, entry)
            return stream

    def step(self) -> bool:
        """Plan and launch a round, after reading the round before the last.

        Returns:
            Whether anything is left to do.
        """
        with self._lock:
            while len(self._in_flight) >= IN_FLIGHT:
                self._read_oldest()
            if self._in_flight and not self._next_round_is_needed():
                while self._in_flight:
                    self._read_oldest()
            plan = self._make_plan()
            if plan is not None:
                self._launch(plan)
            return bool(self._in_flight or self._queue or self._tenants)

    def run(self) -> None:
        """Serve until every request is over."""
        while self.step():
            pass

    def update_params(self, weights: Weights) -> None:
        """Other weights from the next round on, without a new compilation.

        Requests under way go on with caches that the old weights wrote.

        Raises:
            ValueError: shapes, dtypes or structure differ.
        """
        if self.policy.kind == "none":
            weights = Weights(weights.target)
        with self._lock:
            old: Any = jax.tree.structure(self._weights)
            if old != jax.tree.structure(weights):
                raise ValueError("the new weights have another structure: load the same models")
            self._weights = jax.tree.map(_in_place_of, self._weights, weights)

    def close(self) -> None:
        """Cancel everything and give the memory back."""
        with self._lock:
            for _, _, _, stream, _ in self._queue:
                stream.cancel()
            for tenant in self._tenants:
                tenant.stream.cancel()
            self._queue, self._tenants, self._closed = [], [], True
            self._in_flight.clear()
            self._state = None

    def compile(self) -> int:
        """Compile all programs ahead, with a progress bar; returns how many there are."""
        return self._programs.compile()

    # Reading.

    def _read_oldest(self) -> None:
        """Take in the report of the oldest round in flight."""
        done = self._in_flight.popleft()
        report = jax.device_get(done.report)
        confidences: dict[int, np.ndarray] = {}
        for tenant, slot, first in done.members:
            tenant.pending -= done.columns
            if report.generation_B[slot] != tenant.generation or tenant.stream.finished:
                continue
            tenant.length = int(report.length_B[slot])
            if report.confidence_logit_BG is not None and not first:
                confidences[tenant.generation] = report.confidence_logit_BG[slot]
            tenant.stream.report(tenant.reader.read(report, slot, first))
            if tenant.reader.result.finish_reason:
                self._tenants.remove(tenant)
        self._history[done.number] = confidences
        self._history.pop(done.number - IN_FLIGHT, None)

    def _next_round_is_needed(self) -> bool:
        """Whether there is work for another round, whatever those in flight bring."""
        self._drop_cancelled()
        free = len(self._tenants) < self.config.slots
        return (bool(self._queue) and free) or any(
            not tenant.decoding or tenant.reader.may_outlast(tenant.pending)
            for tenant in self._tenants
        )

    def _drop_cancelled(self) -> None:
        self._tenants = [tenant for tenant in self._tenants if not tenant.stream.cancelled]
        if any(entry[3].cancelled for entry in self._queue):
            self._queue = [entry for entry in self._queue if not entry[3].cancelled]
            heapq.heapify(self._queue)

    # Planning.

    def _make_plan(self) -> HostPlan | None:
        """The next round; None where there is nothing to do."""
        self._drop_cancelled()
        joining = self._pop_queue()
        if not joining and not self._tenants:
            return None
        moves = self._seat(joining)
        admissions = tuple(
            Admission(tenant.slot, tenant.generation, tenant.reader.request) for tenant in joining
        )
        drafted = [tenant for tenant in self._tenants if tenant.decoding]
        number = next(self._numbers)
        chunks = tuple(
            plan_chunks(part, self._sizes.slots, self.config.chunk_rows, self._ladder.chunks)
            for part in spread(self._tenants, (), self._sizes.slots, self._shards)
        )
        num_chunks = max(map(len, chunks))
        if num_chunks:
            num_chunks = fit(num_chunks, self._ladder.chunks)
        num_rows = self._choose_rows(number, drafted)
        if num_rows and num_chunks:  # fewer programs: such a round is long in any case
            num_rows = self._ladder.rows(self._sizes.slots)[-1]
        shape = Shape(
            self._sizes,
            self.policy.num_draft if num_rows else 0,
            num_rows or self._sizes.slots,
            num_chunks,
        )
        occupied = frozenset(tenant.slot for tenant in self._tenants)
        return HostPlan(number, moves, admissions, occupied, chunks, shape)

    def _pop_queue(self) -> list[Tenant]:
        """Those who join now, as tenants; where, is not settled yet."""
        joining: list[Tenant] = []
        while self._queue and len(self._tenants) + len(joining) < self.config.slots:
            _, arrival, request, stream, reader = heapq.heappop(self._queue)
            joining.append(Tenant(stream, reader, arrival, -1, len(request.prompt_ids)))
        return joining

    def _seat(self, joining: Sequence[Tenant]) -> tuple[Move, ...]:
        """Slots for everybody, in a state that holds them."""
        shards = spread(self._tenants, joining, self._sizes.slots, self._shards)
        everybody, columns = [*self._tenants, *joining], self.policy.num_draft + 1
        wanted = Sizes(
            fit(max(map(len, shards)), self._ladder.slots),
            fit(max(room(tenant, columns) for tenant in everybody), self._ladder.positions),
        )
        sizes = Sizes(
            max(wanted.slots, self._sizes.slots), max(wanted.positions, self._sizes.positions)
        )
        self._roomy_rounds = self._roomy_rounds + 1 if sizes != wanted else 0
        if self._roomy_rounds > SHRINK_AFTER:
            sizes, self._roomy_rounds = wanted, 0
        moves = plan_moves(shards, self._sizes, sizes)
        self._tenants, self._sizes = everybody, sizes
        return moves

    def _choose_rows(self, number: int, drafted: Sequence[Tenant]) -> int:
        """Rows of a data shard for anchors and drafts; 0 for a round without a draft."""
        if not self.policy.num_draft or not drafted:
            return 0
        confidences = self._history.get(number - IN_FLIGHT, {})
        rows = [0] * self._shards
        for tenant in self._tenants:
            wanted = 0
            if tenant in drafted:
                wanted = self.policy.num_draft
                if self.policy.kind == "threshold" and tenant.generation in confidences:
                    logit_G = confidences[tenant.generation].astype(np.float64)
                    with np.errstate(over="ignore"):
                        low_G = 1 / (1 + np.exp(-logit_G)) < self.policy.threshold
                    wanted = int(low_G.argmax()) if low_G.any() else len(low_G)
            if tenant.decoding:
                rows[tenant.slot // self._sizes.slots] += 1 + wanted
        return fit(max(rows), self._ladder.rows(self._sizes.slots))

    # Launching.

    def _launch(self, plan: HostPlan) -> None:
        """Run a plan on the device, without waiting for it."""
        assert self._state is not None
        programs = self._programs
        state, put = self._state, programs.put
        for move in plan.moves:
            state = programs.move(move.old, move.new)(state, put(move.origin_B, BY_SLOT))
        for admission in plan.admissions:
            values = slot_values(
                admission.request, admission.generation, programs.form(plan.shape.sizes)
            )
            given = put(np.int32(admission.slot), EVERYWHERE), put(values, EVERYWHERE)
            state = programs.admit(plan.shape.sizes)(state, *given)
        given = put(round_input(plan), BY_SLOT)
        self._state, report = programs.round(plan.shape)(self._weights, state, given)
        columns, members = plan.shape.num_draft + 1, []
        beginning = {
            shard * plan.shape.sizes.slots + chunk.slot
            for shard, part in enumerate(plan.chunks)
            for chunk in part
            if chunk.last
        }
        for tenant in self._tenants:
            if tenant.decoding:
                tenant.pending += columns
                members.append((tenant, tenant.slot, tenant.slot in beginning))
        self._in_flight.append(InFlight(plan.number, report, columns, tuple(members)))

    async def _step_async(self) -> None:
        """One step in a worker thread, shared by all who wait for it in this event loop."""
        task = self._stepping
        if task is None or task.done() or task.get_loop() is not asyncio.get_running_loop():
            task = asyncio.create_task(asyncio.to_thread(self.step))
            self._stepping = task
        await asyncio.shield(task)


def _in_place_of(old: jax.Array, new: jax.Array) -> jax.Array:
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        raise ValueError(
            f"the new weights have an array {new.dtype}{list(new.shape)} in the place of "
            f"{old.dtype}{list(old.shape)}: load the same models in the same dtype"
        )
    return jax.device_put(new, old.sharding)
