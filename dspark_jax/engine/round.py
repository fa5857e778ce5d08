"""One decoding round as one program: draft, schedule, verify, accept, commit (spec section 1).

The functions here are pure; ``generate.py`` jits them with a donated state.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax import sampling
from dspark_jax.config import DrafterConfig, TargetConfig
from dspark_jax.decoding import schedule, verify
from dspark_jax.engine.state import DecodeState
from dspark_jax.models.drafter import DrafterParams, block_hidden, extend_context
from dspark_jax.models.heads import DraftBlock, sample_block
from dspark_jax.models.target import Rows, TargetParams, Vocab, extend, unembed
from pallas_kernels import random


@dataclass(frozen=True)
class RoundConfig:
    """What is static in a round; one program is compiled for each.

    Attributes:
        target: sizes of the target.
        drafter: sizes of the drafter; None decodes plainly.
        num_draft: how many slots of a block may be verified, at most ``block_size``; 0 is a round
            without a draft, which still extends the drafter's context.
        threshold: verify slots up to the first whose confidence lies below; 0 verifies
            ``num_draft`` always.
        gate: verify nothing of a block whose first confidence lies below; 0 never. Where further
            drafts cost nothing, as in a program of fixed size, it is the better rule of the two.
        acceptance: rejection sampling, or coupled by a common noise field.
        greedy: all temperatures are 0, so that no noise is needed.
    """

    target: TargetConfig
    drafter: DrafterConfig | None
    num_draft: int
    threshold: float = 0.0
    gate: float = 0.0
    acceptance: Literal["rejection", "coupled"] = "rejection"
    greedy: bool = False


@struct.dataclass
class Weights:
    """The weights of a round: target, drafter and the drafter's vocabulary (None without one)."""

    target: TargetParams
    drafter: DrafterParams | None = None
    vocab: Vocab | None = None


@struct.dataclass
class RoundReport:
    """All that the host reads of a round.

    Attributes:
        token_BC: int32 committed tokens of this round, the first ``count_B`` of them.
        count_B: int32 committed tokens: the round's accepted length, 0 for an idle slot.
        accepted_B: int32 accepted drafts.
        verified_B: int32 verified drafts.
        stopped_B: bool, the last committed token is a stop token.
        finite_B: bool, all logits that were read are finite.
    """

    token_BC: jax.Array
    count_B: jax.Array
    accepted_B: jax.Array
    verified_B: jax.Array
    stopped_B: jax.Array
    finite_B: jax.Array


def prefill(
    weights: Weights, state: DecodeState, start: jax.Array, cfg: RoundConfig, *, num_rows: int
) -> DecodeState:
    """Read positions ``start .. start + num_rows - 1`` of every prompt into both caches.

    The anchor, the last token of a prompt, is left to the first round.

    Args:
        weights: of target and drafter.
        state: donated.
        start: int32 scalar, a multiple of ``num_rows``.
        cfg: static part.
        num_rows: rows of each slot, static.
    """
    num_slots = state.length_B.shape[0]
    position_BC = jnp.broadcast_to(
        start + jnp.arange(num_rows, dtype=jnp.int32), (num_slots, num_rows)
    )
    wanted_BC = (position_BC < state.length_B[:, None] - 1) & state.active_B[:, None]
    token_BC = jnp.take_along_axis(state.token_BS, position_BC, axis=1, mode="clip")
    rows = _rows(token_BC, position_BC, wanted_BC)
    _, feature_TFD, target_cache = _extend(weights, state, rows, cfg, num_rows)
    return state.replace(  # type: ignore[attr-defined]
        target_cache=target_cache,
        context_cache=_inject(weights, state, feature_TFD, rows, cfg),
    )


