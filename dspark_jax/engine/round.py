"""One decoding round as one program: draft, schedule, verify, accept, commit.

What each part does is in ``notebooks/concepts/round.md``.

The functions here are pure; ``programs.py`` jits them with a donated state. Profiles show their
parts under these five names, by ``jax.named_scope``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dspark_jax import sampling
from dspark_jax.engine import verify
from dspark_jax.engine.inputs import DraftNews, RoundConfig, RoundInput, RoundReport, Weights
from dspark_jax.engine.rows import begin_decoding, chunk_rows, flat_rows, observe_rows, read_rows
from dspark_jax.engine.shaping import Masks
from dspark_jax.engine.state import DecodeState
from dspark_jax.engine.tokens import accept, draft_tokens, raw_logprobs, shape_law, top_logprobs
from dspark_jax.models.cache import with_pages
from dspark_jax.models.drafters.family import Borrowed
from dspark_jax.models.drafters.heads import DraftBlock
from dspark_jax.models.drafters.table import drafter_of
from dspark_jax.models.vocab import suppress
from dspark_jax.scheduler import schedule
from dspark_jax.scheduler.temperatures import calibrated_confidence
from pallas_kernels.accept_block.api import OneHot


def decode_round(
    weights: Weights,
    state: DecodeState,
    given: RoundInput,
    cfg: RoundConfig,
    *,
    num_rows: int,
    rows_per_chunk: int = 0,
) -> tuple[DecodeState, RoundReport]:
    """draft -> schedule -> verify -> accept -> commit, for all slots.

    Args:
        weights: of target and drafter.
        state: donated.
        given: the host's decisions.
        cfg: static part.
        num_rows: T, anchors and verified drafts of all slots together; at least one a slot. Where
            it does not hold all that the configuration wants, the best drafts of the batch get it.
        rows_per_chunk: W, positions of a chunk of a prompt.

    Returns:
        The state after the round and its report.

    Source: section 3 of the paper; ``notebooks/concepts/round.md``.

    >>> weights, state, given, cfg = read_prompts(load(), [Request(prompt="Hello!")])
    >>> step = jax.jit(decode_round, static_argnames=("cfg", "num_rows"))
    >>> state, report = step(weights, state, given, cfg, num_rows=1 + cfg.num_draft)
    >>> bool(report.count_B[0] == report.accepted_B[0] + 1)
    True
    """
    chunks, limits = None, state.sampling
    if given.chunks is not None:
        chunks = chunk_rows(state, given.chunks, rows_per_chunk)
    state, drafted_B = _begin(state, given)
    position_B, anchor_B = _anchors(state)
    block, token_BC, verified_B = given.block, anchor_B[:, None], jnp.zeros_like(position_B)
    if cfg.num_draft:
        block = draft(weights, state, anchor_B, position_B, cfg) if block is None else block
        survival_BG = rank(block, drafted_B, given.temperature_BG, cfg, given.masks)
        verified_B = plan_lengths(block, survival_BG, state, num_rows)
        token_BC = jnp.concatenate([token_BC, block.token_BG[:, : cfg.num_draft]], axis=1)
    plan = verify.plan_rows(verified_B, state.active_B, num_rows, cfg.num_draft + 1)
    rows = flat_rows(token_BC, position_B, plan)

    often_none = bool(cfg.threshold or cfg.gate) or (
        block is not None and block.count_B is not None
    )
    logits_TV, feature_TFD, target_cache = read_rows(
        weights, state, rows, chunks, verified_B, cfg, often_none=often_none
    )
    law_TV = shape_law(state, given, logits_TV, token_BC, plan, cfg)
    acceptance = accept(weights, state, block, law_TV, plan, position_B, cfg)
    draft_BG = token_BC[:, 1:]
    accepted_B, count_B, stopped_B = verify.truncate_at_stop(
        draft_BG, acceptance.accepted_B, acceptance.next_B, state.stop_id_BK
    )
    count_B = jnp.where(state.active_B, count_B, 0)
    token_BS, length_B = verify.commit_tokens(
        state.token_BS, state.length_B, draft_BG, accepted_B, acceptance.next_B, count_B
    )
    state = state.replace(token_BS=token_BS, length_B=length_B)  # type: ignore[attr-defined]
    context_cache = observe_rows(weights, state, feature_TFD, rows, chunks, cfg)

    column_C = jnp.arange(cfg.num_draft + 1, dtype=jnp.int32)
    committed_BC = jnp.where(
        column_C == accepted_B[:, None], acceptance.next_B[:, None], jnp.roll(token_BC, -1, axis=1)
    )
    finite_B = acceptance.finite_B | ~state.active_B
    top_id_BCK, top_logprob_BCK = top_logprobs(given, logits_TV, plan.row_BC, cfg)
    report = RoundReport(
        token_BC=committed_BC,
        count_B=count_B,
        accepted_B=jnp.where(state.active_B, accepted_B, 0),
        verified_B=jnp.where(state.active_B, verified_B, 0),
        stopped_B=stopped_B & state.active_B,
        finite_B=finite_B,
        length_B=length_B,
        generation_B=state.generation_B,
        logprob_BC=raw_logprobs(state, logits_TV, plan.row_BC, committed_BC, cfg),
        draft_BG=None if block is None else block.token_BG,
        confidence_logit_BG=None if block is None else block.confidence_logit_BG,
        top_id_BCK=top_id_BCK,
        top_logprob_BCK=top_logprob_BCK,
    )
    state = state.replace(  # type: ignore[attr-defined]
        active_B=state.active_B & ~stopped_B & finite_B & (length_B < state.stop_at_B),
        sampling=limits,
        target_cache=with_pages(target_cache, None),
        context_cache=with_pages(context_cache, None),
    )
    return state, report


def draft_ahead(
    weights: Weights,
    state: DecodeState,
    given: RoundInput,
    steps_per_s_T: jax.Array | None,
    cfg: RoundConfig,
) -> tuple[DraftBlock, DraftNews]:
    """The draft of a round by itself: for the causal policy, where the host chooses the program of
    the rest from the rows that Algorithm 1 asks for, and for grammars, whose masks it makes.

    Args:
        weights: as for :func:`decode_round`.
        state: likewise, but it is not donated.
        given: likewise.
        cfg: likewise.
        steps_per_s_T: float32, of rounds of 0, 1, ... rows; None where the rows are chosen already.

    Returns:
        The block, to be handed to the round, and what the host may read of it.
    """
    state, drafted_B = _begin(state, given)
    position_B, anchor_B = _anchors(state)
    block = draft(weights, state, anchor_B, position_B, cfg)
    if steps_per_s_T is None:
        return block, DraftNews(block.token_BG, None)
    survival_BG = _before_stop(block, rank(block, drafted_B, given.temperature_BG, cfg), state)
    budget = schedule.causal_budget(survival_BG, steps_per_s_T, state.active_B)
    num_rows = budget + jnp.sum(state.active_B, dtype=jnp.int32)
    return block, DraftNews(block.token_BG, jnp.where(budget > 0, num_rows, 0)[None])


def _begin(state: DecodeState, given: RoundInput) -> tuple[DecodeState, jax.Array]:
    """The state with the host's changes, and which slots can draft: those that did not begin to
    decode just now. Idle slots are greedy without filters, so that nothing is computed for them."""
    drafted_B = active_B = state.active_B & given.keep_B
    state = state.replace(  # type: ignore[attr-defined]
        active_B=active_B,
        target_cache=with_pages(state.target_cache, given.page_BX),
        context_cache=with_pages(state.context_cache, given.page_BX),
    )
    if given.chunks is not None:
        state = begin_decoding(state, given.chunks)
        active_B = state.active_B
    values = state.sampling
    sampled = sampling.Sampling(
        temperature_B=jnp.where(active_B, values.temperature_B, 0),
        top_k_B=jnp.where(active_B, values.top_k_B, 0),
        top_p_B=jnp.where(active_B, values.top_p_B, 1),
        min_p_B=jnp.where(active_B, values.min_p_B, 0),
    )
    return state.replace(sampling=sampled), drafted_B  # type: ignore[attr-defined]


def _anchors(state: DecodeState) -> tuple[jax.Array, jax.Array]:
    """Positions and tokens of the anchors, int32 [B] each."""
    position_B = state.length_B - 1
    return position_B, jnp.take_along_axis(state.token_BS, position_B[:, None], axis=1)[:, 0]


@jax.named_scope("draft")
def draft(
    weights: Weights,
    state: DecodeState,
    anchor_B: jax.Array,
    position_B: jax.Array,
    cfg: RoundConfig,
) -> DraftBlock:
    """A block behind every anchor, drawn from the law that ``accept`` will verify against.

    Args:
        weights: of target and drafter.
        state: with the drafter's context of all that the target has read.
        anchor_B: int32 last committed tokens.
        position_B: int32 their positions.
        cfg: static part.

    Returns:
        token_BG int32 in the target's ids, the laws that they were drawn from, and
        confidence_logit_BG float32, None without a confidence head.

    Raises:
        ValueError: ``cfg.draft_law`` is a rule, but the drafter draws nothing.

    Source: sections 3.1 and 3.2 of the paper.

    >>> weights, state, _, cfg = read_prompts(load(), [Request(prompt="Hello!")])
    >>> position_B = state.length_B - 1
    >>> anchor_B = state.token_BS[jnp.arange(1), position_B]
    >>> block = draft(weights, state, anchor_B, position_B, cfg)
    >>> block.token_BG.shape == (1, cfg.drafter.block_size)
    True
    """
    assert cfg.drafter is not None
    assert weights.drafter is not None
    assert weights.vocab is not None
    vocab = weights.vocab

    def law(logits_BU: jax.Array, slot: int) -> jax.Array:
        if cfg.draft_law is not None:
            logits_BU = cfg.draft_law.function(logits_BU, slot)
        return suppress(logits_BU, cfg.target.suppressed, vocab.d2t_U)

    def choose(logits_BU: jax.Array, slot: int) -> jax.Array:
        return draft_tokens(logits_BU, slot, state, position_B, vocab.d2t_U, cfg)

    family, context = drafter_of(cfg.drafter), state.context_cache
    if family.reads == "cache":
        context = Borrowed(context, weights.target, state.target_cache, cfg.target)
    block = family.draft(
        weights.drafter,
        vocab,
        context,
        anchor_B,
        position_B,
        choose,
        law,
        cfg.drafter,
        kernels=cfg.kernels,
    )
    if cfg.draft_law is not None and isinstance(block.logits_BGU, OneHot):
        raise ValueError("draft_law is a rule, but the drafter draws nothing: leave it out")
    return block


@jax.named_scope("schedule")
def rank(
    block: DraftBlock,
    drafted_B: jax.Array,
    temperature_BG: jax.Array | None,
    cfg: RoundConfig,
    masks: Masks | None = None,
) -> jax.Array:
    """Survival of the drafts that the policy wants, float32 [B, K] for K = ``cfg.num_draft``; 0 for
    all others.

    Lossless by the conditions of ``scheduler/schedule.py``: it never rises along a block, and a
    threshold or gate stops at the first slot that it does not want.

    Args:
        block: the drafts.
        drafted_B: bool, slots whose drafts mean something.
        temperature_BG: float32 of the calibration, from past rounds alone; None is 1.
        cfg: static part.
        masks: of grammars; behind a draft that they forbid, none is wanted. None forbids nothing.

    Source: ``notebooks/concepts/scheduler.md``.

    >>> from types import SimpleNamespace
    >>> logit_BG = jnp.array([[2.0, 1.0, -3.0]])  # of the confidences
    >>> fields = dict(token_BG=jnp.zeros((1, 3)), confidence_logit_BG=logit_BG, count_B=None)
    >>> cfg = SimpleNamespace(num_draft=3, threshold=0.5, gate=0.0, lengths=None)
    >>> rank(SimpleNamespace(**fields), jnp.array([True]), None, cfg).round(2).tolist()
    [[0.8..., 0.6..., 0.0]]
    """
    num_slots, block_size = block.token_BG.shape
    length_B = schedule.fixed_length(num_slots, block_size, cfg.num_draft)
    confidence_BG = survival_BG = jnp.ones((num_slots, cfg.num_draft), jnp.float32)
    if block.confidence_logit_BG is not None:
        if temperature_BG is None:
            temperature_BG = jnp.ones((num_slots, block_size), jnp.float32)
        confidence_BG = calibrated_confidence(block.confidence_logit_BG, temperature_BG)
        confidence_BG = confidence_BG[:, : cfg.num_draft]
        length_B = schedule.threshold_length(confidence_BG, cfg.threshold)
        length_B = schedule.gated_length(length_B, confidence_BG, cfg.gate)
        survival_BG = schedule.prefix_survival(confidence_BG)
    if cfg.lengths is not None:
        length_B = cfg.lengths.function(confidence_BG)
    if block.count_B is not None:
        length_B = jnp.minimum(length_B, block.count_B)
    if masks is not None:
        length_B = jnp.minimum(length_B, masks.usable_B)
    wanted_BG = (jnp.arange(cfg.num_draft) < length_B[:, None]) & drafted_B[:, None]
    # Above 0, so that no draft that is wanted is left out while there are rows for it.
    return jnp.where(wanted_BG, jnp.maximum(survival_BG, jnp.finfo(jnp.float32).tiny), 0)


@jax.named_scope("schedule")
def plan_lengths(
    block: DraftBlock, survival_BG: jax.Array, state: DecodeState, num_rows: int
) -> jax.Array:
    """How many drafts are verified: all that are wanted, or the best that there are rows for,
    behind the anchors of all active slots.

    Args:
        block: the drafts.
        survival_BG: float32 of :func:`rank`, 0 where a draft is not wanted.
        state: which slots are active, and the ids that end them.
        num_rows: T, of anchors and drafts.

    Returns:
        int32 [B].

    Source: ``notebooks/concepts/scheduler.md``; lossless by ``notebooks/concepts/lossless.md``.

    >>> plan_lengths(None, jnp.array([[0.9, 0.7, 0.0], [0.8, 0.0, 0.0]]), None, 8).tolist()
    [2, 1]
    """
    num_slots, num_draft = survival_BG.shape
    if num_rows >= num_slots * (num_draft + 1):
        return jnp.sum(survival_BG > 0, axis=1, dtype=jnp.int32)
    budget = num_rows - jnp.sum(state.active_B, dtype=jnp.int32)
    survival_BG = _before_stop(block, survival_BG, state)
    return schedule.select_prefixes(survival_BG, budget, state.active_B)


def _before_stop(block: DraftBlock, survival_BG: jax.Array, state: DecodeState) -> jax.Array:
    """Survival without the drafts behind a drafted stop token."""
    token_BG = block.token_BG[:, : survival_BG.shape[1]]
    stop_BG = jnp.any(token_BG[..., None] == state.stop_id_BK[:, None], axis=-1)
    return schedule.end_at_stop(survival_BG, stop_BG)
