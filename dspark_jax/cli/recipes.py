"""Recipes by their names, and what their settings mean. Imports nothing that takes time."""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
# An installed package has the recipes inside; in a checkout they lie beside it.
FOLDERS = (PACKAGE / "recipes", PACKAGE.parent / "configs")
WIDTH = 96


def recipes() -> dict[str, Path]:
    """The files of the recipes by their names, in order."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.py"))}


def recipe_file(word: str) -> Path:
    """The file that a recipe's name or path stands for.

    Raises:
        ValueError: there is none.
    """
    if Path(word).is_file():
        return Path(word)
    known = recipes()
    if word in known:
        return known[word]
    raise ValueError(
        f"{word}: no such file and no such recipe; dspark train --list says which there are"
    )


def recipe_list() -> str:
    """The names of the recipes, each with the first line of its file."""
    known = recipes()
    width = max(map(len, known), default=0)
    lines = [f"{name:<{width}}  {_first_line(path)}" for name, path in known.items()]
    return "\n".join(lines)


def _first_line(path: Path) -> str:
    document = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return document.partition("\n")[0]


def settings() -> list[tuple[dict[str, str], str]]:
    """The settings of a recipe as ``TrainConfig`` documents them: groups of fields with their
    defaults, and what each group means."""
    source = (PACKAGE / "config.py").read_text(encoding="utf-8")
    (found,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "TrainConfig"
    )
    defaults = {
        node.target.id: ast.unparse(node.value)
        for node in found.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value
    }
    document = inspect.cleandoc(ast.get_docstring(found) or "")
    groups: list[str] = []
    attributes = document.partition("Attributes:\n")[2].partition("\n\n")[0]
    for line in attributes.splitlines():
        if line.startswith(" " * 5):
            groups[-1] += f" {line.strip()}"
        else:
            groups.append(line.strip())
    split = (group.partition(": ") for group in groups)
    return [
        ({name: defaults[name] for name in names.split(", ")}, text.replace("``", ""))
        for names, _, text in split
    ]


def settings_help() -> str:
    """The settings of a recipe, for ``--help``."""
    lines = ["settings (--set NAME=VALUE), with their defaults:"]
    for defaults, text in settings():
        words = " ".join(f"{name}={value}" for name, value in defaults.items())
        lines += textwrap.wrap(words, WIDTH, initial_indent="  ", subsequent_indent="  ")
        lines += textwrap.wrap(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)
