"""The two passes of verification over logits, in plain JAX: what they mean.

:func:`statistics` reads every row once for numbers of the row; :func:`draw` reads one row of each
request for the token after its accepted drafts. In between stands the rule (``rule.py``), which
works on single numbers. No law is ever written out for all rows.

Axes: X any leading axes, T rows, B rows that are drawn from, V target vocabulary, U draft
vocabulary, 2 words of a key.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import random

LEAST_MASS = 1e-8  # a residual with no more mass is rounding: the target's own law stands for it


class Statistics(NamedTuple):
    """What verification needs to know of a row of logits.

    Attributes:
        best_X: float32 the highest logit.
        first_X: int32 the first token that has it; needed at temperature 0 alone, and 0 where no
            row has that.
        mass_X: float32, sum of exp((logit - best) / temperature) over the tokens that are kept.
        finite_X: bool, all logits are finite.
    """

    best_X: jax.Array
    first_X: jax.Array
    mass_X: jax.Array
    finite_X: jax.Array


class Law(NamedTuple):
    """How the logits of a row become a law: see :func:`logprob`. All float32."""

    best_X: jax.Array
    log_mass_X: jax.Array
    floor_X: jax.Array
    temperature_X: jax.Array


class Fallen(NamedTuple):
    """The drafts that were refused, one for each row that is drawn from.

    Attributes:
        logits_XU: of the drafter, any rows.
        row_B: int32 the row among them that the draft was drawn from.
        law_B: of these rows.
        fell_B: bool; elsewhere no draft was refused, and the rest means nothing.
        d2t_U: int32 target ids of the draft vocabulary, those of another shard beyond V; None
            where it is the target's.
    """

    logits_XU: jax.Array
    row_B: jax.Array
    law_B: Law
    fell_B: jax.Array
    d2t_U: jax.Array | None


def statistics(logits_XV: jax.Array, temperature_X: jax.Array, floor_X: jax.Array) -> Statistics:
    """One reading of the rows.

    Args:
        logits_XV: any float dtype; -inf forbids a token.
        temperature_X: float32, 0 is greedy.
        floor_X: float32, the least logit that is kept; -inf keeps all.
    """
    logits_XV = logits_XV.astype(jnp.float32)
    best_X, lowest_X = jnp.max(logits_XV, axis=-1), jnp.min(logits_XV, axis=-1)
    first_X = jax.lax.cond(
        jnp.any(temperature_X == 0),
        lambda: _first_index(logits_XV, best_X),
        lambda: jnp.zeros(best_X.shape, jnp.int32),
    )
    weight_XV = jnp.exp(-gap(logits_XV, best_X, temperature_X))
    mass_X = jnp.sum(jnp.where(logits_XV >= floor_X[..., None], weight_XV, 0), axis=-1)
    return Statistics(best_X, first_X, mass_X, jnp.isfinite(best_X) & jnp.isfinite(lowest_X))


def merge(parts_NX: Statistics, temperature_X: jax.Array) -> Statistics:
    """Statistics of whole rows from those of N parts of each, whose `first_X` are tokens of it."""
    best_X = jnp.max(parts_NX.best_X, axis=0)
    beyond = jnp.iinfo(jnp.int32).max
    first_NX = jnp.where(parts_NX.best_X < best_X, beyond, parts_NX.first_X)
    weight_NX = jnp.exp(-gap(parts_NX.best_X.T, best_X, temperature_X)).T
    mass_NX = jnp.where(weight_NX > 0, weight_NX * parts_NX.mass_X, 0)  # 0, not NaN, of no token
    finite_X = parts_NX.finite_X.all(axis=0)
    return Statistics(best_X, first_NX.min(axis=0), mass_NX.sum(axis=0), finite_X)


def gap(logits_XV: jax.Array, best_X: jax.Array, temperature_X: jax.Array) -> jax.Array:
    """How far each token lies below the best, in units of the temperature.

    Taking the maximum off before dividing keeps tiny temperatures from overflowing. Temperature 0,
    where the law is a matter of `first_X`, counts as 1.
    """
    scale_X1 = jnp.where(temperature_X == 0, 1, temperature_X)[..., None]
    return (best_X[..., None] - logits_XV) / scale_X1


def logprob(logits_XV: jax.Array, law_X: Law) -> jax.Array:
    """float32 [X, V] log-probabilities under a law with a temperature above 0."""
    logits_XV = logits_XV.astype(jnp.float32)
    gap_XV = gap(logits_XV, law_X.best_X, law_X.temperature_X)
    kept_XV = logits_XV >= law_X.floor_X[..., None]
    return jnp.where(kept_XV, -gap_XV - law_X.log_mass_X[..., None], -jnp.inf)


def draw(
    logits_TV: jax.Array,
    row_B: jax.Array | None,
    law_B: Law,
    fallen: Fallen | None,
    key_B2: jax.Array,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """A token of each row, by the Gumbel noise of its key: from normalise(max(0, p^t - p^d)) where
    a draft was refused and this has any mass, else from p^t.

    Args:
        logits_TV: the target's, or a shard of them.
        row_B: int32 rows to draw from; None for all, one behind the other.
        law_B: of these rows, over the whole vocabulary.
        fallen: the refused drafts; None where there are none.
        key_B2: uint32 keys of the noise.
        axis_name: the mesh axis that the vocabulary is split over, if it is.

    Returns:
        float32 score and int32 token [B], the first of the highest in this shard.
    """
    num_tokens = logits_TV.shape[-1]
    logprob_BV = logprob(logits_TV if row_B is None else logits_TV[row_B], law_B)
    if fallen is not None:
        logprob_BV = next_weight(logprob_BV, fallen, axis_name)
    start = shard_start(num_tokens, axis_name)
    score_BV = logprob_BV + random.gumbel_at(key_B2, start + jnp.arange(num_tokens))
    best_B = jnp.max(score_BV, axis=-1)
    return best_B, start + _first_index(score_BV, best_B)


def next_weight(logprob_BV: jax.Array, fallen: Fallen, axis_name: str | None = None) -> jax.Array:
    """float32 [B, V]: the law of the next token up to a factor, as logarithms.

    The residual where a draft was refused, unless it has no mass; else the target's own law, which
    is `logprob_BV`.
    """
    draft_logprob_BU = logprob(fallen.logits_XU[fallen.row_B], fallen.law_B)
    excess_BV = excess(logprob_BV, draft_logprob_BU, fallen.d2t_U)
    mass_B1 = jnp.sum(excess_BV, axis=-1, keepdims=True)
    if axis_name is not None:
        mass_B1 = jax.lax.psum(mass_B1, axis_name)
    from_residual_B1 = fallen.fell_B[:, None] & (mass_B1 > LEAST_MASS)
    return jnp.where(from_residual_B1, jnp.log(excess_BV), logprob_BV)


def excess(
    logprob_XV: jax.Array, draft_logprob_XU: jax.Array, d2t_U: jax.Array | None
) -> jax.Array:
    """max(0, p^t - p^d), float32 [X, V]: the residual before it is normalised.

    Args:
        logprob_XV: of the target.
        draft_logprob_XU: of the drafter.
        d2t_U: distinct target ids of the draft vocabulary, those beyond V left out; None where it
            is the target's.
    """
    target_XV, draft_XU = jnp.exp(logprob_XV), jnp.exp(draft_logprob_XU)
    if d2t_U is None:
        return jnp.maximum(target_XV - draft_XU, 0)
    less_XV = target_XV.at[..., d2t_U].add(-draft_XU, unique_indices=True, mode="drop")
    return jnp.maximum(less_XV, 0)


def first_argmax(score_XV: jax.Array) -> jax.Array:
    """int32 index of the first maximum of float32 scores; always inside the vocabulary.

    Two plain reductions over float32 vectorise on a CPU where `jnp.argmax` does not: 8 against
    54 ms at [64, 49152] with the noise that is added there. Indices are exact below 2^24.
    """
    return _first_index(score_XV, jnp.max(score_XV, axis=-1))


def _first_index(score_XV: jax.Array, best_X: jax.Array) -> jax.Array:
    index_V = jnp.arange(score_XV.shape[-1], dtype=jnp.float32)
    last = float(score_XV.shape[-1] - 1)
    below_XV = score_XV < best_X[..., None]
    return jnp.min(jnp.where(below_XV, last, index_V), axis=-1).astype(jnp.int32)


def shard_start(num_tokens: int, axis_name: str | None) -> jax.Array | int:
    """The first token of this shard of the vocabulary."""
    return 0 if axis_name is None else num_tokens * jax.lax.axis_index(axis_name)
