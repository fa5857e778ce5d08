"""The passes of verification over logits, in plain JAX: what they mean.

Rejection reads every row once for numbers of the row (:func:`statistics`), and one row of each
request for the token after its accepted drafts (:func:`draw`, or :func:`sample_rest` where the
drafts have one-hot laws). In between stands the rule
(``rule.py``), which works on single numbers. Where drafts only have to equal the target's own
tokens, one reading finds these (:func:`sample`). No law is ever written out for all rows.

Axes: X any leading axes, T rows, B rows that are drawn from, V target vocabulary, U draft
vocabulary, N shards of a vocabulary, 2 words of a key.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import random
from pallas_kernels.chunks import by_rows

NO_TOKEN = -1
LEAST_MASS = 1e-8  # a residual with no more mass is rounding: the target's own law stands for it


class Statistics(NamedTuple):
    """What rejection needs to know of a row of logits.

    Attributes:
        best_T: float32 the highest logit.
        first_T: int32 the first token that has it; needed at temperature 0 alone.
        mass_T: float32, sum of exp((logit - best) / temperature) over the tokens that are kept.
        finite_T: bool, all logits are finite.
    """

    best_T: jax.Array
    first_T: jax.Array
    mass_T: jax.Array
    finite_T: jax.Array


class Sample(NamedTuple):
    """A token of each row.

    Attributes:
        best_T: float32 the highest logit.
        score_T: float32, (logit - best) / temperature + noise of the token.
        token_T: int32 the first token with the highest score.
        finite_T: bool, all logits are finite.
    """

    best_T: jax.Array
    score_T: jax.Array
    token_T: jax.Array
    finite_T: jax.Array


class Law(NamedTuple):
    """How the logits of a row become a law: see :func:`logprob`. All float32."""

    best_X: jax.Array
    log_mass_X: jax.Array
    floor_X: jax.Array
    temperature_X: jax.Array


class Draws(NamedTuple):
    """A token of each of two laws, with the same noise.

    Attributes:
        score_B: float32, log p^t + noise of the token.
        token_B: int32 the first with the highest score.
        residual_score_B: likewise of max(0, p^t - p^d), not normalised.
        residual_token_B: likewise.
        mass_B: float32 sum of max(0, p^t - p^d).
    """

    score_B: jax.Array
    token_B: jax.Array
    residual_score_B: jax.Array
    residual_token_B: jax.Array
    mass_B: jax.Array


def statistics(logits_TV: jax.Array, temperature_T: jax.Array, floor_T: jax.Array) -> Statistics:
    """One reading of the rows.

    Args:
        logits_TV: any float dtype; -inf forbids a token.
        temperature_T: float32, 0 is greedy.
        floor_T: float32, the least logit that is kept; -inf keeps all.
    """
    given = logits_TV, temperature_T, floor_T
    found: Statistics = by_rows(_statistics, *given, on_cpu=_statistics_sparing)
    return found


def _statistics(logits_TV: jax.Array, temperature_T: jax.Array, floor_T: jax.Array) -> Statistics:
    logits_TV = logits_TV.astype(jnp.float32)
    best_T, finite_T = _best(logits_TV)
    weight_TV = jnp.exp(-gap(logits_TV, best_T, temperature_T))
    mass_T = jnp.sum(jnp.where(logits_TV >= floor_T[:, None], weight_TV, 0), axis=-1)
    return Statistics(best_T, _first_index(logits_TV, best_T), mass_T, finite_T)


def _statistics_sparing(
    logits_TV: jax.Array, temperature_T: jax.Array, floor_T: jax.Array
) -> Statistics:
    """The first token is looked for where a row needs it."""
    found = _statistics(logits_TV, temperature_T, floor_T)
    first_T = jax.lax.cond(
        jnp.any(temperature_T == 0),
        lambda: _first_index(logits_TV.astype(jnp.float32), found.best_T),
        lambda: jnp.zeros(found.best_T.shape, jnp.int32),
    )
    return found._replace(first_T=first_T)


def _best(logits_TV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The highest of float32 logits, and whether all are finite."""
    best_T, lowest_T = jnp.max(logits_TV, axis=-1), jnp.min(logits_TV, axis=-1)
    return best_T, jnp.isfinite(best_T) & jnp.isfinite(lowest_T)


