"""Lossless acceptance: which drafts stand, which token follows them, what is committed.

Rejection (Leviathan et al. 2023, Chen et al. 2023). Slot k with token v stands with probability
min(1, p^t_k(v) / p^d_k(v)). At the first slot that falls the next token comes from
normalise(max(0, p^t_k - p^d_k)); where all stand, from the target's row after them.

Coupled (Daliri et al. 2024). The target's token at a position is argmax(log p^t + G) under a
noise field G that depends on seed and position alone, and a draft stands while it equals that
token. The text is then the target's own, whatever was drafted or verified.

The target reads the anchor and the verified drafts of all requests as T flat rows; `row_BC` says
which row is column k of a request. That row holds the target's law after the anchor and k drafts:
it judges slot k, and the token that it decides has the absolute position `anchor_position + 1 + k`.

Axes: B requests, G slots of a block, C = G + 1, T rows, V target vocabulary, U draft vocabulary,
S positions, K stop ids, 2 words of a key.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax import sampling
from pallas_kernels import random

# Keeps the ratio finite where rounding drew a token of next to no probability; the published
# evaluation has the same floor.
MIN_DRAFT_LOGPROB = -18.420680743952367  # log 1e-8


@struct.dataclass
class VerifyPlan:
    """Which rows of the flat batch the target reads for whom.

    Attributes:
        slot_T: int32 request of each row; B marks a row that nobody needs.
        column_T: int32 its place behind the anchor, 0 for the anchor itself.
        row_BC: int32 row of every column; any row where a column is not read.
        length_B: int32 drafts verified.
    """

    slot_T: jax.Array
    column_T: jax.Array
    row_BC: jax.Array
    length_B: jax.Array


@struct.dataclass
class Acceptance:
    """The outcome of a round, before stop tokens."""

    accepted_B: jax.Array  # int32, number of leading drafts that stand, <= length
    next_B: jax.Array  # int32, the target's token after them


def plan_rows(
    length_B: jax.Array, active_B: jax.Array, num_rows: int, num_columns: int
) -> VerifyPlan:
    """Anchors and verified drafts of the active requests, one request behind the other.

    Args:
        length_B: int32 drafts to verify, below ``num_columns``; with the anchors of the active
            requests at most ``num_rows`` in all.
        active_B: bool, requests that take part.
        num_rows: T.
        num_columns: C.
    """
    num_requests = length_B.shape[0]
    count_B = jnp.where(active_B, length_B + 1, 0)
    end_B = jnp.cumsum(count_B)
    row_T = jnp.arange(num_rows, dtype=jnp.int32)
    slot_T = jnp.sum(end_B <= row_T[:, None], axis=1, dtype=jnp.int32)
    start_B = end_B - count_B
    column_T = row_T - start_B[jnp.minimum(slot_T, num_requests - 1)]
    row_BC = start_B[:, None] + jnp.arange(num_columns, dtype=jnp.int32)
    return VerifyPlan(slot_T, column_T, jnp.minimum(row_BC, num_rows - 1), length_B)


def accept_rejection(
    target_logprob_TV: jax.Array,
    row_BC: jax.Array,
    draft_index_BG: jax.Array,
    draft_logprob_BGU: jax.Array,
    d2t_U: jax.Array | None,
    length_B: jax.Array,
    key_B2: jax.Array,
    anchor_position_B: jax.Array,
) -> Acceptance:
    """Rejection sampling: the output follows the target's law, whatever the drafter's.

    Args:
        target_logprob_TV: filtered and normalised.
        row_BC: int32, as in :class:`VerifyPlan`; columns after `length` are not read.
        draft_index_BG: int32 drafts as indices of the draft vocabulary.
        draft_logprob_BGU: the law that each draft was drawn from, normalised.
        d2t_U: target ids of the draft vocabulary; None where it is the target's.
        length_B: int32 number of slots verified, 0 to G, chosen without knowing the drafts that
            it admits (slot k may depend on drafts before k).
        key_B2: key of each request; drafts were drawn with its DRAFT stream.
        anchor_position_B: int32 absolute position of the anchor.
    """
    draft_token_BG = draft_index_BG if d2t_U is None else d2t_U[draft_index_BG]
    slot_G = jnp.arange(draft_index_BG.shape[1])
    accept_key_BG2 = sampling.stream_key(
        key_B2[:, None], sampling.ACCEPT, anchor_position_B[:, None], slot_G
    )
    accepted_B = accepted_prefix(
        target_logprob_TV[row_BC[:, :-1], draft_token_BG],
        jnp.take_along_axis(draft_logprob_BGU, draft_index_BG[..., None], axis=-1)[..., 0],
        random.uniform(accept_key_BG2, 1)[..., 0],
        length_B,
    )
    target_BV = target_logprob_TV[jnp.take_along_axis(row_BC, accepted_B[:, None], axis=1)[:, 0]]
    logprob_BV = next_logprob(target_BV, draft_logprob_BGU, d2t_U, accepted_B, length_B)
    next_key_B2 = sampling.stream_key(key_B2, sampling.RESIDUAL, anchor_position_B, accepted_B)
    noise_BV = random.gumbel(next_key_B2, logprob_BV.shape[-1])
    return Acceptance(accepted_B, sampling.sample_logprob(logprob_BV, noise_BV))


def accepted_prefix(
    target_logprob_BG: jax.Array,
    draft_logprob_BG: jax.Array,
    uniform_BG: jax.Array,
    length_B: jax.Array,
) -> jax.Array:
    """int32 [B]: how many of the first `length` slots stand, from both laws of each drawn token.

    A slot stands iff uniform < min(1, p^t / p^d), strictly: a token that the target forbids falls
    even at a uniform of 0, and equal laws stand even at the largest, which is below 1.
    """
    draft_logprob_BG = jnp.maximum(draft_logprob_BG, MIN_DRAFT_LOGPROB)
    ratio_BG = jnp.exp(jnp.minimum(target_logprob_BG - draft_logprob_BG, 0))
    return _leading(uniform_BG < ratio_BG, length_B)


def next_logprob(
    target_logprob_BV: jax.Array,
    draft_logprob_BGU: jax.Array,
    d2t_U: jax.Array | None,
    accepted_B: jax.Array,
    length_B: jax.Array,
) -> jax.Array:
    """float32 [B, V]: the law of the token after the accepted prefix.

    The residual of slot `accepted` where that slot fell, else the target's own law there, which is
    `target_logprob_BV`. Only this one row of each request is built: at V = 49152 the others would
    cost more than the whole round.
    """
    fallen_B = jnp.minimum(accepted_B, draft_logprob_BGU.shape[1] - 1)
    draft_BU = draft_logprob_BGU[jnp.arange(accepted_B.shape[0]), fallen_B]
    residual_BV = sampling.residual_logprob(target_logprob_BV, draft_BU, d2t_U)
    return jnp.where((accepted_B < length_B)[:, None], residual_BV, target_logprob_BV)


def accept_coupled(
    target_logprob_TV: jax.Array,
    row_BC: jax.Array,
    draft_token_BG: jax.Array,
    length_B: jax.Array,
    key_T2: jax.Array,
    position_T: jax.Array,
) -> Acceptance:
    """Coupled acceptance: drafts stand while they are the tokens that the target draws anyway.

    Args:
        target_logprob_TV: filtered and normalised.
        row_BC: int32, as in :class:`VerifyPlan`; columns after `length` are not used.
        draft_token_BG: int32 target ids, however they were found.
        length_B: int32 number of slots verified, 0 to G, chosen in any way at all.
        key_T2: key of each row's request.
        position_T: int32 absolute position of each row.
    """
    noise_TV = random.gumbel(
        sampling.noise_key(key_T2, position_T + 1), target_logprob_TV.shape[-1]
    )
    token_T = sampling.sample_logprob(target_logprob_TV, noise_TV)
    return accept_equal(token_T[row_BC], draft_token_BG, length_B)


def accept_equal(token_BC: jax.Array, draft_token_BG: jax.Array, length_B: jax.Array) -> Acceptance:
    """Drafts stand while they equal the target's own tokens: greedy and coupled decoding.

    Args:
        token_BC: int32 the target's token after the anchor and after every draft.
        draft_token_BG: int32 target ids.
        length_B: int32 number of slots verified, 0 to G.
    """
    accepted_B = _leading(draft_token_BG == token_BC[:, :-1], length_B)
    return Acceptance(accepted_B, token_BC[jnp.arange(accepted_B.shape[0]), accepted_B])


def _leading(stands_BG: jax.Array, length_B: jax.Array) -> jax.Array:
    """int32 [B]: slots before the first that falls or lies beyond `length`."""
    verified_BG = jnp.arange(stands_BG.shape[1]) < length_B[:, None]
    return jnp.sum(jnp.cumprod((stands_BG & verified_BG).astype(jnp.int32), axis=1), axis=1)


def truncate_at_stop(
    draft_token_BG: jax.Array, acceptance: Acceptance, stop_id_BK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ends a request at its first stop token: an accepted draft or the next token.

    Args:
        draft_token_BG: int32 target ids.
        acceptance: of the same round.
        stop_id_BK: int32 stop ids of each request, padded with -1.

    Returns:
        accepted_B: int32 drafts to commit, a stop token included and what follows it dropped.
        count_B: int32 tokens to commit, which is the accepted length of the round: accepted + 1,
            or accepted where a draft stopped the request and the next token is dropped too.
        stopped_B: bool, the last committed token is a stop token.
    """
    slot_G = jnp.arange(draft_token_BG.shape[1])
    accepted_BG = slot_G < acceptance.accepted_B[:, None]
    stop_BG = jnp.any(draft_token_BG[..., None] == stop_id_BK[:, None], axis=-1) & accepted_BG
    by_draft_B = jnp.any(stop_BG, axis=1)
    by_next_B = jnp.any(acceptance.next_B[:, None] == stop_id_BK, axis=1)
    until_stop_B = 1 + jnp.sum(jnp.cumsum(stop_BG, axis=1) == 0, axis=1, dtype=jnp.int32)
    accepted_B = jnp.where(by_draft_B, until_stop_B, acceptance.accepted_B)
    count_B = jnp.where(by_draft_B, accepted_B, accepted_B + 1)
    return accepted_B, count_B, by_draft_B | by_next_B