def decode_round(
    weights: Weights, state: DecodeState, cancel_B: jax.Array, cfg: RoundConfig
) -> tuple[DecodeState, RoundReport]:
    """draft -> schedule -> verify -> accept -> commit, for all slots.

    Args:
        weights: of target and drafter.
        state: donated.
        cancel_B: bool, slots to end before this round.
        cfg: static part.

    Returns:
        The state after the round and its report.
    """
    state = state.replace(active_B=state.active_B & ~cancel_B)  # type: ignore[attr-defined]
    num_slots = state.length_B.shape[0]
    position_B = state.length_B - 1
    anchor_B = jnp.take_along_axis(state.token_BS, position_B[:, None], axis=1)[:, 0]

    if cfg.num_draft:
        block = draft(weights, state, anchor_B, position_B, cfg)
        verified_B = plan_lengths(block, cfg)
        token_BC = jnp.concatenate([anchor_B[:, None], block.token_BG[:, : cfg.num_draft]], 1)
    else:
        block, token_BC = None, anchor_B[:, None]
        verified_B = jnp.zeros(num_slots, jnp.int32)

    column_C = jnp.arange(cfg.num_draft + 1, dtype=jnp.int32)
    wanted_BC = (column_C <= verified_B[:, None]) & state.active_B[:, None]
    rows = _rows(token_BC, position_B[:, None] + column_C, wanted_BC)
    read = functools.partial(_read, weights, state, rows, cfg)
    if cfg.threshold or cfg.gate:
        # Where no slot verifies anything one row each will do. Which slots verify is settled, so
        # that this changes the cost of the round and nothing else.
        logits_BCV, feature_TFD, target_cache = jax.lax.cond(
            (verified_B * state.active_B).any(), read, functools.partial(read, anchors_alone=True)
        )
    else:
        logits_BCV, feature_TFD, target_cache = read()
    finite_BC = jnp.isfinite(logits_BCV).all(-1) | ~wanted_BC

    acceptance = accept(weights, state, block, logits_BCV, verified_B, position_B, cfg)
    draft_BG = token_BC[:, 1:]
    accepted_B, count_B, stopped_B = verify.truncate_at_stop(draft_BG, acceptance, state.stop_id_BK)
    count_B = jnp.where(state.active_B, count_B, 0)
    token_BS, length_B = verify.commit_tokens(
        state.token_BS, state.length_B, draft_BG, accepted_B, acceptance.next_B, count_B
    )
    committed_BC = jnp.where(
        column_C == accepted_B[:, None], acceptance.next_B[:, None], jnp.roll(token_BC, -1, axis=1)
    )
    context_cache = _inject(weights, state, feature_TFD, rows, cfg)
    report = RoundReport(
        token_BC=committed_BC,
        count_B=count_B,
        accepted_B=jnp.where(state.active_B, accepted_B, 0),
        verified_B=jnp.where(state.active_B, verified_B, 0),
        stopped_B=stopped_B & state.active_B,
        finite_B=finite_BC.all(-1),
    )
    state = state.replace(  # type: ignore[attr-defined]
        token_BS=token_BS,
        length_B=length_B,
        active_B=state.active_B & ~stopped_B & (length_B < state.stop_at_B),
        target_cache=target_cache,
        context_cache=context_cache,
    )
    return state, report


def draft(
    weights: Weights,
    state: DecodeState,
    anchor_B: jax.Array,
    position_B: jax.Array,
    cfg: RoundConfig,
) -> DraftBlock:
    """A block behind every anchor, drawn from the law that ``accept`` will verify against."""
    assert cfg.drafter is not None
    assert weights.drafter is not None
    assert weights.vocab is not None
    vocab = weights.vocab

    def choose(logits_BU: jax.Array, slot: int) -> jax.Array:
        if cfg.greedy:
            return sampling.first_argmax(logits_BU)
        logprob_BU = sampling.draft_logprob(logits_BU, state.sampling.temperature_B)
        if cfg.acceptance == "coupled":
            key_B2 = sampling.noise_key(state.key_B2, position_B + 1 + slot)
            if vocab.d2t_U is None:
                noise_BU = random.gumbel(key_B2, logits_BU.shape[-1])
            else:
                noise_BU = random.gumbel_at(key_B2, vocab.d2t_U)
        else:
            key_B2 = sampling.stream_key(state.key_B2, sampling.DRAFT, position_B, slot)
            noise_BU = random.gumbel(key_B2, logits_BU.shape[-1])
        return sampling.sample_logprob(logprob_BU, noise_BU)

    hidden_BAGD = block_hidden(
        weights.drafter,
        vocab,
        anchor_B[:, None],
        position_B[:, None],
        state.context_cache,
        cfg.drafter,
    )
    return sample_block(weights.drafter, vocab, hidden_BAGD[:, 0], anchor_B, choose, cfg.drafter)


def plan_lengths(block: DraftBlock, cfg: RoundConfig) -> jax.Array:
    """int32 [B]: how many drafts are verified.

    A slot's confidence never sees its own draft, so that stopping at the first low one is lossless
    (spec section 5, non-anticipation).
    """
    num_slots = block.token_BG.shape[0]
    length_B = schedule.fixed_length(num_slots, block.token_BG.shape[1], cfg.num_draft)
    if not cfg.threshold and not cfg.gate:
        return length_B
    confidence_BG = jax.nn.sigmoid(block.confidence_logit_BG[:, : cfg.num_draft])
    if cfg.threshold:
        length_B = schedule.threshold_length(confidence_BG, cfg.threshold)
    return schedule.gated_length(length_B, confidence_BG, cfg.gate)


