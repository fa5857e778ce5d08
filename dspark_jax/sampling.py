"""From logits to laws, and from laws to tokens.

    target law   p^t = normalise(min-p(top-p(top-k(softmax(logits / temperature)))))
    draft law    p^d = softmax(logits / temperature)
    token        argmax(log p + G), G standard Gumbel: a draw from p

Temperature 0 is the limit: all mass on the first argmax. Every filter keeps the tokens whose gap
below the best token is at most a threshold, so tokens that tie at the threshold stay together,
and nothing is ever sorted: a sort of [8, 49152] takes 60 ms on a CPU, a search by bits 2 ms.

Axes: X any leading axes, V target vocabulary, U draft vocabulary, B requests.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from pallas_kernels.accept_block.xla import first_argmax, gap
from pallas_kernels.chunks import by_rows

HOTTEST = 1e6  # a temperature: every law is flat there, and float32 goes far beyond


@struct.dataclass
class Sampling:
    """Sampling parameters of each request; they act in the order of the fields."""

    temperature_B: jax.Array  # float32, 0 is greedy
    top_k_B: jax.Array  # int32, 0 is off
    top_p_B: jax.Array  # float32, 1 is off
    min_p_B: jax.Array  # float32, 0 is off


def check_sampling(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Raises ValueError where a parameter of one request has no meaning."""
    if not 0 <= temperature <= HOTTEST:
        raise ValueError(f"temperature is {temperature}: give 0..{HOTTEST:g} (0 is greedy)")
    if not 0 <= top_k < 2**31:
        raise ValueError(f"top_k is {top_k}: give a number of tokens in 0..2^31-1 (0 keeps all)")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}: give a probability in (0, 1] (1 keeps all)")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p is {min_p}: give a probability in [0, 1] (0 keeps all)")


def target_logprob(
    logits_XV: jax.Array,
    temperature_X: jax.Array,
    top_k_X: jax.Array,
    top_p_X: jax.Array,
    min_p_X: jax.Array,
) -> jax.Array:
    """The law that the output follows: temperature, then top-k, top-p, min-p, normalised.

    Args:
        logits_XV: any float dtype; -inf forbids a token.
        temperature_X: this and the rest as in :class:`Sampling`; leading axes broadcast.
        top_k_X: keeps the k best tokens and what ties with the last of them.
        top_p_X: keeps the smallest set of best tokens with at least this mass (after top-k).
        min_p_X: keeps tokens at least this likely relative to the best.

    Returns:
        float32 log-probabilities, -inf outside the kept set.
    """
    floor_X = kept_floor(logits_XV, temperature_X, top_k_X, top_p_X, min_p_X)
    kept_XV = jnp.where(logits_XV >= floor_X[..., None], logits_XV, -jnp.inf)
    return draft_logprob(kept_XV, temperature_X)


def draft_logprob(logits_XU: jax.Array, temperature_X: jax.Array) -> jax.Array:
    """The drafter's law, float32 [X, U]: softmax of logits / temperature, one-hot at 0."""
    logits_XU = logits_XU.astype(jnp.float32)
    first_X1 = first_argmax(logits_XU)[..., None]
    one_hot_XU = jnp.where(jnp.arange(logits_XU.shape[-1]) == first_X1, 0.0, -jnp.inf)
    gap_XU = gap(logits_XU, jnp.max(logits_XU, axis=-1), temperature_X)
    sampled_XU = jax.nn.log_softmax(-gap_XU, axis=-1)
    return jnp.where((temperature_X == 0)[..., None], one_hot_XU, sampled_XU)


def filters(limits: Sampling) -> jax.Array:
    """bool [B]: whether a request leaves out any token."""
    return (limits.top_k_B > 0) | (limits.top_p_B < 1) | (limits.min_p_B > 0)


