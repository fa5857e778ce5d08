"""Bodies of requests: JSON of which every field is asked for by its name, or refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from dspark_jax.characters import check_characters, first_line
from dspark_jax.serving.errors import ApiError

MOST_LEVELS = 64  # of values inside each other

T = TypeVar("T")


def parse(raw: bytes) -> dict[str, Any]:
    """The object of a body.

    Raises:
        ApiError: it is none: no JSON, numbers that are none, names that are there twice, halves of
            characters, or more levels than anybody means.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_once,
            parse_constant=_no_number,
            parse_float=_finite,
        )
        _check(value, 0)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (at byte {error.start})") from None
    except RecursionError:
        raise ApiError(400, f"the body has more than {MOST_LEVELS} levels") from None
    except ValueError as error:  # of json and of the checks, numbers of too many digits too
        raise ApiError(
            400, f"the body is not JSON that is understood: {first_line(error)}"
        ) from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is no JSON object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r:.60} is there twice")
    return found


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text:.20} is too large")
    return value


def _check(value: Any, level: int) -> None:
    """Levels and characters."""
    if level > MOST_LEVELS:
        raise RecursionError
    if isinstance(value, str):
        check_characters("a text", value)
    elif isinstance(value, list):
        for one in value:
            _check(one, level + 1)
    elif isinstance(value, dict):
        for name, one in value.items():
            check_characters("a name", name)
            _check(one, level + 1)


class Fields:
    """Takes the fields of an object one by one; :meth:`end` refuses what nobody has taken."""

    def __init__(self, value: Any, where: str = "") -> None:
        """``where`` the object is within the body, for messages."""
        self.where = where
        if not isinstance(value, dict):
            raise ApiError(400, f"{where or 'the body'} is {value!r:.40}: give an object",
                           param=where or None)  # fmt: skip
        self._left = dict(value)

    def take(self, name: str, read: Callable[[Any], T], default: T) -> T:
        """The field's value as ``read`` has it; the default where it is missing or null."""
        value = self._left.pop(name, None)
        return default if value is None else self._read(name, read, value)

    def need(self, name: str, read: Callable[[Any], T]) -> T:
        """Likewise, of a field that must be there."""
        if self._left.get(name) is None:
            raise self.error(name, "is missing")
        return self._read(name, read, self._left.pop(name))

    def only(self, name: str, *values: Any) -> None:
        """A field that changes nothing, if it is null or one of these values."""
        value = self._left.pop(name, None)
        if value is not None and not any(_same(value, one) for one in values):
            known = " or ".join(json.dumps(one) for one in values)
            remedy = f": it must be {known}" if values else ": it is not supported, leave it out"
            raise self.error(name, f"is {value!r:.40}{remedy}")

    def end(self, known: Collection[str] = ()) -> None:
        """All have been taken.

        Args:
            known: of the interface, but not supported: fields that are null are none.
        """
        for name, value in self._left.items():
            if value is not None or name not in known:
                raise self.error(name, "is not supported: leave it out", "unsupported_parameter")

    def error(self, name: str, message: str, code: str | None = None) -> ApiError:
        """What is wrong with a field."""
        path = f"{self.where}.{name}" if self.where else name
        return ApiError(400, f"{path[:200]} {message}", param=path[:200], code=code)

    def _read(self, name: str, read: Callable[[Any], T], value: Any) -> T:
        try:
            return read(value)
        except ValueError as error:
            raise self.error(name, str(error)) from None


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(value == other)


def boolean(value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"is {value!r:.40}: give true or false")
    return value


def integer(value: Any) -> int:
    """A whole number."""
    if type(value) is not int:
        raise ValueError(f"is {value!r:.40}: give a whole number")
    return value


def between(low: int, high: int) -> Callable[[Any], int]:
    """A whole number of a range."""

    def read(value: Any) -> int:
        if not low <= integer(value) <= high:
            raise ValueError(f"is {value!r:.40}: give {low}..{high}")
        return int(value)

    return read


def number(value: Any) -> float:
    """A number."""
    if type(value) not in (int, float):
        raise ValueError(f"is {value!r:.40}: give a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"is {value!r:.40}: it is too large") from None


def text(value: Any) -> str:
    """A text."""
    if not isinstance(value, str):
        raise ValueError(f"is {value!r:.40}: give a text")
    return value


def some_object(value: Any) -> dict[str, Any]:
    """An object."""
    if not isinstance(value, dict):
        raise ValueError(f"is {value!r:.40}: give an object")
    return value


def some_list(value: Any) -> list[Any]:
    """A list with something in it."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"is {value!r:.40}: give a list that is not empty")
    return value
