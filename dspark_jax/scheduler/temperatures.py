"""Calibrated confidences: how they are rescaled and fitted (``notebooks/concepts/calibration.md``).

    c_k = σ(logit_k / t_k)        a_k = Π_{i<=k} c_i  should be the chance that prefix k is accepted

Sequential temperature scaling finds t_1, t_2, ... in turn, each by a grid search for the smallest
calibration error of the product a_k, on rounds that verified their whole block. Only conditionals
are rescaled, by numbers from past rounds: a map on the product could break that it never rises
along a block, and with it losslessness (``schedule.py``).

`calibrated_confidence` runs on the device, everything else on the host in float64.

Axes: N recorded rounds, G slots of a block, B requests, J temperatures of the grid.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.scheduler.reliability import calibration_error, check_rounds

GRID = tuple(float(t) for t in np.geomspace(0.1, 10, 121))
WINDOW, ENOUGH = 8192.0, 512.0  # outcomes that online calibration remembers, and waits for


def calibrated_confidence(logit_BG: jax.Array, temperature_G: jax.Array) -> jax.Array:
    """c_k = σ(logit_k / t_k), float32 [B, G].

    Args:
        logit_BG: of the confidence head; a NaN stays one.
        temperature_G: float, positive; [B, G] gives every request its own.
    """
    return jax.nn.sigmoid(logit_BG.astype(jnp.float32) / temperature_G)


def predicted_survival(logit_NG: np.ndarray, temperature_G: np.ndarray | float = 1.0) -> np.ndarray:
    """a_k on the host, float64 [N, G]; arguments as for `calibrated_confidence`."""
    confidence_NG = _sigmoid(np.asarray(logit_NG, np.float64) / temperature_G)
    return np.cumprod(confidence_NG, axis=1)


def fit_temperatures(logit_NG: np.ndarray, accepted_N: np.ndarray) -> np.ndarray:
    """Sequential temperature scaling: float64 [G].

    Args:
        logit_NG: of the confidence head, finite.
        accepted_N: accepted drafts of each round, 0 to G, with the whole block verified.

    Raises:
        ValueError: the rounds are empty, do not fit each other or are not finite.
    """
    logit_NG, accepted_N = check_rounds(logit_NG, accepted_N)
    # Among equal errors the first wins: the temperature that changes least.
    grid_J = np.array(sorted(GRID, key=lambda t: abs(np.log(t))))
    prefix_N = np.ones(len(logit_NG))
    temperatures = []
    for slot in range(logit_NG.shape[1]):
        label_N = (accepted_N > slot).astype(np.float64)
        best = (np.inf, 1.0, prefix_N)
        for temperature in grid_J:
            product_N = prefix_N * _sigmoid(logit_NG[:, slot] / temperature)
            error = calibration_error(product_N, label_N)
            if error < best[0]:
                best = error, float(temperature), product_N
        temperatures.append(best[1])
        prefix_N = best[2]
    return np.array(temperatures)


@dataclass(frozen=True)
class OnlineCalibration:
    """What past rounds say about the temperature of every slot.

    The log-loss of the conditional c_k is summed for each temperature of `GRID`, over the slots
    that were *decided about*: verified, with all before them accepted. Nothing has to be corrected
    for the others. Given everything drafted before slot k, its draft is accepted with the same
    chance whether or not the slot is verified, because that was settled without d_k (``schedule``).
    So each outcome is an honest sample of its conditional, the log-loss is proper, and choosing
    slots by their confidence only weighs the fit towards the slots that are chosen. Counting slots
    that were not verified as rejected, or fitting the product, would be biased.

    Attributes:
        loss_GJ: float64 sums of the log-loss.
        weight_G: float64 outcomes behind them; old ones fade, `WINDOW` are remembered.
        prior_G: float64 temperatures while fewer than `ENOUGH` are known.
    """

    loss_GJ: np.ndarray
    weight_G: np.ndarray
    prior_G: np.ndarray

    @property
    def temperature_G(self) -> np.ndarray:
        """float64 [G]: the best temperature of each slot."""
        best_G = np.array(GRID)[np.argmin(self.loss_GJ, axis=1)]
        return np.where(self.weight_G >= ENOUGH, best_G, self.prior_G)


def start_online(prior_G: np.ndarray) -> OnlineCalibration:
    """Online calibration that knows no outcome yet, from temperatures fitted before."""
    prior_G = np.asarray(prior_G, np.float64)
    return OnlineCalibration(np.zeros((len(prior_G), len(GRID))), np.zeros(len(prior_G)), prior_G)


def observe(
    state: OnlineCalibration, logit_BG: np.ndarray, accepted_B: np.ndarray, verified_B: np.ndarray
) -> OnlineCalibration:
    """Takes in a round, one that is at least two rounds old like all that a schedule may know.

    Args:
        state: before.
        logit_BG: of the confidence head; slots that are not finite are left out.
        accepted_B: accepted drafts.
        verified_B: verified drafts, 0 for idle slots. Where an accepted stop token ended the
            request, the slots up to it: nothing is known about those after it.
    """
    slot_G = np.arange(logit_BG.shape[1])
    decided_BG = slot_G < np.minimum(accepted_B + 1, verified_B)[:, None]
    decided_BG &= np.isfinite(logit_BG)
    accepted_BG = slot_G < accepted_B[:, None]
    # -log σ(±logit / t): the sign turns a rejection into the acceptance of its opposite.
    signed_BG = np.where(decided_BG, np.where(accepted_BG, logit_BG, -logit_BG), 0.0)
    loss_BGJ = np.logaddexp(0.0, -signed_BG[..., None] / np.array(GRID))
    new_G = decided_BG.sum(axis=0)
    kept_G = np.maximum(1 - new_G / WINDOW, 0)
    loss_GJ = (loss_BGJ * decided_BG[..., None]).sum(axis=0)
    return dataclasses.replace(
        state,
        loss_GJ=state.loss_GJ * kept_G[:, None] + loss_GJ,
        weight_G=state.weight_G * kept_G + new_G,
    )


def _sigmoid(logit_N: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -logit_N))