def kept_floor(
    logits_XV: jax.Array,
    temperature_X: jax.Array,
    top_k_X: jax.Array,
    top_p_X: jax.Array,
    min_p_X: jax.Array,
    axis_name: str | None = None,
) -> jax.Array:
    """The least logit that the filters keep, float32 [X].

    All filters keep the tokens from some logit on, so that this one number stands for them:
    acceptance takes it in their place. Arguments as for :func:`target_logprob`; temperature 0
    counts as 1, which keeps the best token like any other.

    Args:
        axis_name: inside ``jax.shard_map``, the mesh axis that V is split over in equal parts. Sums
            of rows cross the mesh, logits never do.
    """
    leading = logits_XV.shape[:-1]
    limits_X = temperature_X, top_k_X, top_p_X, min_p_X
    limits_T = (jnp.broadcast_to(limit_X, leading).reshape(-1) for limit_X in limits_X)
    logits_TV = logits_XV.reshape(-1, logits_XV.shape[-1])
    search, on_cpu = (
        functools.partial(_kept_floor, Search(axis_name, sparing)) for sparing in (False, True)
    )
    floor_T: jax.Array = by_rows(search, logits_TV, *limits_T, on_cpu=on_cpu)
    return floor_T.reshape(leading)


REACH_BITS = 31  # of a float32 that is not negative
PART = 512  # tokens that a GPU sums up first
BITS_A_PASS = 3  # read 2.8 times less than one; with four the compiler splits a pass


@dataclass(frozen=True)
class Search:
    """How thresholds of a vocabulary are found.

    Attributes:
        axis_name: the mesh axis that V is split over; None where it is whole.
        sparing: for a CPU, where sums are dear and another pass is not: one bit a pass, in a loop,
            and nothing for filters that nobody wants. A GPU reads the logits a third as often, and
            its host need not wait for the end of a loop or for a condition.
    """

    axis_name: str | None = None
    sparing: bool = False

    def total(self, sum_X: jax.Array) -> jax.Array:
        """Of the sums of all shards."""
        return sum_X if self.axis_name is None else jax.lax.psum(sum_X, self.axis_name)

    def highest(self, x_XV: jax.Array) -> jax.Array:
        """[X]."""
        best_X = jnp.max(x_XV, axis=-1)
        return best_X if self.axis_name is None else jax.lax.pmax(best_X, self.axis_name)

    def smallest_reach(
        self, gap_XV: jax.Array, weight_XV: jax.Array, need_X: jax.Array
    ) -> jax.Array:
        """The smallest gap within which the weights sum to at least `need_X`; inf if they never do.

        A gap is not negative, so its bits as an integer are in the order of its values, and the
        exact threshold is found from the highest bit on. Sums of a growing set in a fixed order
        never fall, so rounding cannot mislead the search; and a gap of 0 is always within reach,
        so the best token stays.

        Args:
            gap_XV: float32, not negative.
            weight_XV: float32, not negative; or one number for all.
            need_X: float32.
        """
        size = gap_XV.shape[-1] if self.sparing else PART
        gap_XPQ = _in_parts(gap_XV, size, jnp.inf)
        weight_XPQ = weight_XV if weight_XV.ndim == 0 else _in_parts(weight_XV, size, 0)
        bits_XPQ = jax.lax.bitcast_convert_type(gap_XPQ, jnp.int32)

        def settle(reach_X: jax.Array, low: Any, count: int) -> jax.Array:
            """The reach with ``count`` more bits, above ``low`` ones that are not known yet."""

            def within(digit: int) -> jax.Array:
                most_X = reach_X | (digit << low) | ((jnp.int32(1) << low) - 1)
                inside_XPQ = bits_XPQ <= most_X[..., None, None]
                return jnp.sum(jnp.where(inside_XPQ, weight_XPQ, 0), axis=-1)

            # The first digit that has enough; the last has what the digits before it have not.
            sums_DX = _sums([within(digit) for digit in range(2**count - 1)])
            short_DX = self.total(sums_DX) < need_X
            return reach_X | (jnp.sum(short_DX, axis=0, dtype=jnp.int32) << low)

        reach_X = jnp.zeros(jnp.broadcast_shapes(gap_XV.shape[:-1], need_X.shape), jnp.int32)
        if self.sparing:
            reach_X = jax.lax.fori_loop(
                0, REACH_BITS, lambda i, reach_X: settle(reach_X, REACH_BITS - 1 - i, 1), reach_X
            )
        else:
            for high in range(REACH_BITS, 0, -BITS_A_PASS):
                low = max(high - BITS_A_PASS, 0)
                reach_X = settle(reach_X, low, high - low)
        # Never enough sets every bit, which reads as NaN; it means no threshold.
        reach_X = jnp.minimum(reach_X, jnp.int32(0x7F800000))
        return jax.lax.bitcast_convert_type(reach_X, jnp.float32)


