"""Pictures of measurements."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure


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


def draw_reliability(report: Mapping[str, Any]) -> Figure:
    """Accepted share against predicted survival, before and after calibration.

    One row a way of sampling, one panel a position.

    Args:
        report: of ``confidence.fit_calibration``.
    """
    tables = report["tables"]
    num_slots = len(tables[0]["confidence_temperatures"])
    size = (2.6 * num_slots, 2.8 * len(tables))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(tables), num_slots, squeeze=False, sharex=True, sharey=True)
    for row, table in zip(panels, tables, strict=True):
        key = f"{table['acceptance']}, {table['sampling_temperature']:g}"
        for slot, axes in enumerate(row):
            axes.plot([0, 1], [0, 1], color="grey", lw=0.8)
            for when, style in (("before", "o--"), ("after", "o-")):
                bins = table[when]["positions"][slot]["reliability"]
                predicted, accepted = (
                    [filled[name] for filled in bins] for name in ("predicted", "accepted")
                )
                axes.plot(predicted, accepted, style, ms=3, label=when)
            axes.set(title=f"{key}: position {slot + 1}", xlim=(0, 1), ylim=(0, 1))
            axes.grid(alpha=0.3)
        row[0].set_ylabel("accepted")
        row[0].legend(fontsize="small")
    for axes in panels[-1]:
        axes.set_xlabel("predicted")
    return figure
