"""The rows of a round: which tokens the target reads, and what is done with what it sees.

Prompts in chunks and blocks under verification are rows of one flat batch. The target's features
of all of them extend the drafter's context.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.engine.inputs import Chunks, RoundConfig, Weights
from dspark_jax.engine.state import DecodeState
from dspark_jax.models.cache import Beside, Rows
from dspark_jax.models.drafters.table import drafter_of, window_of
from dspark_jax.models.targets.table import family_of
from dspark_jax.models.vocab import suppress, unembed
from pallas_kernels.accept_block.rule import VerifyPlan


def chunk_rows(state: DecodeState, chunks: Chunks, rows_per_chunk: int) -> Rows:
    """The rows [P, W] of chunks; positions that are not wanted become padding (slot B)."""
    column_W = jnp.arange(rows_per_chunk, dtype=jnp.int32)
    position_PW = chunks.start_P[:, None] + column_W
    token_PW = state.token_BS.at[chunks.slot_P[:, None], position_PW].get(mode="clip")
    wanted_PW = column_W < chunks.count_P[:, None]
    num_slots = state.length_B.shape[0]
    return Rows(token_PW, jnp.where(wanted_PW, chunks.slot_P[:, None], num_slots), position_PW)


def begin_decoding(state: DecodeState, chunks: Chunks) -> DecodeState:
    """The state with the slots active whose prompts are read to the end in this round.

    They verify nothing yet: the drafter's context lacks what this round reads.
    """
    slot_P = jnp.where(chunks.last_P, chunks.slot_P, state.length_B.shape[0])
    active_B = state.active_B.at[slot_P].set(True, mode="drop")
    return state.replace(active_B=active_B)  # type: ignore[attr-defined]


def flat_rows(token_BC: jax.Array, position_B: jax.Array, plan: VerifyPlan) -> Rows:
    """The flat rows of a plan."""
    slot_T = jnp.minimum(plan.slot_T, position_B.shape[0] - 1)
    token_T = token_BC.at[slot_T, plan.column_T].get(mode="clip")
    return Rows(token_T, plan.slot_T, position_B[slot_T] + plan.column_T)


@jax.named_scope("verify")
def read_rows(
    weights: Weights,
    state: DecodeState,
    rows: Rows,
    chunks: Rows | None,
    verified_B: jax.Array,
    cfg: RoundConfig,
    *,
    often_none: bool,
) -> Any:
    """The target over the rows of a round: logits_TV, features of all rows, and its cache.

    Where the one request of a CPU verifies nothing, which may be ``often``, one row will do.
    Whether it verifies is settled, so that this changes the cost of the round and nothing else.
    """
    num_rows, num_slots = rows.slot_T.shape[0], state.length_B.shape[0]
    beside, window = None, None if cfg.drafter is None else window_of(cfg.drafter)
    if window is not None and cfg.num_draft:
        beside = window(state.context_cache, state.length_B - 1, cfg.drafter)

    def read(num_rows: int, rows_per_slot: int) -> Any:
        first = jax.tree.map(lambda x_T: x_T[:num_rows], rows)
        given = first, chunks, beside, cfg, rows_per_slot
        hidden_TD, feature_TFD, cache = _extend(weights, state, *given)
        logits_TV = unembed(weights.target.vocab, hidden_TD[:num_rows])
        logits_TV = suppress(logits_TV, cfg.target.suppressed)
        return logits_TV, feature_TFD, cache

    def read_anchor() -> Any:
        logits_TV, feature_TFD, cache = read(1, 1)
        unread_TFD = jnp.zeros((num_rows - 1, *feature_TFD.shape[1:]), feature_TFD.dtype)
        feature_TFD = jnp.concatenate([feature_TFD[:1], unread_TFD, feature_TFD[1:]])
        return jnp.pad(logits_TV, ((0, num_rows - 1), (0, 0))), feature_TFD, cache

    if cfg.asks == "any" and often_none and num_slots == 1 and num_rows > 1 and beside is None:
        everything = functools.partial(read, num_rows, cfg.num_draft + 1)
        return jax.lax.cond(verified_B[0] > 0, everything, read_anchor)
    return read(num_rows, cfg.num_draft + 1)


def _extend(
    weights: Weights,
    state: DecodeState,
    rows: Rows,
    chunks: Rows | None,
    beside: Beside | None,
    cfg: RoundConfig,
    rows_per_slot: int,
) -> Any:
    """The target over the rows, with the drafter's feature layers."""
    reads = None if cfg.drafter is None else drafter_of(cfg.drafter).reads
    layers = cfg.drafter.target_layer_ids if cfg.drafter is not None and reads == "streams" else ()
    hidden_TD, feature_TFD, cache = family_of(cfg.target).extend(
        weights.target,
        state.target_cache,
        rows,
        cfg.target,
        layers,
        rows_per_slot=rows_per_slot,
        chunks=chunks,
        beside=beside,
        kernels=cfg.kernels,
    )
    return hidden_TD, feature_TFD if reads == "streams" else hidden_TD[:, None], cache


@jax.named_scope("commit")
def observe_rows(
    weights: Weights,
    state: DecodeState,
    feature_TFD: jax.Array,
    rows: Rows,
    chunks: Rows | None,
    cfg: RoundConfig,
) -> Any:
    """The drafter's context with what the target has read; that of rejected drafts is garbage that
    the next round overwrites. None without a drafter.

    Args:
        weights: of the round.
        rows: likewise.
        chunks: likewise.
        cfg: likewise.
        state: with its committed tokens, this round's included.
        feature_TFD: features of all rows, and behind them of those of a window.
    """
    if cfg.drafter is None or weights.drafter is None:
        return state.context_cache
    assert weights.vocab is not None
    if chunks is not None:
        flat = jax.tree.map(lambda x_PW: x_PW.reshape(-1), chunks)
        rows = jax.tree.map(lambda *parts: jnp.concatenate(parts), rows, flat)
        rows = rows.replace(runs=chunks.slot_T.shape)  # type: ignore[attr-defined]
    rows = rows.replace(most=cfg.num_draft + 1)  # type: ignore[attr-defined]
    return drafter_of(cfg.drafter).observe(
        weights.drafter,
        weights.vocab,
        state.context_cache,
        rows,
        feature_TFD,
        state.token_BS,
        state.length_B,
        cfg.drafter,
        kernels=cfg.kernels,
    )
