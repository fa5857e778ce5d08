"""The file of calibrated temperatures beside a drafter, one table for each way of sampling.

The confidence head is trained on the acceptance of sampled drafts at temperature 1. Greedy decoding
accepts by equality, and coupled acceptance accepts less, so that a table belongs to (acceptance,
sampling temperature); the nearest is used, and it says which one it is.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.files import read_json, write_atomically

FILE_NAME = "calibration.json"
FORMAT = 1
ACCEPTANCES = ("rejection", "coupled")


@dataclass(frozen=True)
class CalibrationTable:
    """Temperatures of the confidences under one way of sampling.

    Attributes:
        acceptance: ``"rejection"`` or ``"coupled"``.
        sampling_temperature: of target and drafter; 0 is greedy.
        confidence_temperatures: t_k of every slot (``temperatures.fit_temperatures``).
    """

    acceptance: str
    sampling_temperature: float
    confidence_temperatures: tuple[float, ...]

    def __str__(self) -> str:
        """The key, for people."""
        return f"{self.acceptance}, temperature {self.sampling_temperature:g}"


@dataclass(frozen=True)
class Calibration:
    """All tables of a drafter."""

    tables: tuple[CalibrationTable, ...]

    def nearest(self, acceptance: str, sampling_temperature: float) -> CalibrationTable:
        """The table whose key is closest: the acceptance first, then the temperature.

        At temperature 0 both acceptances are the same, and their tables serve either.
        """

        def distance(table: CalibrationTable) -> tuple[bool, float, float]:
            greedy = sampling_temperature == table.sampling_temperature == 0
            other = table.acceptance != acceptance and not greedy
            gap = abs(table.sampling_temperature - sampling_temperature)
            return other, gap, table.sampling_temperature

        return min(self.tables, key=distance)


def confidence_temperatures(
    calibration: Calibration | None, acceptance: str, sampling_temperature: float, block_size: int
) -> np.ndarray:
    """float32 [G]: the temperatures of a request's confidences; ones without a calibration."""
    if calibration is None:
        return np.ones(block_size, np.float32)
    table = calibration.nearest(acceptance, sampling_temperature)
    return np.array(table.confidence_temperatures, np.float32)


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write the tables, atomically."""
    content = {"format": FORMAT, **dataclasses.asdict(calibration)}
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def read_calibration(path: Path, block_size: int) -> Calibration:
    """The tables of a drafter.

    Args:
        path: ``FILE_NAME`` in the drafter's directory, usually.
        block_size: slots of its block, one temperature each.

    Raises:
        ValueError: the file is missing, damaged, or belongs to another block size; the message
            says what is wrong with which field.
    """
    content = read_json(path, "calibration")
    remedy = "write it anew with `dspark calibrate`"
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no calibration of format {FORMAT}: {remedy}")
    entries = content.get("tables")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: tables must be a list that is not empty: {remedy}")
    try:
        tables = tuple(_table(entry, block_size) for entry in entries)
    except ValueError as error:
        raise ValueError(f"{path}: {error}: {remedy}") from None
    keys = {(table.acceptance, table.sampling_temperature) for table in tables}
    if len(keys) < len(tables):
        raise ValueError(f"{path}: two tables have the same key: {remedy}")
    return Calibration(tables)


def _table(entry: Any, block_size: int) -> CalibrationTable:
    """A table from JSON; ValueError names the field that is wrong."""
    fields = {field.name for field in dataclasses.fields(CalibrationTable)}
    if not isinstance(entry, dict) or set(entry) != fields:
        raise ValueError(f"a table needs exactly {sorted(fields)}")
    if entry["acceptance"] not in ACCEPTANCES:
        raise ValueError(f"acceptance is {entry['acceptance']!r:.40}, not one of {ACCEPTANCES}")
    sampling = entry["sampling_temperature"]
    if not _is_finite(sampling) or sampling < 0:
        raise ValueError(f"sampling_temperature is {sampling!r:.40}, not a finite number >= 0")
    temperatures = entry["confidence_temperatures"]
    if not isinstance(temperatures, list) or len(temperatures) != block_size:
        raise ValueError(
            f"confidence_temperatures is not a list of {block_size}, one for each slot"
        )
    if not all(_is_finite(value) and value > 0 for value in temperatures):
        raise ValueError("confidence_temperatures are not all finite and positive")
    return CalibrationTable(
        entry["acceptance"], float(sampling), tuple(float(value) for value in temperatures)
    )


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return is_number and math.isfinite(value)
    except OverflowError:  # an integer beyond any float
        return False
