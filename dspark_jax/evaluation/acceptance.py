"""How many drafts a target keeps: by set of prompts, temperature and position in the block.

Every block is verified whole, so that a drafter is measured and no policy. Accepted lengths are
those of the paper: the mean over all rounds of a set, the bonus token counted
(``notebooks/concepts/round.md``).
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from dspark_jax.engine.decoder import Decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.generate import config_for
from dspark_jax.engine.reader import Generation
from dspark_jax.engine.request import Request
from dspark_jax.engine.setting import device_name
from dspark_jax.evaluation.prompts import Prompt, make_request_sets
from dspark_jax.evaluation.results import (
    accept_rates,
    format_rates,
    mean_accepted_length,
    require_drafts,
    served,
)
from dspark_jax.progress import progress
from pallas_kernels.dispatch import Kernels

# What reports must share to be compared.
SETTING = ("target", "prompts", "max_new_tokens", "acceptance", "seed", "device", "jax")
# What a training curve shows of the lines of a metrics log.
CURVE = ("step", "split", "accepted_length", "ce")


def bench_acceptance(
    decoder: Decoder,
    sets: Mapping[str, Sequence[Prompt]],
    limits: Request,
    temperatures: Sequence[float] = (0.0, 1.0),
    *,
    seed: int = 0,
    batch: int = 8,
    acceptance: Literal["rejection", "coupled"] = "rejection",
    kernels: Kernels = "auto",
) -> dict[str, Any]:
    """Decode all prompts at every temperature.

    Args:
        decoder: weights with a drafter.
        sets: the prompts of each set by its name.
        limits: all of a request but prompt, key and temperature.
        temperatures: to decode at.
        seed: root of the keys; each set counts its prompts from 0.
        batch: prompts decoded together.
        acceptance: of ``EngineConfig``.
        kernels: likewise.

    Returns:
        ``rows``, one for each set and temperature, their ``mean`` over the sets at each
        temperature, and the setting, as JSON values.

    Raises:
        ValueError: a prompt cannot be used, or no text of a set has a round.
        FloatingPointError: the target's logits are not finite.
    """
    assert decoder.drafter is not None
    asked = make_request_sets(sets, decoder, limits, seed)
    requests = {
        (name, value): [dataclasses.replace(one, temperature=value) for one in asked[name]]
        for value in temperatures
        for name in sets
    }
    everybody = [request for group in requests.values() for request in group]
    config = config_for(
        decoder, everybody, policy="block", acceptance=acceptance, kernels=kernels, slots=batch
    )
    rows = []
    with (
        Engine(decoder, config) as engine,
        progress(total=len(everybody), unit="prompt") as bar,
    ):
        for (name, temperature), group in requests.items():
            bar.set_description(f"{name}, temperature {temperature:g}")
            results = list(served(engine, group, bar))
            require_drafts(results, f"{name}, temperature {temperature:g}")
            row = {"set": name, "temperature": temperature, "prompts": len(group)}
            rows.append(row | summarise(results, decoder.drafter.block_size))
    return {
        "rows": rows,
        "mean": [mean_of_sets(rows, temperature) for temperature in temperatures],
        "prompts": sum(map(len, sets.values())),
        "max_new_tokens": limits.max_new_tokens,
        "acceptance": acceptance,
        "seed": seed,
        "device": device_name(),
        "jax": jax.__version__,
    }


def summarise(results: Sequence[Generation], block_size: int) -> dict[str, Any]:
    """What some results say about acceptance."""
    return {
        "tokens": sum(len(result.token_ids) for result in results),
        "rounds": sum(result.rounds for result in results),
        "accepted_length": mean_accepted_length(results),
        "accept_rate_by_position": accept_rates(results, block_size),
    }


def mean_of_sets(rows: Sequence[Mapping[str, Any]], temperature: float) -> dict[str, float]:
    """The mean accepted length of the sets at a temperature, all sets weighing the same."""
    lengths = [row["accepted_length"] for row in rows if row["temperature"] == temperature]
    return {"temperature": temperature, "accepted_length": round(statistics.mean(lengths), 4)}


def compare(
    reports: Mapping[str, Mapping[str, Any]], logs: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, Any]:
    """Several drafters side by side, as JSON values.

    Args:
        reports: of :func:`bench_acceptance` with the ``target``, by the drafters' labels.
        logs: the lines of the metrics logs that the drafters' trainings left, by the same labels.

    Returns:
        The setting and, under ``drafters``, the ``rows``, ``mean`` and ``curve`` of each.

    Raises:
        ValueError: the reports are not of the same setting, sets and temperatures; names what
            differs.
    """
    first, *others = reports
    for label in others:
        for key in SETTING:
            mine, its = reports[first][key], reports[label][key]
            if mine != its:
                raise ValueError(
                    f"{key} is {mine!r} with {first} and {its!r} with {label}: measure both alike"
                )
        if _measured(reports[first]) != _measured(reports[label]):
            raise ValueError(
                f"{first} and {label} were measured on other prompts or temperatures: measure "
                "both alike"
            )
    return {
        **{key: reports[first][key] for key in SETTING},
        "drafters": {
            label: {
                "rows": report["rows"],
                "mean": report["mean"],
                "curve": [
                    {key: line[key] for key in CURVE if key in line}
                    for line in logs[label]
                    if line.get("split") != "decoded"
                ],
            }
            for label, report in reports.items()
        },
    }


def _measured(report: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Set, temperature and number of prompts of every row."""
    return [(row["set"], row["temperature"], row["prompts"]) for row in report["rows"]]


def format_report(report: Mapping[str, Any]) -> str:
    """A report as a short table for people."""
    lines = [
        f"{report['target']} + {report['drafter']} on {report['device']}, jax {report['jax']}",
        f"{report['max_new_tokens']} new tokens, whole blocks verified, {report['acceptance']}",
        "",
        f"{'':<16}{'temperature':>12}{'prompts':>8}{'tokens':>8}{'rounds':>8}{'length':>8}"
        "  accepted by position",
    ]
    for row in report["rows"]:
        lines.append(
            f"{row['set']:<16}{row['temperature']:>12g}{row['prompts']:>8}{row['tokens']:>8}"
            f"{row['rounds']:>8}{row['accepted_length']:>8.2f}"
            f"  {format_rates(row['accept_rate_by_position'])}"
        )
    for row in report["mean"]:
        lines.append(
            f"{'mean of sets':<16}{row['temperature']:>12g}{'':>24}{row['accepted_length']:>8.2f}"
        )
    return "\n".join(lines)