def _in_parts(x_XV: jax.Array, size: int, fill: float) -> jax.Array:
    """[X, V / size, size], filled up."""
    *lead, length = x_XV.shape
    padding = [(0, 0)] * len(lead) + [(0, -length % size)]
    return jnp.pad(x_XV, padding, constant_values=fill).reshape(*lead, -1, size)


def _sums(parts: list[jax.Array]) -> jax.Array:
    """[D, X] sums of D arrays [X, P] in one kernel."""
    zeros, axis = [jnp.float32(0)] * len(parts), parts[0].ndim - 1

    def add(some: Any, more: Any) -> Any:
        return [one + other for one, other in zip(some, more, strict=True)]

    return jnp.stack(jax.lax.reduce(parts, zeros, add, (axis,)))


def _kept_floor(
    search: Search,
    logits_TV: jax.Array,
    temperature_T: jax.Array,
    top_k_T: jax.Array,
    top_p_T: jax.Array,
    min_p_T: jax.Array,
) -> jax.Array:
    logits_TV = logits_TV.astype(jnp.float32)
    gap_TV = gap(logits_TV, search.highest(logits_TV), temperature_T)

    def filtered(wanted_T: jax.Array, by: Any, value_T: jax.Array, reach_T: jax.Array) -> jax.Array:
        by = functools.partial(by, search, gap_TV)
        if not search.sparing:
            return jnp.minimum(reach_T, by(value_T, reach_T))
        limited = jnp.any(wanted_T)
        return jax.lax.cond(
            limited, lambda: jnp.minimum(reach_T, by(value_T, reach_T)), lambda: reach_T
        )

    reach_T = jnp.full(temperature_T.shape, jnp.inf)
    reach_T = filtered(top_k_T > 0, _top_k, top_k_T, reach_T)
    reach_T = filtered(top_p_T < 1, _top_p, top_p_T, reach_T)
    reach_T = jnp.minimum(reach_T, -jnp.log(min_p_T))
    return -search.highest(-jnp.where(gap_TV <= reach_T[:, None], logits_TV, jnp.inf))


def _top_k(search: Search, gap_TV: jax.Array, top_k_T: jax.Array, _: jax.Array) -> jax.Array:
    # Counted in float32: exact below 2^24, and 1.2 to 1.7 times as fast as int32 on a CPU.
    need_T = jnp.where(top_k_T > 0, top_k_T, jnp.inf)
    return search.smallest_reach(gap_TV, jnp.float32(1), need_T)


def _top_p(search: Search, gap_TV: jax.Array, top_p_T: jax.Array, reach_T: jax.Array) -> jax.Array:
    mass_TV = jnp.where(gap_TV <= reach_T[:, None], jnp.exp(-gap_TV), 0)
    total_T = search.total(jnp.sum(mass_TV, axis=-1))
    need_T = jnp.where(top_p_T < 1, top_p_T * total_T, jnp.inf)
    return search.smallest_reach(gap_TV, mass_TV, need_T)


def acceptance_rate(
    target_logprob_XV: jax.Array, draft_logprob_XU: jax.Array, d2t_U: jax.Array | None
) -> jax.Array:
    """1 - TV(p^t, p^d) = Σ min(p^t, p^d), float32 [X]: the chance that one draft is accepted."""
    if d2t_U is not None:
        target_logprob_XV = target_logprob_XV[..., d2t_U]
    return jnp.sum(jnp.exp(jnp.minimum(target_logprob_XV, draft_logprob_XU)), axis=-1)
