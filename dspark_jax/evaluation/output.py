"""An output that outlives its process: JSON lines with an ``id``, appended whole, in any order.

A crash can only tear the last line. Beside the output lies the recipe that all of its lines were
made by, and while processes share the work, their parts ``OUT.part-I-of-N``.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dspark_jax.files import read_json, write_atomically


def check_recipe(out: Path, recipe: dict[str, Any]) -> None:
    """Refuse to go on in the output of another recipe; a new output notes its own.

    Raises:
        ValueError: names the fields that differ.
    """
    path = out.with_name(f"{out.name}.recipe.json")
    if not path.exists():
        if out.exists():
            raise ValueError(f"{out} exists, and has no {path.name}: choose another output")
        write_atomically(path, json.dumps(recipe, indent=2) + "\n")
        return
    found = read_json(path, "recipe")
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not the recipe of an output: choose another output")
    differ = [key for key in {**recipe, **found} if recipe.get(key) != found.get(key)]
    if differ:
        changes = ", ".join(f"{key}: {found.get(key)!r} -> {recipe.get(key)!r}" for key in differ)
        raise ValueError(
            f"{out} was made by another recipe ({changes}): choose another output, or restore "
            "these values"
        )


@contextmanager
def open_lines(path: Path) -> Iterator[tuple[BinaryIO, dict[int, bytes]]]:
    """A file to append to, without the line that a crash has torn, and its lines by their id.

    Raises:
        ValueError: another process is writing the file, or a line is not ours.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{path} is being written by another process: wait for it to end"
            ) from None
        lines, length = read_lines(path)
        file.truncate(length)
        yield file, lines


def read_lines(path: Path) -> tuple[dict[int, bytes], int]:
    """The whole lines of an output by their id, and their length in bytes.

    Raises:
        ValueError: a line is not one of ours.
    """
    data = path.read_bytes()
    length = data.rfind(b"\n") + 1
    lines: dict[int, bytes] = {}
    for number, line in enumerate(data[:length].splitlines(keepends=True), 1):
        try:
            key = json.loads(line)["id"]
        except (ValueError, KeyError, TypeError, RecursionError):
            key = None
        if type(key) is not int:
            raise ValueError(f"{path}:{number}: damaged; remove the line to have it made anew")
        lines.setdefault(key, line)
    return lines, length


def take_over_parts(out: Path, file: BinaryIO, lines: dict[int, bytes]) -> None:
    """Move the lines of all parts into the output; ``lines`` receives them too.

    Raises:
        ValueError: a process is still writing its part.
    """
    for part in sorted(out.parent.glob(f"{glob.escape(out.name)}.part-*-of-*")):
        with open_lines(part) as (_, found):
            fresh = {number: line for number, line in found.items() if number not in lines}
            lines.update(fresh)
            file.write(b"".join(fresh.values()))
            file.flush()
            os.fsync(file.fileno())
            part.unlink()
