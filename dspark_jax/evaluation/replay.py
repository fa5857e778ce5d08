"""Policies replayed over recorded rounds, under any costs, without a model or an accelerator.

Requests are taken from the record as clients of a closed loop would send them. All policies see
the same rounds: a policy that verifies less than was accepted commits less, and its next round is
all the same the next one of the record. What is reported is therefore the worth of decisions, not
a forecast of every text. The yardstick is an oracle that knows what will be accepted:

    regret = 1 - (tokens a second) / (the oracle's tokens a second)

Axes: N rounds of a request, R rounds of the batch, B requests, G slots of a block.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.evaluation.rounds import RecordedRequest
from dspark_jax.scheduler import schedule
from dspark_jax.scheduler.budget import (
    DraftSwitch,
    RoundCosts,
    best_bucket,
    bucket_for,
    choose_bucket,
    steps_per_s,
)
from dspark_jax.scheduler.calibration import Calibration, confidence_temperatures
from dspark_jax.scheduler.history import Promise, keep_promise
from dspark_jax.scheduler.temperatures import predicted_survival

LOSSY = ("oracle", "argmax", "delayed:0")  # the draft of a slot has a say in whether it is verified
UNTRIED = DraftSwitch()


@dataclass(frozen=True, eq=False)
class Batch:
    """Rounds of requests that are decoded together.

    Attributes:
        survival_RBG: float32, never rising along a block.
        accepted_RB: int, drafts that would be accepted.
        request_RB: int, whose rounds they are.
    """

    survival_RBG: np.ndarray
    accepted_RB: np.ndarray
    request_RB: np.ndarray


@dataclass(frozen=True, eq=False)
class Decisions:
    """What a policy did.

    Attributes:
        seconds_R: of each round.
        length_RB: int, drafts verified.
        drafted_R: bool.
    """

    seconds_R: np.ndarray
    length_RB: np.ndarray
    drafted_R: np.ndarray


@dataclass(frozen=True)
class Replayed:
    """What a policy is worth.

    Attributes:
        policy: its name.
        lossless: whether an engine could use it.
        tokens_per_s: of all requests.
        regret: share of the oracle's tokens a second that it misses.
        accepted_length: tokens of a request in a round.
        verification_length: drafts verified of a request in a round.
        undrafted_share: of the rounds.
    """

    policy: str
    lossless: bool
    tokens_per_s: float
    regret: float
    accepted_length: float
    verification_length: float
    undrafted_share: float


def make_batch(
    survivals: Sequence[np.ndarray], accepted: Sequence[np.ndarray], num_requests: int
) -> Batch:
    """The rounds of a closed loop: a slot goes on with the next request when its last is over.

    Every recorded round is used about once, and every slot lasts as long as the longest request.

    Args:
        survivals: [N, G] of each recorded request.
        accepted: [N] of each.
        num_requests: B, decoded together.
    """
    lengths = [len(accepted_N) for accepted_N in accepted]
    num_rounds = max(-(-sum(lengths) // num_requests), *lengths)
    slots: list[list[int]] = [[] for _ in range(num_requests)]
    free = [(0, slot) for slot in range(num_requests)]
    for request in itertools.cycle(range(len(lengths))):
        begun, slot = heapq.heappop(free)
        if begun >= num_rounds:
            break
        slots[slot].append(request)
        heapq.heappush(free, (begun + lengths[request], slot))

    def joined(parts: Sequence[np.ndarray]) -> np.ndarray:
        columns = [np.concatenate([parts[i] for i in slot])[:num_rounds] for slot in slots]
        return np.stack(columns, axis=1)

    owner = [np.full(length, i) for i, length in enumerate(lengths)]
    return Batch(joined(survivals).astype(np.float32), joined(accepted), joined(owner))


def replay_record(
    requests: Sequence[RecordedRequest],
    concurrency: Sequence[int],
    costs: Callable[[int, int], RoundCosts],
    calibration: Calibration | None = None,
    switch: DraftSwitch = UNTRIED,
) -> list[dict[str, Any]]:
    """Every policy at every concurrency, as rows of JSON values.

    Args:
        requests: of a record.
        concurrency: numbers of requests decoded together.
        costs: for such a number and the block size.
        calibration: of the confidences; None takes them as they are.
        switch: that the delayed policy begins with.

    Raises:
        ValueError: there are no such costs.
    """
    block_size = requests[0].logit_NG.shape[1]
    survival, accepted = survivals(requests, calibration), [r.accepted_N for r in requests]
    rows: list[dict[str, Any]] = []
    for number in concurrency:
        batch = make_batch(survival, accepted, number)
        for replayed in replay(batch, costs(number, block_size), switch):
            rows.append({"concurrency": number, **dataclasses.asdict(replayed)})
    return rows


def survivals(
    requests: Sequence[RecordedRequest], calibration: Calibration | None = None
) -> list[np.ndarray]:
    """float64 [N, G] of each recorded request, by its confidences."""
    return [
        predicted_survival(
            request.logit_NG,
            confidence_temperatures(
                calibration, request.acceptance, request.temperature, request.logit_NG.shape[1]
            ),
        )
        for request in requests
    ]


def replay(batch: Batch, costs: RoundCosts, switch: DraftSwitch = UNTRIED) -> list[Replayed]:
    """Every policy over the same rounds: the oracle first, then those an engine could use, then
    the lossy ones, which are there for comparison.

    Args:
        batch: of the rounds.
        costs: for as many requests.
        switch: that the delayed policy begins with.
    """
    block_size = batch.survival_RBG.shape[-1]
    policies: dict[str, Callable[[Batch, RoundCosts], Decisions]] = {
        "oracle": _oracle,
        "none": _none,
        **{f"fixed:{k}": _fixed(k) for k in range(1, block_size + 1)},
        "causal": _causal,
        **{f"delayed:{delay}": _delayed(delay, switch) for delay in (2, 1, 0)},
        "argmax": _argmax,
    }
    best, found = 0.0, []
    for name, decide in policies.items():
        made = decide(batch, costs)
        num_rows = made.length_RB.size
        tokens = num_rows + np.minimum(made.length_RB, batch.accepted_RB).sum()
        tokens_per_s = float(tokens / made.seconds_R.sum())
        best = tokens_per_s if name == "oracle" else best
        found.append(
            Replayed(
                policy=name,
                lossless=name not in LOSSY,
                tokens_per_s=tokens_per_s,
                regret=1 - tokens_per_s / best,
                accepted_length=float(tokens / num_rows),
                verification_length=float(made.length_RB.mean()),
                undrafted_share=float(1 - made.drafted_R.mean()),
            )
        )
    return found


def _oracle(batch: Batch, costs: RoundCosts) -> Decisions:
    """The most tokens a second over all rounds, knowing what is accepted.

    Where λ are the tokens a second of the best decisions, each round's maximise tokens - λ seconds;
    so λ is found by repeating that (Dinkelbach's method).
    """
    num_requests = batch.accepted_RB.shape[1]
    budget_K1 = np.array([0, *(rows - num_requests for rows in costs.buckets)])
    seconds_K1 = np.array([costs.undrafted_s, *(costs.draft_s + np.array(costs.verify_s_K))])
    possible_K1 = budget_K1 >= 0
    useful_RK1 = np.minimum(budget_K1, batch.accepted_RB.sum(axis=1)[:, None])
    tokens_RK1 = num_requests + useful_RK1
    every_R = np.arange(len(tokens_RK1))
    rate, before = 0.0, -1.0
    choice_R = np.zeros(len(tokens_RK1), int)
    while rate > before:
        worth_RK1 = np.where(possible_K1, tokens_RK1 - rate * seconds_K1, -np.inf)
        choice_R = worth_RK1.argmax(axis=1)
        before = rate
        rate = max(rate, tokens_RK1[every_R, choice_R].sum() / seconds_K1[choice_R].sum())
    ahead_RB = np.cumsum(batch.accepted_RB, axis=1) - batch.accepted_RB
    length_RB = np.clip(budget_K1[choice_R][:, None] - ahead_RB, 0, batch.accepted_RB)
    return Decisions(seconds_K1[choice_R], length_RB, choice_R > 0)


def _none(batch: Batch, costs: RoundCosts) -> Decisions:
    num_rounds = len(batch.accepted_RB)
    nothing_R = np.zeros(num_rounds, bool)
    seconds_R = np.full(num_rounds, costs.undrafted_s)
    return Decisions(seconds_R, np.zeros_like(batch.accepted_RB), nothing_R)


def _fixed(length: int) -> Callable[[Batch, RoundCosts], Decisions]:
    def decide(batch: Batch, costs: RoundCosts) -> Decisions:
        num_rounds, num_requests = batch.accepted_RB.shape
        rows_R = np.full(num_rounds, num_requests * (1 + length))
        length_RB = np.full_like(batch.accepted_RB, length)
        return Decisions(_drafted_s(rows_R, costs), length_RB, np.ones(num_rounds, bool))

    return decide


def _causal(batch: Batch, costs: RoundCosts) -> Decisions:
    """Algorithm 1 on the round's own confidences, rounded up to the next bucket."""
    num_requests = batch.accepted_RB.shape[1]
    steps_per_s_T = jnp.asarray(steps_per_s(costs))
    budget_R = np.asarray(_budgets(batch.survival_RBG, steps_per_s_T))
    rows_R = bucket_for(num_requests + budget_R, costs.buckets)
    return _drafted(batch, costs, np.where(budget_R > 0, rows_R, 0))


def _argmax(batch: Batch, costs: RoundCosts) -> Decisions:
    """The best of all buckets by the round's own confidences, which is not lossless."""
    everybody_B = np.ones(batch.accepted_RB.shape[1], bool)
    known = dataclasses.replace(costs, undrafted_s=costs.draft_s + costs.undrafted_s)
    choices = [best_bucket(s_BG, everybody_B, everybody_B, known) for s_BG in batch.survival_RBG]
    return _drafted(batch, costs, np.array([0, *costs.buckets])[choices])


def _delayed(delay: int, switch: DraftSwitch) -> Callable[[Batch, RoundCosts], Decisions]:
    """The delayed policy, from the confidences of so many rounds ago; of this one where it drafts,
    for a delay of 0, which is not lossless."""

    def decide(batch: Batch, costs: RoundCosts) -> Decisions:
        num_rounds, num_requests = batch.accepted_RB.shape
        everybody_B = np.ones(num_requests, bool)
        now, promise, drafted = switch, Promise(), np.zeros(num_rounds, bool)
        rows_R, length_RB = np.zeros(num_rounds, int), np.zeros_like(batch.accepted_RB)
        for t in range(num_rounds):
            drafted[t] = now.drafts and delay == 0
            past = t - delay  # before the first round, the last one, which has not drafted yet
            known_B = drafted[past] & (batch.request_RB[past] == batch.request_RB[t])
            seen = t - max(delay, 1)  # outcomes are never known before the round
            if seen >= 0:
                accepted_B = np.minimum(batch.accepted_RB[seen], length_RB[seen])
                survival_BG = batch.survival_RBG[seen]
                promise = keep_promise(promise, survival_BG, length_RB[seen], accepted_B)
            believed_BG = np.minimum(promise.kept * batch.survival_RBG[past], 1)
            now, choice = choose_bucket(now, believed_BG, known_B, everybody_B, costs)
            rows_R[t] = costs.buckets[choice - 1] if choice else 0
            if choice:
                budget_R = rows_R[t : t + 1] - num_requests
                length_RB[t] = _selected(batch.survival_RBG[t : t + 1], budget_R)[0]
            drafted[t] |= choice > 0
        return _drafted(batch, costs, rows_R, drafted)

    return decide


def _drafted(
    batch: Batch, costs: RoundCosts, rows_R: np.ndarray, drafted_R: np.ndarray | None = None
) -> Decisions:
    """Rounds whose rows go to the best drafts; where there are none, the draft was in vain."""
    num_rounds, num_requests = batch.accepted_RB.shape
    drafted_R = np.ones(num_rounds, bool) if drafted_R is None else drafted_R
    length_RB = _selected(batch.survival_RBG, np.maximum(rows_R - num_requests, 0))
    in_vain_s = costs.undrafted_s + costs.draft_s * drafted_R
    seconds_R = np.where(rows_R > 0, _drafted_s(np.maximum(rows_R, 1), costs), in_vain_s)
    return Decisions(seconds_R, np.asarray(length_RB), drafted_R)


def _drafted_s(rows_R: np.ndarray, costs: RoundCosts) -> np.ndarray:
    """Seconds of rounds that draft and verify so many rows."""
    bucket_R = bucket_for(rows_R, costs.buckets)
    return costs.draft_s + np.array(costs.verify_s_K)[np.searchsorted(costs.buckets, bucket_R)]


@jax.jit
def _budgets(survival_RBG: jax.Array, steps_per_s_T: jax.Array) -> jax.Array:
    everybody_B = jnp.ones(survival_RBG.shape[1], bool)
    return jax.vmap(lambda s_BG: schedule.causal_budget(s_BG, steps_per_s_T, everybody_B))(
        survival_RBG
    )


@jax.jit
def _selected(survival_RBG: jax.Array, budget_R: jax.Array) -> jax.Array:
    everybody_B = jnp.ones(survival_RBG.shape[1], bool)
    return jax.vmap(lambda s_BG, budget: schedule.select_prefixes(s_BG, budget, everybody_B))(
        survival_RBG, budget_R
    )


def format_replay(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table for people."""
    lines = [
        f"{'requests':>8}  {'policy':<11}{'tokens/s':>10}{'regret':>8}{'length':>8}{'verified':>10}"
        f"{'undrafted':>11}"
    ]
    for row in rows:
        note = "" if row["lossless"] else "  not lossless"
        lines.append(
            f"{row['concurrency']:>8}  {row['policy']:<11}{row['tokens_per_s']:>10.1f}"
            f"{row['regret']:>8.1%}{row['accepted_length']:>8.2f}{row['verification_length']:>10.2f}"
            f"{row['undrafted_share']:>11.0%}{note}"
        )
    return "\n".join(lines)
