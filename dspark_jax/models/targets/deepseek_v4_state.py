"""The decoding state of DeepSeek-V4, in which nothing is ever rolled back.

Every layer keeps the keys of its window in a ring by position. A layer with compressed entries
keeps them by their number, and in another ring what the latest positions add to entries. Whenever
the last position of an entry is read, the entry is computed from the rows that are read with it
and from that ring, and overwrites whatever was there. What rows see follows from their positions
alone: what rejected rows have left is behind them, and is overwritten before anyone sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.axes import Buffer
from dspark_jax.models.cache import Room, Rows, put
from dspark_jax.models.rope import Table
from dspark_jax.models.targets.deepseek_v4_config import Config
from dspark_jax.models.targets.deepseek_v4_entries import (
    choose,
    chosen_keys,
    complete,
    compress,
    index_queries,
    overlap,
    raw_inputs,
)
from dspark_jax.models.targets.deepseek_v4_layers import (
    Compressor,
    Inputs,
    Kind,
    Layer,
    attend_to,
)
from pallas_kernels.ragged_attention.groups import Groups, group_by_slot, group_runs

_NOWHERE = 2**31 - 1  # a slot that there is not: what is put there is dropped


@struct.dataclass
class Entries:
    """Compressed entries of the layers of a stack, each field [L, B, S, ...] or a tuple of layers.

    Attributes:
        raw: float32, of the latest positions, at ``position % S``: see
            :func:`~dspark_jax.models.targets.deepseek_v4_entries.raw_inputs`.
        key: entries, by number.
    """

    raw: Any
    key: Any


@struct.dataclass
class LayerState:
    """What the layers of a stack keep.

    Attributes:
        key: of the window, [L, B, S, H] or a tuple of layers, at ``position % S``.
        entries: that rows attend to; None for none.
        index: those of the indexer; None for none.
    """

    key: Any
    entries: Any = None
    index: Any = None


def declare_layers_state(cfg: Config, kind: Kind, num_layers: int, room: Room) -> LayerState:
    """Declaration of what the layers of a stack keep."""

    def buffer(length: int, width: int, dtype: Any, span: int = 1) -> Buffer:
        return Buffer("LBSH", (num_layers, room.slots, length, width), dtype, span=span)

    def entries(width: int) -> Entries:
        span, halves = kind.ratio + overlap(kind), 2 if kind.sparse else 1
        raw = buffer(room.tail(span), 2 * halves * width, jnp.float32)
        length = max(1, room.positions // kind.ratio)
        return Entries(raw, buffer(length, width, room.dtype, kind.ratio))

    return LayerState(
        buffer(room.length(kind.attention.window), cfg.head_dim, room.dtype),
        entries(cfg.head_dim) if kind.ratio else None,
        entries(cfg.index_dim) if kind.sparse else None,
    )


def num_slots(state: LayerState) -> int:
    """B, the requests that it can hold."""
    return int(state.key[0].shape[0])


@dataclass(frozen=True)
class Run:
    """Rows of a pass in P groups of at most C, whose positions follow each other.

    Attributes:
        rows: which ones of the pass.
        groups: their places.
        slot_P: int32 slots; ``_NOWHERE`` where there are no rows.
        first_P: int32 first position.
        count_P: how many there are.
        by_slot: whether group p is slot p; otherwise several may be of one slot.
    """

    rows: slice
    groups: Groups
    slot_P: jax.Array
    first_P: jax.Array
    count_P: jax.Array
    by_slot: bool

    @property
    def position_PC(self) -> jax.Array:
        """int32 positions of the groups' places."""
        return self.first_P[:, None] + jnp.arange(self.groups.rows_per_group, dtype=jnp.int32)

    def find(self, slot_P: jax.Array, position_PS: jax.Array) -> jax.Array:
        """The group, int32 [P, S], that has a position of a slot, if there is one."""
        if self.by_slot:
            group_P = jnp.minimum(slot_P, self.groups.num_groups - 1)
            return jnp.broadcast_to(group_P[:, None], position_PS.shape)
        offset_PSG = position_PS[..., None] - self.first_P
        there_PSG = (offset_PSG >= 0) & (offset_PSG < self.count_P)
        return jnp.argmax(there_PSG & (slot_P[:, None] == self.slot_P)[:, None], axis=-1)

    def of_slots(self, x_BX: jax.Array) -> jax.Array:
        """What belongs to the slot of every group [P, ...]."""
        return x_BX if self.by_slot else jnp.take(x_BX, self.slot_P, axis=0, mode="clip")

    def gather(self, x_TX: jax.Array) -> jax.Array:
        """[P, C, ...]: the run's rows, of those of a pass, in their places."""
        return self.groups.gather(x_TX[self.rows])


