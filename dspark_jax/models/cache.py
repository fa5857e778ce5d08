"""Key/value caches: the target's, and the drafter's context.

Position ``p`` of slot ``b`` lives at ``[b, :, p]`` of a layer that sees everything, or in a page of
its own (:mod:`pallas_kernels.ragged_attention.pages`), so that memory follows the text and nothing
moves when it grows; and at ``[b, :, p % S]`` of a layer with a sliding window, whose S positions
are a ring. The functions here and ``ragged_attention`` are the only ones that know it. A cache is
valid up to the length that the decode state names; whatever lies behind is garbage, overwritten
before anyone attends to it. A ring has room for a window and for all that may lie behind a row when
it attends, so that what was rejected never stands where something is still seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.axes import MESH_RULES, Buffer
from pallas_kernels.ragged_attention.pages import PAGE


@struct.dataclass
class Rows:
    """A flat ragged batch of tokens, prefill and verification alike.

    Attributes:
        token_T: int32 token ids.
        slot_T: int32 slots; B marks a padding row.
        position_T: int32 positions in the slot's sequence; one slot's are contiguous.
        runs: of the last rows: how many chunks of how many rows they are, for whoever reads them
            again; None for none.
        most: rows that one slot has of the others, at most; None where nobody says.
    """

    token_T: jax.Array
    slot_T: jax.Array
    position_T: jax.Array
    runs: tuple[int, int] | None = struct.field(pytree_node=False, default=None)
    most: int | None = struct.field(pytree_node=False, default=None)


@struct.dataclass
class Beside:
    """Rows of every slot that are read without being kept: they see the slot's text, and of each
    other what they are told to.

    Attributes:
        token_BW: int32 token ids.
        position_BW: int32 positions.
        limit_B: int32: they see the positions before it; under a window those that a row standing
            there would see.
        seen_WW: bool, which rows each row sees, of every slot alike; itself at least.
    """

    token_BW: jax.Array
    position_BW: jax.Array
    limit_B: jax.Array
    seen_WW: jax.Array


@struct.dataclass
class KVCache:
    """Keys and values of one stack of layers.

    Heads come before positions, so that attention finds what a head reads in one piece: a CPU
    would copy the whole cache every time otherwise (7 instead of 1 ms for 32 slots of 512).

    Attributes:
        k: keys [L, B, K, S, H], or a tuple of L arrays [B, K, S, H] for unstacked layers; of a
            cache in pages [L, Q, K, PAGE, H].
        v: values, likewise.
        page_BX: int32 pages of every slot; None for a cache without pages, and while it is stored.
        paged: whether it lies in pages.
    """

    k: Any
    v: Any
    page_BX: Any = None
    paged: bool = struct.field(pytree_node=False, default=False)


RING_STEP = PAGE
_NO_PAGE = 2**31 - 1  # nor slot: what is written there is dropped


@dataclass(frozen=True)
class Room:
    """What a cache is declared for.

    Attributes:
        slots: B.
        positions: S of a layer that sees everything.
        ahead: the most positions that one slot may have been written behind a row that attends:
            a block, or all chunks of a round.
        dtype: of keys and values.
        pages: Q, pages that layers that see everything share; 0 where every slot has room for all
            positions.
        drafts: the most positions of a slot that may be written and then rejected: a block. None
            for as many as ``ahead``.
    """

    slots: int
    positions: int
    ahead: int
    dtype: Any
    pages: int = 0
    drafts: int | None = None

    def length(self, window: int) -> int:
        """S of a layer that sees so many positions; 0 for all."""
        ring = -(-(window + self.ahead) // RING_STEP) * RING_STEP
        return min(self.positions, ring) if window else self.positions

    def tail(self, count: int) -> int:
        """S of a ring of the last ``count`` positions that are not rejected."""
        drafts = self.ahead if self.drafts is None else self.drafts
        return min(self.positions, count + drafts + 1)


def declare_kv(num_layers: int, num_heads: int, head_dim: int, window: int, room: Room) -> KVCache:
    """Declaration of the keys and values of a stack of layers.

    Args:
        num_layers: L.
        num_heads: K.
        head_dim: H.
        window: positions that they see; 0 for all.
        room: what it is declared for.
    """
    paged = bool(room.pages) and not window
    if paged:
        shape = num_layers, room.pages, num_heads, PAGE, head_dim
        buffer = Buffer("LQKXH", shape, room.dtype)
    else:
        shape = num_layers, room.slots, num_heads, room.length(window), head_dim
        buffer = Buffer("LBKSH", shape, room.dtype)
    return KVCache(buffer, buffer, paged=paged)


def with_pages(caches: Any, page_BX: jax.Array | None) -> Any:
    """Caches with the pages of every slot, where they lie in pages; None takes the table away.

    Args:
        caches: a tree with a :class:`KVCache` or None for every stack.
        page_BX: int32; a number that no page has where a slot has none.
    """

    def attach(cache: Any) -> Any:
        if isinstance(cache, KVCache) and cache.paged:
            return cache.replace(page_BX=page_BX)  # type: ignore[attr-defined]
        return cache

    return jax.tree.map(attach, caches, is_leaf=lambda node: isinstance(node, KVCache))


def of_sequences(k_LBSKH: jax.Array, v_LBSKH: jax.Array) -> KVCache:
    """The cache of whole sequences, from the keys and values of all their positions."""
    return KVCache(jnp.swapaxes(k_LBSKH, 2, 3), jnp.swapaxes(v_LBSKH, 2, 3))


def write(
    cache: KVCache,
    layer: Any,
    slot_T: jax.Array,
    position_T: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
    window: int = 0,
) -> KVCache:
    """The cache with one layer's keys and values of T rows at (slot, position).

    Rows whose slot or position lies outside the cache (padding) are dropped; under a window there
    are no positions outside. A head of a row whose value is not finite gets a key of NaN and a
    value of 0: whoever may see it still computes NaN, but the next request of the slot, for whom it
    has a weight of 0, does not. (A head at a time, since heads are split over a mesh.)
    """
    first_T, place_T = slot_T, position_T
    if window:
        place_T = position_T % _positions(cache)
    elif cache.paged:
        page = slot_T, position_T // PAGE
        first_T = cache.page_BX.at[page].get(mode="fill", fill_value=_NO_PAGE)
        place_T = position_T % PAGE
    sound_TK1 = jnp.isfinite(v_TKH).all(axis=2, keepdims=True)
    k_TKH, v_TKH = jnp.where(sound_TK1, k_TKH, jnp.nan), jnp.where(sound_TK1, v_TKH, 0)
    where = first_T, slice(None), place_T
    k, v = (put(values, layer, where, new) for values, new in ((cache.k, k_TKH), (cache.v, v_TKH)))
    return cache.replace(k=k, v=v)  # type: ignore[attr-defined]


def put(values: Any, layer: Any, where: tuple[Any, ...], new_TX: jax.Array) -> Any:
    """Values of decoding state with T rows put into one layer.

    Args:
        values: [L, ...], or a tuple of the L layers.
        layer: which one.
        where: of every row in a layer: int32 arrays [T], or slices. Rows outside are dropped.
        new_TX: the rows.
    """
    if new_TX.shape[0] == 1:
        # XLA makes a scatter of one row an update of a slice, and copies the cache for its test of
        # the bounds (30 layers, 1024 positions, a CPU: 42 ms a round, not 18). Two rows stay a
        # scatter; the second is dropped.
        where = tuple(x if isinstance(x, slice) else jnp.append(x, _NO_PAGE) for x in where)
        new_TX = jnp.repeat(new_TX, 2, axis=0)
    if isinstance(values, tuple):
        changed = values[layer].at[where].set(new_TX, mode="drop")
        return (*values[:layer], changed, *values[layer + 1 :])
    return values.at[(layer, *where)].set(new_TX, mode="drop")


def read(cache: KVCache, layer: Any) -> tuple[jax.Array, jax.Array]:
    """One layer's keys and values of a cache without pages, [B, S, K, H] each; a view that
    attention takes as it lies."""
    return jnp.swapaxes(cache.k[layer], 1, 2), jnp.swapaxes(cache.v[layer], 1, 2)


def attention_inputs(cache: KVCache, layer: Any) -> dict[str, Any]:
    """One layer's part of the cache as ``ragged_attention`` takes it, and where its heads lie on a
    mesh; stacked layers stay whole, so that no kernel needs a copy of its own."""
    (heads_axis,) = MESH_RULES["K"]
    k, v = cache.k, cache.v
    if isinstance(k, tuple):
        k, v, layer = k[layer], v[layer], None
    where = {"layer": layer, "page_BX": cache.page_BX, "heads_axis": heads_axis}
    return {"k_BKSH": k, "v_BKSH": v, **where}


def _positions(cache: KVCache) -> int:
    """S of its layers."""
    return int(cache.k[0].shape[-2])


def num_slots(cache: KVCache) -> int:
    """B, the requests that it can hold."""
    return int(cache.page_BX.shape[0] if cache.paged else cache.k[0].shape[-4])
