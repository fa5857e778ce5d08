"""How targets whose layers keep keys and values read tokens.

``read_sequences`` reads whole sequences and keeps nothing: training features. ``read_rows`` reads
the rows of a flat ragged batch against a cache: prefill and verification are the same operation.
Both return the residual stream after chosen layers ("features") beside the last
hidden state. What a layer computes is the family's own (:class:`Blocks`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.models import cache as kv
from dspark_jax.models.cache import Beside, Room, Rows
from dspark_jax.models.sequences import attend_causally
from dspark_jax.models.stacks import Place, Sections, loop_layers, map_stacks, place_of
from pallas_kernels.ragged_attention.api import ragged_attention
from pallas_kernels.ragged_attention.groups import Groups, group_by_slot, group_runs

Cache = tuple[Any, ...]  # of every stack a KVCache, or None where it reads another's


@dataclass(frozen=True)
class Attention:
    """What the attention of a layer is like.

    Attributes:
        num_heads: K, of keys and values.
        head_dim: H.
        window: positions that a row sees, its own included; 0 for all.
        scale: of the scores; None for H ** -0.5.
        softcap: of the scores; None for none.
        reads: the layer whose keys and values are read in place of own ones.
        value_is_key: whether values are the keys themselves, which no kernel has a form for.
    """

    num_heads: int
    head_dim: int
    window: int = 0
    scale: float | None = None
    softcap: float | None = None
    reads: int | None = None
    value_is_key: bool = False


@dataclass(frozen=True)
class Blocks:
    """The layers of a family, in the parts between which attention stands.

    Attributes:
        sections: ``(cfg)``: the layers; every kind has an ``attention``.
        enter: ``(target, token_X, position_X, cfg)``: the residual stream [X, D] before the first
            layer, and what all layers share (RoPE).
        project: ``(layer, x_XD, place, shared, cfg)``: queries [X, N, H], and keys and values
            [X, K, H] or twice None.
        finish: ``(layer, x_XD, attended_XNH, place, shared, cfg)``: the residual stream after the
            layer.
        leave: ``(target, x_XD, cfg)``: the hidden state [X, D] after the last layer.
    """

    sections: Callable[[Any], Sections]
    enter: Callable[..., tuple[jax.Array, Any]]
    project: Callable[..., tuple[jax.Array, Any, Any]]
    finish: Callable[..., jax.Array]
    leave: Callable[..., jax.Array]


def declare_caches(sections: Sections, room: Room) -> Cache:
    """Declaration of what :func:`read_rows` keeps."""

    def declare(stack: Any) -> kv.KVCache | None:
        own = stack.kind.attention
        if own.reads is not None:
            return None
        return kv.declare_kv(len(stack.layers), own.num_heads, own.head_dim, own.window, room)

    return map_stacks(declare, sections)


def read_sequences(
    blocks: Blocks,
    target: Any,
    token_BS: jax.Array,
    cfg: Any,
    feature_layers: Sequence[int] = (),
    fetch: Callable[[Any, int], Any] = lambda layer, stack: layer,
    kernels: str = "xla",
) -> tuple[jax.Array, jax.Array]:
    """``TargetFamily.encode`` with these blocks."""
    length = token_BS.shape[1]
    position_BS = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), token_BS.shape)
    x_BSD, shared = blocks.enter(target, token_BS, position_BS, cfg)
    sections = blocks.sections(cfg)

    def block(carry: Any, layer: Any, place: Place) -> Any:
        x_BSD, feature_FBSD, kept = carry
        layer, own = fetch(layer, place.stack), place.kind.attention
        q, k, v = blocks.project(layer, x_BSD, place, shared, cfg)
        if own.reads is not None:
            k, v = kept[own.reads]
        kept = _keep_read(kept, k, v, place.layer)
        options = {"window": own.window, "scale": own.scale, "softcap": own.softcap}
        out = attend_causally(q, k, v, **options, kernels=kernels)
        x_BSD = blocks.finish(layer, x_BSD, out, place, shared, cfg)
        return x_BSD, keep_feature(feature_FBSD, x_BSD, place.layer, feature_layers), kept

    kept = _nothing_read(sections, token_BS.shape, x_BSD.dtype)
    carry = (x_BSD, start_features(x_BSD, feature_layers), kept)
    x_BSD, feature_FBSD, _ = loop_layers(block, carry, target.layers, sections)
    return blocks.leave(target, x_BSD, cfg), jnp.moveaxis(feature_FBSD, 0, 2)


def _nothing_read(
    sections: Sections, lead: tuple[int, ...], dtype: Any
) -> dict[int, tuple[jax.Array, jax.Array]]:
    """Keys and values of the layers that others read, yet to be computed."""

    def nothing(number: int) -> tuple[jax.Array, jax.Array]:
        own = place_of(sections, number).kind.attention
        empty = jnp.zeros((*lead, own.num_heads, own.head_dim), dtype)
        return empty, empty

    found = set(map_stacks(lambda stack: stack.kind.attention.reads, sections))
    return {number: nothing(number) for number in sorted(found - {None})}


def _keep_read(
    kept: dict[int, tuple[jax.Array, jax.Array]], k: jax.Array, v: jax.Array, layer: Any
) -> dict[int, tuple[jax.Array, jax.Array]]:
    """The same, with those of a layer if it is one that others read."""
    for number, (old_k, old_v) in kept.items():
        if k.shape == old_k.shape:
            here = layer == number
            kept = kept | {number: (jnp.where(here, k, old_k), jnp.where(here, v, old_v))}
    return kept


def read_rows(
    blocks: Blocks,
    target: Any,
    cache: Cache,
    rows: Rows,
    cfg: Any,
    feature_layers: Sequence[int] = (),
    *,
    rows_per_slot: int,
    chunks: Rows | None = None,
    beside: Beside | None = None,
    kernels: str = "xla",
) -> tuple[jax.Array, jax.Array, Cache]:
    """``TargetFamily.extend`` with these blocks.

    The dense layers see T flat rows; for the attention alone they are grouped by slot, so that
    every slot's cache is read once. Donate the cache: it is written in place.
    """
    num_rows = rows.token_T.shape[0]
    num_slots = kv.num_slots(next(part for part in cache if part is not None))
    groups = group_by_slot(rows.slot_T, rows.position_T, num_slots, rows_per_slot)
    attend_rows = _cache_attention(groups, rows, num_slots, kernels)
    if chunks is not None:
        flat = jax.tree.map(lambda x_PW: x_PW.reshape(-1), chunks)
        runs = group_runs(chunks.slot_T[:, 0], *chunks.slot_T.shape)
        attend_chunks = _cache_attention(runs, flat, num_slots, kernels)
        rows = jax.tree.map(lambda *parts: jnp.concatenate(parts), rows, flat)
    num_kept = rows.token_T.shape[0]
    if beside is not None:
        flat_T = beside.token_BW.reshape(-1), beside.position_BW.reshape(-1)
        unkept = Rows(flat_T[0], jnp.full_like(flat_T[0], num_slots), flat_T[1])
        rows = jax.tree.map(lambda *parts: jnp.concatenate(parts), rows, unkept)
        attend_beside = _beside_attention(beside)
    x_TD, shared = blocks.enter(target, rows.token_T, rows.position_T, cfg)
    sections = blocks.sections(cfg)

    def block(carry: Any, layer: Any, place: Place) -> Any:
        x_TD, feature_FTD, cache, kept = carry
        own = place.kind.attention
        q_TNH, k_TKH, v_TKH = blocks.project(layer, x_TD, place, shared, cfg)
        at = place if own.reads is None else place_of(sections, own.reads)
        if own.reads is None:
            unkept = k_TKH[num_kept:], v_TKH[num_kept:]
            kept = _keep_read(kept, *unkept, place.layer)
            where = place.index, rows.slot_T, rows.position_T
            new = kv.write(cache[at.stack], *where, k_TKH, v_TKH, own.window)
            cache = (*cache[: at.stack], new, *cache[at.stack + 1 :])
        held = cache[at.stack], at.index, own
        out_TNH = attend_rows(q_TNH[:num_rows], *held)
        if chunks is not None:
            q_WNH = q_TNH[num_rows:num_kept]
            out_TNH = jnp.concatenate([out_TNH, attend_chunks(q_WNH, *held)])
        if beside is not None:
            pair = unkept if own.reads is None else kept[own.reads]
            out_WNH = attend_beside(q_TNH[num_kept:], pair, *held)
            out_TNH = jnp.concatenate([out_TNH, out_WNH])
        x_TD = blocks.finish(layer, x_TD, out_TNH, place, shared, cfg)
        return x_TD, keep_feature(feature_FTD, x_TD, place.layer, feature_layers), cache, kept

    num_beside = rows.token_T.shape[0] - num_kept
    kept = _nothing_read(sections, (num_beside,), x_TD.dtype) if num_beside else {}
    carry = (x_TD, start_features(x_TD, feature_layers), cache, kept)
    x_TD, feature_FTD, cache, _ = loop_layers(block, carry, target.layers, sections)
    return blocks.leave(target, x_TD, cfg), jnp.moveaxis(feature_FTD, 0, 1), cache


def read_beside(
    blocks: Blocks,
    target: Any,
    cache: Cache,
    rows: Beside,
    cfg: Any,
    num_layers: int,
) -> jax.Array:
    """``TargetFamily.beside`` with these blocks."""
    x_BWD, shared = blocks.enter(target, rows.token_BW, rows.position_BW, cfg)
    sections, attend = blocks.sections(cfg), _beside_attention(rows)

    def compute(carry: Any, layer: Any, place: Place) -> Any:
        x_BWD, kept = carry
        own = place.kind.attention
        q, k, v = blocks.project(layer, x_BWD, place, shared, cfg)
        at = place if own.reads is None else place_of(sections, own.reads)
        if own.reads is not None:
            k, v = kept[own.reads]
        kept = _keep_read(kept, k, v, place.layer)
        out = attend(q, (k, v), cache[at.stack], at.index, own)
        return blocks.finish(layer, x_BWD, out, place, shared, cfg), kept

    def block(carry: Any, layer: Any, place: Place) -> Any:
        if isinstance(place.layer, int):
            return compute(carry, layer, place) if place.layer < num_layers else carry
        within = place.layer < num_layers
        return jax.lax.cond(within, lambda: compute(carry, layer, place), lambda: carry)

    kept = _nothing_read(sections, rows.token_BW.shape, x_BWD.dtype)
    return loop_layers(block, (x_BWD, kept), target.layers, sections)[0]


def _cache_attention(
    groups: Groups, rows: Rows, num_slots: int, kernels: str
) -> Callable[[jax.Array, kv.KVCache, Any, Attention], jax.Array]:
    """(q_TNH, cache, index, attention) -> out_TNH: rows that see their slot up to their own
    position."""
    limit_T = jnp.where(rows.slot_T < num_slots, rows.position_T + 1, 0)

    def attention(q_TNH: jax.Array, cache: kv.KVCache, index: Any, own: Attention) -> jax.Array:
        out_TNH = ragged_attention(
            q_TNH.astype(cache.k[0].dtype),
            groups=groups,
            limit_T=limit_T,
            window=own.window or None,
            scale=own.scale,
            softcap=own.softcap,
            implementation=kernels,
            **kv.attention_inputs(cache, index),
        )
        return out_TNH.astype(q_TNH.dtype)

    return attention


def _beside_attention(rows: Beside) -> Callable[..., jax.Array]:
    """(q_XNH, (k_XKH, v_XKH), cache, index, attention) -> out_XNH of rows that are not kept, for X
    as [B, W] or flat. Kernels have no form of it."""
    slots, width = rows.token_BW.shape

    def attention(
        q_XNH: jax.Array, new: tuple[Any, Any], cache: kv.KVCache, index: Any, own: Attention
    ) -> jax.Array:
        dtype = cache.k[0].dtype
        out_XNH = ragged_attention(
            q_XNH.reshape(-1, *q_XNH.shape[-2:]).astype(dtype),
            groups=group_runs(None, slots, width),
            limit_T=jnp.repeat(rows.limit_B, width),
            own=tuple(x.reshape(slots, width, *x.shape[-2:]).astype(dtype) for x in new),
            own_seen_CW=rows.seen_WW,
            window=max(own.window - 1, 1) if own.window else None,  # beside the row itself
            scale=own.scale,
            softcap=own.softcap,
            **kv.attention_inputs(cache, index),
        )
        return out_XNH.reshape(q_XNH.shape).astype(q_XNH.dtype)

    return attention


def keep_feature(
    feature_FXD: jax.Array, x_XD: jax.Array, layer: Any, feature_layers: Sequence[int]
) -> jax.Array:
    """The features with the residual stream after ``layer``, if it is one of the chosen."""
    if not feature_layers:
        return feature_FXD
    if isinstance(layer, int):
        if layer not in feature_layers:
            return feature_FXD
        return feature_FXD.at[feature_layers.index(layer)].set(x_XD)
    hit_F = jnp.asarray(np.array(feature_layers, np.int32)) == layer
    place = jnp.where(hit_F.any(), jnp.argmax(hit_F), len(feature_layers))
    return feature_FXD.at[place].set(x_XD, mode="drop")


def start_features(x_XD: jax.Array, feature_layers: Sequence[int]) -> jax.Array:
    """Room for the features, the embedding output (layer -1) already in its place."""
    feature_FXD = jnp.zeros((len(feature_layers), *x_XD.shape), x_XD.dtype)
    return keep_feature(feature_FXD, x_XD, -1, feature_layers)