def slot_run(rows: Rows, num_slots: int, rows_per_slot: int) -> Run:
    """The flat rows of a pass, one group a slot."""
    groups = group_by_slot(rows.slot_T, rows.position_T, num_slots, rows_per_slot)
    size = num_slots + 1
    count_B = jax.ops.segment_sum(jnp.ones_like(rows.slot_T), rows.slot_T, size)[:-1]
    first_B = jax.ops.segment_min(rows.position_T, rows.slot_T, size)[:-1]
    there_B = count_B > 0
    slot_B = jnp.where(there_B, jnp.arange(num_slots), _NOWHERE)
    first_B = jnp.where(there_B, first_B, 0)
    return Run(slice(0, len(rows.slot_T)), groups, slot_B, first_B, count_B, True)


def chunk_run(chunks: Rows, num_slots: int, start: int) -> Run:
    """Pieces of prompts [P, W], which follow ``start`` other rows of the pass."""
    slot_P = chunks.slot_T[:, 0]
    groups = group_runs(slot_P, *chunks.slot_T.shape)
    count_P = (chunks.slot_T < num_slots).sum(1)
    slot_P = jnp.where(slot_P < num_slots, slot_P, _NOWHERE)
    return Run(slice(start, None), groups, slot_P, chunks.position_T[:, 0], count_P, False)


def store(
    state: LayerState,
    index: Any,
    layer: Layer,
    kind: Kind,
    inputs: Inputs,
    rows: Rows,
    runs: Sequence[Run],
    cfg: Config,
) -> LayerState:
    """The state with what a layer keeps of T rows.

    Args:
        state: of the layer's stack.
        index: of the layer in it.
        layer: weights.
        kind: what they are.
        inputs: of the layer's attention.
        rows: slots and positions.
        runs: the same in groups.
        cfg: sizes.
    """
    where = rows.slot_T, rows.position_T % state.key[0].shape[1]
    key = put(state.key, index, where, inputs.key_XH.astype(state.key[0].dtype))

    def more(entries: Entries | None, compressor: Any) -> Entries | None:
        if entries is None:
            return None
        return _store_entries(entries, index, compressor, kind, inputs.u_XD, rows, runs, cfg)

    indexer = None if layer.indexer is None else layer.indexer.compressor
    return LayerState(key, more(state.entries, layer.compressor), more(state.index, indexer))


def _store_entries(
    entries: Entries,
    index: Any,
    compressor: Compressor,
    kind: Kind,
    u_TD: jax.Array,
    rows: Rows,
    runs: Sequence[Run],
    cfg: Config,
) -> Entries:
    """The entries that are complete with these rows, and what the rows add to later ones."""
    raw_TX, key = raw_inputs(compressor, u_TD), entries.key
    for run in runs:
        window_PK, raw_PSX = _windows(run, runs, raw_TX, entries.raw[index], kind)
        entry_PKH = compress(compressor, raw_PSX, window_PK, kind, cfg).astype(key[0].dtype)
        end_P = (run.first_P + run.count_P)[:, None]
        done_PK = ((window_PK + 1) * kind.ratio <= end_P) & (run.count_P > 0)[:, None]
        slot_PK = jnp.where(done_PK, run.slot_P[:, None], _NOWHERE)
        where = slot_PK.reshape(-1), window_PK.reshape(-1)
        key = put(key, index, where, entry_PKH.reshape(-1, entry_PKH.shape[-1]))
    size, slots = entries.raw[0].shape[1], entries.raw[0].shape[0]
    # Of a slot with more rows than the ring has places, the last ones stay.
    last_B = jax.ops.segment_max(rows.position_T, rows.slot_T, slots + 1)
    slot_T = jnp.where(rows.position_T + size > last_B[rows.slot_T], rows.slot_T, _NOWHERE)
    raw = put(entries.raw, index, (slot_T, rows.position_T % size), raw_TX)
    return Entries(raw, key)


