"""The context of drafters that see the last W positions: a ring without room for anything else.

Position p of slot b lies at place ``p % S``, S being W, or fewer where a text cannot be that long.
Only what is committed is ever written, so nothing has to be left for rejected drafts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.axes import Buffer
from dspark_jax.models.cache import Room, Rows


def declare(num_layers: int, window: int, width: int, room: Room) -> Buffer:
    """Declaration of one vector of a width for every layer and place."""
    shape = num_layers, room.slots, min(window, room.positions), width
    return Buffer("LBSH", shape, room.dtype)


def kept_slots(rows: Rows, length_B: jax.Array, window: int) -> jax.Array:
    """Slots of the rows that are written, int32 [T]: B for the others.

    These are committed and read, so before the anchor, and of each slot the last ``window`` of what
    is read, or several would have the same place.

    Args:
        rows: of the target's pass.
        length_B: int32 committed tokens, the anchor included.
        window: W.
    """
    num_slots = len(length_B)
    end_T = length_B.at[rows.slot_T].get(mode="fill", fill_value=0) - 1
    slot_T = jnp.where(rows.position_T < end_T, rows.slot_T, num_slots)
    last_B = jnp.full(num_slots, -1, jnp.int32).at[slot_T].max(rows.position_T, mode="drop")
    least_T = last_B.at[slot_T].get(mode="clip") - window
    return jnp.where(rows.position_T > least_T, slot_T, num_slots)


def write(ring: Any, layer: Any, slot_T: jax.Array, position_T: jax.Array, new_TH: Any) -> Any:
    """The ring, of stacked or single layers, with rows in one layer; see :func:`kept_slots`."""

    def put(held_X: jax.Array, *first: Any) -> jax.Array:
        where = *first, slot_T, position_T % held_X.shape[-2]
        return held_X.at[where].set(new_TH.astype(held_X.dtype), mode="drop")

    if isinstance(ring, tuple):
        return (*ring[:layer], put(ring[layer]), *ring[layer + 1 :])
    return put(ring, layer)


def positions(end_B: jax.Array, num_places: int) -> jax.Array:
    """The positions that lie at the places of a ring, int32 [B, S]: the last before ``end_B``;
    below 0 where there is none."""
    place_S = jnp.arange(num_places, dtype=jnp.int32)
    return end_B[:, None] - 1 - (end_B[:, None] - 1 - place_S) % num_places
