"""A picture of a run: what ``metrics.jsonl`` says, as ``curves.png``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dspark_jax.files import write_atomically
from dspark_jax.training.records import read_metrics

PANELS = (
    ("loss", "loss"),
    ("accepted_length", "accepted length: expected at temperature 1, and decoded"),
    ("accept_rate", "acceptance by position"),
    ("confidence_abs_error", "confidence, absolute error"),
)


def draw_curves(metrics: Path, picture: Path) -> None:
    """Losses and acceptance over the steps, training and held-out, and lengths that were decoded;
    written atomically.

    Args:
        metrics: the log of a run.
        picture: PNG file to write.
    """
    rows = read_metrics(metrics)
    figure = Figure(figsize=(11, 7), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        drawn = [("training", key, "-"), ("held-out", key, "o--")]
        if key == "accepted_length":
            drawn += [("decoded", f"decoded_length_{kind}", "s:") for kind in ("greedy", "sampled")]
        for split, name, style in drawn:
            seen = [row for row in rows if row.get("split", "training") == split and name in row]
            for label, values in _lines(seen, name):
                label = name.replace("_length", "") if split == "decoded" else f"{split}{label}"
                axes.plot([row["step"] for row in seen], values, style, ms=3, label=label)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    write_picture(figure, picture)


def write_picture(figure: Figure, path: Path) -> None:
    """A figure as a PNG file, written atomically."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_atomically(path, content.getvalue())


def _lines(rows: list[dict[str, Any]], key: str) -> list[tuple[str, list[float]]]:
    """(label, values) of a number, or of each entry of a list."""
    if not rows or not isinstance(rows[0][key], list):
        return [("", [row[key] for row in rows])]
    return [
        (f" {place + 1}", [row[key][place] for row in rows]) for place in range(len(rows[0][key]))
    ]
