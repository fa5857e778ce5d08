"""Around lossless acceptance: which rows the target reads, where a text stops, what is committed.

Acceptance itself is ``pallas_kernels/accept_block``.

Axes: B requests, G slots of a block, C = G + 1, T rows, S positions, K stop ids.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.accept_block.rule import VerifyPlan


@jax.named_scope("schedule")
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


@jax.named_scope("accept")
def truncate_at_stop(
    draft_token_BG: jax.Array, accepted_B: jax.Array, next_B: jax.Array, stop_id_BK: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ends a request at its first stop token: an accepted draft or the next token.

    Args:
        draft_token_BG: int32 target ids.
        accepted_B: int32 leading drafts that stand.
        next_B: int32 token after them.
        stop_id_BK: int32 stop ids of each request, padded with -1.

    Returns:
        accepted_B: int32 drafts to commit, a stop token included and what follows it dropped.
        count_B: int32 tokens to commit, which is the accepted length of the round: accepted + 1,
            or accepted where a draft stopped the request and the next token is dropped too.
        stopped_B: bool, the last committed token is a stop token.
    """
    slot_G = jnp.arange(draft_token_BG.shape[1])
    accepted_BG = slot_G < accepted_B[:, None]
    stop_BG = jnp.any(draft_token_BG[..., None] == stop_id_BK[:, None], axis=-1) & accepted_BG
    by_draft_B = jnp.any(stop_BG, axis=1)
    by_next_B = jnp.any(next_B[:, None] == stop_id_BK, axis=1)
    until_stop_B = 1 + jnp.sum(jnp.cumsum(stop_BG, axis=1) == 0, axis=1, dtype=jnp.int32)
    accepted_B = jnp.where(by_draft_B, until_stop_B, accepted_B)
    count_B = jnp.where(by_draft_B, accepted_B, accepted_B + 1)
    return accepted_B, count_B, by_draft_B | by_next_B


@jax.named_scope("commit")
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
