"""Key/value caches: the target's, and the drafter's context.

Position ``p`` of slot ``b`` lives at ``[b, p]`` of every layer; the functions here are the only
ones that know it. A cache is valid up to the length that the decode state names; whatever lies
behind is garbage, overwritten before anyone attends to it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.config import TransformerConfig


@struct.dataclass
class KVCache:
    """Keys and values of all layers.

    Attributes:
        k, v: [L, B, S, K, H], or a tuple of L arrays [B, S, K, H] for unstacked layers.
    """

    k: Any
    v: Any


def empty_cache(
    cfg: TransformerConfig, num_slots: int, num_positions: int, dtype: Any, *, stacked: bool
) -> KVCache:
    """A zeroed cache for ``num_slots`` requests of at most ``num_positions`` tokens."""
    shape = (num_slots, num_positions, cfg.num_kv_heads, cfg.head_dim)
    if stacked:
        all_layers = (cfg.num_layers, *shape)
        return KVCache(jnp.zeros(all_layers, dtype), jnp.zeros(all_layers, dtype))

    def layers() -> tuple[jax.Array, ...]:
        return tuple(jnp.zeros(shape, dtype) for _ in range(cfg.num_layers))

    return KVCache(layers(), layers())


def write(
    cache: KVCache,
    layer: Any,
    slot_T: jax.Array,
    position_T: jax.Array,
    k_TKH: jax.Array,
    v_TKH: jax.Array,
) -> KVCache:
    """The cache with one layer's keys and values of T rows at (slot, position).

    Rows whose slot or position lies outside the cache (padding) are dropped.
    """

    def put(values: Any, new_TKH: jax.Array) -> Any:
        if isinstance(values, tuple):
            changed = values[layer].at[slot_T, position_T].set(new_TKH, mode="drop")
            return (*values[:layer], changed, *values[layer + 1 :])
        return values.at[layer, slot_T, position_T].set(new_TKH, mode="drop")

    return KVCache(put(cache.k, k_TKH), put(cache.v, v_TKH))


def read(cache: KVCache, layer: Any) -> tuple[jax.Array, jax.Array]:
    """One layer's keys and values, [B, S, K, H] each."""
    return cache.k[layer], cache.v[layer]


def num_positions(cache: KVCache) -> int:
    """S, the positions that a slot can hold."""
    return cache.k[0].shape[1]
