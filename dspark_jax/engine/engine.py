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
import time
from collections import deque
from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from dspark_jax.engine.compiled import Programs
from dspark_jax.engine.config import EngineConfig, fit, make_ladder
from dspark_jax.engine.decoder import Decoder
from dspark_jax.engine.inputs import RoundInput, Weights, replace_weights
from dspark_jax.engine.memory import check_sizes
from dspark_jax.engine.plan import Admission, HostPlan, Move
from dspark_jax.engine.programs import BY_SLOT, num_shards
from dspark_jax.engine.reader import Reader, drafted_by
from dspark_jax.engine.request import Request
from dspark_jax.engine.seats import InFlight, Tenant, plan_chunks, plan_moves, room, spread
from dspark_jax.engine.state import DecodeState, slot_values
from dspark_jax.engine.stream import Mailbox, Stream
from dspark_jax.engine.timing import profile_of
from dspark_jax.scheduler.budget import DraftSwitch, RoundCosts, bucket_for, steps_per_s
from dspark_jax.scheduler.calibration import confidence_temperatures
from dspark_jax.scheduler.choice import Outlook, Seat, choose_rows
from dspark_jax.scheduler.drift import Drift
from dspark_jax.scheduler.history import Drafted, History, Kind, advance, record
from dspark_jax.scheduler.policy import make_policy
from dspark_jax.scheduler.profile import Profile
from dspark_jax.scheduler.seconds import Seconds
from dspark_jax.scheduler.shape import Shape, Sizes
from pallas_kernels.dispatch import require_kernels

IN_FLIGHT = 2  # rounds that the host launches before it reads the first of them
SHORTEST_WAIT_S = 1e-4  # below that the host found a round over
SHRINK_AFTER = 16  # rounds that a smaller state must have sufficed before it is moved there


