"""What an engine has learnt from past rounds, and may use: nothing newer than two rounds.

Condition (e) of a lossless schedule (``schedule.py``) is kept here: rounds are taken in by
their number, when they are `DELAY` old, and not when their reports arrive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from dspark_jax.scheduler.choice import DELAY
from dspark_jax.scheduler.temperatures import (
    OnlineCalibration,
    observe,
    predicted_survival,
    start_online,
)

CREDIT = 8.0  # drafts predicted and accepted that every kind of request is credited with at first
WINDOW = 512.0  # predicted accepted drafts that are remembered

# Whose outcomes say something about each other's confidences: requests of one sort, greedy or not,
# of a shaped law or not, that start from the same temperatures.
Kind = tuple[Hashable, tuple[float, ...]]


@dataclass(frozen=True, eq=False)
class Drafted:
    """A request's draft in a round, and what became of it.

    Attributes:
        kind: of the request.
        logit_G: float32 confidence logits.
        accepted: drafts accepted.
        decided: drafts that the target was asked about, an accepted stop token the last of them.
    """

    kind: Kind
    logit_G: np.ndarray
    accepted: int
    decided: int


@dataclass(frozen=True)
class Promise:
    """How far confidences have kept what they promised. Texts that a drafter was not made for are
    promised too much for, and whether drafts pay at all hangs on a few hundredths.

    Attributes:
        predicted: drafts that the confidences said would be accepted, of those decided about.
        accepted: how many were; both fade.
    """

    predicted: float = 0.0
    accepted: float = 0.0

    @property
    def kept(self) -> float:
        """The factor between the two, near 1 while little is known."""
        return (CREDIT + self.accepted) / (CREDIT + self.predicted)


@dataclass(frozen=True, eq=False)
class History:
    """Past rounds. Requests go by their generation, which no other request ever has.

    Attributes:
        recalibrates: whether temperatures follow what is observed.
        waiting: numbers and drafts of rounds that are too new to be used.
        logits: the newest confidences of each request that may be used.
        fresh: requests whose confidences are those of `DELAY` rounds ago.
        promises: how far the confidences of each kind can be believed.
        online: what is known about the temperatures of each kind.
    """

    recalibrates: bool = False
    waiting: tuple[tuple[int, Mapping[int, Drafted]], ...] = ()
    logits: Mapping[int, np.ndarray] = dataclasses.field(default_factory=dict)
    fresh: frozenset[int] = frozenset()
    promises: Mapping[Kind, Promise] = dataclasses.field(default_factory=dict)
    online: Mapping[Kind, OnlineCalibration] = dataclasses.field(default_factory=dict)

    def temperature_G(self, kind: Kind) -> np.ndarray:
        """float32 [G]: of the confidences of such requests."""
        known = self.online.get(kind)
        return np.array(kind[1] if known is None else known.temperature_G, np.float32)


def decided_drafts(count: int, accepted: int, verified: int) -> int:
    """How many of the verified drafts the target was asked about.

    Where no token of the target's own was committed, an accepted draft was the stop token, and
    the last one looked at.
    """
    return accepted if count == accepted else verified


def record(history: History, number: int, drafted: Mapping[int, Drafted]) -> History:
    """Keeps what a round brought until it is old enough; one without drafts brings nothing."""
    if not drafted:
        return history
    return dataclasses.replace(history, waiting=(*history.waiting, (number, drafted)))


def advance(history: History, number: int, present: Collection[int]) -> History:
    """What round ``number`` may know.

    Args:
        history: as returned for the round before, with the reports since.
        number: of the round that is planned.
        present: requests that the engine serves; the confidences of others are forgotten.
    """
    usable = [entry for entry in history.waiting if entry[0] <= number - DELAY]
    logits, online, promises = dict(history.logits), dict(history.online), dict(history.promises)
    fresh: frozenset[int] = frozenset()
    for seen, drafted in usable:
        logits |= {request: draft.logit_G for request, draft in drafted.items()}
        if seen == number - DELAY:
            fresh = frozenset(drafted)
        for kind, logit_BG, decided_B, accepted_B in _by_kind(drafted.values()):
            survival_BG = predicted_survival(logit_BG, history.temperature_G(kind))
            promise = promises.get(kind, Promise())
            promises[kind] = keep_promise(promise, survival_BG, decided_B, accepted_B)
            if history.recalibrates:
                known = online.get(kind) or start_online(np.array(kind[1]))
                online[kind] = observe(known, logit_BG, accepted_B, decided_B)
    return dataclasses.replace(
        history,
        waiting=history.waiting[len(usable) :],
        logits={request: logits[request] for request in present if request in logits},
        fresh=fresh,
        promises=promises,
        online=online,
    )


def keep_promise(
    promise: Promise, survival_BG: np.ndarray, decided_B: np.ndarray, accepted_B: np.ndarray
) -> Promise:
    """What a round adds to what is known about its confidences.

    Args:
        promise: before.
        survival_BG: float, by the confidences; requests with one that is not finite are left out.
        decided_B: drafts that the target was asked about.
        accepted_B: drafts accepted.
    """
    decided_BG = np.arange(survival_BG.shape[1]) < decided_B[:, None]
    predicted_B = np.where(decided_BG, survival_BG, 0).sum(axis=1)
    finite_B = np.isfinite(predicted_B)
    predicted = float(predicted_B[finite_B].sum())
    left = max(1 - predicted / WINDOW, 0)
    return Promise(
        promise.predicted * left + predicted,
        promise.accepted * left + float(accepted_B[finite_B].sum()),
    )


def _by_kind(
    drafts: Collection[Drafted],
) -> Iterator[tuple[Kind, np.ndarray, np.ndarray, np.ndarray]]:
    """The drafts of a round, kind by kind: logits [B, G], decided and accepted drafts [B]."""
    for kind in dict.fromkeys(draft.kind for draft in drafts):
        own = [draft for draft in drafts if draft.kind == kind]
        yield (
            kind,
            np.stack([draft.logit_G for draft in own]),
            np.array([draft.decided for draft in own]),
            np.array([draft.accepted for draft in own]),
        )
