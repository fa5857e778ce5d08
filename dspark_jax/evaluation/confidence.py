"""How far confidences can be trusted, before and after they are calibrated.

Half of the conversations fit the temperatures, the other half judges them: rounds of one text
resemble each other, so that texts are never split.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.checkpoints.load import default_drafter_directory
from dspark_jax.checkpoints.runs import drafter_directory
from dspark_jax.engine.request import Request
from dspark_jax.evaluation.prompts import Prompt
from dspark_jax.evaluation.rounds import RecordedRequest, record_rounds
from dspark_jax.model import Model
from dspark_jax.scheduler.calibration import (
    FILE_NAME,
    Calibration,
    CalibrationTable,
    write_calibration,
)
from dspark_jax.scheduler.reliability import confidence_report
from dspark_jax.scheduler.temperatures import fit_temperatures, predicted_survival

LEAST_ROUNDS = 4  # to fit temperatures, and as many to judge them


def calibrate(
    model: Model,
    prompts: Sequence[str],
    *,
    acceptances: Sequence[str] = ("rejection",),
    temperatures: Sequence[float] = (0.0, 1.0),
    max_new_tokens: int = 128,
    seed: int = 0,
    slots: int = 16,
    out: str | Path | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Fit the drafter's confidences to what is accepted of the drafts for some prompts.

    Args:
        model: of ``dspark_jax.load``, with a drafter that has a confidence head.
        prompts: messages of the user, at least two: half of them judge what the others fit.
        acceptances: rules, ``"rejection"`` or ``"coupled"``.
        temperatures: of the sampling; a table is fitted for each pair of the two.
        max_new_tokens: of each text.
        seed: of the sampling.
        slots: requests decoded together.
        out: a file for the tables; beside a drafter, as ``calibration.json``, ``load`` finds it.

    Returns:
        The model with these tables; and the report, whose ``tables`` have ``before`` and
        ``after`` of held-out texts.

    Raises:
        ValueError: there is no confidence head, or a prompt cannot be used.
        FloatingPointError: the target's logits are not finite.

    Source: the paper's sequential temperature scaling (``notebooks/concepts/calibration.md``).

    >>> model, report = calibrate(load(), ["Hello.", "Who?", "Why?", "Where?"], max_new_tokens=12)
    >>> [table["sampling_temperature"] for table in report["tables"]]
    [0.0, 1.0]
    """
    listed = [Prompt(text, f"prompt {number}") for number, text in enumerate(prompts)]
    limits = Request((0,), max_new_tokens=max_new_tokens)
    recorded = record_rounds(
        model.decoder, {"": listed}, limits, acceptances, temperatures, seed=seed, slots=slots
    )
    tables, report = fit_calibration([request for _, request in recorded])
    if out is not None:
        write_calibration(Path(out), tables)
    decoder = dataclasses.replace(model.decoder, calibration=tables)
    return dataclasses.replace(model, decoder=decoder), report


def fit_calibration(
    requests: Sequence[RecordedRequest],
) -> tuple[Calibration, dict[str, Any]]:
    """A table for each way of sampling, and what it is worth.

    Args:
        requests: recorded with one drafter, in any order and number of ways.

    Returns:
        The tables, and a report of JSON values: ``tables`` has the fields of each one with
        ``before`` and ``after``, each a ``ConfidenceReport`` of the conversations held out.

    Raises:
        ValueError: some way has too few conversations or rounds.
    """
    if not requests:
        raise ValueError(
            "no text has a round behind its first token, so that there is nothing to fit: give "
            "other prompts or a larger max_new_tokens"
        )
    ways = dict.fromkeys((request.acceptance, request.temperature) for request in requests)
    tables, reports = [], []
    for acceptance, temperature in sorted(ways):
        way = (acceptance, temperature)
        own = [request for request in requests if (request.acceptance, request.temperature) == way]
        table, report = _fit_way(acceptance, temperature, own)
        tables.append(table)
        reports.append({**dataclasses.asdict(table), **report})
    return Calibration(tuple(tables)), {"tables": reports}


