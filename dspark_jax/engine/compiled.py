"""The compiled programs of an engine: every size of its ladder, ahead of time.

Executables are shared by all engines of a process that ask for the same program and shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from dspark_jax.engine.config import EngineConfig, Ladder
from dspark_jax.engine.decoder import Decoder, state_config
from dspark_jax.engine.inputs import RoundConfig
from dspark_jax.engine.plan import Chunk, HostPlan, Shape, Sizes, round_input
from dspark_jax.engine.policy import Policy
from dspark_jax.engine.programs import (
    BY_SLOT,
    EVERYWHERE,
    admit_program,
    move_program,
    num_shards,
    place_state,
    round_program,
)
from dspark_jax.engine.state import (
    DecodeState,
    StateConfig,
    make_state,
    slot_values,
    state_shardings,
)


@dataclass(frozen=True, eq=False)
class Programs:
    """Executables by size, compiled when they are first asked for, or all at once.

    Attributes:
        decoder: whose models they run; the weights are arguments of every call.
        config, policy, ladder: of the engine.
    """

    decoder: Decoder
    config: EngineConfig
    policy: Policy
    ladder: Ladder
    _ready: dict[Any, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Keep the shapes of the weights alone."""
        abstract = jax.tree.map(_abstract, self.decoder.weights)
        object.__setattr__(self, "decoder", replace(self.decoder, weights=abstract))

    def compile(self) -> int:
        """Compile everything, with a progress bar; returns how many programs there are."""
        sizes = [Sizes(s, p) for s in self.ladder.slots for p in self.ladder.positions]
        moves = [
            (old, new)
            for old in sizes
            for new in sizes
            if (old.slots == new.slots) != (old.positions == new.positions)
        ]
        todo: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        todo += [(self.round, (shape,)) for size in sizes for shape in self.shapes(size)]
        todo += [(self.admit, (size,)) for size in sizes]
        todo += [(self.move, pair) for pair in moves]
        for program, args in tqdm(todo, desc="compile", unit="program", disable=None):
            program(*args)
        return len(self._ready)

    def shapes(self, sizes: Sizes) -> list[Shape]:
        """Of all rounds of a state of these sizes.

        With pieces of prompts a round is long in any case: it drafts with all rows or not at all.
        """
        drafted = self.ladder.rows(sizes.slots)
        shapes = [Shape(sizes, self.policy.num_draft, rows, 0) for rows in drafted]
        for chunks in (0, *self.ladder.chunks):
            shapes.append(Shape(sizes, 0, sizes.slots, chunks))
            if drafted and chunks:
                shapes.append(Shape(sizes, self.policy.num_draft, drafted[-1], chunks))
        return shapes

    def round(self, shape: Shape) -> Callable[..., Any]:
        """``decode_round(weights, state, given)``."""
        if shape not in self._ready:
            policy, models = self.policy, self.decoder
            threshold = policy.threshold if shape.num_draft else 0.0
            cfg = RoundConfig(
                models.target, models.drafter, shape.num_draft, threshold, self.config.acceptance
            )
            rows_per_chunk = self.config.chunk_rows if shape.num_chunks else 0
            program = round_program(cfg, shape.num_rows, rows_per_chunk, models.mesh)
            chunks = ((Chunk(0, 0, 0, False),) * shape.num_chunks,) * num_shards(models.mesh)
            given = round_input(HostPlan(0, (), (), frozenset(), chunks, shape))
            state = self._abstract_state(shape.sizes)
            self._ready[shape] = _compiled(program, models.weights, state, self.put(given, BY_SLOT))
        return self._ready[shape]

    def admit(self, sizes: Sizes) -> Callable[..., Any]:
        """``admit(state, slot, values)``."""
        if sizes not in self._ready:
            given = np.int32(0), slot_values(None, -1, self.form(sizes))
            self._ready[sizes] = _compiled(
                admit_program(self.decoder.mesh),
                self._abstract_state(sizes),
                *self.put(given, EVERYWHERE),
            )
        return self._ready[sizes]

    def move(self, old: Sizes, new: Sizes) -> Callable[..., Any]:
        """``move(state, origin_B)``."""
        if (old, new) not in self._ready:
            mesh = self.decoder.mesh
            origin_B = np.zeros(new.slots * num_shards(mesh), np.int32)
            self._ready[old, new] = _compiled(
                move_program(new.positions, mesh),
                self._abstract_state(old),
                self.put(origin_B, BY_SLOT),
            )
        return self._ready[old, new]

    def form(self, sizes: Sizes) -> StateConfig:
        """Of a state over all data shards."""
        num_slots = sizes.slots * num_shards(self.decoder.mesh)
        return state_config(self.decoder, num_slots, sizes.positions, self.config.stop_ids)

    def new_state(self, sizes: Sizes) -> DecodeState:
        """A state without requests."""
        return place_state(make_state((), self.form(sizes)), self.decoder.mesh)

    def put(self, values: Any, spec: PartitionSpec) -> Any:
        """Small values of the host on the devices, explicitly."""
        mesh = self.decoder.mesh
        return jax.device_put(values, None if mesh is None else NamedSharding(mesh, spec))

    def _abstract_state(self, sizes: Sizes) -> DecodeState:
        state: DecodeState = jax.eval_shape(lambda: make_state((), self.form(sizes)))
        if self.decoder.mesh is None:
            return state
        shardings = state_shardings(state, self.decoder.mesh)
        placed: DecodeState = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            state,
            shardings,
        )
        return placed


def _compiled(program: Any, *args: Any) -> Any:
    leaves, structure = jax.tree.flatten(jax.tree.map(_abstract, args))
    return _compile(program, structure, tuple(leaves))


@functools.lru_cache(maxsize=1024)
def _compile(program: Any, structure: Any, leaves: tuple[jax.ShapeDtypeStruct, ...]) -> Any:
    return program.lower(*structure.unflatten(leaves)).compile()


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    on_mesh = sharding if isinstance(sharding, NamedSharding) else None
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_mesh)
