"""How good predicted survivals are: calibration error, discrimination, reliability bins.

    ECE = Σ_bins share of the rounds * |mean prediction - mean outcome|, over 20 bins

judged for every prefix of a block by itself: a_k against "prefix k was accepted". A perfect
predictor has an error too, of finite samples: 4.4 % with 1,000 rounds and 1.0 % with 20,000.

Axes: N recorded rounds, G slots of a block. All on the host, in float64.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

NUM_BINS = 20  # of the calibration error
NUM_FINE_BINS = 1000  # of the area under the curve
LEAST = 1e-8  # predictions are judged this far from 0 and 1


@dataclass(frozen=True)
class ReliabilityBin:
    """Rounds whose prediction lies in [low, high), the last bin's in [low, 1]."""

    low: float
    high: float
    predicted: float  # mean prediction
    accepted: float  # mean outcome
    weight: int


@dataclass(frozen=True)
class PositionReport:
    """How good the predictions of prefix `position` (1 for the first slot) are.

    Attributes:
        position: k, the length of the prefix.
        weight: rounds that verified it. Without any, all numbers are None.
        ece: expected calibration error over 20 bins.
        ece_low: lower bound of its 95 % bootstrap interval.
        ece_high: upper bound.
        auc: area under the ROC curve over 1000 bins; None where all outcomes are alike.
        brier: mean squared error.
        predicted: mean prediction.
        accepted: mean outcome.
        reliability: bins that are not empty.
    """

    position: int
    weight: int
    ece: float | None = None
    ece_low: float | None = None
    ece_high: float | None = None
    auc: float | None = None
    brier: float | None = None
    predicted: float | None = None
    accepted: float | None = None
    reliability: tuple[ReliabilityBin, ...] = ()


@dataclass(frozen=True)
class ConfidenceReport:
    """One report a position, and the mean of their errors with its 95 % bootstrap interval."""

    positions: tuple[PositionReport, ...]
    ece_mean: float | None = None
    ece_mean_low: float | None = None
    ece_mean_high: float | None = None


def confidence_report(
    survival_NG: np.ndarray,
    accepted_N: np.ndarray,
    verified_N: np.ndarray,
    group_N: np.ndarray | None = None,
    resamples: int = 200,
) -> ConfidenceReport:
    """Calibration and discrimination of predicted survivals, position by position.

    The bootstrap draws whole groups with replacement, the same ones for every position. Drawing
    adds noise, which raises a calibration error; so its mean is moved onto the estimate. The
    estimate itself still contains the floor of finite samples.

    Args:
        survival_NG: predictions in [0, 1], such as `predicted_survival` makes.
        accepted_N: accepted drafts of each round.
        verified_N: verified drafts of each round; later positions are not judged.
        group_N: int, the conversation of each round, whose rounds resemble each other; None for
            rounds on their own.
        resamples: of the bootstrap.

    Raises:
        ValueError: the rounds are empty, do not fit each other or are not finite.
    """
    survival_NG, accepted_N = check_rounds(survival_NG, accepted_N)
    group_N = np.arange(len(accepted_N)) if group_N is None else np.asarray(group_N)
    _, group_N = np.unique(group_N, return_inverse=True)
    num_groups = int(group_N.max()) + 1
    rng = np.random.default_rng(0)
    chance = np.full(num_groups, 1 / num_groups)
    drawn = [rng.multinomial(num_groups, chance)[group_N] for _ in range(resamples)]

    positions, errors = [], []
    for slot in range(survival_NG.shape[1]):
        seen_N = np.asarray(verified_N) > slot
        label_N = (accepted_N[seen_N] > slot).astype(np.float64)
        prediction_N = survival_NG[seen_N, slot]
        report = position_report(slot + 1, prediction_N, label_N)
        if report.weight:
            resampled = [calibration_error(prediction_N, label_N, w[seen_N]) for w in drawn]
            error = calibration_error(prediction_N, label_N)
            errors.append((error, resampled))
            low, high = _interval(error, np.array(resampled))
            report = dataclasses.replace(report, ece_low=low, ece_high=high)
        positions.append(report)
    if not errors:
        return ConfidenceReport(tuple(positions))
    mean = float(np.mean([error for error, _ in errors]))
    low, high = _interval(mean, np.mean([resampled for _, resampled in errors], axis=0))
    return ConfidenceReport(tuple(positions), mean, low, high)