def sample(
    logits_TV: jax.Array,
    temperature_T: jax.Array,
    floor_T: jax.Array,
    key_T2: jax.Array | None,
    axis_name: str | None = None,
    id_V: jax.Array | None = None,
) -> Sample:
    """A token of each row by the Gumbel noise of its key, in one reading: no normaliser is needed.

    Args:
        logits_TV: any float dtype, a shard or whole; -inf forbids a token.
        temperature_T: float32, 0 is greedy: such rows have no noise.
        floor_T: float32, the least logit that is kept; -inf keeps all.
        key_T2: uint32; None where all rows are greedy.
        axis_name: the mesh axis that the vocabulary is split over, if it is; tokens are of the
            whole vocabulary then, and scores relative to the best of the shard.
        id_V: int32 places of the tokens in the field of the noise; None for their own.
    """
    start = shard_start(logits_TV.shape[-1], axis_name)
    if key_T2 is None:
        best_T, score_T, token_T, finite_T = by_rows(_greedy, logits_TV)
    else:
        if id_V is None:
            id_V = start + jnp.arange(logits_TV.shape[-1])
        rows, on_cpu = (functools.partial(way, id_V) for way in (_sample, _sample_unless_greedy))
        given = logits_TV, temperature_T, floor_T, key_T2
        best_T, score_T, token_T, finite_T = by_rows(rows, *given, on_cpu=on_cpu)
    return Sample(best_T, score_T, start + token_T, finite_T)


def _greedy(logits_TV: jax.Array) -> tuple[jax.Array, ...]:
    logits_TV = logits_TV.astype(jnp.float32)
    best_T, finite_T = _best(logits_TV)
    return best_T, jnp.zeros_like(best_T), _first_index(logits_TV, best_T), finite_T


def _sample_unless_greedy(
    id_V: jax.Array, logits_TV: jax.Array, temperature_T: jax.Array, *others: jax.Array
) -> tuple[jax.Array, ...]:
    """Noise is nine tenths of the time: rows that need none do without."""
    found: tuple[jax.Array, ...] = jax.lax.cond(
        jnp.all(temperature_T == 0),
        lambda: _greedy(logits_TV),
        lambda: _sample(id_V, logits_TV, temperature_T, *others),
    )
    return found


def _sample(
    id_V: jax.Array,
    logits_TV: jax.Array,
    temperature_T: jax.Array,
    floor_T: jax.Array,
    key_T2: jax.Array,
) -> tuple[jax.Array, ...]:
    logits_TV = logits_TV.astype(jnp.float32)
    best_T, finite_T = _best(logits_TV)
    # Forbidden tokens are left out by name: in a shard without others they would be the best.
    kept_TV = logits_TV >= jnp.maximum(floor_T, jnp.finfo(jnp.float32).min)[:, None]
    score_TV = jnp.where(kept_TV, -gap(logits_TV, best_T, temperature_T), -jnp.inf)
    noise_TV = random.gumbel_at(key_T2, id_V)
    score_TV = score_TV + jnp.where(temperature_T[:, None] == 0, 0, noise_TV)
    return best_T, *_first_of_best(score_TV), finite_T


def sample_rest(
    logits_TV: jax.Array,
    row_B: jax.Array,
    without_B: jax.Array,
    temperature_B: jax.Array,
    floor_B: jax.Array,
    key_B2: jax.Array,
    axis_name: str | None = None,
) -> Sample:
    """A token of some rows, each of the law without one token; otherwise as :func:`sample`.

    Args:
        logits_TV: as for :func:`sample`.
        row_B: int32 rows to draw from.
        without_B: int32 the token of the whole vocabulary that is left out; ``NO_TOKEN`` leaves all
            in. Where nothing else is kept the score is -inf, and the token means nothing.
        temperature_B: as for :func:`sample`.
        floor_B: likewise.
        key_B2: likewise.
        axis_name: likewise.
    """
    start = shard_start(logits_TV.shape[-1], axis_name)
    id_V = start + jnp.arange(logits_TV.shape[-1])

    def rest(sample_rows: Callable[..., Any]) -> Callable[..., Any]:
        def rows(logits_BV: jax.Array, without_B: jax.Array, *others: jax.Array) -> Any:
            left_out_BV = id_V == without_B[:, None]
            logits_BV = jnp.where(left_out_BV, -jnp.inf, logits_BV.astype(jnp.float32))
            return sample_rows(id_V, logits_BV, *others)

        return rows

    given = logits_TV[row_B], without_B, temperature_B, floor_B, key_B2
    best_B, score_B, token_B, finite_B = by_rows(
        rest(_sample), *given, on_cpu=rest(_sample_unless_greedy)
    )
    return Sample(best_B, score_B, start + token_B, finite_B)


