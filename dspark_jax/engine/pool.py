"""The memory of stored prefixes on the devices: out of a slot, and into one.

What of the caches of target and drafter can be cut into pages of positions is copied page by page.
The rest, rings and what else only knows the latest positions, is copied whole. What follows from
the tokens is not stored: a drafter makes it again. All of it is read off the declared state, so
that no family is named here. On a mesh every data shard has a pool of its own, of which the
functions here see one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.axes import Buffer
from dspark_jax.engine.inputs import Weights
from dspark_jax.engine.state import DecodeState, StateConfig, declare_state, fitted
from dspark_jax.models.cache import Rows
from dspark_jax.models.drafters.table import drafter_of
from pallas_kernels.ragged_attention.pages import PAGE

Pool = tuple[Any, ...]  # an array or None for every leaf of the caches
# Of a leaf: cut into pages, copied whole, made again from the tokens, or in pages of the slots.
Form = Literal["paged", "snapshot", "made", "shared"]


@dataclass(frozen=True)
class PoolConfig:
    """The form of a pool.

    Attributes:
        largest: form of the largest state of the engine.
        pages: that there is room for, over all data shards.
        snapshots: likewise.
    """

    largest: StateConfig
    pages: int
    snapshots: int


@struct.dataclass
class Copies:
    """What is copied between a slot and the pool; every field has one entry for each data shard.

    Attributes:
        slot_D: int32 slots, counted within the shard.
        first_D: int32 page of the text that comes first.
        count_D: int32 pages; 0 for none.
        page_DX: int32 where they lie in the pool.
        snapshot_D: int32 where a snapshot lies; -1 for none.
        read_D: int32 positions of the text that are there now; 0 for none.
        from_D: int32 pages of slots that are copied; -1 for none.
        to_D: int32 pages that they are copied to.
    """

    slot_D: Any
    first_D: Any
    count_D: Any
    page_DX: Any
    snapshot_D: Any
    read_D: Any
    from_D: Any
    to_D: Any


def pool_forms(largest: StateConfig) -> list[tuple[Buffer, Form]]:
    """Every leaf of the caches of a state, and how it is stored."""
    declared = _caches(declare_state(largest))
    in_pages = any("B" not in buffer.axes for buffer in declared)

    def form(buffer: Buffer) -> Form:
        if "B" not in buffer.axes:
            return "shared"
        if buffer.follows:
            return "made"
        span = buffer.span
        whole = "S" in buffer.axes and buffer.shape[buffer.axes.index("S")] == max(
            1, largest.num_positions // span
        )
        cut = whole and (PAGE % span == 0 or span % PAGE == 0)
        return "paged" if cut and not in_pages else "snapshot"

    return [(buffer, form(buffer)) for buffer in declared]


def declare_pool(cfg: PoolConfig) -> tuple[Buffer | None, ...]:
    """Declaration of the pool; its leaves have places (Q) where those of a state have slots."""

    def declare(buffer: Buffer, form: Form) -> Buffer | None:
        if form not in ("paged", "snapshot"):
            return None
        sizes = dict(zip(buffer.axes, buffer.shape, strict=True))
        sizes["B"] = cfg.pages if form == "paged" else cfg.snapshots
        if form == "paged":
            sizes["S"] = _places(buffer)
        shape = tuple(sizes[letter] for letter in buffer.axes)
        return replace(buffer, axes=buffer.axes.replace("B", "Q"), shape=shape)

    return tuple(declare(*one) for one in pool_forms(cfg.largest))


def plan_pool(largest: StateConfig, limit: int, num_shards: int) -> PoolConfig | None:
    """The pool that fits into a number of bytes; None where that is 0. Where there are both pages
    and snapshots, each has half of it.

    Raises:
        ValueError: not even one of each fits for every data shard.
    """
    if not limit:
        return None
    one = (_page_bytes(largest), pool_bytes(PoolConfig(largest, 0, 1)))
    share = limit // 2 if all(one) else limit
    pages, snapshots = (share // size // num_shards * num_shards if size else 0 for size in one)
    if any(size and not count for size, count in zip(one, (pages, snapshots), strict=True)):
        least = num_shards * max(one) * (2 if all(one) else 1)
        raise ValueError(
            f"prefix_bytes is {limit}: a page of {PAGE} positions takes {one[0]} bytes and what "
            f"cannot be cut into pages {one[1]}, give at least {least}, or 0 for no store"
        )
    pages = min(pages, largest.num_pages) if largest.num_pages else pages
    if not one[0]:  # snapshots alone: nothing bounds the bookkeeping but they
        pages = snapshots * -(-largest.num_positions // PAGE)
    return PoolConfig(largest, pages, snapshots)


def _page_bytes(largest: StateConfig) -> int:
    """Of a page in the pool, or of one of the slots'."""
    shared = [buffer.nbytes for buffer, form in pool_forms(largest) if form == "shared"]
    return sum(shared) // largest.num_pages if shared else pool_bytes(PoolConfig(largest, 1, 0))


