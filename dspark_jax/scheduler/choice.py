"""How many rows the next round gets, from what the host knows: one function a policy.

Condition (e) of a lossless schedule (``schedule.py``): the confidences that have a part in
round t are those of rounds up to t - 2, by their number; ``history.py`` holds newer ones back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark_jax.scheduler.budget import (
    EVIDENCE,
    DraftSwitch,
    RoundCosts,
    bucket_for,
    choose_bucket,
)
from dspark_jax.scheduler.policy import Policy
from dspark_jax.scheduler.temperatures import predicted_survival

DELAY = 2  # rounds between a confidence and the choices that it has a part in


@dataclass(frozen=True)
class Seat:
    """A request that the round decodes, as the scheduler sees it.

    Attributes:
        shard: its data shard.
        drafted: whether it can draft; not in its first round.
        temperature_G: float32 of the calibration of its confidences.
        logit_G: float32 confidence logits, the newest that are at least two rounds old; None where
            there are none.
        fresh: whether they are those of two rounds ago.
        kept: accepted drafts as a share of those that such confidences promised.
    """

    shard: int
    drafted: bool
    temperature_G: np.ndarray
    logit_G: np.ndarray | None
    fresh: bool
    kept: float


@dataclass(frozen=True)
class Outlook:
    """What the choice is made from.

    Attributes:
        seats: of the requests that decode.
        buckets: numbers of rows of a data shard that the round may have with drafts.
        num_shards: data shards.
        costs: seconds of every choice, over all data shards; None where the policy needs none, or
            too little is known of them.
        floor: tokens a second that every request shall have.
    """

    seats: Sequence[Seat]
    buckets: tuple[int, ...]
    num_shards: int
    costs: RoundCosts | None
    floor: float


def choose_rows(policy: Policy, switch: DraftSwitch, outlook: Outlook) -> tuple[DraftSwitch, int]:
    """Rows of a data shard for anchors and drafts; 0 for a round without a draft.

    Under the causal policy these are the most that there may be; the round's own confidences
    decide later.

    Args:
        policy: of the engine.
        switch: as returned for the round before; ``DraftSwitch()`` at first.
        outlook: of the round.
    """
    if not policy.num_draft or not any(seat.drafted for seat in outlook.seats):
        return switch, 0
    if policy.kind == "causal":
        return switch, outlook.buckets[-1] if outlook.costs is not None else 0
    if policy.kind == "delayed":
        return _delayed(policy, switch, outlook)
    rows_D = np.zeros(outlook.num_shards, int)
    for seat in outlook.seats:
        wanted = 0
        if seat.drafted:
            wanted = policy.num_draft
            if policy.threshold and seat.logit_G is not None:
                wanted = _before_low(seat.logit_G, seat.temperature_G, policy.threshold)
            if policy.gate and seat.logit_G is not None:
                first_low = not _before_low(seat.logit_G, seat.temperature_G, policy.gate)
                wanted = 0 if first_low else wanted
        rows_D[seat.shard] += 1 + wanted
    return switch, int(bucket_for(rows_D.max(), outlook.buckets))


def _before_low(logit_G: np.ndarray, temperature_G: np.ndarray, threshold: float) -> int:
    """Drafts before the first whose confidence lies below the threshold, as two rounds ago."""
    confidence_G = predicted_survival(logit_G[:, None], temperature_G[:, None])[:, 0]
    low_G = np.append(confidence_G < threshold, True)
    return int(low_G.argmax())


def _delayed(policy: Policy, switch: DraftSwitch, outlook: Outlook) -> tuple[DraftSwitch, int]:
    known_B = np.array([seat.fresh for seat in outlook.seats])
    survival_BG = np.ones((len(known_B), policy.num_draft))
    for row, seat in enumerate(outlook.seats):
        if seat.fresh and seat.logit_G is not None:
            promised_G = _survival(seat.logit_G, seat.temperature_G)
            survival_BG[row] = np.minimum(seat.kept * promised_G, 1)
    if outlook.costs is None:  # first the evidence, then what plain rounds cost
        switch = switch.after(survival_BG[known_B])
        return switch, outlook.buckets[-1] if len(switch.seen) < EVIDENCE else 0
    active_B = np.ones(len(known_B), bool)
    switch, choice = choose_bucket(
        switch, survival_BG, known_B, active_B, outlook.costs, outlook.floor
    )
    return switch, outlook.buckets[choice - 1] if choice else 0


def _survival(logit_G: np.ndarray, temperature_G: np.ndarray) -> np.ndarray:
    """Survival of one request; from the first logit that is not a number on, slots count as 1."""
    finite_G = np.cumprod(np.isfinite(logit_G)).astype(bool)
    logit_G = np.where(finite_G, logit_G, np.inf)
    survival_G: np.ndarray = predicted_survival(logit_G[None], temperature_G)[0]
    return survival_G
