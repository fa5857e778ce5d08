"""How many rows a round gets: the part of the scheduler that runs on the host, in microseconds.

A real step is as slow as the compiled bucket of rows that it falls into, so that only the edges of
buckets can be optimal, and a search that stops early is trapped between them. The budget is
therefore searched for among all of them, from the survival of earlier rounds, which the host has
read while the device was busy:

    budget(bucket)  = bucket - anchors
    tokens(bucket)  = requests + sum of the `budget` best survivals
    tokens(bucket) / (seconds of drafting + seconds of verifying with bucket)  ->  max

Not drafting at all, requests / seconds of an undrafted round, is one of the choices. Survival is
seen only where something was drafted, so pauses are interrupted by probes (:class:`DraftSwitch`).

Losslessness (``notebooks/concepts/lossless.md``), condition (e): whatever is decided here for round
t may use what rounds up to t - 2 drafted, by their number and not by when they arrived, and nothing
newer. A budget that does know the current round's confidences (`schedule.causal_budget`) is rounded
up.

Axes: B requests, G slots of a block, K buckets of rows, 1 + K the same after not drafting,
N slots of all active requests (request-rounds in what was seen), T rows of a round, X batches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MARGIN = 0.03  # drafting that starts anew must promise this much more tokens a second
EVIDENCE = 8  # request-rounds behind a verdict on drafting
EARLY = 2  # behind one that hardly any evidence could change
PRIOR = 0.5  # chance of each draft before any was seen; it weighs as much as `EARLY` of them
CARRY = 0.5  # of what sets a request apart from the others, that is left after two rounds
WINDOW = 128  # request-rounds that the verdict remembers
PROBE_SHARE = 0.005  # of the time, that probes may cost while drafting does not pay
SHORTEST_PAUSE = 16  # rounds without drafting before a probe


@dataclass(frozen=True)
class RoundCosts:
    """Predicted seconds of a round, at the present length of the caches.

    Attributes:
        buckets: numbers of rows that programs are compiled for, ascending.
        verify_s_K: seconds of the target's pass over each of these numbers of rows.
        draft_s: seconds of drafting, for all requests together.
        undrafted_s: seconds of a round without drafting, prefill included.
    """

    buckets: tuple[int, ...]
    verify_s_K: tuple[float, ...]
    draft_s: float
    undrafted_s: float

    def __post_init__(self) -> None:
        """Refuses costs that no search makes sense of."""
        rows = np.asarray(self.buckets)
        if rows.size == 0 or rows[0] < 1 or (np.diff(rows) <= 0).any():
            raise ValueError(f"buckets is {self.buckets}: give ascending numbers of rows from 1 on")
        seconds = np.array([*self.verify_s_K, self.undrafted_s])
        if len(self.verify_s_K) != rows.size or not (np.isfinite(seconds) & (seconds > 0)).all():
            raise ValueError(
                f"verify_s_K is {self.verify_s_K} and undrafted_s {self.undrafted_s}: "
                f"give positive seconds, one for each of the {rows.size} buckets"
            )
        if not (np.isfinite(self.draft_s) and self.draft_s >= 0):
            raise ValueError(f"draft_s is {self.draft_s}: give seconds >= 0")

    def round_s(self, rows: int) -> float:
        """Seconds of a whole round with a bucket of so many rows; 0 for one without drafts."""
        if not rows:
            return self.undrafted_s
        return self.draft_s + self.verify_s_K[self.buckets.index(rows)]


def bucket_for(rows: int | np.ndarray, buckets: Sequence[int]) -> np.ndarray:
    """The smallest bucket that holds so many rows, elementwise.

    Rounding up, always: a causal budget rounded down would let the draft of a slot decide, by the
    confidence after it, whether that slot is verified.

    Raises:
        ValueError: there are more rows than the largest bucket holds.
    """
    edges = np.asarray(buckets)
    if np.max(rows) > edges[-1]:
        raise ValueError(f"{np.max(rows)} rows do not fit: the largest bucket has {edges[-1]}")
    return edges[np.searchsorted(edges, rows)]


def steps_per_s(costs: RoundCosts) -> np.ndarray:
    """float32 [T]: drafted rounds a second at 0, 1, ... rows, for `schedule.causal_budget`.

    A staircase, since every number of rows costs its bucket.
    """
    seconds_K = costs.draft_s + np.asarray(costs.verify_s_K)
    return np.repeat(1 / seconds_K, np.diff([-1, *costs.buckets])).astype(np.float32)


def best_bucket(
    survival_BG: np.ndarray,
    known_B: np.ndarray,
    active_B: np.ndarray,
    costs: RoundCosts,
    min_tokens_per_s_user: float = 0.0,
) -> int:
    """The most productive number of rows: 0 for not drafting, k for ``costs.buckets[k - 1]``.

    Args:
        survival_BG: float, of two rounds ago or earlier.
        known_B: bool, rows of it that belong to the request now in the slot; others count as 1.
        active_B: bool, requests that the round decodes.
        costs: seconds of every choice.
        min_tokens_per_s_user: a floor under the expected tokens a second of every single request.
            The best total throughput above it is chosen; where nothing reaches it, what comes
            closest.
    """
    survival_BG = np.where(known_B[:, None], survival_BG, 1.0)
    return int(np.argmax(_scores(survival_BG[active_B][None], costs, min_tokens_per_s_user)))


def _scores(survival_XBG: np.ndarray, costs: RoundCosts, floor: float) -> np.ndarray:
    """float64 [1 + K]: expected tokens a second of active requests; 0 for what cannot be chosen.

    The mean over X batches, any of which may be the next one. Where the floor is out of reach it
    is the tokens a second of the slowest request instead.
    """
    num_batches, num_requests, _ = survival_XBG.shape
    survival_XN = survival_XBG.astype(np.float64).reshape(num_batches, -1)
    budget_K = np.asarray(costs.buckets) - num_requests
    admitted_K1 = np.clip(np.array([0, *budget_K]), 0, survival_XN.shape[1])
    seconds_K1 = np.array([costs.undrafted_s, *(costs.draft_s + np.asarray(costs.verify_s_K))])
    possible_K1 = np.array([True, *(budget_K > 0)]) & (num_requests > 0)

    order_XN = np.argsort(-survival_XN, axis=1)
    best_N = np.take_along_axis(survival_XN, order_XN, axis=1).mean(axis=0)
    tokens_N1 = num_requests + np.concatenate([[0.0], np.cumsum(best_N)])
    rate_K1 = np.where(possible_K1, tokens_N1[admitted_K1] / seconds_K1, 0.0)
    if floor <= 0 or num_requests == 0:
        return rate_K1

    rank_XBG = np.argsort(order_XN, axis=1).reshape(survival_XBG.shape)
    fewest_K1 = 1 + np.array(
        [(survival_XBG * (rank_XBG < n)).sum(axis=2).min(axis=1).mean() for n in admitted_K1]
    )
    slowest_K1 = np.where(possible_K1, fewest_K1 / seconds_K1, 0.0)
    reached_K1 = slowest_K1 >= floor
    return np.where(reached_K1, rate_K1, 0.0) if reached_K1.any() else slowest_K1


@dataclass(frozen=True)
class DraftSwitch:
    """Whether the batch drafts, and what is known about the worth of its drafts.

    What is remembered is survival, which belongs to the texts; what it is worth at the present
    load follows from the present costs. So an engine that fills up stops drafting, and one that
    empties begins again, without trying. While drafting does not pay, its survival is probed: for
    as many rounds as bring `EVIDENCE`, after a pause so long that what the probes lose is
    `PROBE_SHARE` of the time.

    Attributes:
        drafting: not only to probe.
        seen: survival of the last request-rounds that drafted, oldest first.
        left: rounds of the present pause that are left; below 0 it is probed.
    """

    drafting: bool = True
    seen: tuple[tuple[float, ...], ...] = ()
    left: int = 0

    @property
    def drafts(self) -> bool:
        """In this round, to probe or because it pays."""
        return self.drafting or self.left < 0

    def after(self, survival_BG: np.ndarray) -> DraftSwitch:
        """The switch that has seen some more request-rounds."""
        new = tuple(map(tuple, survival_BG.tolist()))
        return dataclasses.replace(self, seen=(*self.seen, *new)[-WINDOW:])


def choose_bucket(
    switch: DraftSwitch,
    survival_BG: np.ndarray,
    known_B: np.ndarray,
    active_B: np.ndarray,
    costs: RoundCosts,
    min_tokens_per_s_user: float = 0.0,
) -> tuple[DraftSwitch, int]:
    """The delayed policy: the switch and the choice of a round, as from `best_bucket`.

    Condition (e): of all arguments only what rounds up to two back drafted may have a part in
    `survival_BG` and `known_B`.

    Args:
        switch: as returned for the round before; ``DraftSwitch()`` at first.
        survival_BG: float, that of the round two back.
        known_B: bool, rows of it that were drafted for the request now in the slot. They are
            taken `CARRY` of the way from the mean of what was seen, and others are that mean.
        active_B: bool, requests that the round decodes.
        costs: seconds of every choice.
        min_tokens_per_s_user: as for `best_bucket`.

    Returns:
        The switch, and 0 for not drafting or k for ``costs.buckets[k - 1]``.
    """
    switch = switch.after(survival_BG[known_B & active_B])
    prior_G = PRIOR ** np.arange(1, survival_BG.shape[1] + 1)
    seen_NG = np.array(switch.seen).reshape(-1, len(prior_G))
    mean_G = (EARLY * prior_G + seen_NG.sum(axis=0)) / (EARLY + len(seen_NG))
    carried_BG = np.where(known_B[:, None], CARRY * (survival_BG - mean_G), 0)
    likely_BG = (mean_G + carried_BG)[active_B]
    scores_K1 = _scores(likely_BG[None], costs, min_tokens_per_s_user)
    best = 1 + int(np.argmax(scores_K1[1:]))
    if scores_K1[best] <= 0:
        return switch, 0
    num_active = len(likely_BG)
    if (
        len(switch.seen) >= EVIDENCE
        or not switch.drafting
        or _is_hopeless(seen_NG, num_active, costs)
    ):
        expected_K1 = _scores(_batches(seen_NG, num_active), costs, min_tokens_per_s_user)
        switch = _next_switch(switch, expected_K1, num_active, costs)
    return switch, best if switch.drafts else 0


def _is_hopeless(seen_NG: np.ndarray, num_requests: int, costs: RoundCosts) -> bool:
    """Whether drafts would not pay even if the little that was seen were too low by its standard
    error: a text must not be slow until there is enough evidence that it is."""
    if len(seen_NG) < EARLY:
        return False
    hoped_G = seen_NG.mean(axis=0) + seen_NG.std(axis=0, ddof=1) / math.sqrt(len(seen_NG))
    hoped_BG = np.minimum.accumulate(np.tile(hoped_G, (num_requests, 1)), axis=1)
    undrafted, *drafted = _scores(hoped_BG[None], costs, 0.0)
    return max(drafted) < undrafted


def _batches(seen_NG: np.ndarray, num_requests: int) -> np.ndarray:
    """Batches [X, B, G] of what was seen, the newest of it; repeated where it is too little."""
    count = max(1, len(seen_NG) // num_requests)
    rows_NG = np.resize(seen_NG[::-1], (count * num_requests, seen_NG.shape[1]))
    return rows_NG.reshape(count, num_requests, -1)


def _next_switch(
    switch: DraftSwitch, expected_K1: np.ndarray, num_active: int, costs: RoundCosts
) -> DraftSwitch:
    """The switch after a verdict.

    Args:
        switch: of the round before, with what was seen since.
        expected_K1: tokens a second of every choice, by what was seen.
        num_active: requests that the round decodes.
        costs: seconds of every choice.
    """
    best = int(np.argmax(expected_K1[1:]))
    undrafted, drafted = expected_K1[0], expected_K1[1 + best]
    if drafted > undrafted * (1 if switch.drafting else 1 + MARGIN):
        return dataclasses.replace(switch, drafting=True, left=0)
    probes = -(-EVIDENCE // num_active)
    left = 0 if switch.drafting else switch.left - 1
    if switch.drafting or left < -probes:
        drafted_s = costs.draft_s + costs.verify_s_K[best]
        lost = probes * drafted_s / costs.undrafted_s * (1 - drafted / undrafted)
        left = max(SHORTEST_PAUSE, math.ceil(lost / PROBE_SHARE))
    seen = switch.seen[-EVIDENCE:] if left == -1 else switch.seen  # the probe is half the verdict
    return DraftSwitch(drafting=False, seen=seen, left=left)
