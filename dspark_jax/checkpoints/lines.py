"""Files with a JSON value a line, as people have them, and what becomes of lines that are bad.

Read alike: UTF-8 with and without a byte-order mark, UTF-16 and UTF-32 with one, either kind of
line end, a comma behind a line, and a file that is one list of all the values. A line that is bad
is refused where every line counts (:func:`json_lines`), and left out, counted and said where some
may be missing (:func:`every_line` and :func:`account_for`).
"""

from __future__ import annotations

import codecs
import io
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

MOST_BAD = 0.1  # share of a file's lines that may be left out; one line always may
TOLD_KINDS, TOLD_PLACES = 5, 5

UNPACK = "unpack it first"
EXPORT = "write its rows as JSON, one object a line"
# How files begin that are no text: what they are, and what to do with them.
MAGIC = {
    b"\x1f\x8b": ("gzip", UNPACK),
    b"PK\x03\x04": ("zip", UNPACK),
    b"BZh": ("bzip2", UNPACK),
    b"\xfd7zXZ": ("xz", UNPACK),
    b"\x28\xb5\x2f\xfd": ("Zstandard", UNPACK),
    b"PAR1": ("Parquet", EXPORT),
    b"ARROW1": ("Arrow", EXPORT),
    b"SQLite format 3": ("SQLite", EXPORT),
}
# Longest first: the mark of UTF-32 begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True)
class Line:
    """One line that is not blank.

    Attributes:
        origin: where it was read, ``FILE:LINE``; of a file that is one list, the place in it.
        value: what it says.
        problem: why it says nothing; empty where it does.
    """

    origin: str
    value: Any = None
    problem: str = ""


def json_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Where it was read (``FILE:LINE``) and value of every line of a file; blank ones are skipped.

    Raises:
        ValueError: the file cannot be read, or a line is not JSON.
    """
    for line in every_line(path):
        if line.problem:
            raise ValueError(f"{line.origin}: {line.problem}")
        yield line.origin, line.value


def every_line(path: str | Path) -> Iterator[Line]:
    """The lines of a file, good and bad; blank ones are skipped.

    Raises:
        ValueError: the file cannot be read, or is no text; the message says what to do.
    """
    data = _read(path)
    values = _listed(data)
    if values is not None:
        yield from (Line(f"{path}:{place}", value) for place, value in enumerate(values, 1))
        return
    # Brackets on lines of their own: a list with a value a line, damaged somewhere.
    blank = (b"", codecs.BOM_UTF8, *((b"[", b"]") if _first(data) == b"[" else ()))
    # At line feeds alone: text is also cut at separators that JSON allows inside a string.
    for number, text in enumerate(io.BytesIO(data), 1):
        if text.strip() not in blank:
            yield Line(f"{path}:{number}", *_parse(text.strip().removesuffix(b",")))


def account_for(bad: Sequence[tuple[str, str]], total: int) -> None:
    """Say what was left out of a file.

    Args:
        bad: where each line was read (``FILE:LINE``), and what is wrong with it.
        total: lines of the file, good and bad.

    Raises:
        ValueError: that is more than a tenth of them (and more than one), or all.
    """
    if not bad:
        return
    kinds: dict[str, list[str]] = {}
    for origin, problem in bad:
        kinds.setdefault(problem, []).append(origin.rpartition(":")[2])
    frequent = sorted(kinds.items(), key=lambda kind: -len(kind[1]))[:TOLD_KINDS]
    told = "; ".join(f"{problem} ({places_of(places)})" for problem, places in frequent)
    if len(kinds) > TOLD_KINDS:
        told += "; and other reasons"
    path = bad[0][0].rpartition(":")[0]
    if len(bad) == total or 1 < len(bad) > MOST_BAD * total:
        raise ValueError(
            f"{path}: {len(bad)} of {total} lines cannot be used, and at most a tenth may be left "
            f"out: {told}"
        )
    logger.warning("%s: %d of %d lines left out: %s", path, len(bad), total, told)


def places_of(places: Sequence[str]) -> str:
    """Numbers of lines in words, the first few of them."""
    more = f" and {len(places) - TOLD_PLACES} more" * (len(places) > TOLD_PLACES)
    return f"line{'s' * (len(places) > 1)} {', '.join(places[:TOLD_PLACES])}{more}"


def _read(path: str | Path) -> bytes:
    """The bytes of a text file, as UTF-8 wherever they are text."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; name a JSON-lines file") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not readable ({error})") from None
    for start, (kind, remedy) in MAGIC.items():
        if data.startswith(start):
            raise ValueError(f"{path}: a {kind} file, and not JSON lines: {remedy}")
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            try:
                return data.decode(encoding).encode()
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path}: begins as {encoding.upper()} and goes on as something else "
                    f"({error.reason} at byte {error.start}): save it as UTF-8"
                ) from None
    return data


def _first(data: bytes) -> bytes:
    """The first line that is not blank."""
    texts = (line.removeprefix(codecs.BOM_UTF8).strip() for line in io.BytesIO(data))
    return next(filter(None, texts), b"")


def _listed(data: bytes) -> list[Any] | None:
    """The values of a file that is one value: a list, or an object over several lines."""
    if isinstance(_parse(_first(data).removesuffix(b","))[0], dict):
        return None
    whole, _ = _parse(data)
    return whole if isinstance(whole, list) else [whole] if isinstance(whole, dict) else None


def _parse(text: bytes) -> tuple[Any, str]:
    """The value of a text and "", or None and what is wrong."""
    try:
        return json.loads(text.decode("utf-8-sig")), ""
    except UnicodeDecodeError as error:
        return None, f"not UTF-8 (byte {error.object[error.start]:#04x})"
    except json.JSONDecodeError as error:
        return None, f"not JSON ({error.msg})"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON ({error})"