def _fit_way(
    acceptance: str, temperature: float, requests: Sequence[RecordedRequest]
) -> tuple[CalibrationTable, dict[str, Any]]:
    """The table of one way of sampling, and its report."""
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(r.prompt for r in requests))}
    halves = [[r for r in requests if place[r.prompt] % 2 == half] for half in (0, 1)]
    if not halves[1]:
        raise ValueError(
            f"{acceptance}, temperature {temperature:g}: there is only one conversation with "
            "rounds: give more prompts, half of them judge what the others fit"
        )
    (logit_NG, verified_N, accepted_N), held_out = (_joined(half) for half in halves)
    whole_N = verified_N == logit_NG.shape[1]
    for count, purpose in ((whole_N.sum(), "fit"), (len(held_out[2]), "judge")):
        if count < LEAST_ROUNDS:
            raise ValueError(
                f"{acceptance}, temperature {temperature:g}: {count} rounds are too few to "
                f"{purpose} confidences, at least {LEAST_ROUNDS} are needed: give more prompts or "
                "a larger max_new_tokens"
            )
    found_G = fit_temperatures(logit_NG[whole_N], accepted_N[whole_N])
    logit_NG, verified_N, accepted_N = held_out
    group_N = np.concatenate([np.full(len(r.accepted_N), place[r.prompt]) for r in halves[1]])
    before, after = (
        dataclasses.asdict(
            confidence_report(
                predicted_survival(logit_NG, temperature_G), accepted_N, verified_N, group_N
            )
        )
        for temperature_G in (1.0, found_G)
    )
    table = CalibrationTable(acceptance, temperature, tuple(found_G.tolist()))
    rounds = {"rounds_fitted": int(whole_N.sum()), "rounds_held_out": len(accepted_N)}
    return table, {**rounds, "before": before, "after": after}


def _joined(requests: Sequence[RecordedRequest]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, verified and accepted of all rounds."""
    return (
        np.concatenate([request.logit_NG for request in requests]),
        np.concatenate([request.verified_N for request in requests]),
        np.concatenate([request.accepted_N for request in requests]),
    )


def format_calibration(report: Mapping[str, Any]) -> str:
    """A report as tables for people; errors in per cent, with 95 % intervals."""
    lines = []
    for table in report["tables"]:
        before, after = table["before"], table["after"]
        lines += [
            f"{table['acceptance']}, temperature {table['sampling_temperature']:g}: "
            f"{table['rounds_fitted']} rounds fitted, {table['rounds_held_out']} held out",
            f"{'position':>8}{'t':>7}{'ECE':>7}{'after':>8}{'95 %':>15}{'AUC':>8}{'after':>8}"
            f"{'Brier':>8}{'after':>8}",
        ]
        for t, old, new in zip(
            table["confidence_temperatures"], before["positions"], after["positions"], strict=True
        ):
            lines.append(
                f"{old['position']:>8}{t:>7.2f}{_percent(old['ece']):>7}{_percent(new['ece']):>8}"
                f"{_interval(new, 'ece'):>15}{_number(old['auc']):>8}{_number(new['auc']):>8}"
                f"{_number(old['brier']):>8}{_number(new['brier']):>8}"
            )
        lines += [
            f"{'mean':>8}{'':>7}{_percent(before['ece_mean']):>7}{_percent(after['ece_mean']):>8}"
            f"{_interval(after, 'ece_mean'):>15}",
            "",
        ]
    return "\n".join(lines[:-1])


def _interval(report: Mapping[str, Any], name: str) -> str:
    return f"{_percent(report[f'{name}_low'])} .. {_percent(report[f'{name}_high'])}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def path_beside(drafter: str, target: str) -> Path:
    """The file beside a drafter.

    Args:
        drafter: ``"default"``, a directory, or a run of training.
        target: of the drafter, as ``load_target`` takes it.

    Raises:
        ValueError: it is no directory, or one that cannot be written.
    """
    directory: Path | None = Path(drafter_directory(drafter))
    if drafter == "default":
        directory = default_drafter_directory(target)
    if directory is None or not directory.is_dir() or not os.access(directory, os.W_OK):
        raise ValueError(
            f"drafter {drafter} is no directory that can be written: say where the tables go, with "
            "--out FILE.json"
        )
    return directory / FILE_NAME