def _interval(estimate: float, resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(resampled - resampled.mean(), [0.025, 0.975])
    return max(0.0, float(estimate + low)), float(estimate + high)


def position_report(position: int, prediction_N: np.ndarray, label_N: np.ndarray) -> PositionReport:
    """The report of one position, without the bootstrap.

    Args:
        position: k.
        prediction_N: float64 in [0, 1].
        label_N: float64, 1 where the prefix was accepted, else 0.
    """
    if len(label_N) == 0:
        return PositionReport(position, 0)
    prediction_N = np.clip(prediction_N, LEAST, 1 - LEAST)
    bin_N = _bin(prediction_N, NUM_BINS)
    weight, predicted, accepted = (
        np.bincount(bin_N, values_N, NUM_BINS)
        for values_N in (np.ones(len(label_N)), prediction_N, label_N)
    )
    reliability = tuple(
        ReliabilityBin(
            low=b / NUM_BINS,
            high=(b + 1) / NUM_BINS,
            predicted=float(predicted[b] / weight[b]),
            accepted=float(accepted[b] / weight[b]),
            weight=int(weight[b]),
        )
        for b in np.flatnonzero(weight)
    )
    return PositionReport(
        position=position,
        weight=len(label_N),
        ece=calibration_error(prediction_N, label_N),
        auc=_area_under_curve(prediction_N, label_N),
        brier=float(np.mean((prediction_N - label_N) ** 2)),
        predicted=float(prediction_N.mean()),
        accepted=float(label_N.mean()),
        reliability=reliability,
    )


def calibration_error(
    prediction_N: np.ndarray, label_N: np.ndarray, weight_N: np.ndarray | None = None
) -> float:
    """Σ over bins |Σ prediction - Σ label| / N: the gap of every bin by its share of the rounds.

    Args:
        prediction_N: float64 in [0, 1].
        label_N: float64, 0 or 1.
        weight_N: int, how often each round counts; None for once.
    """
    gap_N = prediction_N - label_N
    total = len(gap_N) if weight_N is None else max(weight_N.sum(), 1)
    gap_N = gap_N if weight_N is None else gap_N * weight_N
    return float(abs(np.bincount(_bin(prediction_N, NUM_BINS), gap_N)).sum() / total)


def _area_under_curve(prediction_N: np.ndarray, label_N: np.ndarray) -> float | None:
    """The chance that an accepted prefix ranks above a rejected one, ties by halves."""
    bin_N = _bin(prediction_N, NUM_FINE_BINS)
    accepted = np.bincount(bin_N, label_N, NUM_FINE_BINS)
    rejected = np.bincount(bin_N, 1 - label_N, NUM_FINE_BINS)
    pairs = accepted.sum() * rejected.sum()
    below = np.cumsum(rejected) - rejected
    return float((accepted * (below + rejected / 2)).sum() / pairs) if pairs else None


def _bin(prediction_N: np.ndarray, num_bins: int) -> np.ndarray:
    return np.minimum((prediction_N * num_bins).astype(np.int64), num_bins - 1)


def check_rounds(value_NG: np.ndarray, accepted_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Predictions (or their logits) and accepted lengths in float64 and int64.

    Raises:
        ValueError: they are empty, do not fit each other or are not finite.
    """
    value_NG, accepted_N = np.asarray(value_NG, np.float64), np.asarray(accepted_N, np.int64)
    if value_NG.ndim != 2 or not value_NG.size or accepted_N.shape != value_NG.shape[:1]:
        raise ValueError(
            f"confidences of shape {value_NG.shape} with accepted lengths of shape "
            f"{accepted_N.shape}: give [rounds, slots] and [rounds], at least one of each"
        )
    if not np.isfinite(value_NG).all():
        raise ValueError(
            "confidences of recorded rounds are not all finite: leave those rounds out"
        )
    return value_NG, accepted_N
