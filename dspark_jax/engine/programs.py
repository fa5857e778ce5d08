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

from dspark_jax.axes import declared_shardings, partition, spans_processes
from dspark_jax.engine.inputs import RoundConfig, RoundInput, RoundReport
from dspark_jax.engine.pool import PoolConfig, declare_pool, keep, restore
from dspark_jax.engine.round import decode_round, draft_ahead
from dspark_jax.engine.state import (
    DecodeState,
    StateConfig,
    admit,
    declare_state,
    move,
    without_pages,
)
from dspark_jax.models.drafters.heads import DraftBlock
from pallas_kernels.dispatch import program_options

BY_SLOT, EVERYWHERE = PartitionSpec("data"), PartitionSpec()
_GIVEN_SPECS: dict[str, Any] = dict.fromkeys(RoundInput.__dataclass_fields__, BY_SLOT)
GIVEN = RoundInput(**_GIVEN_SPECS)


def num_shards(mesh: Mesh | None) -> int:
    """Parts that the slots are split into."""
    return 1 if mesh is None else int(mesh.shape["data"])


def round_program(
    cfg: RoundConfig, form: StateConfig, num_rows: int, rows_per_chunk: int, mesh: Mesh | None
) -> Callable[..., tuple[DecodeState, RoundReport]]:
    """``decode_round(weights, state, given)``."""
    step = functools.partial(
        decode_round, cfg=cfg, num_rows=num_rows, rows_per_chunk=rows_per_chunk
    )
    if mesh is not None:
        declared = declare_state(form)
        split = _by_data(declared, mesh)
        step = _by_shard(step, declared, mesh, (EVERYWHERE, split, GIVEN), (split, BY_SLOT))
        step = functools.partial(_readable, step, mesh)
    return jax.jit(step, donate_argnums=1, compiler_options=program_options())


def _readable(step: Any, mesh: Mesh, *args: Any) -> Any:
    """``step(*args)``, of which a host reads all but the state, on whichever devices it has."""
    state, report = step(*args)
    if spans_processes(mesh):
        report = jax.lax.with_sharding_constraint(report, NamedSharding(mesh, EVERYWHERE))
    return state, report


def draft_program(
    cfg: RoundConfig, form: StateConfig, mesh: Mesh | None
) -> Callable[..., tuple[Any, jax.Array]]:
    """``draft_ahead(weights, state, given, steps_per_s_T)``."""
    step = functools.partial(draft_ahead, cfg=cfg)
    if mesh is None:
        return jax.jit(step, compiler_options=program_options())
    declared = declare_state(form)
    takes = EVERYWHERE, _by_data(declared, mesh), GIVEN, EVERYWHERE
    sharded = _by_shard(step, declared, mesh, takes, BY_SLOT)
    read = EVERYWHERE if spans_processes(mesh) else BY_SLOT
    lies = block_shardings(cfg, form, mesh), NamedSharding(mesh, read)
    return jax.jit(sharded, out_shardings=lies)


def block_shardings(cfg: RoundConfig, form: StateConfig, mesh: Mesh) -> DraftBlock:
    """Where drafts lie that are handed to a round: their logits in shards of the vocabulary."""
    assert cfg.drafter is not None
    shape = form.num_slots, cfg.drafter.block_size, cfg.drafter.sizes["U"]
    by_slot = NamedSharding(mesh, BY_SLOT)
    split: Any = NamedSharding(mesh, partition("BGU", shape, mesh))
    return DraftBlock(by_slot, by_slot, split, by_slot, by_slot)  # type: ignore[arg-type]


def admit_program(form: StateConfig, mesh: Mesh | None) -> Callable[..., DecodeState]:
    """``admit(state, slot, values)``."""
    return jax.jit(functools.partial(_pinned, admit, declare_state(form), mesh), donate_argnums=0)


def move_program(form: StateConfig, mesh: Mesh | None) -> Callable[..., DecodeState]:
    """``move(state, origin_B)`` to a state of this form, both without pages; slots keep to their
    shard, by their numbers within it."""
    step = functools.partial(move, cfg=form)
    if mesh is not None:
        declared = without_pages(declare_state(form))
        split = _by_data(declared, mesh)
        step = _by_shard(step, declared, mesh, (split, BY_SLOT), split)
    return jax.jit(step)


def keep_program(form: StateConfig, cfg: PoolConfig, mesh: Mesh | None) -> Callable[..., Any]:
    """``keep(state, pool, copies)``."""
    step = functools.partial(keep, cfg=cfg)
    if mesh is None:
        return jax.jit(step, donate_argnums=1)
    declared = declare_pool(cfg)
    pool = _by_data(declared, mesh)
    takes = _by_data(declare_state(form), mesh), pool, BY_SLOT
    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=takes, out_specs=pool, axis_names={"data"}, check_vma=False
    )
    lies = declared_shardings(declared, mesh)
    return jax.jit(sharded, donate_argnums=1, out_shardings=lies)


def restore_program(form: StateConfig, cfg: PoolConfig, mesh: Mesh | None) -> Callable[..., Any]:
    """``restore(weights, state, pool, copies)``."""
    step = functools.partial(restore, form=form, cfg=cfg)
    if mesh is not None:
        declared = declare_state(form)
        split = _by_data(declared, mesh)
        takes = EVERYWHERE, split, _by_data(declare_pool(cfg), mesh), BY_SLOT
        step = _by_shard(step, declared, mesh, takes, split)
    return jax.jit(step, donate_argnums=1)


def _by_data(declared: Any, mesh: Mesh) -> Any:
    """How a state, or a pool, is split over the data shards."""
    shardings = declared_shardings(declared, mesh, unused=("fsdp", "tensor"))
    return jax.tree.map(lambda sharding: sharding.spec, shardings)


def _by_shard(step: Any, declared: DecodeState, mesh: Mesh, takes: Any, gives: Any) -> Any:
    """A step of one data shard as a step of all of them."""
    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=takes, out_specs=gives, axis_names={"data"}, check_vma=False
    )
    return functools.partial(_pinned, sharded, declared, mesh)


def _pinned(step: Any, declared: DecodeState, mesh: Mesh | None, *args: Any) -> Any:
    """``step(*args)`` whose state, so declared, lies where every such state does."""
    out = step(*args)
    if mesh is None:
        return out

    def pin(value: Any) -> Any:
        if not isinstance(value, DecodeState):
            return value
        shardings = declared_shardings(declared, mesh)
        return jax.lax.with_sharding_constraint(value, shardings)

    return jax.tree.map(pin, out, is_leaf=lambda value: isinstance(value, DecodeState))
