"""The jitted entry points: one program for each size, with a donated state.

On a (data, tensor) mesh every data shard runs a round of its own slots: what is written here is the
round of one shard, and the sizes of a program (slots, rows, chunks) are those of one shard. Heads,
MLP and vocabulary are left to the partitioner, over the tensor axis. The schedule is computed alike
on all devices of a data shard; nothing is broadcast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dspark_jax.engine.inputs import RoundConfig, RoundInput, RoundReport
from dspark_jax.engine.round import decode_round, draft_ahead
from dspark_jax.engine.state import DecodeState, admit, move, state_shardings

BY_SLOT, EVERYWHERE = PartitionSpec("data"), PartitionSpec()
IN_CACHE = PartitionSpec(None, "data")  # behind the layers, which are stacked on a mesh
_STATE_SPECS: dict[str, Any] = dict.fromkeys(DecodeState.__dataclass_fields__, BY_SLOT)
STATE = DecodeState(**_STATE_SPECS | {"target_cache": IN_CACHE, "context_cache": IN_CACHE})
_GIVEN_SPECS: dict[str, Any] = dict.fromkeys(RoundInput.__dataclass_fields__, BY_SLOT)
GIVEN = RoundInput(**_GIVEN_SPECS)


def num_shards(mesh: Mesh | None) -> int:
    """Parts that the slots are split into."""
    return 1 if mesh is None else int(mesh.shape["data"])


def place_state(state: DecodeState, mesh: Mesh | None) -> DecodeState:
    """A new state on its devices."""
    return state if mesh is None else jax.device_put(state, state_shardings(state, mesh))


@functools.lru_cache(maxsize=256)
def round_program(
    cfg: RoundConfig, num_rows: int, rows_per_chunk: int, mesh: Mesh | None
) -> Callable[..., tuple[DecodeState, RoundReport]]:
    """``decode_round(weights, state, given)``."""
    step = functools.partial(
        decode_round, cfg=cfg, num_rows=num_rows, rows_per_chunk=rows_per_chunk
    )
    if mesh is not None:
        step = _by_shard(step, mesh, (EVERYWHERE, STATE, GIVEN), (STATE, BY_SLOT))
    return jax.jit(step, donate_argnums=1)


@functools.lru_cache(maxsize=64)
def draft_program(cfg: RoundConfig, mesh: Mesh | None) -> Callable[..., tuple[Any, jax.Array]]:
    """``draft_ahead(weights, state, given, steps_per_s_T)``."""
    step = functools.partial(draft_ahead, cfg=cfg)
    if mesh is None:
        return jax.jit(step)
    sharded = _by_shard(step, mesh, (EVERYWHERE, STATE, GIVEN, EVERYWHERE), BY_SLOT)
    return jax.jit(sharded, out_shardings=NamedSharding(mesh, BY_SLOT))


@functools.lru_cache(maxsize=8)
def admit_program(mesh: Mesh | None) -> Callable[..., DecodeState]:
    """``admit(state, slot, values)``."""
    return jax.jit(functools.partial(_pinned, admit, mesh), donate_argnums=0)


@functools.lru_cache(maxsize=64)
def move_program(num_positions: int, mesh: Mesh | None) -> Callable[..., DecodeState]:
    """``move(state, origin_B)``; slots keep to their shard, by their numbers within it."""
    step = functools.partial(move, num_positions=num_positions)
    if mesh is not None:
        step = _by_shard(step, mesh, (STATE, BY_SLOT), STATE)
    return jax.jit(step)


def _by_shard(step: Any, mesh: Mesh, takes: Any, gives: Any) -> Any:
    """A step of one data shard as a step of all of them."""
    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=takes, out_specs=gives, axis_names={"data"}, check_vma=False
    )
    return functools.partial(_pinned, sharded, mesh)


def _pinned(step: Any, mesh: Mesh | None, *args: Any) -> Any:
    """``step(*args)`` whose state lies where every state of its form does."""
    out = step(*args)
    if mesh is None:
        return out

    def pin(value: Any) -> Any:
        if not isinstance(value, DecodeState):
            return value
        return jax.lax.with_sharding_constraint(value, state_shardings(value, mesh))

    return jax.tree.map(pin, out, is_leaf=lambda value: isinstance(value, DecodeState))
