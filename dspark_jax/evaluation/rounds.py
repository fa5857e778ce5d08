"""Recorded rounds: what the drafter's confidences said, and what came of the drafts.

A round of which the whole block was verified says what any policy would have made of it. A record
is a file of JSON lines, one a request; what they are for does not depend on who shared a round. It
is written while requests end, and gone on with after an interruption (``output.py``).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.checkpoints.lines import json_lines
from dspark_jax.engine.decoder import Decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.generate import config_for
from dspark_jax.engine.reader import Generation
from dspark_jax.engine.request import Request
from dspark_jax.evaluation.output import check_recipe, open_lines
from dspark_jax.evaluation.prompts import Prompt, make_request_sets
from dspark_jax.evaluation.results import served
from dspark_jax.progress import progress
from dspark_jax.scheduler.calibration import ACCEPTANCES
from dspark_jax.scheduler.history import decided_drafts

# Of a line in a record: axes, and the kinds of numpy's dtypes.
NUMBERS = {
    "id": (0, "i"),
    "temperature": (0, "fi"),
    "logits": (2, "fi"),
    "verified": (1, "i"),
    "accepted": (1, "i"),
}


@dataclass(frozen=True, eq=False)
class RecordedRequest:
    """The rounds of one request, in their order.

    Attributes:
        prompt: where the prompt was read; requests of one prompt resemble each other.
        acceptance: the rule of its drafts.
        temperature: how it was sampled.
        logit_NG: float64 confidence logits, before calibration; finite.
        verified_N: drafts whose fate is known: all of the block, or those up to an accepted stop
            token, behind which nothing was decided.
        accepted_N: accepted drafts.
    """

    prompt: str
    acceptance: str
    temperature: float
    logit_NG: np.ndarray
    verified_N: np.ndarray
    accepted_N: np.ndarray


def record_rounds(
    decoder: Decoder,
    sets: Mapping[str, Sequence[Prompt]],
    limits: Request,
    acceptances: Sequence[str],
    temperatures: Sequence[float],
    *,
    seed: int = 0,
    slots: int = 16,
    done: Collection[int] = (),
) -> Iterator[tuple[int, RecordedRequest]]:
    """Continue prompts with whole blocks verified, many at once, in several ways of sampling.

    Args:
        decoder: models with a drafter that has a confidence head.
        sets: the prompts of each file.
        limits: all of a request but prompt, key and temperature.
        acceptances: rules.
        temperatures: every combination with a rule is a way; at 0 all rules are the same, and the
            first stands for them.
        seed: root of the keys; each set counts its prompts from 0.
        slots: requests decoded together.
        done: numbers of requests that are left out.

    Yields:
        The requests that had a round, in order, with their numbers: all prompts of the first way,
        those of the second, ...

    Raises:
        ValueError: there is no confidence head, or a prompt or a way cannot be used.
        FloatingPointError: the target's logits are not finite.
    """
    if decoder.drafter is None or not decoder.drafter.confidence:
        raise ValueError("the drafter has no confidence head: there is nothing to record")
    ways = dict.fromkeys((a if t else acceptances[0], t) for a in acceptances for t in temperatures)
    origins = [prompt.origin for prompts in sets.values() for prompt in prompts]
    asked = [*itertools.chain(*make_request_sets(sets, decoder, limits, seed).values())]
    for way, (acceptance, temperature) in enumerate(ways):
        own = [dataclasses.replace(request, temperature=temperature) for request in asked]
        requests = dict(enumerate(own, way * len(origins)))
        todo = {number: r for number, r in requests.items() if number not in done}
        if not todo:
            continue
        config = config_for(
            decoder,
            list(requests.values()),
            policy="block",
            acceptance=acceptance,  # type: ignore[arg-type]
            slots=slots,
        )
        label = f"{acceptance}, temperature {temperature:g}"
        with (
            Engine(decoder, config) as engine,
            progress(desc=label, total=len(todo), unit="request") as bar,
        ):
            results = served(engine, list(todo.values()), bar)
            for number, result in zip(todo, results, strict=True):
                origin = origins[number % len(origins)]
                found = recorded_request(origin, acceptance, temperature, result)
                if len(found.accepted_N):
                    yield number, found


def recorded_request(
    prompt: str, acceptance: str, temperature: float, result: Generation
) -> RecordedRequest:
    """The rounds of a result; those without a draft, or with logits that are not finite, are left
    out."""
    kept = []
    for logit_G, verified, accepted, length in zip(
        result.confidence_logits,
        result.verified_lengths,
        result.accepted_drafts,
        result.accepted_lengths,
        strict=True,
    ):
        if logit_G is not None and np.isfinite(logit_G).all():
            verified = decided_drafts(length, accepted, verified)
            if accepted < verified:  # behind a rejection no prefix is accepted
                verified = len(logit_G)
            kept.append((logit_G, verified, accepted))
    logit_NG, verified_N, accepted_N = zip(*kept, strict=True) if kept else ((), (), ())
    return RecordedRequest(
        prompt,
        acceptance,
        temperature,
        np.array(logit_NG, np.float64),
        np.array(verified_N, np.int64),
        np.array(accepted_N, np.int64),
    )


def write_record(path: Path, recipe: dict[str, Any], record: Callable[..., Any]) -> None:
    """Write a record request by request, or go on where an interrupted run stopped.

    Args:
        path: of the record.
        recipe: what the rounds depend on, as JSON values; it lies in ``PATH.recipe.json``.
        record: :func:`record_rounds` with everything but ``done`` filled in.

    Raises:
        ValueError: the record belongs to something else, or another process is writing it.
        FloatingPointError: the target's logits are not finite; what was finished stays.
    """
    check_recipe(path, recipe)
    with open_lines(path) as (file, lines):
        for number, request in record(done=lines):
            file.write(record_line(number, request))
            file.flush()


def record_line(number: int, request: RecordedRequest) -> bytes:
    """A request as a line of a record."""
    row = {
        "id": number,
        "prompt": request.prompt,
        "acceptance": request.acceptance,
        "temperature": request.temperature,
        "logits": np.round(request.logit_NG, 5).tolist(),
        "verified": request.verified_N.tolist(),
        "accepted": request.accepted_N.tolist(),
    }
    return json.dumps(row).encode() + b"\n"


def read_record(path: str | Path) -> list[RecordedRequest]:
    """The requests of a record.

    Raises:
        ValueError: the file is missing, empty or damaged; the message names the line.
    """
    requests = [_request(row, origin) for origin, row in json_lines(path)]
    if not requests:
        raise ValueError(f"{path}: no rounds in it; record some with `dspark calibrate --record`")
    sizes = {request.logit_NG.shape[1] for request in requests}
    if len(sizes) > 1:
        raise ValueError(f"{path}: blocks of {sorted(sizes)} drafts: give one drafter's rounds")
    return requests


def _request(row: Any, origin: str) -> RecordedRequest:
    """A request from JSON; ValueError names the field that is wrong."""
    if not isinstance(row, dict) or set(row) != {"prompt", "acceptance", *NUMBERS}:
        fields = ", ".join(("prompt", "acceptance", *NUMBERS))
        raise ValueError(f"{origin}: a recorded request needs exactly {fields}")
    if not isinstance(row["prompt"], str):
        raise ValueError(f"{origin}: prompt is {row['prompt']!r:.40}, not a text")
    if row["acceptance"] not in ACCEPTANCES:
        raise ValueError(f"{origin}: acceptance is {row['acceptance']!r:.40}, not {ACCEPTANCES}")
    number = {name: _array(row[name], f"{origin}: {name}", *NUMBERS[name]) for name in NUMBERS}
    temperature, logit_NG = float(number["temperature"]), number["logits"].astype(np.float64)
    verified_N, accepted_N = number["verified"], number["accepted"]
    if temperature < 0:
        raise ValueError(f"{origin}: temperature is {temperature}: it must be 0 or more")
    if not len(verified_N) == len(accepted_N) == len(logit_NG):
        raise ValueError(f"{origin}: logits, verified and accepted differ in their rounds")
    ordered_N = (accepted_N >= 0) & (accepted_N <= verified_N) & (verified_N <= logit_NG.shape[1])
    if not ordered_N.all():
        raise ValueError(
            f"{origin}: accepted and verified must be numbers of drafts, the first not larger than "
            f"the second and both within 0..{logit_NG.shape[1]}"
        )
    return RecordedRequest(
        row["prompt"], row["acceptance"], temperature, logit_NG, verified_N, accepted_N
    )


def _array(value: Any, what: str, num_axes: int, kinds: str) -> np.ndarray:
    """A value from JSON as an array of finite numbers."""
    try:
        array = np.array(value)
    except (ValueError, OverflowError):  # lists of different lengths
        array = np.array(None)
    if array.dtype.kind not in kinds or array.ndim != num_axes or not array.size:
        numbers = "whole numbers" if kinds == "i" else "numbers"
        form = ("one of the", "a list of", "lists of equally many")[num_axes]
        raise ValueError(f"{what} must be {form} {numbers}")
    if not np.isfinite(array).all():
        raise ValueError(f"{what} must be finite")
    return array
