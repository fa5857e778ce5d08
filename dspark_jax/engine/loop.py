"""Planning, launching and reading the rounds of an engine, by one thread.

The host plans a round, launches it and reads the report of the round before the last, so that the
device never waits for the host: two rounds are in flight. Everything that it decides passes
through one :class:`~dspark_jax.engine.plan.HostPlan`. Whatever goes wrong in between, the host
still has every token that it has read: :meth:`Loop.start_over` needs nothing else.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence, Set

import jax

from dspark_jax.engine.config import Ladder, fit
from dspark_jax.engine.guided import end_with_grammars, masks_by, shaping_by
from dspark_jax.engine.launch import IN_FLIGHT, Launcher
from dspark_jax.engine.outlook import predicted_s, seats_of, temperatures_of
from dspark_jax.engine.pages import Pages
from dspark_jax.engine.plan import Admission, HostPlan, Move, asked_by
from dspark_jax.engine.programs import num_shards
from dspark_jax.engine.reader import drafted_by
from dspark_jax.engine.seats import InFlight, Tenant, plan_chunks, plan_moves, room, spread
from dspark_jax.engine.stats import Tally
from dspark_jax.engine.store import Store
from dspark_jax.engine.waiting import Waiting
from dspark_jax.scheduler.budget import DraftSwitch, RoundCosts, bucket_for, steps_per_s
from dspark_jax.scheduler.choice import Outlook, choose_rows
from dspark_jax.scheduler.history import Drafted, History, advance, record
from dspark_jax.scheduler.seconds import Seconds
from dspark_jax.scheduler.shape import Shape, Sizes

SHORTEST_WAIT_S = 1e-4  # below that the host found a round over
SHRINK_AFTER = 16  # rounds that a smaller state must have sufficed before it is moved there


class Loop:
    """The requests of an engine, its state, and what it has learnt. Not thread-safe.

    Attributes:
        launcher: what plans do on the devices.
        suspects: whose admission may have caused what the present step raises.
        one_by_one: of the requests that wait, how many take their slots in steps of their own.
        seconds: what rounds take.
        tally: of what was read.
    """

    def __init__(self, launcher: Launcher, seconds: Seconds, tell: Callable[..., None]) -> None:
        """Nothing is allocated before there is a request. What is launched goes to ``tell`` first,
        for :func:`~dspark_jax.engine.launch.follow`."""
        self.launcher, self._tell, self._programs = launcher, tell, launcher.programs
        self._config, self._policy = self._programs.config, self._programs.policy
        self.seconds, self.tally = seconds, Tally()
        self.suspects: list[Tenant] = []
        self.one_by_one = 0
        self._shards = num_shards(self._programs.decoder.mesh)
        drafter = self._programs.decoder.drafter
        self._block_size = 0 if drafter is None else drafter.block_size
        self._ladder: Ladder = self._programs.ladder
        self._pages = Pages(self._config.pages // self._shards, self._policy.num_draft + 1)
        self._store = Store(self._programs.pool, self._config.pages, self._shards)
        self._sizes = Sizes(self._ladder.slots[0], self._ladder.positions[0])
        self._queue = Waiting()
        self._tenants: list[Tenant] = []
        self._in_flight: deque[InFlight] = deque()
        self._plan: HostPlan | None = None
        self._switch = DraftSwitch()
        self._chosen_from: RoundCosts | None = None
        self._history = History(self._config.recalibrate)
        self._numbers, self._generations = itertools.count(), itertools.count()
        self._roomy_rounds, self._waited, self._read_s, self._in_turn = 0, False, 0.0, False

    @property
    def running(self) -> int:
        """Requests that have slots and that somebody waits for; from any thread."""
        return sum(not tenant.mailbox.cancelled for tenant in list(self._tenants))

    @property
    def waiting(self) -> int:
        """Requests that have none yet and that somebody waits for; from any thread."""
        return self._queue.wanted

    @property
    def busy(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._in_flight or self._queue or self._tenants or self._plan)

    @property
    def _num_slots(self) -> int:
        """Of all data shards."""
        return self._sizes.slots * self._shards

    def add(self, tenant: Tenant, priority: int) -> None:
        """Queue a request: higher priorities first, then by arrival; from any thread."""
        self._queue.add(tenant, priority)

    def step(self) -> None:
        """Plan and launch a round, after reading the round before the last."""
        plan, self._plan = self._plan, None
        if plan is None:
            self.suspects = []
            while len(self._in_flight) >= IN_FLIGHT:
                self._read_oldest()
            self._in_turn = any(tenant.guide and tenant.pending for tenant in self._tenants)
            if self._in_turn:
                self.settle()  # a grammar goes on from the committed text
            if self._in_flight and not self._next_round_is_needed():
                self.settle()
            plan = self._make_plan()
            ready = plan is None or self._programs.ready(plan.shape, plan.asks)
            if self._in_flight and not ready:
                joined, self.suspects = self.suspects, []
                self.settle()  # nobody waits for a compiler to hear what was decided before
                self._plan, self.suspects = plan, joined
                return
        if plan is not None:
            self._launch(plan)

    def settle(self) -> None:
        """Wait for the rounds in flight and read them."""
        while self._in_flight:
            self._read_oldest()

    def forget_prefixes(self) -> None:
        """Other weights: what these have read is of no use to later requests."""
        self._store.clear(self._tenants)

    def close(self, error: Exception | None = None) -> None:
        """Cancel everything, or end it with an error, and let go of the state."""
        for tenant in self._everybody():
            if error is not None:
                tenant.mailbox.fail(error)
            tenant.mailbox.cancel()
        self._queue.clear()
        self._tenants, self._plan = [], None
        self.launcher.state = self.launcher.pool = None
        self._in_flight.clear()

    def start_over(self) -> None:
        """Forget the device's state, and let everybody who had a slot go on from what was read.

        Where texts do not depend on where rounds begin (greedy, coupled acceptance), they become
        what they would have been; under rejection they keep their distribution.
        """
        self._in_flight.clear()
        self._store.clear()
        self.launcher.state = self.launcher.pool = self._plan = None
        self._waited = False
        self._sizes = Sizes(self._ladder.slots[0], self._ladder.positions[0])
        for tenant in (one for one in self._tenants if not one.mailbox.finished):
            tenant.leave()
            self._queue.put_back(tenant)
        self._tenants = []

    def drop(self, tenant: Tenant) -> None:
        """Forget a request, which must be over."""
        self._tenants = [other for other in self._tenants if other is not tenant]
        self._queue.drop(tenant)

    def newest(self) -> Tenant | None:
        """Who came last of all that have a slot, or had one before :meth:`start_over`; of those who
        wait where nobody has."""
        seated = [*self._tenants, *self._queue.returned()] or self._queue
        return max(seated, key=lambda tenant: tenant.arrival, default=None)

    def drop_cancelled(self) -> None:
        """End the requests that nobody wants any more, so that their slots are free."""
        for tenant in self._everybody():
            if tenant.mailbox.cancelled:
                tenant.mailbox.cancel()
                self.drop(tenant)
                self._store.leave(tenant, self._sizes.slots)

    def _everybody(self) -> list[Tenant]:
        return [*self._tenants, *self._queue]

    # Reading.

    def _read_oldest(self) -> None:
        """Take in the report of the oldest round in flight."""
        done, began_s = self._in_flight.popleft(), time.perf_counter()
        report = jax.device_get(done.report)
        now_s = time.perf_counter()
        # Of a round that was over before anybody looked, nobody knows how long it took.
        waited, before = now_s - began_s > SHORTEST_WAIT_S, self._waited
        self._waited, steady = waited, done.steady and waited and before
        self.seconds.read(done.number, done.shape, steady, now_s)
        round_s, self._read_s = now_s - max(self._read_s, done.launched_s), now_s
        if steady and done.predicted_s:
            self.tally.timed(done.predicted_s, round_s)
        drafted: dict[int, Drafted] = {}
        for tenant, slot, first in done.members:
            tenant.pending -= done.shape.num_draft + 1
            if report.generation_B[slot] != tenant.generation or tenant.mailbox.finished:
                continue
            if report.confidence_logit_BG is not None and not first:
                drafted[tenant.generation] = drafted_by(tenant.kind, report, slot)
            self.tally.read(report, slot, first, now_s)
            try:
                tenant.take(report, slot, first, done.shape.num_rows, round_s)
            except Exception as error:  # of its tokenizer, say: nobody else's business
                tenant.mailbox.fail(error)
            if tenant.reader.result.finish_reason:
                tenant.reader.result.seconds = now_s - tenant.since_s
                still = bool(report.stopped_B[slot]) or tenant.length >= room(tenant, 0)
                self._tenants.remove(tenant)
                self._store.leave(tenant, self._sizes.slots, still=still)
        self.tally.judge(drafted.values(), self._history)
        self._history = record(self._history, done.number, drafted)

    def _next_round_is_needed(self) -> bool:
        """Whether there is work for another round, whatever those in flight bring."""
        self.drop_cancelled()
        free = len(self._tenants) < self._config.slots
        return (bool(self._queue) and free) or any(
            not tenant.decoding or tenant.reader.may_outlast(tenant.pending)
            for tenant in self._tenants
        )

    # Planning.

    def _make_plan(self) -> HostPlan | None:
        """The next round; None where there is nothing to do."""
        self.drop_cancelled()
        self._store.branch(self._tenants, self._sizes.slots)
        self._give_pages()
        joining = self._join()
        if not self._tenants:
            return None
        start, moves = self._seat(joining)
        drafted = frozenset(tenant for tenant in self._tenants if tenant.decoding)
        number, num_rows, buckets = next(self._numbers), 0, self._ladder.chunks
        if 0 < len(drafted) < len(self._tenants):
            limit_s = self._config.max_stall_s
            buckets = self.seconds.chunks_within(number, self._sizes, buckets, limit_s)
        chunks = tuple(
            plan_chunks(part, self._sizes.slots, self._config.chunk_rows, buckets)
            for part in self._parts()
        )
        num_chunks = fit(max(map(len, chunks)), (0, *buckets))
        if self._policy.num_draft:
            if len(joining) == len(self._tenants):  # what is known is about texts that are over
                self._switch = DraftSwitch()
            outlook = self._outlook(number, drafted, num_chunks)
            self._switch, num_rows = choose_rows(self._policy, self._switch, outlook)
        asks = asked_by(tenant.request for tenant in self._tenants if tenant.decoding)
        return HostPlan(
            number,
            moves,
            tuple(Admission(t.slot, t.generation, t.request, t.prefix) for t in joining),
            frozenset(tenant.slot for tenant in self._tenants),
            chunks,
            self._shape(num_rows, num_chunks),
            self._pages.table(self._tenants, self._sizes, self._shards),
            asks,
            shaping_by(asks, self._tenants, self._num_slots),
            start,
            self._store.take(),
        )

    def _give_pages(self) -> None:
        """Pages for what everybody's next round may write; where there are too few, those who came
        last wait until there are some again."""
        for shard, stored in enumerate(self._store.shards):
            while not self._pages.grow(part := self._parts()[shard], stored):
                if self._in_flight:
                    self.settle()  # whoever is over gives his back, and the others need fewer
                    continue
                last = max(part, key=lambda tenant: tenant.arrival)
                self._store.leave(last, self._sizes.slots)
                self._tenants.remove(last)
                last.leave()
                self._queue.put_back(last)

    def _parts(self) -> list[list[Tenant]]:
        """The tenants of every data shard."""
        return spread(self._tenants, (), self._sizes.slots, self._shards)

    def _join(self) -> list[Tenant]:
        """Those who get a slot now, in front of the queue; they are tenants from here on."""
        joining: list[Tenant] = []
        shards = self._parts()
        while self._queue and len(self._tenants) < self._config.slots:
            if self.one_by_one and joining:
                break
            part, tenant = min(shards, key=len), self._queue.first
            stored = self._store.shards[shards.index(part)]
            found = stored.find(tuple(tenant.request.prompt_ids))
            prefix = self._pages.enter(tenant, part, found, stored)
            if prefix is None:
                break
            part.append(tenant)
            self.one_by_one = max(0, self.one_by_one - 1)
            self._queue.pop()
            self._tenants.append(tenant)
            if self._programs.pool is not None and not tenant.since_s:
                self.tally.looked_up(prefix.count)
            tenant.enter(next(self._generations), prefix)
            joining.append(tenant)
        self.suspects = joining
        return joining

    def _shape(self, num_rows: int, num_chunks: int) -> Shape:
        """Of a round with so many rows for anchors and drafts; 0 for one without a draft."""
        num_draft = self._policy.num_draft if num_rows else 0
        return Shape(self._sizes, num_draft, num_rows or self._sizes.slots, num_chunks)

    def _seat(self, joining: Sequence[Tenant]) -> tuple[Sizes | None, tuple[Move, ...]]:
        """Slots for everybody, in a state that holds them: a new one, where there is none, or the
        one that there is, after some moves."""
        seated = [tenant for tenant in self._tenants if tenant.slot >= 0]
        shards = spread(seated, joining, self._sizes.slots, self._shards)
        columns = self._policy.num_draft + 1
        wanted = Sizes(
            fit(max(map(len, shards)), self._ladder.slots),
            fit(max(room(tenant, columns) for tenant in self._tenants), self._ladder.positions),
        )
        start = wanted if self.launcher.state is None else None
        self._sizes = start or self._sizes
        sizes = Sizes(
            max(wanted.slots, self._sizes.slots), max(wanted.positions, self._sizes.positions)
        )
        self._roomy_rounds = self._roomy_rounds + 1 if sizes != wanted else 0
        if self._roomy_rounds > SHRINK_AFTER:
            sizes, self._roomy_rounds = wanted, 0
        moves = plan_moves(shards, self._sizes, sizes)
        self._sizes = sizes
        return start, moves

    def _outlook(self, number: int, drafted: Set[Tenant], num_chunks: int) -> Outlook:
        """What the choice of the rows of a round is made from."""
        self._history = advance(self._history, number, [t.generation for t in self._tenants])
        seats = seats_of(self._history, self._tenants, drafted, self._sizes.slots)
        rows = self._drafted_rows(self._shape(0, num_chunks))
        costs = self._costs(number, rows, self._shards) if self._policy.needs_seconds else None
        self._chosen_from = costs
        return Outlook(seats, rows, self._shards, costs, self._config.min_tokens_per_s_user)

    def _costs(self, number: int, rows: tuple[int, ...], num_shards: int) -> RoundCosts | None:
        """Seconds of what round ``number`` may be; None while too little is known."""
        return self.seconds.costs(number, self._sizes, rows, self._policy.num_draft, num_shards)

    # Launching.

    def _launch(self, plan: HostPlan) -> None:
        """Run a plan on the devices, without waiting for them."""
        launcher, joined, sizes = self.launcher, self.suspects, plan.shape.sizes
        temperature_BG = steps_per_s_T = None
        if self._block_size:
            drafts = self._num_slots, self._block_size
            temperature_BG = temperatures_of(self._history, self._tenants, *drafts)
        if self._policy.kind == "causal" and plan.shape.num_draft:
            costs = self._costs(plan.number, self._drafted_rows(plan.shape), num_shards=1)
            assert costs is not None
            steps_per_s_T = steps_per_s(costs)
        self._tell(plan, temperature_BG, steps_per_s_T)
        launcher.begin(plan)
        for admission, tenant in zip(plan.admissions, joined, strict=True):
            self.suspects = [tenant]
            launcher.admit(admission, sizes)
        self.suspects = joined
        given, shape = self._programs.round_input(plan, temperature_BG), plan.shape
        block, news = launcher.draft(plan, given, steps_per_s_T)
        num_tokens, masks = self._programs.decoder.target.vocab_size, None
        for tenant in end_with_grammars(self._tenants, num_tokens):  # while the devices draft
            self._store.leave(tenant, sizes.slots)
            self.drop(tenant)
        if news is not None and news.num_rows_D is not None:
            shape = self._fitted(shape, news.num_rows_D)
        ready = self._programs.ready(shape, plan.asks)
        if plan.shaping is not None:
            size = self._num_slots, shape.num_draft + 1, num_tokens
            masks = masks_by(self._tenants, news, plan.beginning, size)
        chosen = shape, self._programs.kind(shape, plan.asks), masks
        self._tell(*chosen)
        report = launcher.run(plan, given, block, chosen)
        columns, members = shape.num_draft + 1, []
        for tenant in self._tenants:
            if tenant.decoding:
                tenant.pending += columns
                members.append((tenant, tenant.slot, tenant.slot in plan.beginning))
        follows = bool(self._in_flight) or self._in_turn  # at once upon the round before it
        steady = ready and follows and not (plan.moves or plan.admissions or plan.keeps)
        about_s = predicted_s(self._chosen_from, shape, self._shards)
        told = steady, time.perf_counter(), about_s, tuple(members)
        self._in_flight.append(InFlight(plan.number, report, shape, *told))

    def _drafted_rows(self, shape: Shape) -> tuple[int, ...]:
        """The rows that there are programs for, of such rounds with a draft."""
        return self._ladder.drafted_rows(shape.sizes.slots, shape.num_chunks)

    def _fitted(self, shape: Shape, wanted_D: jax.Array) -> Shape:
        """The shape of a round by what Algorithm 1 makes of its drafts: the one place where the
        host waits for the device."""
        wanted = int(jax.device_get(wanted_D).max())
        rows = int(bucket_for(wanted, self._drafted_rows(shape))) if wanted else 0
        return self._shape(rows, shape.num_chunks)
