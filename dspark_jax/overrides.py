"""Typed ``key=value`` overrides of frozen configurations."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Sequence
from typing import Literal, TypeVar

ConfigT = TypeVar("ConfigT")


def _convert(field: str, text: str, annotation: object) -> object:
    """``text`` as a value of the annotated type.

    Raises:
        ValueError: the text does not spell such a value.
    """
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        options = [a for a in typing.get_args(annotation) if a is not type(None)]
        return None if text.lower() == "none" else _convert(field, text, options[0])
    if origin is Literal:
        if text in typing.get_args(annotation):
            return text
        raise ValueError(f"{field}={text}: choose one of {', '.join(typing.get_args(annotation))}")
    if annotation is str:
        return text
    if annotation is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueError(f"{field}={text}: must be true or false")
    if origin is tuple and typing.get_args(annotation)[0] is str:
        return _strings(field, text)
    if origin is tuple:
        try:
            return tuple(int(part) for part in text.strip("()[] ").split(",") if part.strip())
        except ValueError:
            raise ValueError(f"{field}={text}: must be integers with commas") from None
    try:
        number = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        number = None
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise ValueError(f"{field}={text}: must be a number")
    if annotation is int and number != int(number):
        raise ValueError(f"{field}={text}: must be an integer")
    return int(number) if annotation is int else float(number)


def _strings(field: str, text: str) -> tuple[str, ...]:
    """Strings with commas between, or as a JSON list, where they have commas themselves."""
    if not text.startswith("["):
        return tuple(part for part in text.split(",") if part)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(part, str) for part in found):
        raise ValueError(f"{field}={text}: must be strings with commas, or a JSON list of strings")
    return tuple(found)


def override(config: ConfigT, settings: Sequence[str]) -> ConfigT:
    """A copy of a configuration with ``key=value`` settings applied.

    Raises:
        ValueError: a setting is not ``key=value``, names no field, or has a value of another type.
    """
    hints = typing.get_type_hints(type(config))
    changes: dict[str, object] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ValueError(f"setting {setting!r}: write it as key=value")
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f": known are {', '.join(hints)}"
            raise ValueError(f"unknown configuration key {key!r}{hint}")
        changes[key] = _convert(key, text, hints[key])
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]
