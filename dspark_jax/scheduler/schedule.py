"""How many slots of each block to verify: the part of the scheduler that runs on the device.

Losslessness under rejection acceptance asks one thing of a schedule: whether slot k is verified
must not depend on the token drafted at slot k. Two kinds of rule keep to that. One stops at the
first slot it does not want (`threshold_length`, `causal_budget`). The other takes a budget from
earlier rounds (``budget.py``) and lets the slots of all requests compete for it by their survival
(`select_prefixes`): revealed in rank order, an admission depends only on drafts that were admitted
before it, because what follows a slot never outranks it. This rests on five conditions
(``notebooks/concepts/lossless.md``), each named where it is kept:

    (a) survival is float32 and never rises along a block      `prefix_survival`
    (b) ties are broken by a fixed index, j ascending          `select_prefixes`
    (c) c_k never sees d_k or anything later                   `models.heads.confidence_logit`
    (d) keys are folded with (anchor position, slot)           `random.stream_key`
    (e) the budget knows only rounds at least two back         `budget.choose_bucket`

and a budget that does know this round's confidences is rounded up alone (`budget.bucket_for`).
Coupled and greedy acceptance need none of it: there any schedule is lossless.

Axes: B requests, G slots of a block, N = B * G slots in all, T rows (target tokens) of a round.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def prefix_survival(confidence_BG: jax.Array) -> jax.Array:
    """a_k = Π_{i<=k} c_i, float32 [B, G]: the chance that slot k and all before it are accepted.

    Condition (a): never rises along a block, not even by rounding.

    Args:
        confidence_BG: c_k in [0, 1]. From a non-finite c_k on, slots count as 1; earlier ones stay
            as they are, because c_k has seen d_{k-1} and must not decide about its slot.
    """
    survival_BG = jnp.cumprod(_finite_prefix(confidence_BG), axis=1)
    # A parallel cumprod associates each prefix in its own way and may rise by a rounding.
    return jax.lax.cummin(survival_BG, axis=1)


def fixed_length(num_requests: int, block_size: int, length: int) -> jax.Array:
    """int32 [B]: the same number of slots for every request."""
    if not 0 <= length <= block_size:
        raise ValueError(f"length is {length}: give a number of slots from 0 to {block_size}")
    return jnp.full(num_requests, length, jnp.int32)


def threshold_length(confidence_BG: jax.Array, threshold: jax.Array | float) -> jax.Array:
    """int32 [B]: the slots before the first whose own confidence c_k is below the threshold.

    Args:
        confidence_BG: c_k in [0, 1], not their product; non-finite as in `prefix_survival`.
        threshold: 0 verifies all, above 1 none.
    """
    wanted_BG = _finite_prefix(confidence_BG) >= threshold
    return jnp.sum(jnp.cumprod(wanted_BG.astype(jnp.int32), axis=1), axis=1)


def gated_length(
    length_B: jax.Array, confidence_BG: jax.Array, gate: jax.Array | float
) -> jax.Array:
    """int32 [B]: `length`, or 0 where the first confidence c_1 lies below the gate.

    c_1 has seen no draft at all, so that it may decide about the whole block.

    Args:
        length_B: int32 lengths, however they were chosen without knowing the drafts they admit.
        confidence_BG: c_k in [0, 1]; a non-finite c_1 counts as 1.
        gate: 0 keeps all lengths.
    """
    return jnp.where(_finite_prefix(confidence_BG)[:, 0] >= gate, length_B, 0)


def end_at_stop(survival_BG: jax.Array, stop_BG: jax.Array) -> jax.Array:
    """Survival with 0 in every slot after a drafted stop token, float32 [B, G].

    The slot of the stop token keeps its own value, so that a slot depends on earlier drafts alone.

    Args:
        survival_BG: as from `prefix_survival`.
        stop_BG: bool, the draft of the slot is a stop token of its request.
    """
    stops_BG = jnp.cumsum(stop_BG.astype(jnp.int32), axis=1)
    return jnp.where(stops_BG - stop_BG > 0, 0.0, survival_BG)


def causal_budget(
    survival_BG: jax.Array, steps_per_s_T: jax.Array, active_B: jax.Array
) -> jax.Array:
    """How many drafts to verify by DSpark's Algorithm 1, an int32 scalar.

    Drafts are admitted in descending survival while each raises the expected throughput
    (committed tokens a step) * (steps a second). Stopping at the first that does not is what
    keeps it lossless: whether the n-th draft is admitted depends on the n best survivals alone,
    and so it does after the budget was rounded up to a bucket.

    Args:
        survival_BG: as from `prefix_survival`; slots with 0 are never admitted.
        steps_per_s_T: float32, element B is for a round of B target tokens, from 0 on. Rounds
            beyond its end count as impossible.
        active_B: bool, requests that take part; each costs one target token by itself.
    """
    survival_N = _descending(survival_BG, active_B)
    num_active = jnp.sum(active_B, dtype=jnp.int32)
    admitted_N1 = jnp.arange(survival_N.shape[0] + 1)
    tokens_N1 = num_active + jnp.pad(jnp.cumsum(survival_N), (1, 0))
    steps_per_s_N1 = steps_per_s_T.at[num_active + admitted_N1].get(mode="fill", fill_value=0)
    tokens_per_s_N1 = tokens_N1 * steps_per_s_N1
    raises_N = (tokens_per_s_N1[1:] > tokens_per_s_N1[:-1]) & (survival_N > 0)
    return jnp.sum(jnp.cumprod(raises_N.astype(jnp.int32)))


def select_prefixes(
    survival_BG: jax.Array, budget: jax.Array | int, active_B: jax.Array
) -> jax.Array:
    """int32 [B]: the lengths of the prefixes that the `budget` best slots of the batch make up.

    Condition (b): among equal survivals the earlier slot comes first, then the earlier request.
    No value decides a tie, and together with (a) the slots taken of a block are always a prefix.

    Args:
        survival_BG: as from `prefix_survival`; slots with 0 are never taken.
        budget: int32 number of slots, any.
        active_B: bool, requests that take part.
    """
    num_requests, num_slots = survival_BG.shape
    survival_BG = jnp.where(active_B[:, None], survival_BG, 0.0)
    survival_N = _descending(survival_BG, active_B)
    last = jnp.where(budget > 0, survival_N[jnp.clip(budget, 1, survival_N.shape[0]) - 1], jnp.inf)
    above_BG, tied_BG = survival_BG > last, survival_BG == last
    # Sorting values and counting ties costs less than sorting pairs of value and index.
    place_BG = jnp.cumsum(tied_BG.T.reshape(-1)).reshape(num_slots, num_requests).T
    left = budget - jnp.sum(above_BG)
    taken_BG = (above_BG | (tied_BG & (place_BG <= left))) & (survival_BG > 0)
    return jnp.sum(taken_BG, axis=1, dtype=jnp.int32)


def _descending(survival_BG: jax.Array, active_B: jax.Array) -> jax.Array:
    """Float32 [N]: the survivals of all slots, best first; those of idle requests count as 0."""
    return jnp.sort(jnp.where(active_B[:, None], survival_BG, 0.0).reshape(-1), descending=True)


def _finite_prefix(confidence_BG: jax.Array) -> jax.Array:
    """float32 confidences, 1 from the first non-finite one of a block on."""
    confidence_BG = confidence_BG.astype(jnp.float32)
    finite_BG = jnp.cumprod(jnp.isfinite(confidence_BG).astype(jnp.int32), axis=1) > 0
    return jnp.where(finite_BG, confidence_BG, 1.0)
