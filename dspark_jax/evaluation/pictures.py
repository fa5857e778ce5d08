"""Pictures of measurements, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dspark_jax.checkpoint import write_atomically


def write_picture(figure: Figure, path: Path) -> None:
    """A figure as a PNG file, written atomically."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    write_atomically(path, content.getvalue())


def draw_load(report: Mapping[str, Any]) -> Figure:
    """Throughput against interactivity, and verification length against concurrency.

    The paper's figures 7 and 8: one line a policy, one point a concurrency.

    Args:
        report: of ``load.bench_load``.
    """
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    speed, length = figure.subplots(1, 2)
    for name in dict.fromkeys(row["policy"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["policy"] == name]
        clients, user, total, verified = (
            [row[key] for row in rows]
            for key in ("concurrency", "tokens_per_s_user", "tokens_per_s", "verification_length")
        )
        speed.plot(user, total, "o-", ms=3, label=name)
        length.plot(clients, verified, "o-", ms=3, label=name)
    speed.set(xlabel="tokens/s of a user", ylabel="tokens/s of all", title="throughput")
    length.set(xlabel="clients", ylabel="verified drafts a round", title="verification length")
    length.set_xscale("log", base=2)
    for axes in (speed, length):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure
