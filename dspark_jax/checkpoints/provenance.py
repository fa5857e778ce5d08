"""Where a drafter comes from: ``provenance.json`` beside its weights, and a model card for people.

A run of training writes the former with every drafter; exports hand it on. The card, ``README.md``,
is made of it: target, data, recipe and figures, in the form that model hubs show. Paths of the
machine that trained are left out of both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dspark_jax import __version__
from dspark_jax.checkpoints.default import HUB_ID
from dspark_jax.checkpoints.tensors import LoadError, read_json
from dspark_jax.files import write_atomically

FILE_NAME, CARD = "provenance.json", "README.md"
RECIPE, METRICS = "recipe.json", "metrics.jsonl"  # of a run
PLACES = ("out", "cache")  # settings that say nothing of a drafter
# What a card says of the splits of a log; batches that were trained on say little of a drafter.
SPLITS = {
    "held-out": "held-out answers, expected at temperature 1",
    "decoded": "prompts, decoded",
}


def provenance_of(run: Path, step: int) -> dict[str, Any]:
    """Where the drafter of a run after some steps comes from, as JSON values.

    Args:
        run: its directory.
        step: how many; the figures are the last that its log has up to there.

    Returns:
        ``version`` of this package, ``step``, ``target``, ``data`` and ``data_sha256``, ``recipe``
        (all settings, and what was in the place of optimiser, schedule and loss) and ``figures`` by
        the splits of the log.
    """
    recipe = dict(read_json(run / RECIPE))
    for name in PLACES:
        recipe.pop(name, None)
    digest, target = recipe.pop("data_sha256", ""), str(recipe.get("target", ""))
    for name in ("target", "data", "init_drafter"):
        recipe[name] = _public(str(recipe.get(name, "")))
    figures: dict[str, Any] = {}
    path = run / METRICS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for row in map(json.loads, lines):
        if row["step"] <= step:
            figures[row.pop("split", "training")] = row
    return {
        "version": __version__,
        "step": step,
        "target": _public(target),
        "data": recipe["data"],
        "data_sha256": digest,
        "recipe": recipe,
        "figures": figures,
    }


def _public(source: str) -> str:
    """A hub id as it is, the last part of a path."""
    if source == "default":
        return HUB_ID
    is_id = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not Path(source).exists()
    return source if is_id else Path(source).name


def write_provenance(directory: Path, provenance: Mapping[str, Any]) -> None:
    """Write ``provenance.json`` beside a drafter's weights."""
    write_atomically(directory / FILE_NAME, json.dumps(provenance, indent=2) + "\n")


def read_provenance(directory: Path) -> dict[str, Any]:
    """What a drafter's directory says of where it comes from; empty where it says nothing.

    Raises:
        LoadError: the file is not of its form.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        return {}
    found = read_json(path)
    parts = [found] if isinstance(found, dict) else []
    parts += [found.get(name, {}) for found in parts for name in ("recipe", "figures")]
    if len(parts) != 3 or not all(isinstance(part, dict) for part in parts):
        raise LoadError(f"{path} is not the provenance of a drafter: remove it")
    return dict(found)


def write_card(
    directory: Path,
    provenance: Mapping[str, Any],
    trained_for: Mapping[str, str],
    layout: str,
    acceptance_G: Sequence[float] = (),
) -> None:
    """Write a model card.

    Args:
        directory: of the drafter, whose name the card has.
        provenance: of :func:`read_provenance`; empty where nobody knows.
        trained_for: what its ``config.json`` says of its target; empty for nothing.
        layout: of the checkpoint.
        acceptance_G: teacher-forced acceptance by position on the answers that exports are checked
            with; empty where it was not measured.
    """
    target = _line(provenance.get("target") or trained_for.get("target") or "an unnamed target")
    recipe, figures = provenance.get("recipe", {}), provenance.get("figures", {})
    head = ["---", "library_name: dspark-jax", "tags:", "- speculative-decoding"]
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", target):
        head.append(f"base_model: {target}")
    lines = [*head, "---", "", f"# {directory.name}", ""]
    lines += [
        f"A drafter for {target}, in the layout `{layout}`. Its drafts are verified by the target: "
        "texts are the target's own, whatever the drafter. With dspark-jax:",
        "",
        "```sh",
        f'dspark generate --target TARGET --drafter {directory.name} "Why is the sky blue?"',
        "```",
        "",
        "## Where it comes from",
        "",
    ]
    rows = {
        "target": target,
        **{f"digest of its {k}": v for k, v in trained_for.items() if k != "target"},
        "data": provenance.get("data"),
        "SHA-256 of the data": provenance.get("data_sha256"),
        "steps of training": provenance.get("step"),
        "dspark-jax": provenance.get("version"),
    }
    lines += _table(("what", "value"), [(k, v) for k, v in rows.items() if v or v == 0])
    if not provenance:
        lines += ["", "How it was trained is not recorded."]
    numbers = [
        (words, row.get("step"), name, value)
        for split, words in SPLITS.items()
        if isinstance(row := figures.get(split), dict)
        for name, value in row.items()
        if name != "step"
    ]
    if acceptance_G:
        rates = [round(float(rate), 4) for rate in acceptance_G]
        numbers.append(("answers of the self-check", "", "acceptance by position", rates))
    if numbers:
        lines += ["", "## Figures", "", *_table(("on", "step", "figure", "value"), numbers)]
        lines += [
            "",
            "Lengths are tokens of a round, the target's own counted. Expected ones come from the "
            "two distributions behind true tokens; decoded ones from texts, greedily (temperature "
            "0) and sampled (temperature 1).",
        ]
    if recipe:
        words = json.dumps(recipe, indent=2).replace("```", "'''")
        lines += ["", "## Recipe", "", "```json", words, "```"]
    write_atomically(directory / CARD, "\n".join(lines) + "\n")


def _line(value: Any) -> str:
    """A value as it may stand in a line of text, a cell of a table."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A table in Markdown."""
    cells = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(_line, row)) + " |" for row in cells]
