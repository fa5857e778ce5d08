"""Pictures of measurements."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from typing import Any

from matplotlib.figure import Figure

from dspark_jax.evaluation.compare import label_of
from dspark_jax.evaluation.results import format_rates


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


def draw_compare(report: Mapping[str, Any]) -> Figure:
    """Speedups by category with their intervals; a panel for each temperature and load.

    Args:
        report: of ``compare.bench_compare``.
    """
    rows, drafters = report["rows"], list(report["drafters"])
    settings = list(dict.fromkeys((row["temperature"], row["concurrency"]) for row in rows))
    categories = list(dict.fromkeys(row["category"] for row in rows))
    size = (2.5 + 0.9 * len(categories), 3.2 * len(settings))
    figure = Figure(figsize=size, layout="constrained")
    width = 0.8 / len(drafters)
    for axes, setting in zip(figure.subplots(len(settings), 1, squeeze=False)[:, 0], settings,
                             strict=True):  # fmt: skip
        for number, name in enumerate(drafters):
            found = {
                row["category"]: row
                for row in rows
                if (row["temperature"], row["concurrency"], row["drafter"]) == (*setting, name)
            }
            own = [found[category] for category in categories]
            middle, low, high = (
                [row[key] for row in own] for key in ("speedup", "speedup_low", "speedup_high")
            )
            errors = [
                [m - x for m, x in zip(middle, low, strict=True)],
                [x - m for m, x in zip(middle, high, strict=True)],
            ]
            places = [at + (number + 0.5) * width - 0.4 for at in range(len(categories))]
            axes.bar(places, middle, width, yerr=errors, capsize=2, label=name)
        axes.axhline(1, color="grey", lw=0.8)
        axes.set_xticks(range(len(categories)), categories, rotation=20, ha="right")
        axes.set_ylabel("speedup over plain decoding")
        axes.set_title(f"temperature {setting[0]:g}, {setting[1]} at once")
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3, axis="y")
    if label_of(report):
        figure.suptitle(label_of(report))
    return figure


COLUMNS = {
    "drafter": "drafter",
    "category": "category",
    "temperature": "temperature",
    "concurrency": "at once",
    "speedup": "speedup",
    "speedup_low": "from",
    "speedup_high": "to",
    "accepted_length": "accepted length",
    "draft_share": "draft share",
    "rows_per_token": "rows a token",
    "same_text": "same text",
}


def compare_page(report: Mapping[str, Any]) -> str:
    """A comparison as one page of HTML that needs nothing else.

    Args:
        report: of ``compare.bench_compare``, with the ``source`` of each drafter.
    """
    picture = io.BytesIO()
    draw_compare(report).savefig(picture, format="png", dpi=120)
    image = base64.b64encode(picture.getvalue()).decode()
    about = f"{report['target']} on {report['device']}, jax {report['jax']}"
    facts = [
        f"{name}: {drafter['source']}, {drafter['parameters']:,} parameters"
        for name, drafter in report["drafters"].items()
    ]
    head = "".join(f"<th>{title}</th>" for title in (*COLUMNS.values(), "accepted by position"))
    lines = []
    for row in report["rows"]:
        cells = ["-" if row[key] is None else str(row[key]) for key in COLUMNS]
        cells.append(format_rates(row["accept_rate_by_position"]))
        lines.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    table = "\n".join(lines)
    items = "".join(f"<li>{escape(fact)}</li>" for fact in facts)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Drafters compared</title>
<style>
body {{ font-family: sans-serif; margin: 2em; }}
table {{ border-collapse: collapse; }}
th, td {{ border: 1px solid #999; padding: 0.2em 0.6em; text-align: left; }}
</style>
<h1>Drafters compared</h1>
<p>{escape(about)}; {report["turns"]} turns, {report["max_new_tokens"]} new tokens each</p>
<p><strong>{escape(label_of(report))}</strong></p>
<ul>{items}</ul>
<img alt="speedup by category and drafter" src="data:image/png;base64,{image}">
<table>
<tr>{head}</tr>
{table}
</table>
</html>
"""
