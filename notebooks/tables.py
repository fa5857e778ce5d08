"""Tables of the site that are read from the code: settings, and the options of the command."""

import argparse
import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

import dspark_jax
from dspark_jax.cli.arguments import make_parser

FIELD = re.compile(r"^(\w+): (.*?)(?=^\w+: |\Z)", flags=re.MULTILINE | re.DOTALL)


def attributes(cls: type) -> dict[str, str]:
    """What the docstring of a class says of its attributes, each by its own name."""
    told: dict[str, str] = {}
    for part in cls.__mro__[:-1]:
        (_, _, section) = inspect.cleandoc(part.__doc__ or "").partition("\nAttributes:\n")
        section = inspect.cleandoc(section.split("\n\n", 1)[0])
        told |= {name: " ".join(text.split()) for name, text in FIELD.findall(section)}
    return told


def settings(cls: type) -> list[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each field.

    Raises:
        ValueError: the docstring misses a field, or tells of one that is not there.
    """
    told, fields = attributes(cls), cls.__dataclass_fields__.values()  # those of __init__ too
    odd = sorted(set(told) ^ {field.name for field in fields})
    if odd:
        raise ValueError(f"{cls.__qualname__}: fields and docstring differ in {', '.join(odd)}")
    return [
        (f"`{field.name}`", f"`{field.type}`", default_of(field), told[field.name])
        for field in fields
    ]


def default_of(field: dataclasses.Field) -> str:
    """As one would write it; nothing where it must be given."""
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    made = field.default_factory is not dataclasses.MISSING
    return f"`{field.default_factory()!r}`" if made else ""


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The commands that do something, in their order."""
    verbs = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for verb in verbs:
        for command in verb.choices.values():
            yield from commands(command)
    if not verbs:
        yield parser


def options(parser: argparse.ArgumentParser) -> list[tuple[str, str]]:
    """How each argument is written, and what its help says."""
    rows = []
    for action in parser._actions:
        value = action.metavar or "|".join(action.choices or ())
        written = [*action.option_strings[-1:], *([value] if action.nargs != 0 else [])]
        text = (action.help or "") % {**vars(action), "prog": parser.prog}
        rows.append((f"`{' '.join(written)}`", text if action.help else ""))
    return rows


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown; what stands in backquotes is code, all else plain text."""

    def cell(text: str) -> str:
        parts = re.split(r"(``.*?``|`[^`]*`)", text)
        parts[::2] = [re.sub(r"([\\*_<>\[\]$])", r"\\\1", part) for part in parts[::2]]
        return "".join(parts).replace("|", r"\|")

    lines = [head, ("---",) * len(head), *(tuple(map(cell, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Settings(SphinxDirective):
    """The fields of a configuration, ``{settings} module.Class``."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The table."""
        module, _, name = self.arguments[0].rpartition(".")
        cls = getattr(importlib.import_module(module), name)
        head = ("field", "type", "default", "meaning")
        return self.parse_text_to_nodes(table(head, settings(cls)))


class Options(SphinxDirective):
    """The options of every command, ``{options}``, each under a heading of its own."""

    def run(self) -> list[nodes.Node]:
        """Sections."""
        found = [
            f"## {command.prog}\n\n{command.description}\n\n"
            + table(("argument", "meaning"), options(command))
            for command in commands(make_parser(dspark_jax.__version__))
        ]
        return self.parse_text_to_nodes("\n\n".join(found), allow_section_headings=True)


def setup(app: Any) -> dict[str, Any]:
    """For Sphinx: the two directives."""
    app.add_directive("settings", Settings)
    app.add_directive("options", Options)
    return {"parallel_read_safe": True}