def accept(
    weights: Weights,
    state: DecodeState,
    block: DraftBlock | None,
    logits_BCV: jax.Array,
    verified_B: jax.Array,
    position_B: jax.Array,
    cfg: RoundConfig,
) -> verify.Acceptance:
    """The accepted prefix and the target's next token; stop tokens come later."""
    num_slots, num_columns = logits_BCV.shape[:2]
    draft_BG = jnp.zeros((num_slots, 0), jnp.int32)
    if block is not None:
        draft_BG = block.token_BG[:, : cfg.num_draft]
    if cfg.greedy:
        return verify.accept_equal(sampling.first_argmax(logits_BCV), draft_BG, verified_B)

    limits = state.sampling
    logprob_BCV = sampling.target_logprob(
        logits_BCV,
        *(
            jnp.broadcast_to(value_B[:, None], (num_slots, num_columns))
            for value_B in (limits.temperature_B, limits.top_k_B, limits.top_p_B, limits.min_p_B)
        ),
    )
    if cfg.acceptance == "coupled":
        return verify.accept_coupled(logprob_BCV, draft_BG, verified_B, state.key_B2, position_B)
    if block is None:
        key_B2 = sampling.stream_key(state.key_B2, sampling.RESIDUAL, position_B, 0)
        noise_BV = random.gumbel(key_B2, logprob_BCV.shape[-1])
        return verify.Acceptance(verified_B, sampling.sample_logprob(logprob_BCV[:, 0], noise_BV))
    assert weights.vocab is not None
    law_BGU = sampling.draft_logprob(
        block.logits_BGU[:, : cfg.num_draft], state.sampling.temperature_B[:, None]
    )
    return verify.accept_rejection(
        logprob_BCV,
        block.index_BG[:, : cfg.num_draft],
        law_BGU,
        weights.vocab.d2t_U,
        verified_B,
        state.key_B2,
        position_B,
    )


def _rows(token_BC: jax.Array, position_BC: jax.Array, wanted_BC: jax.Array) -> Rows:
    """Flat rows of a [B, C] table; unwanted ones become padding (slot B)."""
    num_slots = token_BC.shape[0]
    slot_BC = jnp.where(wanted_BC, jnp.arange(num_slots, dtype=jnp.int32)[:, None], num_slots)
    return Rows(token_BC.reshape(-1), slot_BC.reshape(-1), position_BC.reshape(-1))


def _read(
    weights: Weights, state: DecodeState, rows: Rows, cfg: RoundConfig, anchors_alone: bool = False
) -> tuple[jax.Array, jax.Array, Any]:
    """The target over the rows of a round: logits_BCV, feature_TFD and its cache.

    ``anchors_alone`` reads the first row of every slot only; the others are left 0.
    """
    num_slots, num_columns = state.length_B.shape[0], cfg.num_draft + 1
    if not anchors_alone:
        hidden_TD, feature_TFD, cache = _extend(weights, state, rows, cfg, num_columns)
        logits_TV = unembed(weights.target.vocab, hidden_TD)
        return logits_TV.reshape(num_slots, num_columns, -1), feature_TFD, cache
    first = jax.tree.map(lambda x_T: x_T[::num_columns], rows)
    hidden_BD, feature_BFD, cache = _extend(weights, state, first, cfg, 1)
    logits_BV = unembed(weights.target.vocab, hidden_BD)
    logits_BCV = jnp.zeros((num_slots, num_columns, logits_BV.shape[-1]), logits_BV.dtype)
    shape = (num_slots * num_columns, *feature_BFD.shape[1:])
    feature_TFD = jnp.zeros(shape, feature_BFD.dtype).at[::num_columns].set(feature_BFD)
    return logits_BCV.at[:, 0].set(logits_BV), feature_TFD, cache


def _extend(
    weights: Weights, state: DecodeState, rows: Rows, cfg: RoundConfig, rows_per_slot: int
) -> Any:
    """The target over the rows, with the drafter's feature layers."""
    layers = () if cfg.drafter is None else cfg.drafter.target_layer_ids
    return extend(
        weights.target,
        state.target_cache,
        rows,
        cfg.target,
        layers,
        rows_per_slot=rows_per_slot,
    )


def _inject(
    weights: Weights, state: DecodeState, feature_TFD: jax.Array, rows: Rows, cfg: RoundConfig
) -> Any:
    """The drafter's context with the rows' features; those of rejected drafts are garbage that
    the next round overwrites. None without a drafter."""
    if cfg.drafter is None or weights.drafter is None:
        return state.context_cache
    return extend_context(
        weights.drafter,
        state.context_cache,
        feature_TFD,
        rows.slot_T,
        rows.position_T,
        cfg.drafter,
    )