class Engine:
    """Serves requests with one set of weights. Use as a context manager, or call :meth:`close`.

    Every method may be called from any thread; one of them works at a time.
    """

    def __init__(
        self,
        decoder: Decoder,
        config: EngineConfig,
        profile: Profile | None = None,
    ) -> None:
        """Allocate the smallest state; :meth:`compile` compiles all programs ahead.

        Args:
            decoder: weights, tokenizer and mesh.
            config: sizes and policy.
            profile: of the rounds, for policies that weigh their seconds; None learns them.

        Raises:
            ValueError: the sizes do not fit the models, the mesh or the memory, the profile belongs
                to something else, or the kernels do not run here.
        """
        require_kernels(config.kernels)
        self.config = config
        self.policy = make_policy(config.policy, decoder.drafter)
        if self.policy.kind == "none":  # no features are extracted either
            decoder = replace(decoder, weights=Weights(decoder.weights.target), drafter=None)
        self._shards = num_shards(decoder.mesh)
        self._ladder = make_ladder(config, self.policy, self._shards)
        check_sizes(decoder, config, self._ladder)
        self._weights, self._tokenizer = decoder.weights, decoder.tokenizer
        self._limits = decoder.target.max_positions, decoder.target.vocab_size
        self._programs = Programs(decoder, config, self.policy, self._ladder)
        self._sizes = Sizes(self._ladder.slots[0], self._ladder.positions[0])
        self._state: DecodeState | None = self._programs.new_state(self._sizes)
        self._calibration = decoder.calibration
        self._block_size = 0 if decoder.drafter is None else decoder.drafter.block_size
        self._profile = self._drift = None
        if self.policy.needs_seconds and profile is not None:
            self._profile = profile_of(self._programs, profile)
            self._drift = Drift(self._profile)
        self._seconds = Seconds()
        self._queue: list[tuple[int, int, Tenant]] = []
        self._tenants: list[Tenant] = []
        self._in_flight: deque[InFlight] = deque()
        self._switch = DraftSwitch()
        self._history = History(config.recalibrate)
        self._numbers, self._arrivals = itertools.count(), itertools.count()
        self._roomy_rounds, self._waited = 0, False
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
        request.check(*self._limits)
        self.config.check(request)
        with self._lock:
            if self._closed:
                raise ValueError("the engine is closed: start another one")
            self._drop_cancelled()
            if len(self._queue) >= self.config.queue:
                raise queue.Full(
                    f"{self.config.queue} requests wait already: try again later, or start the "
                    "engine with a longer queue"
                )
            reader = Reader(request, request.max_new_tokens, self._tokenizer)
            mailbox = Mailbox(reader)
            arrival, calibration = next(self._arrivals), self._calibration
            sampled = self.config.acceptance, request.temperature
            temperature_G = confidence_temperatures(calibration, *sampled, self._block_size)
            kind = request.temperature == 0, tuple(temperature_G.tolist())
            tenant = Tenant(mailbox, reader, arrival, -1, kind, len(request.prompt_ids))
            heapq.heappush(self._queue, (-priority, arrival, tenant))
            return Stream(mailbox, self.step, self._step_async, self._lock)

    def step(self) -> bool:
        """Plan and launch a round, after reading the round before the last.

        Returns:
            Whether anything is left to do.
        """
        with self._lock:
            while len(self._in_flight) >= IN_FLIGHT:
                self._read_oldest()
            if self._in_flight and not self._next_round_is_needed():
                self.settle()
            plan = self._make_plan()
            if plan is not None:
                self._launch(plan)
            return bool(self._in_flight or self._queue or self._tenants)

    def run(self) -> None:
        """Serve until every request is over."""
        while self.step():
            pass

    def settle(self) -> None:
        """Wait for the rounds in flight and read them."""
        with self._lock:
            while self._in_flight:
                self._read_oldest()

    def update_params(self, weights: Weights) -> None:
        """Other weights from the next round on, without a new compilation.

        Requests under way go on with caches that the old weights wrote.

        Raises:
            ValueError: shapes, dtypes or structure differ.
        """
        if self.policy.kind == "none":
            weights = Weights(weights.target)
        with self._lock:
            self._weights = replace_weights(self._weights, weights)

    def close(self) -> None:
        """Cancel everything and give the memory back."""
        with self._lock:
            for tenant in (*self._tenants, *(entry[-1] for entry in self._queue)):
                tenant.mailbox.cancel()
            self._queue, self._tenants, self._closed = [], [], True
            self._in_flight.clear()
            self._state = None

    def compile(self) -> int:
        """Compile all programs ahead, with a progress bar; returns how many there are."""
        return self._programs.compile()

    # Reading.

    def _read_oldest(self) -> None:
        """Take in the report of the oldest round in flight."""
        done, began_s = self._in_flight.popleft(), time.perf_counter()
        report = jax.device_get(done.report)
        # Of a round that was over before anybody looked, nobody knows how long it took.
        waited, before = time.perf_counter() - began_s > SHORTEST_WAIT_S, self._waited
        self._waited, steady = waited, done.steady and waited and before
        if self.policy.needs_seconds and self._drift is None:  # otherwise nobody would take them in
            self._seconds.read(done.number, done.shape, steady)
        if self._drift is not None:
            self._drift.read(done.shape, steady)
        drafted: dict[int, Drafted] = {}
        for tenant, slot, first in done.members:
            tenant.pending -= done.shape.num_draft + 1
            if report.generation_B[slot] != tenant.generation or tenant.mailbox.finished:
                continue
            tenant.length = int(report.length_B[slot])
            if report.confidence_logit_BG is not None and not first:
                drafted[tenant.generation] = drafted_by(tenant.kind, report, slot)
            tenant.mailbox.report(tenant.reader.read(report, slot, first))
            if tenant.reader.result.finish_reason:
                self._tenants.remove(tenant)
        self._history = record(self._history, done.number, drafted)

    def _next_round_is_needed(self) -> bool:
        """Whether there is work for another round, whatever those in flight bring."""
        self._drop_cancelled()
        free = len(self._tenants) < self.config.slots
        return (bool(self._queue) and free) or any(
            not tenant.decoding or tenant.reader.may_outlast(tenant.pending)
            for tenant in self._tenants
        )

    def _drop_cancelled(self) -> None:
        """End the requests that nobody wants any more, so that their slots are free."""
        everybody = (*self._tenants, *(entry[-1] for entry in self._queue))
        gone = [tenant for tenant in everybody if tenant.mailbox.cancelled]
        for tenant in gone:
            tenant.mailbox.cancel()
        if gone:
            self._tenants = [tenant for tenant in self._tenants if not tenant.mailbox.cancelled]
            self._queue = [entry for entry in self._queue if not entry[-1].mailbox.cancelled]
            heapq.heapify(self._queue)

    # Planning.

    def _make_plan(self) -> HostPlan | None:
        """The next round; None where there is nothing to do."""
        self._drop_cancelled()
        joining: list[Tenant] = []
        while self._queue and len(self._tenants) + len(joining) < self.config.slots:
            joining.append(heapq.heappop(self._queue)[-1])
        if not joining and not self._tenants:
            return None
        moves = self._seat(joining)
        drafted = frozenset(tenant for tenant in self._tenants if tenant.decoding)
        chunks = tuple(
            plan_chunks(part, self._sizes.slots, self.config.chunk_rows, self._ladder.chunks)
            for part in spread(self._tenants, (), self._sizes.slots, self._shards)
        )
        num_chunks = fit(max(map(len, chunks)), (0, *self._ladder.chunks))
        number, num_rows = next(self._numbers), 0
        if self.policy.num_draft:
            outlook = self._outlook(number, drafted, num_chunks)
            if outlook.costs is not None or not self.policy.needs_seconds:
                self._switch, num_rows = choose_rows(self.policy, self._switch, outlook)
        return HostPlan(
            number,
            moves,
            tuple(Admission(t.slot, t.generation, t.reader.request) for t in joining),
            frozenset(tenant.slot for tenant in self._tenants),
            chunks,
            self._shape(num_rows, num_chunks),
        )

    def _shape(self, num_rows: int, num_chunks: int) -> Shape:
        """Of a round with so many rows for anchors and drafts; 0 for one without a draft."""
        num_draft = self.policy.num_draft if num_rows else 0
        return Shape(self._sizes, num_draft, num_rows or self._sizes.slots, num_chunks)

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

    def _outlook(self, number: int, drafted: Set[Tenant], num_chunks: int) -> Outlook:
        """What the choice of the rows of a round is made from."""
        self._history = advance(self._history, number, [t.generation for t in self._tenants])
        history, temperatures = self._history, self._temperatures()
        seats = [
            Seat(
                tenant.slot // self._sizes.slots,
                tenant in drafted,
                temperatures[tenant.kind],
                history.logits.get(tenant.generation),
                tenant.generation in history.fresh,
            )
            for tenant in self._tenants
            if tenant.decoding
        ]
        rows = self._ladder.drafted_rows(self._sizes.slots, num_chunks)
        costs = None
        if self.policy.needs_seconds:
            costs = self._costs(number, num_chunks, self._shards)
        floor = self.config.min_tokens_per_s_user
        return Outlook(seats, rows, self._shards, costs, floor)

    def _costs(self, number: int, num_chunks: int, num_shards: int) -> RoundCosts | None:
        """Seconds of what round ``number`` may be; None while too little is known."""
        if self._profile is not None:
            return self._profile.costs(self._sizes, num_chunks, num_shards)
        rows = self._ladder.drafted_rows(self._sizes.slots, num_chunks)
        return self._seconds.costs(number, self._sizes, rows, self.policy.num_draft, num_shards)

    # Launching.

    def _launch(self, plan: HostPlan) -> None:
        """Run a plan on the device, without waiting for it."""
        assert self._state is not None
        programs = self._programs
        state = self._state
        for move in plan.moves:
            state = programs.move(move.old, move.new)(state, programs.put(move.origin_B, BY_SLOT))
        for admission in plan.admissions:
            values = slot_values(
                admission.request, admission.generation, programs.form(plan.shape.sizes)
            )
            slot = np.int32(admission.slot)
            state = programs.admit(plan.shape.sizes)(state, *programs.put((slot, values)))
        given, shape = programs.round_input(plan, self._temperature_BG()), plan.shape
        if self.policy.kind == "causal" and shape.num_draft:
            shape, given = self._draft_ahead(plan.number, state, given, shape)
        ready = programs.ready(shape)
        if not ready:  # the rounds in flight will be over long before they are read
            self._in_flight = deque(replace(done, steady=False) for done in self._in_flight)
        self._state, report = programs.round(shape)(self._weights, state, given)
        columns, members = shape.num_draft + 1, []
        for tenant in self._tenants:
            if tenant.decoding:
                tenant.pending += columns
                members.append((tenant, tenant.slot, tenant.slot in plan.beginning))
        steady = ready and bool(self._in_flight) and not (plan.moves or plan.admissions)
        self._in_flight.append(InFlight(plan.number, report, shape, steady, tuple(members)))

    def _temperatures(self) -> dict[Kind, np.ndarray]:
        """float32 [G]: of the confidences of each kind of requests."""
        kinds = {tenant.kind for tenant in self._tenants}
        return {kind: self._history.temperature_G(kind) for kind in kinds}

    def _temperature_BG(self) -> np.ndarray | None:
        """float32: of everybody's confidences; None without a drafter."""
        if not self._block_size:
            return None
        temperatures, num_slots = self._temperatures(), self._sizes.slots * self._shards
        temperature_BG = np.ones((num_slots, self._block_size), np.float32)
        for tenant in self._tenants:
            temperature_BG[tenant.slot] = temperatures[tenant.kind]
        return temperature_BG

    def _draft_ahead(
        self, number: int, state: DecodeState, given: RoundInput, shape: Shape
    ) -> tuple[Shape, RoundInput]:
        """The drafts of a round, and its program by what Algorithm 1 makes of them: the one place
        where the host waits for the device."""
        size, chunks = shape.sizes, shape.num_chunks
        costs = self._costs(number, chunks, num_shards=1)
        assert costs is not None
        steps_per_s_T = self._programs.put(steps_per_s(costs))
        draft = self._programs.draft(size, chunks)
        block, wanted_D = draft(self._weights, state, given, steps_per_s_T)
        wanted = int(jax.device_get(wanted_D).max())
        if not wanted:
            return self._shape(0, chunks), given
        rows = int(bucket_for(wanted, costs.buckets))
        return self._shape(rows, chunks), given.replace(block=block)  # type: ignore[attr-defined]

    async def _step_async(self) -> None:
        """One step in a worker thread, shared by all who wait for it in this event loop."""
        task = self._stepping
        if task is None or task.done() or task.get_loop() is not asyncio.get_running_loop():
            task = asyncio.create_task(asyncio.to_thread(self.step))
            self._stepping = task
        await asyncio.shield(task)