def draw(
    logits_TV: jax.Array,
    row_B: jax.Array,
    law_B: Law,
    draft_logits_BU: jax.Array,
    draft_law_B: Law,
    d2t_U: jax.Array | None,
    key_B2: jax.Array,
    axis_name: str | None = None,
) -> Draws:
    """Tokens of some rows, by the Gumbel noise of their keys: of p^t and of max(0, p^t - p^d).

    Args:
        logits_TV: the target's, or a shard of them.
        row_B: int32 rows to draw from.
        law_B: of these rows, over the whole vocabulary.
        draft_logits_BU: the drafter's, any float dtype.
        draft_law_B: of these.
        d2t_U: int32 distinct target ids of the draft vocabulary, those of another shard beyond V;
            None where it is the target's.
        key_B2: uint32 keys of the noise.
        axis_name: the mesh axis that the vocabulary is split over, if it is; tokens are of the
            whole vocabulary then, all else of the shard.
    """
    start = shard_start(logits_TV.shape[-1], axis_name)

    def rows(
        logits_BV: jax.Array, draft_logits_BU: jax.Array, key_B2: jax.Array, *laws: jax.Array
    ) -> Draws:
        logprob_BV = logprob(logits_BV, Law(*laws[:4]))
        excess_BV = excess(logprob_BV, logprob(draft_logits_BU, Law(*laws[4:])), d2t_U)
        noise_BV = random.gumbel_at(key_B2, start + jnp.arange(logits_BV.shape[-1]))
        score_B, token_B = _first_of_best(logprob_BV + noise_BV)
        residual_score_B, residual_token_B = _first_of_best(jnp.log(excess_BV) + noise_BV)
        mass_B = jnp.sum(excess_BV, axis=-1)
        return Draws(score_B, start + token_B, residual_score_B, start + residual_token_B, mass_B)

    drawn: Draws = by_rows(rows, logits_TV[row_B], draft_logits_BU, key_B2, *law_B, *draft_law_B)
    return drawn


def merge(parts_NT: Statistics, temperature_T: jax.Array) -> Statistics:
    """Statistics of whole rows from those of parts of each, whose `first` are tokens of it."""
    best_T, first_T = _first_of_parts(parts_NT.best_T, parts_NT.first_T)
    weight_NT = jnp.exp(-_gap_of_parts(parts_NT.best_T, best_T, temperature_T))
    mass_NT = jnp.where(weight_NT > 0, weight_NT * parts_NT.mass_T, 0)  # 0, not NaN, of no token
    finite_T = parts_NT.finite_T.all(axis=0)
    return Statistics(best_T, first_T, mass_NT.sum(axis=0), finite_T)


def merge_samples(parts_NT: Sample, temperature_T: jax.Array) -> Sample:
    """Samples of whole rows from those of parts of each."""
    best_T = jnp.max(parts_NT.best_T, axis=0)
    score_NT = parts_NT.score_T - _gap_of_parts(parts_NT.best_T, best_T, temperature_T)
    return Sample(
        best_T, *_first_of_parts(score_NT, parts_NT.token_T), parts_NT.finite_T.all(axis=0)
    )


def merge_draws(parts_NB: Draws) -> Draws:
    """Draws of whole rows from those of parts of each."""
    return Draws(
        *_first_of_parts(parts_NB.score_B, parts_NB.token_B),
        *_first_of_parts(parts_NB.residual_score_B, parts_NB.residual_token_B),
        mass_B=jnp.sum(parts_NB.mass_B, axis=0),
    )


def _first_of_parts(score_NT: jax.Array, token_NT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Highest score over the parts of a row, and the first token with it."""
    score_T = jnp.max(score_NT, axis=0)
    below_NT = score_NT < score_T  # nothing is below NaN: a token remains
    return score_T, jnp.min(jnp.where(below_NT, jnp.iinfo(jnp.int32).max, token_NT), axis=0)


def _gap_of_parts(best_NT: jax.Array, best_T: jax.Array, temperature_T: jax.Array) -> jax.Array:
    return gap(best_NT.T, best_T, temperature_T).T


def gap(logits_XV: jax.Array, best_X: jax.Array, temperature_X: jax.Array) -> jax.Array:
    """How far each token lies below the best, in units of the temperature.

    Taking the maximum off before dividing keeps tiny temperatures from overflowing. Temperature 0
    counts as 1: its law is a matter of the best token alone.
    """
    scale_X1 = jnp.where(temperature_X == 0, 1, temperature_X)[..., None]
    return (best_X[..., None] - logits_XV) / scale_X1


def logprob(logits_XV: jax.Array, law_X: Law) -> jax.Array:
    """float32 [X, V] log-probabilities under a law with a temperature above 0."""
    logits_XV = logits_XV.astype(jnp.float32)
    gap_XV = gap(logits_XV, law_X.best_X, law_X.temperature_X)
    kept_XV = logits_XV >= law_X.floor_X[..., None]
    return jnp.where(kept_XV, -gap_XV - law_X.log_mass_X[..., None], -jnp.inf)


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
    return _first_of_best(score_XV)[1]


def _first_of_best(score_XV: jax.Array) -> tuple[jax.Array, jax.Array]:
    best_X = jnp.max(score_XV, axis=-1)
    return best_X, _first_index(score_XV, best_X)


def _first_index(score_XV: jax.Array, best_X: jax.Array) -> jax.Array:
    index_V = jnp.arange(score_XV.shape[-1], dtype=jnp.float32)
    last = float(score_XV.shape[-1] - 1)
    below_XV = score_XV < best_X[..., None]
    return jnp.min(jnp.where(below_XV, last, index_V), axis=-1).astype(jnp.int32)


def shard_start(num_tokens: int, axis_name: str | None) -> jax.Array | int:
    """The first token of this shard of the vocabulary."""
    return 0 if axis_name is None else num_tokens * jax.lax.axis_index(axis_name)