def _windows(
    run: Run, runs: Sequence[Run], raw_TX: jax.Array, ring_BSX: jax.Array, kind: Kind
) -> tuple[jax.Array, jax.Array]:
    """The windows [P, K] that may be complete with the rows of a run, and the raw inputs
    [P, S, X] of their positions: of rows of the pass, and of earlier ones in the ring."""
    slots, size = ring_BSX.shape[:2]
    before, ratio = overlap(kind), kind.ratio
    count = 1 + (run.groups.rows_per_group - 1) // ratio
    first_P = run.first_P // ratio
    window_PK = first_P[:, None] + jnp.arange(count, dtype=jnp.int32)
    place_S = jnp.arange(count * ratio + before, dtype=jnp.int32) - before
    position_PS = first_P[:, None] * ratio + place_S
    slot_P1 = jnp.minimum(run.slot_P, slots - 1)[:, None]
    raw_PSX = ring_BSX[slot_P1, position_PS % size]
    row_T = jnp.arange(len(raw_TX), dtype=jnp.int32)
    for other in runs:  # the anchor of a prompt is read with the last piece of it
        group_PS = other.find(run.slot_P, position_PS)
        offset_PS = position_PS - other.first_P[group_PS]
        there_PS = (offset_PS >= 0) & (offset_PS < other.count_P[group_PS])
        there_PS &= other.slot_P[group_PS] == run.slot_P[:, None]
        row_PS = other.gather(row_T).at[group_PS, offset_PS].get(mode="clip")
        raw_PSX = jnp.where(there_PS[..., None], raw_TX[row_PS], raw_PSX)
    return window_PK, raw_PSX


def attend_rows(
    state: LayerState,
    index: Any,
    layer: Layer,
    kind: Kind,
    inputs: Inputs,
    table: Table,
    runs: Sequence[Run],
    cfg: Config,
) -> jax.Array:
    """What T rows attend to [T, N, H], each up to its position.

    Args:
        state: with what the layer keeps of the rows; see :func:`store` for the others.
        table: RoPE at the rows' positions.
    """
    chooses = kind.sparse and state.index.key[0].shape[1] > cfg.index_top
    if chooses:
        queries = index_queries(layer.indexer, inputs.u_XD, inputs.latent_XI, table, cfg)
    parts = []
    for run in runs:
        key_PSH, position_PC = run.of_slots(state.key[index]), run.position_PC
        size = key_PSH.shape[1]
        age_PCS = (position_PC[..., None] - jnp.arange(size)) % size
        visible_PCS = (age_PCS < kind.attention.window) & (age_PCS <= position_PC[..., None])
        seen = [(key_PSH, visible_PCS)]
        if state.entries is not None:
            entry_PSH = run.of_slots(state.entries.key[index])
            found = entry_PSH, complete(position_PC, entry_PSH.shape[1], kind)
            if chooses:
                q_PCNH, head_PCN = map(run.gather, queries)
                own_PSH = run.of_slots(state.index.key[index])
                best_PCK, visible_PCK = choose(q_PCNH, head_PCN, own_PSH, found[1], cfg.index_top)
                found = chosen_keys(entry_PSH, best_PCK), visible_PCK
            seen.append(found)
        out_PCNH = attend_to(run.gather(inputs.q_XNH), seen, layer.heads.sink_N)
        parts.append(run.groups.scatter(out_PCNH))
    return jnp.concatenate(parts)