def pool_bytes(cfg: PoolConfig) -> int:
    """Bytes over all devices, without pages of slots."""
    return sum(buffer.nbytes for buffer in jax.tree.leaves(declare_pool(cfg)))


def keep(state: DecodeState, pool: Pool, copies: Copies, cfg: PoolConfig) -> Pool:
    """The pool with what is copied out of a slot.

    Args:
        state: not changed.
        pool: donated.
        copies: of one data shard.
        cfg: of the pool; static.
    """
    leaves, forms, slot = _caches(state), pool_forms(cfg.largest), copies.slot_D[0]

    def page(number: jax.Array, pool: Pool) -> Pool:
        at, place = copies.first_D[0] + number, copies.page_DX[0, number]

        def put(leaf: Any, held: Any, buffer: Buffer) -> Any:
            part = jax.lax.dynamic_slice(leaf, *_page(buffer, leaf, slot, at))
            return _put(held, part, buffer.axes, place)

        return _change(put, pool, leaves, forms, "paged")

    def snapshot(_: Any, pool: Pool) -> Pool:
        def put(leaf: Any, held: Any, buffer: Buffer) -> Any:
            part = fitted(_row(leaf, buffer.axes, slot), buffer)
            return _put(held, part, buffer.axes, copies.snapshot_D[0])

        return _change(put, pool, leaves, forms, "snapshot")

    pool = jax.lax.fori_loop(0, copies.count_D[0], page, pool)
    return jax.lax.fori_loop(0, _once(copies.snapshot_D[0] >= 0), snapshot, pool)


def restore(
    weights: Weights,
    state: DecodeState,
    pool: Pool,
    copies: Copies,
    form: StateConfig,
    cfg: PoolConfig,
) -> DecodeState:
    """The state with what is copied into a slot, in which the request is already.

    Args:
        weights: of the drafter, which makes again what follows from the tokens.
        state: donated.
        pool: not changed.
        copies: of one data shard.
        form: of the state; static.
        cfg: of the pool; static.
    """
    forms, slot = pool_forms(cfg.largest), copies.slot_D[0]

    def page(number: jax.Array, leaves: Pool) -> Pool:
        at, place = copies.first_D[0] + number, copies.page_DX[0, number]

        def put(held: Any, leaf: Any, buffer: Buffer) -> Any:
            start, sizes = _page(buffer, leaf, slot, at)
            part, axis = _row(held, buffer.axes, place), buffer.axes.index("S")
            if buffer.span > PAGE:  # of what is not complete there may be no place yet
                there = jax.lax.dynamic_slice(leaf, start, sizes)
                part = jnp.where(start[axis] < leaf.shape[axis], part, there)
            return jax.lax.dynamic_update_slice(leaf, part, start)

        return _change(put, leaves, pool, forms, "paged")

    def snapshot(_: Any, leaves: Pool) -> Pool:
        def put(held: Any, leaf: Any, buffer: Buffer) -> Any:
            part = _row(held, buffer.axes, copies.snapshot_D[0])
            return _put(leaf, fitted(part, replace(buffer, shape=leaf.shape)), buffer.axes, slot)

        return _change(put, leaves, pool, forms, "snapshot")

    def part_of_page(_: Any, leaves: Pool) -> Pool:
        def put(_: Any, leaf: Any, buffer: Buffer) -> Any:
            axis, start, end = buffer.axes.index("Q"), copies.from_D[0], copies.to_D[0]
            held = jax.lax.dynamic_slice_in_dim(leaf, start, 1, axis)
            return jax.lax.dynamic_update_slice_in_dim(leaf, held, end, axis)

        return _change(put, leaves, pool, forms, "shared")

    leaves = jax.lax.fori_loop(0, copies.count_D[0], page, tuple(_caches(state)))
    leaves = jax.lax.fori_loop(0, _once(copies.to_D[0] >= 0), part_of_page, leaves)
    leaves = jax.lax.fori_loop(0, _once(copies.snapshot_D[0] >= 0), snapshot, leaves)
    structure = jax.tree.structure((state.target_cache, state.context_cache))
    target_cache, context_cache = jax.tree.unflatten(structure, leaves)
    context_cache = _made_again(weights, state, context_cache, copies, form)
    caches = {"target_cache": target_cache, "context_cache": context_cache}
    return state.replace(**caches)  # type: ignore[attr-defined]


