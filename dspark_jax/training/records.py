"""What a run says of itself: its recipe and ``metrics.jsonl`` beside the checkpoints."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dspark_jax.config import TrainConfig
from dspark_jax.files import read_json, write_atomically
from dspark_jax.training.cache import INDEX
from dspark_jax.training.data import TokenSequence, origins


class MetricsLog:
    """``metrics.jsonl``; steps that a resumed run repeats are cut from it."""

    def __init__(self, directory: Path, start_step: int) -> None:
        """Open the log in a directory for the steps after ``start_step``."""
        self.path = directory / "metrics.jsonl"
        found = self.path.exists()
        text = self.path.read_text(encoding="utf-8", errors="replace") if found else ""
        kept = [line for line in text.split("\n") if _step_of(line) <= start_step]
        write_atomically(self.path, "".join(line + "\n" for line in kept))

    def write(self, step: int, **values: Any) -> None:
        """Append one line; ``split`` names another part of the data than that trained on."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def _step_of(line: str) -> float:
    """Step of a line of the log; a line torn by a crash counts as never reached."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, int) else math.inf


@dataclasses.dataclass(frozen=True)
class Report:
    """What a training says at a step, to callbacks.

    Attributes:
        recipe: of the run.
        step: batches done.
        split: ``"training"`` for the means of the step's updates, ``"held-out"`` for the sequences
            that are held out, ``"decoded"`` for texts that were decoded.
        values: by name; numbers, or a list of one number for each slot of a block.
        params: the weights that are evaluated and exported, on their devices. The next step reuses
            their memory: copy what is to stay.
    """

    recipe: TrainConfig
    step: int
    split: str
    values: Mapping[str, Any]
    params: Any

    def scalars(self) -> dict[str, float]:
        """The values as ``split/name``, and ``split/name/k`` for slot k = 1, 2, ..."""
        found: dict[str, float] = {}
        for name, value in self.values.items():
            if isinstance(value, list):
                places = {f"{name}/{k}": each for k, each in enumerate(value, 1)}
            else:
                places = {name: value}
            found |= {f"{self.split}/{place}": number for place, number in places.items()}
        return found


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def best_length(path: Path) -> float:
    """The largest ``decoded_length`` in a ``metrics.jsonl``; 0 where there is none."""
    return max((row.get("decoded_length", 0.0) for row in read_metrics(path)), default=0.0)


def plain(metrics: dict[str, jax.Array]) -> dict[str, Any]:
    """Metrics as JSON numbers and lists, rounded to 6 digits."""
    return {
        name.removesuffix("_G"): np.round(np.asarray(value, np.float64), 6).tolist()
        for name, value in jax.device_get(metrics).items()
    }


def mean_metrics(rows: list[dict[str, jax.Array]]) -> dict[str, Any]:
    """Mean of several batches' metrics, weighted by their blocks."""
    rows = jax.device_get(rows)
    weight = np.array([row["blocks"] for row in rows], np.float64)
    return {
        name.removesuffix("_G"): np.round(
            np.average([row[name] for row in rows], axis=0, weights=weight), 6
        ).tolist()
        for name in rows[0]
        if name != "blocks"
    }


def recipe_record(
    recipe: TrainConfig, optimizer: Any = None, schedule: Any = None, loss: Any = None
) -> dict[str, Any]:
    """The recipe, the SHA-256 of its data (of a cache: of its index), and what is in the place of
    its optimiser, schedule and loss, as JSON values.

    The order of batches and the reduced vocabulary follow from the data, so a run that goes on
    needs the same; the file may move.
    """
    record: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    whole_cache = recipe.cache and not recipe.cache_gb
    source = Path(recipe.cache) / INDEX if whole_cache else Path(recipe.data)
    chosen = {"optimizer": optimizer, "schedule": schedule, "loss": loss}
    words = {name: described(value) for name, value in chosen.items()}
    return record | {"data_sha256": sha256(source)} | words


def described(value: Any) -> str:
    """A function by its name, something else in its own words; empty for None."""
    if value is None:
        return ""
    if isinstance(value, functools.partial):
        given = [*map(repr, value.args), *(f"{k}={v!r}" for k, v in value.keywords.items())]
        return f"{described(value.func)}({', '.join(given)})"
    name = getattr(value, "__qualname__", None)
    return str(value) if name is None else f"{value.__module__}.{name}"


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check_same_recipe(path: Path, now: dict[str, Any]) -> None:
    """Refuse to resume a run of another recipe, which lies beside its checkpoints.

    Args:
        path: of the run's ``recipe.json``; a run that is new has none.
        now: :func:`recipe_record` of the recipe asked for.

    Raises:
        ValueError: names the fields that differ, or says that the file is no recipe.
    """
    if not path.exists():
        return
    found = read_json(path, "recipe")
    if not isinstance(found, dict) or not found or not found.keys() <= now.keys():
        raise ValueError(
            f"{path} is not the recipe of a training run: set out to another directory"
        )
    # An older run has the defaults of newer fields.
    defaults = json.loads(json.dumps(dataclasses.asdict(TrainConfig())))
    chosen = {"optimizer": "", "schedule": "", "loss": ""}
    before = defaults | {"data_sha256": now["data_sha256"]} | chosen | found
    may_change = {
        "out", "data", "cache", "cache_gb", "eval_every", "checkpoint_every", "log_every",
        "data_parallel", "fsdp", "tensor_parallel", "micro_batches", "kernels",
    }  # fmt: skip
    differ = [k for k in now if k not in may_change and before[k] != now[k]]
    if differ:
        changes = ", ".join(f"{k}: {before[k]!r} -> {now[k]!r}" for k in differ)
        raise ValueError(
            f"{path.parent} holds a run of another recipe ({changes}): "
            "set another out, or restore these values"
        )


def check_finite(
    when: str,
    values: dict[str, Any],
    sequences: Sequence[TokenSequence],
    plans: Iterator[tuple[int, list[int]]],
    remedy: str,
) -> None:
    """Stop a run whose numbers are lost.

    A gradient that is not finite ruins the weights even where the loss still is.

    Args:
        when: the step, and what in it.
        values: the metrics of a batch.
        sequences: of which the batch was made.
        plans: which of them these were comes first; only looked at where something is wrong.
        remedy: what is left.

    Raises:
        FloatingPointError: names the step, the terms that are not finite, and the batch.
    """
    bad = [name for name, value in values.items() if not np.isfinite(value).all()]
    if bad:
        terms = ", ".join(f"{name} {values[name]}" for name in bad)
        _, indices = next(plans)
        raise FloatingPointError(
            f"{when} is not finite ({terms}) on the batch {origins(sequences, indices)}: {remedy}"
        )