def commit_tokens(
    token_BS: jax.Array,
    length_B: jax.Array,
    draft_token_BG: jax.Array,
    accepted_B: jax.Array,
    next_B: jax.Array,
    count_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Appends the first `count` of (accepted drafts, next token) to each request.

    Args:
        token_BS: int32 committed tokens; donate it to write in place.
        length_B: int32 tokens committed so far.
        draft_token_BG: int32 target ids.
        accepted_B: int32 drafts that stand.
        next_B: int32 token after them.
        count_B: int32, at most accepted + 1; 0 leaves the request as it is.

    Returns:
        token_BS and length_B afterwards. Tokens that fall beyond S are dropped, though counted.
    """
    num_requests, num_slots = draft_token_BG.shape
    slot_C = jnp.arange(num_slots + 1)
    block_BC = jnp.pad(draft_token_BG, ((0, 0), (0, 1)))
    block_BC = jnp.where(slot_C == accepted_B[:, None], next_B[:, None], block_BC)
    committed_BC = slot_C < count_B[:, None]
    place_BC = jnp.where(committed_BC, length_B[:, None] + slot_C, token_BS.shape[1])
    request_B1 = jnp.arange(num_requests)[:, None]
    token_BS = token_BS.at[request_B1, place_BC].set(block_BC.astype(token_BS.dtype), mode="drop")
    return token_BS, length_B + count_B
