"""The programs of an engine, one for each size of its ladder."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dspark_jax.axes import abstract_buffers, empty_buffers, place
from dspark_jax.engine.config import EngineConfig, Ladder
from dspark_jax.engine.decoder import Decoder, state_config
from dspark_jax.engine.executables import Executable, Program, program_of
from dspark_jax.engine.inputs import ASKS, Asks, RoundConfig, RoundInput
from dspark_jax.engine.pages import pages_for
from dspark_jax.engine.plan import HostPlan, round_input
from dspark_jax.engine.pool import Copies, Pool, PoolConfig, declare_pool, plan_pool
from dspark_jax.engine.prefix import NOTHING, Kept, Prefix
from dspark_jax.engine.programs import (
    BY_SLOT,
    EVERYWHERE,
    GIVEN,
    admit_program,
    block_shardings,
    draft_program,
    keep_program,
    move_program,
    num_shards,
    restore_program,
    round_program,
)
from dspark_jax.engine.request import Request
from dspark_jax.engine.shaping import no_masks, shaping_of
from dspark_jax.engine.state import (
    DecodeState,
    StateConfig,
    declare_state,
    make_state,
    slot_values,
    with_pages_of,
    without_pages,
)
from dspark_jax.progress import progress
from dspark_jax.scheduler.policy import Policy
from dspark_jax.scheduler.shape import Shape, Sizes


@dataclass(frozen=True, eq=False)
class Programs:
    """Executables by size, compiled when they are first asked for, or all at once.

    Attributes:
        decoder: whose models they run; the weights are arguments of every call, and only their
            shapes are kept here.
        config: of the engine.
        policy: likewise.
        ladder: likewise.
        kinds: what rounds may be asked for, the least first, each with programs of its own. A CPU
            has one program for all, with conditions in it, but those of shaped laws, which are
            compiled for whoever asks.
    """

    decoder: Decoder
    config: EngineConfig
    policy: Policy
    ladder: Ladder
    kinds: tuple[Asks, ...] = field(default_factory=lambda: _kinds())
    _known: dict[Any, Program] = field(default_factory=dict)
    _placed: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Let go of the weights themselves."""
        shapes = jax.tree.map(_abstract, self.decoder.weights)
        object.__setattr__(self, "decoder", replace(self.decoder, weights=shapes))

    def compile(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Compile everything, with a progress bar, until ``stop()``."""
        sizes = self.sizes()
        todo: list[tuple[Callable[..., Executable], tuple[Any, ...]]] = []
        *narrower, widest = self._able("greedy")  # which serves everybody
        shapes = [shape for size in sizes for shape in self.shapes(size)]
        todo += [(self.round, (shape, widest)) for shape in shapes]
        if self.policy.kind == "causal":
            ahead = [kind for kind in (*narrower, widest) if kind != "filtered"]
            chunks = 0, *self.ladder.chunks
            todo += [
                (self.draft, (size, n, kind)) for size in sizes for n in chunks for kind in ahead
            ]
        todo += [(self.admit, (size,)) for size in sizes]
        if self.pool is not None:
            todo += [(one, (size,)) for one in (self.keep, self.restore) for size in sizes]
        todo += [
            (self.move, (old, new))
            for old, new in itertools.permutations(sizes, 2)
            if old.slots == new.slots or old.positions == new.positions
        ]
        todo += [(self.round, (shape, kind)) for kind in narrower for shape in shapes]
        for program, args in progress(todo, desc="compile", unit="program"):
            if stop():
                break
            program(*args)

    def sizes(self) -> list[Sizes]:
        """Of all states."""
        return [Sizes(s, p) for s in self.ladder.slots for p in self.ladder.positions]

    def shapes(self, sizes: Sizes) -> list[Shape]:
        """Of all rounds of a state of these sizes."""
        shapes = []
        for chunks in (0, *self.ladder.chunks):
            shapes.append(Shape(sizes, 0, sizes.slots, chunks))
            for rows in self.ladder.drafted_rows(sizes.slots, chunks):
                shapes.append(Shape(sizes, self.policy.num_draft, rows, chunks))
        return shapes

    def kind(self, shape: Shape, asks: Asks = "greedy") -> Asks:
        """The kind of program that serves rounds of a shape.

        Args:
            shape: of the round.
            asks: the most that anybody in it asks for. A program that does more serves as well, if
                it is the one that need not be compiled first.
        """
        able = self._able(asks)
        return next((kind for kind in able if self._has(shape, kind)), able[0])

    def ready(self, shape: Shape, asks: Asks = "greedy") -> bool:
        """Whether a program of such rounds is compiled."""
        return any(self._has(shape, kind) for kind in self._able(asks))

    def _able(self, asks: Asks) -> tuple[Asks, ...]:
        """The kinds that serve what is asked, the least first."""
        if asks == "shaped":
            return (asks,)
        kinds = tuple(kind for kind in self.kinds if kind != "shaped")
        return kinds[kinds.index(asks) :] if asks in kinds else kinds

    def _has(self, shape: Shape, kind: Asks) -> bool:
        return (shape, kind) in self._known and self._known[shape, kind].ready

    def round(self, shape: Shape, kind: Asks) -> Executable:
        """``decode_round(weights, state, given)`` of a kind; under the causal policy, and where the
        law is shaped, the drafts are given."""

        def build() -> tuple[Any, ...]:
            rows_per_chunk = self.config.chunk_rows if shape.num_chunks else 0
            cfg, weights = self._config(shape.num_draft, kind), self.decoder.weights
            form = self.form(shape.sizes)
            parts = cfg, form, shape.num_rows, rows_per_chunk, self.decoder.mesh
            args = weights, self._state(shape.sizes), self._given(shape, kind)
            return round_program, parts, args

        return self._once((shape, kind), build)

    def draft(self, sizes: Sizes, num_chunks: int, asks: Asks = "greedy") -> Executable:
        """``draft_ahead(weights, state, given, steps_per_s_T)``, the speeds None but under the
        causal policy; filters and what shapes a law are the target's alone."""
        kind = self._able("sampled" if asks in ("filtered", "shaped") else asks)[0]
        return self._once((sizes, num_chunks, kind), lambda: self._draft(sizes, num_chunks, kind))

    def admit(self, sizes: Sizes) -> Executable:
        """``admit(state, slot, values)``."""

        def build() -> tuple[Any, ...]:
            form = self.form(sizes)
            values = self.put((np.int32(0), slot_values(Request((0,)), 0, form)))
            return admit_program, (form, self.decoder.mesh), (self._state(sizes), *values)

        return self._once(sizes, build)

    def keep(self, sizes: Sizes) -> Executable:
        """``keep(state, pool, copies)``."""

        def build() -> tuple[Any, ...]:
            args = self._state(sizes), self._pool(), self.copies(sizes, 0, Kept())
            return keep_program, (self.form(sizes), self.pool, self.decoder.mesh), args

        return self._once(("keep", sizes), build)

    def restore(self, sizes: Sizes) -> Executable:
        """``restore(weights, state, pool, copies)``."""

        def build() -> tuple[Any, ...]:
            args = self._state(sizes), self._pool(), self.copies(sizes, 0, NOTHING)
            parts = self.form(sizes), self.pool, self.decoder.mesh
            return restore_program, parts, (self.decoder.weights, *args)

        return self._once(("restore", sizes), build)

    def move(self, old: Sizes, new: Sizes) -> Executable:
        """``move(state, origin_B)``."""

        def build() -> tuple[Any, ...]:
            origin_B = np.zeros(new.slots * num_shards(self.decoder.mesh), np.int32)
            parts = self.form(new), self.decoder.mesh
            moving = without_pages(self._state(old))
            return move_program, parts, (moving, self.put(origin_B, BY_SLOT))

        run = self._once((old, new), build)

        def moved(state: DecodeState, origin_B: jax.Array) -> DecodeState:
            return with_pages_of(run(without_pages(state), origin_B), state)

        return moved

    def _once(self, key: Any, build: Callable[[], tuple[Any, ...]]) -> Executable:
        """The executable of a program, of whose parts and arguments ``build`` tells."""
        if key not in self._known:
            make, parts, args = build()
            self._known[key] = program_of(make, parts, jax.tree.map(_abstract, args))
        return self._known[key].executable()

    def _config(self, num_draft: int, kind: Asks) -> RoundConfig:
        policy, kernels = self.policy, self.config.kernels
        assert kernels != "auto"  # whoever made the configuration has chosen
        return RoundConfig(
            target=self.decoder.target,
            drafter=self.decoder.drafter,
            num_draft=num_draft,
            threshold=policy.threshold if num_draft else 0.0,
            gate=policy.gate if num_draft else 0.0,
            acceptance=self.config.acceptance,
            lengths=policy.lengths if num_draft else None,
            draft_law=self.config.draft_law if num_draft else None,
            kernels=kernels,
            asks=kind,
        )

    # What programs are given.

    def form(self, sizes: Sizes) -> StateConfig:
        """Of a state over all data shards."""
        num_slots = sizes.slots * num_shards(self.decoder.mesh)
        return state_config(self.decoder, num_slots, sizes.positions, self.config)

    def any_pages(self, sizes: Sizes) -> np.ndarray | None:
        """int32 [B, X]: pages for all slots, each its own as far as there are enough of them; None
        for a state without pages."""
        if not self.config.pages:
            return None
        shards = num_shards(self.decoder.mesh)
        columns, pages = pages_for(sizes.positions), self.config.pages // shards
        page_BX = np.arange(sizes.slots * columns, dtype=np.int32).reshape(sizes.slots, columns)
        return np.tile(page_BX % pages, (shards, 1))

    def new_state(self, sizes: Sizes) -> DecodeState:
        """A state without requests."""
        return make_state((), self.form(sizes), self.decoder.mesh)

    @functools.cached_property
    def pool(self) -> PoolConfig | None:
        """The form of the memory for prefixes; None where none are stored."""
        largest = self.form(self.sizes()[-1])
        return plan_pool(largest, self.config.prefix_bytes, num_shards(self.decoder.mesh))

    def new_pool(self) -> Pool:
        """Memory in which no prefix is stored."""
        assert self.pool is not None
        pool: Pool = empty_buffers(declare_pool(self.pool), self.decoder.mesh)
        return pool

    def copies(self, sizes: Sizes, slot: int, what: Kept | Prefix) -> Copies:
        """What is copied out of a slot, counted over all data shards, or into one."""
        shards, longest = num_shards(self.decoder.mesh), pages_for(self.ladder.positions[-1])
        shard = slot // sizes.slots
        page_DX = np.zeros((shards, longest), np.int32)
        page_DX[shard, : len(what.pages)] = what.pages

        def only(value: int, others: int = 0) -> np.ndarray:
            return np.where(np.arange(shards) == shard, value, others).astype(np.int32)

        first, count, copy = 0, 0, NOTHING.copy
        if isinstance(what, Kept):
            first = what.first
        else:
            count, copy = what.count, what.copy
        return self.put(
            Copies(
                slot_D=only(slot % sizes.slots),
                first_D=only(first),
                count_D=only(len(what.pages)),
                page_DX=page_DX,
                snapshot_D=only(what.snapshot, -1),
                read_D=only(count),
                from_D=only(copy[0], -1),
                to_D=only(copy[1], -1),
            ),
            BY_SLOT,
        )

    def put(self, values: Any, spec: PartitionSpec = EVERYWHERE) -> Any:
        """Small values of the host on the devices, explicitly."""
        mesh = self.decoder.mesh
        if mesh is None:
            return jax.device_put(values)
        return place(values, NamedSharding(mesh, spec))

    def round_input(self, plan: HostPlan, temperature_BG: np.ndarray | None) -> RoundInput:
        """A plan on the devices; ``temperature_BG`` as in :class:`RoundInput`.

        What is as it was in the round before is there already.
        """
        given = vars(round_input(plan, temperature_BG))
        return RoundInput(**{name: self.placed(name, value) for name, value in given.items()})

    def placed(self, name: str, value: Any) -> Any:
        """A field of :class:`RoundInput` on the devices."""
        before, there = self._placed.get(name, (None, None))
        if not _same(before, value):
            there = self.put(value, getattr(GIVEN, name))
            self._placed[name] = value, there
        return there

    def idle_input(self, shape: Shape) -> RoundInput:
        """What a round is told where no slot is taken; drafts, if they are given, are zeros."""

        def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)

        return jax.tree.map(fill, self._given(shape))

    def _given(self, shape: Shape, kind: Asks = "greedy") -> RoundInput:
        shards, drafter, temperature_BG = num_shards(self.decoder.mesh), self.decoder.drafter, None
        pages = self.any_pages(shape.sizes)
        plan = HostPlan(0, (), (), frozenset(), ((),) * shards, shape, pages)
        if drafter is not None:
            size = shape.sizes.slots * shards, drafter.block_size
            temperature_BG = np.zeros(size, np.float32)
        given = jax.tree.map(_abstract, self.round_input(plan, temperature_BG))
        if kind == "shaped":
            count, tokens = shape.sizes.slots * shards, self.decoder.target.vocab_size
            shaping, masks = shaping_of({}, count), no_masks(count, shape.num_draft + 1, tokens)
            told = {"shaping": self.put(shaping, BY_SLOT), "masks": self.put(masks, BY_SLOT)}
            given = given.replace(**jax.tree.map(_abstract, told))
        if (self.policy.kind == "causal" or kind == "shaped") and shape.num_draft:
            make, parts, args = self._draft(shape.sizes, shape.num_chunks, self.kinds[0])
            block, _ = make(*parts).eval_shape(*args)
            if self.decoder.mesh is not None:
                lies = jax.tree.broadcast(block_shardings(*parts), block)
                block = jax.tree.map(
                    lambda leaf, sharding: leaf.update(sharding=sharding), block, lies
                )
            given = given.replace(block=block)
        return given

    def _draft(self, sizes: Sizes, num_chunks: int, kind: Asks) -> tuple[Any, ...]:
        """The program of :meth:`draft` and its arguments."""
        given = self._given(Shape(sizes, 0, sizes.slots, num_chunks))
        steps_per_s_T = None
        if self.policy.kind == "causal":
            most = self.ladder.drafted_rows(sizes.slots, 0)[-1]
            steps_per_s_T = self.put(np.zeros(most + 1, np.float32))
        parts = self._config(self.policy.num_draft, kind), self.form(sizes), self.decoder.mesh
        args = self.decoder.weights, self._state(sizes), given, steps_per_s_T
        return draft_program, parts, args

    def _pool(self) -> Pool:
        assert self.pool is not None
        pool: Pool = abstract_buffers(declare_pool(self.pool), self.decoder.mesh)
        return pool

    def _state(self, sizes: Sizes) -> DecodeState:
        state: DecodeState = abstract_buffers(declare_state(self.form(sizes)), self.decoder.mesh)
        return state


def _kinds() -> tuple[Asks, ...]:
    return ("any", "shaped") if jax.default_backend() == "cpu" else ASKS


def _same(before: Any, value: Any) -> bool:
    """Whether two trees of arrays are equal."""
    forms: tuple[Any, Any] = jax.tree.structure(before), jax.tree.structure(value)
    leaves = zip(jax.tree.leaves(before), jax.tree.leaves(value), strict=False)
    return bool(forms[0] == forms[1]) and all(np.array_equal(*pair) for pair in leaves)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    on_mesh = sharding if isinstance(sharding, NamedSharding) else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_mesh)