def _made_again(
    weights: Weights, state: DecodeState, context: Any, copies: Copies, form: StateConfig
) -> Any:
    """The drafter's context with what follows from the tokens, as if it had observed them."""
    declared = declare_state(form).context_cache
    if (
        form.drafter is None
        or weights.vocab is None
        or not any(buffer.follows for buffer in jax.tree.leaves(declared))
    ):
        return context
    slots, slot = state.length_B.shape[0], copies.slot_D[0]
    position_S = jnp.arange(form.num_positions, dtype=jnp.int32)
    slot_S = jnp.where(position_S < copies.read_D[0], slot, slots)
    rows = Rows(state.token_BS[slot], slot_S, position_S)
    feature_TFD = jnp.zeros((len(position_S), 0, 0))  # what needs features does not follow
    given = weights.drafter, weights.vocab, context, rows, feature_TFD
    known = state.token_BS, state.length_B, form.drafter
    seen = drafter_of(form.drafter).observe(*given, *known)
    return jax.tree.map(lambda b, old, new: new if b.follows else old, declared, context, seen)


def _caches(state: DecodeState) -> list[Any]:
    """The leaves of both caches."""
    return jax.tree.leaves((state.target_cache, state.context_cache))


def _change(put: Any, changed: Pool, others: Any, forms: Any, wanted: Form) -> Pool:
    """The leaves of one form as ``put(other, leaf, buffer)``; the rest as they are."""
    every = zip(changed, others, forms, strict=True)
    return tuple(
        put(other, leaf, buffer) if form == wanted else leaf
        for leaf, other, (buffer, form) in every
    )


def _places(buffer: Buffer) -> int:
    """Places of a page."""
    return max(1, PAGE // buffer.span)


def _page(buffer: Buffer, leaf: Any, slot: Any, page: Any) -> tuple[list[Any], list[int]]:
    """Where a page of a slot begins in a leaf, and its sizes."""
    begin = {"B": slot, "S": page * PAGE // buffer.span}
    sizes = {"B": 1, "S": _places(buffer)}
    start = [jnp.int32(begin.get(letter, 0)) for letter in buffer.axes]
    return start, [sizes.get(letter, n) for letter, n in zip(buffer.axes, leaf.shape, strict=True)]


def _row(leaf: Any, axes: str, place: Any) -> Any:
    """What lies at one slot, or at one place of the pool."""
    return jax.lax.dynamic_slice_in_dim(leaf, place, 1, axes.index("B"))


def _put(leaf: Any, row: Any, axes: str, place: Any) -> Any:
    return jax.lax.dynamic_update_slice_in_dim(leaf, row, place, axes.index("B"))


def _once(wanted: jax.Array) -> jax.Array:
    """Turns of a loop that is a condition: its state is changed in place."""
    return wanted.astype(jnp.int32)
