"""How many slots of each block to verify.

Losslessness under rejection acceptance asks one thing of a schedule: whether slot k is verified
must not depend on the token drafted at slot k. The confidence c_k sees the drafts before k alone,
so a rule that stops at the first slot it does not want keeps to that.

Axes: B requests, G slots of a block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def prefix_survival(confidence_BG: jax.Array) -> jax.Array:
    """a_k = Π_{i<=k} c_i, float32 [B, G]: the chance that slot k and all before it are accepted.

    Never rises along a block, not even by rounding: schedules that rank slots rely on it.

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


def _finite_prefix(confidence_BG: jax.Array) -> jax.Array:
    """float32 confidences, 1 from the first non-finite one of a block on."""
    confidence_BG = confidence_BG.astype(jnp.float32)
    finite_BG = jnp.cumprod(jnp.isfinite(confidence_BG).astype(jnp.int32), axis=1) > 0
    return jnp.where(finite_BG, confidence_BG, 1.0)
