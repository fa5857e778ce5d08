"""The state of decoding: B slots, their committed tokens, both caches.

``length_B`` is the only truth: ``token_BS[b, :length]`` is committed, the last of it is the anchor,
and both caches are valid below ``length - 1``. Whatever lies behind is garbage by definition:
rejected drafts are never rolled back, they are overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh

from dspark_jax.axes import Buffer, empty_buffers, unstacked
from dspark_jax.config import TargetConfig
from dspark_jax.drafting import AnyDrafterConfig
from dspark_jax.engine.request import Request
from dspark_jax.models.cache import KVCache, Room
from dspark_jax.models.drafters.table import drafter_of
from dspark_jax.models.targets.table import family_of
from dspark_jax.sampling import Sampling


@struct.dataclass
class DecodeState:
    """Everything that a round reads and writes.

    Attributes:
        token_BS: int32 committed tokens; garbage behind ``length_B``.
        length_B: int32 committed tokens of each slot, the anchor included.
        stop_at_B: int32 length at which a slot is done.
        active_B: bool.
        stop_id_BK: int32 ids that end a slot, padded with -1.
        key_B2: uint32 key of each request.
        logprobs_B: bool, whether log-probabilities are wanted.
        generation_B: int32 number of the request in the slot; no two requests share one.
        sampling: temperature and filters of each slot.
        target_cache: what the target keeps of the tokens, as its family declares it.
        context_cache: the drafter's context; None without a drafter.
    """

    token_BS: jax.Array
    length_B: jax.Array
    stop_at_B: jax.Array
    active_B: jax.Array
    stop_id_BK: jax.Array
    key_B2: jax.Array
    logprobs_B: jax.Array
    generation_B: jax.Array
    sampling: Sampling
    target_cache: Any
    context_cache: Any


@dataclass(frozen=True)
class StateConfig:
    """The form of a state; one program is compiled for each.

    Attributes:
        target: its sizes.
        drafter: its sizes; None for plain decoding.
        num_slots: B.
        num_positions: S, room for prompt, new tokens and one block past the limit.
        num_ahead: the most positions that one slot may have been written behind a row that
            attends; see :class:`~dspark_jax.models.cache.Room`.
        num_stop_ids: most stop ids of a request.
        dtypes: of the target's and the drafter's cache.
        stacked: whether their layers are stacked.
        num_pages: Q, pages that all slots share; 0 where each has room for all positions.
    """

    target: TargetConfig
    drafter: AnyDrafterConfig | None
    num_slots: int
    num_positions: int
    num_ahead: int
    num_stop_ids: int
    dtypes: tuple[Any, Any]
    stacked: tuple[bool, bool]
    num_pages: int = 0


def declare_state(cfg: StateConfig) -> DecodeState:
    """Declaration of the whole state: what a free slot holds, and which axis is slots and which
    positions. Sizes, copies, shardings and byte counts of a state all follow from it."""

    def by_slot(dtype: Any, fill: float = 0, axes: str = "B", *sizes: int) -> Any:
        return Buffer(axes, (cfg.num_slots, *sizes), dtype, fill)

    def cache(declare: Any, sizes: Any, which: int) -> Any:
        dtype = cfg.dtypes[which]
        drafts = 0 if cfg.drafter is None else cfg.drafter.block_size
        sizes_of = cfg.num_slots, cfg.num_positions, cfg.num_ahead, dtype, cfg.num_pages, drafts
        room = Room(*sizes_of)
        declared = declare(sizes, room)
        return declared if cfg.stacked[which] else unstacked(declared)

    drafter = cfg.drafter
    return DecodeState(
        token_BS=by_slot(jnp.int32, 0, "BS", cfg.num_positions),
        length_B=by_slot(jnp.int32, 1),
        stop_at_B=by_slot(jnp.int32, 1),
        active_B=by_slot(bool),
        stop_id_BK=by_slot(jnp.int32, -1, "BX", cfg.num_stop_ids),
        key_B2=by_slot(jnp.uint32, 0, "BX", 2),
        logprobs_B=by_slot(bool),
        generation_B=by_slot(jnp.int32, -1),
        sampling=Sampling(
            temperature_B=by_slot(jnp.float32),
            top_k_B=by_slot(jnp.int32),
            top_p_B=by_slot(jnp.float32, 1),
            min_p_B=by_slot(jnp.float32),
        ),
        target_cache=cache(family_of(cfg.target).declare_cache, cfg.target, 0),
        context_cache=None
        if drafter is None
        else cache(drafter_of(drafter).declare_context, drafter, 1),
    )


def slot_values(request: Request, generation: int, cfg: StateConfig) -> dict[str, Any]:
    """What a state holds of a request beside its caches, in numpy."""
    length = len(request.prompt_ids)
    token_S = np.zeros(cfg.num_positions, np.int32)
    token_S[:length] = request.prompt_ids
    stop_id_K = np.full(cfg.num_stop_ids, -1, np.int32)
    stop_id_K[: len(request.stop_ids)] = request.stop_ids
    limits: list[Any] = [np.float32(request.temperature), np.int32(request.top_k)]
    limits += [np.float32(request.top_p), np.float32(request.min_p)]
    return {
        "token_BS": token_S,
        "length_B": np.int32(length),
        "stop_at_B": np.int32(min(length + request.max_new_tokens, cfg.target.max_positions)),
        "stop_id_BK": stop_id_K,
        "key_B2": np.asarray(request.key, np.uint32),
        "logprobs_B": np.bool_(request.logprobs),
        "generation_B": np.int32(generation),
        "sampling": Sampling(*limits),
    }


def make_state(
    requests: Sequence[Request], cfg: StateConfig, mesh: Mesh | None = None
) -> DecodeState:
    """A state with one active slot a request; the remaining slots are free."""
    state: DecodeState = empty_buffers(declare_state(cfg), mesh)
    if not requests:
        return state
    each = [slot_values(request, number, cfg) for number, request in enumerate(requests)]
    values = jax.tree.map(lambda *rows: np.stack(rows), *each)
    return _seat(state, slice(len(requests)), values, True)


def admit(state: DecodeState, slot: jax.Array, values: dict[str, Any]) -> DecodeState:
    """A request into a slot, whoever was there; it is not active before its prompt is read.

    Args:
        state: donated.
        slot: int32 scalar.
        values: of :func:`slot_values`.
    """
    return _seat(state, slot, values, False)


def _seat(state: DecodeState, where: Any, values: dict[str, Any], active: bool) -> DecodeState:
    before = {name: getattr(state, name) for name in values}
    after = jax.tree.map(lambda x_B, x: x_B.at[where].set(x), before, values)
    return state.replace(active_B=state.active_B.at[where].set(active), **after)  # type: ignore[attr-defined]


def without_pages(state: DecodeState) -> DecodeState:
    """A state, or the declaration of one, without the pages of its caches, which nothing moves."""

    def bare(cache: Any) -> Any:
        paged = isinstance(cache, KVCache) and cache.paged
        return cache.replace(k=None, v=None) if paged else cache

    return _map_caches(bare, state)


def with_pages_of(state: DecodeState, other: DecodeState) -> DecodeState:
    """The inverse of :func:`without_pages`: with the pages of another state."""

    def take(cache: Any, there: Any) -> Any:
        return there if isinstance(cache, KVCache) and cache.paged else cache

    return _map_caches(take, state, other)


def _map_caches(function: Any, state: DecodeState, *others: DecodeState) -> DecodeState:
    names = "target_cache", "context_cache"

    def mapped(name: str) -> Any:
        trees = (getattr(one, name) for one in (state, *others))
        return jax.tree.map(function, *trees, is_leaf=lambda node: isinstance(node, KVCache))

    return state.replace(**{name: mapped(name) for name in names})  # type: ignore[attr-defined]


def move(state: DecodeState, origin_B: jax.Array, cfg: StateConfig) -> DecodeState:
    """The state in another form: its slots in another order and number, its positions cut or
    extended.

    Args:
        state: every active slot that is kept is shorter than the new positions; without pages.
        origin_B: int32, the old slot that each new one continues; -1 for a free slot.
        cfg: of the new state; static.
    """

    def place(buffer: Buffer, leaf: jax.Array) -> jax.Array:
        leaf = jnp.take(leaf, origin_B, axis=buffer.axes.index("B"), mode="clip")
        return fitted(leaf, buffer)

    moved: DecodeState = jax.tree.map(place, without_pages(declare_state(cfg)), state)
    return moved.replace(active_B=moved.active_B & (origin_B >= 0))  # type: ignore[attr-defined]


def fitted(leaf: jax.Array, buffer: Buffer) -> jax.Array:
    """A leaf of some slots with its positions cut or extended to those of a declared one."""
    if "S" not in buffer.axes:
        return leaf
    axis = buffer.axes.index("S")
    old, new = leaf.shape[axis], buffer.shape[axis]
    if new <= old:
        return jax.lax.slice_in_dim(leaf, 0, new, axis=axis)
    widths = [(0, new - old if place == axis else 0) for place in range(leaf.ndim)]
    return jnp.pad(leaf, widths, constant_values=buffer.fill)
