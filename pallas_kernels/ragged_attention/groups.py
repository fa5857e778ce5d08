"""Flat query rows in groups of one slot each, so that a cache is read once for all its rows."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["slot_P", "group_T", "column_T"],
    meta_fields=["num_groups", "rows_per_group"],
)
@dataclasses.dataclass(frozen=True)
class Groups:
    """P groups of at most C of the T flat rows; the rows of a group attend to one slot.

    Attributes:
        slot_P: int32 slots; None where group p is slot p, for all slots in their order.
        group_T: int32 group of every row; P marks a row of none (padding). None where row p * C + c
            is column c of group p.
        column_T: int32 its column, likewise.
        num_groups: P, static.
        rows_per_group: C, static.
    """

    slot_P: jax.Array | None
    group_T: jax.Array | None
    column_T: jax.Array | None
    num_groups: int
    rows_per_group: int

    def gather(self, rows_TX: jax.Array) -> jax.Array:
        """[P, C, ...]: the rows in their places, 0 in places without a row."""
        shape = self.num_groups, self.rows_per_group, *rows_TX.shape[1:]
        if self.group_T is None:
            return rows_TX.reshape(shape)
        # A scatter of the rows: on a CPU it costs half of a gather through a table of rows.
        return (
            jnp.zeros(shape, rows_TX.dtype)
            .at[self.group_T, self.column_T]
            .set(rows_TX, mode="drop")
        )

    def scatter(self, places_PCX: jax.Array) -> jax.Array:
        """[T, ...]: what lies in every row's place; 0 for rows of no group."""
        if self.group_T is None:
            return places_PCX.reshape(-1, *places_PCX.shape[2:])
        return places_PCX.at[self.group_T, self.column_T].get(mode="fill", fill_value=0)


def group_by_slot(
    slot_T: jax.Array, position_T: jax.Array, num_slots: int, rows_per_slot: int
) -> Groups:
    """One group a slot, for rows in any order: verification.

    Args:
        slot_T: int32 slots; ``num_slots`` marks padding.
        position_T: int32; those of one slot are contiguous, in any order.
        num_slots: B, static.
        rows_per_slot: C, static; the most rows that one slot has.
    """
    first_B = jax.ops.segment_min(position_T, slot_T, num_slots + 1)
    return Groups(None, slot_T, position_T - first_B[slot_T], num_slots, rows_per_slot)


def group_runs(slot_P: jax.Array | None, num_groups: int, rows_per_group: int) -> Groups:
    """Groups of rows that lie in runs of C already: chunks of prompts, drafted blocks.

    Args:
        slot_P: int32 slots of the runs; None where run p is slot p.
        num_groups: P, static.
        rows_per_group: C, static.
    """
    return Groups(slot_P, None, None, num_groups, rows_per_group)
