"""Pictures of measurements."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from dspark_jax.engine.reader import RoundTrace
from dspark_jax.evaluation.compare import label_of
from dspark_jax.evaluation.results import format_rates

FATES = {
    "verified and kept": "#bfe3c6",
    "verified, dropped": "#f6c9bd",
    "not verified": "#e9e9e9",
    "drawn by the target": "#c5d8f2",
}


def draw_rounds(trace: Sequence[RoundTrace], word: Callable[[int], str]) -> Figure:
    """What became of the drafts of a text, one line a round that drafted.

    The number below a draft is its confidence, before calibration.

    Args:
        trace: of a result with ``trace=True``, of a drafter with blocks of one length.
        word: of a token.
    """
    rounds = [one for one in trace if one.draft_G is not None]
    size = max((len(one.draft_G) for one in rounds if one.draft_G is not None), default=1)
    figure = Figure(figsize=(1.3 * size + 2.5, 0.42 * len(rounds) + 1.1), layout="constrained")
    axes = figure.subplots()

    def cell(column: float, line: int, fate: str, token: int, note: str = "") -> None:
        place = (column - 0.46, line - 0.44)
        axes.add_patch(Rectangle(place, 0.92, 0.88, facecolor=FATES[fate], edgecolor="white"))
        text = word(token).replace("\n", "\\n").strip(" ").replace("$", "\\$") or "\u2423"
        lift = 0.12 if note else 0
        axes.text(column, line - lift, text, ha="center", va="center", fontsize=9)
        axes.text(
            column, line + 0.26, note, ha="center", va="center", fontsize=6.5, color="#555555"
        )

    kept, dropped, unread, drawn = FATES
    for line, one in enumerate(rounds):
        assert one.draft_G is not None
        for slot, token in enumerate(one.draft_G.tolist()):
            fate = kept if slot < one.accepted else dropped if slot < one.verified else unread
            note = ""
            if one.confidence_G is not None:
                note = f"{1 / (1 + math.exp(-float(one.confidence_G[slot]))):.2f}"
            cell(slot + 1, line, fate, token, note)
        if len(one.token_ids) > one.accepted:  # else a draft has ended the text
            cell(size + 1.3, line, drawn, one.token_ids[one.accepted])
    axes.set(xlim=(0.4, size + 1.9), ylim=(len(rounds) - 0.4, -0.6), ylabel="round")
    axes.set_xlabel("position in the block")
    slots = range(1, size + 1)
    axes.set_xticks([*slots, size + 1.3], [*map(str, slots), "the target's own"])
    axes.set_yticks(range(len(rounds)), [str(number + 1) for number in range(len(rounds))])
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    handles = [Patch(facecolor=colour, label=fate) for fate, colour in FATES.items()]
    figure.legend(handles=handles, ncols=4, loc="outside upper center", frameon=False, fontsize=8)
    return figure


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
