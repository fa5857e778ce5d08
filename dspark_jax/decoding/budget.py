"""How many rows a round gets: the part of the scheduler that runs on the host, in microseconds.

A real step is as slow as the compiled bucket of rows that it falls into, so that only the edges of
buckets can be optimal, and a search that stops early is trapped between them. The budget is
therefore searched for among all of them, from the survival of earlier rounds, which the host has
read while the device was busy:

    budget(bucket)  = bucket - anchors - prefill rows
    tokens(bucket)  = requests + sum of the `budget` best survivals
    tokens(bucket) / (seconds of drafting + seconds of verifying with bucket)  ->  max

Not drafting at all, requests / seconds of an undrafted round, is one of the choices. Survival is
seen only where something was drafted, so a pause is ended by a probe (:class:`DraftSwitch`).

Losslessness (spec section 7), condition (e): whatever is decided here for round t may use what
rounds up to t - 2 drafted, by their number and not by when they arrived, and nothing newer. A
budget that does know the current round's confidences (`schedule.causal_budget`) is rounded up.

Axes: B requests, G slots of a block, K buckets of rows, 1 + K the same after not drafting,
N slots of all active requests, T rows of a round.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MARGIN = 0.03  # drafting that starts anew must promise this much more tokens a second
EVIDENCE = 16  # request-rounds behind a verdict on drafting
WINDOW = 64  # request-rounds that the mean gain remembers
FIRST_PAUSE, LAST_PAUSE = 64, 1024  # rounds without drafting before the next probe
ANOTHER_LOAD = 4  # times more or fewer requests: what was learnt no longer holds


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
    prefill_rows: int = 0,
    min_tokens_per_s_user: float = 0.0,
) -> int:
    """The most productive number of rows: 0 for not drafting, k for ``costs.buckets[k - 1]``.

    Args:
        survival_BG: float, of two rounds ago or earlier.
        known_B: bool, rows of it that belong to the request now in the slot; others count as 1.
        active_B: bool, requests that the round decodes.
        costs: seconds of every choice.
        prefill_rows: rows of the round that are neither anchors nor drafts.
        min_tokens_per_s_user: a floor under the expected tokens a second of every single request.
            The best total throughput above it is chosen; where nothing reaches it, what comes
            closest.
    """
    survival_BG = np.where(known_B[:, None], survival_BG, 1.0)
    return int(
        np.argmax(_scores(survival_BG[active_B], costs, prefill_rows, min_tokens_per_s_user))
    )


def _scores(
    survival_BG: np.ndarray, costs: RoundCosts, prefill_rows: int, floor: float
) -> np.ndarray:
    """float64 [1 + K]: expected tokens a second of active requests; 0 for what cannot be chosen.

    Where the floor is out of reach it is the tokens a second of the slowest request instead.
    """
    num_requests = survival_BG.shape[0]
    budget_K = np.asarray(costs.buckets) - num_requests - prefill_rows
    admitted_K1 = np.clip(np.array([0, *budget_K]), 0, survival_BG.size)
    seconds_K1 = np.array([costs.undrafted_s, *(costs.draft_s + np.asarray(costs.verify_s_K))])
    possible_K1 = np.array([True, *(budget_K > 0)]) & (num_requests > 0)

    survival_N = survival_BG.astype(np.float64).reshape(-1)
    order_N = np.argsort(-survival_N)
    tokens_N1 = num_requests + np.concatenate([[0.0], np.cumsum(survival_N[order_N])])
    rate_K1 = np.where(possible_K1, tokens_N1[admitted_K1] / seconds_K1, 0.0)
    if floor <= 0 or num_requests == 0:
        return rate_K1

    owner_N = order_N // survival_BG.shape[1]
    fewest_K1 = 1 + np.array(
        [
            np.bincount(owner_N[:n], survival_N[order_N[:n]], num_requests).min()
            for n in admitted_K1.tolist()
        ]
    )
    slowest_K1 = np.where(possible_K1, fewest_K1 / seconds_K1, 0.0)
    reached_K1 = slowest_K1 >= floor
    return np.where(reached_K1, rate_K1, 0.0) if reached_K1.any() else slowest_K1


@dataclass(frozen=True)
class DraftSwitch:
    """Whether the batch drafts, and what is known about its worth.

    Drafting goes on while its mean predicted gain, over at least `EVIDENCE` request-rounds, is at
    least 1; otherwise it pauses. After a pause it is tried again from scratch, which is the probe:
    the first verdict then asks for a gain of 1 + `MARGIN`. A failed probe doubles the next pause.
    When there are `ANOTHER_LOAD` times more or fewer requests than when it began, it ends at once.

    Attributes:
        drafting: in this round.
        gain: mean ratio of expected tokens a second with drafting and without.
        evidence: request-rounds behind it.
        pause: rounds that the next pause will last.
        left: rounds of the present pause that are left.
        load: active requests when it began.
    """

    drafting: bool = True
    gain: float = 0.0
    evidence: int = 0
    pause: int = FIRST_PAUSE
    left: int = 0
    load: int = 0


def next_switch(
    switch: DraftSwitch, gain: float, num_observed: int, num_active: int
) -> DraftSwitch:
    """The switch of this round from that of the last.

    Args:
        switch: of the round before.
        gain: expected tokens a second, drafting over not drafting; read if anything was observed.
        num_observed: requests whose survival two rounds ago is behind the gain; 0 where nothing
            was drafted then.
        num_active: requests that this round decodes.
    """
    if not switch.drafting:
        if not switch.load / ANOTHER_LOAD < num_active < switch.load * ANOTHER_LOAD:
            return DraftSwitch()
        if switch.left > 1:
            return dataclasses.replace(switch, left=switch.left - 1)
        return DraftSwitch(pause=switch.pause)
    if num_observed == 0:
        return switch
    evidence = min(switch.evidence + num_observed, WINDOW)
    mean = switch.gain + (gain - switch.gain) * min(1.0, num_observed / evidence)
    if evidence < EVIDENCE:
        return dataclasses.replace(switch, gain=mean, evidence=evidence)
    if mean >= (1 if switch.evidence >= EVIDENCE else 1 + MARGIN):
        return DraftSwitch(gain=mean, evidence=evidence)
    return DraftSwitch(
        drafting=False,
        pause=min(2 * switch.pause, LAST_PAUSE),
        left=switch.pause,
        load=num_active,
    )


def choose_bucket(
    switch: DraftSwitch,
    survival_BG: np.ndarray,
    known_B: np.ndarray,
    fresh: bool,
    active_B: np.ndarray,
    costs: RoundCosts,
    prefill_rows: int = 0,
    min_tokens_per_s_user: float = 0.0,
) -> tuple[DraftSwitch, int]:
    """The delayed policy: the switch and the choice of a round, as from `best_bucket`.

    Condition (e): of all arguments only what rounds up to two back drafted may have a part in
    `survival_BG`, `known_B` and `fresh`.

    Args:
        switch: as returned for the round before; ``DraftSwitch()`` at first.
        survival_BG: float, the newest of each slot that is at least two rounds old.
        known_B: bool, rows of it that belong to the request now in the slot. Others count as 1 in
            the choice of the bucket, and like the mean of the known ones in the worth of drafting:
            else every arrival would end a pause.
        fresh: round t - 2 drafted, so that `survival_BG` has its survival.
        active_B: bool, requests that the round decodes.
        costs: seconds of every choice.
        prefill_rows: rows of the round that are neither anchors nor drafts.
        min_tokens_per_s_user: as for `best_bucket`.

    Returns:
        The switch, and 0 for not drafting or k for ``costs.buckets[k - 1]``.
    """
    known_B = known_B & active_B
    num_known, num_active = int(known_B.sum()), int(active_B.sum())
    asked = costs, prefill_rows, min_tokens_per_s_user
    scores_K1 = _scores(np.where(known_B[:, None], survival_BG, 1.0)[active_B], *asked)
    gain, num_observed = 1.0, num_known if fresh else 0
    if num_observed:
        typical_G = survival_BG[known_B].mean(axis=0)
        likely_BG = np.where(known_B[:, None], survival_BG, typical_G)[active_B]
        likely_K1 = scores_K1 if num_known == num_active else _scores(likely_BG, *asked)
        best, undrafted = likely_K1[1:].max(), likely_K1[0]
        most = 1.0 + survival_BG.shape[1]  # also where not drafting misses the floor
        gain = min(best / undrafted, most) if undrafted > 0 else most
    switch = next_switch(switch, gain, num_observed, num_active)
    best = 1 + int(np.argmax(scores_K1[1:]))
    return switch, best if switch.drafting and scores_K1[best] > 0 else 0
