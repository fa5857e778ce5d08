"""Files: JSON as it comes, and writing that leaves the whole of a file or what was there before."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class SaveError(OSError):
    """What a training has reached could not be written."""


# How files begin that are often found in another's place -> what they are, and the remedy.
FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer, not the file: fetch it with `git lfs pull`",
    b"<!DOCTYPE": "an HTML page: download the file itself",
    b"<!doctype": "an HTML page: download the file itself",
    b"<html": "an HTML page: download the file itself",
    b"GGUF": "a GGUF file: name it FILE.gguf, and the file instead of its directory",
    b"PK\x03\x04": "a zip archive, as pickled weights are: convert it to safetensors",
}


def foreign(path: str | Path) -> str:
    """What a file is that is not what its name says, for a message; empty where nobody knows.

    Raises:
        OSError: it cannot be read.
    """
    with Path(path).open("rb") as file:
        start = file.read(max(map(len, FOREIGN)))
    return next((what for magic, what in FOREIGN.items() if start.startswith(magic)), "")


def absent(path: str | Path) -> str:
    """Why a path is no file, for a message."""
    if Path(path).is_symlink():
        return f"a link to {Path(path).readlink()}, which is not there"
    return "a directory, not a file" if Path(path).is_dir() else "no such file"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) so that a reader, or a crash, never sees half of it.

    Raises:
        OSError: it cannot be written; what was there before stays, and nothing else is left.
    """
    write_together({path: content})


def write_together(contents: Mapping[Path, str | bytes]) -> None:
    """Write files that belong together, in this order, once there is room for all of them.

    Raises:
        OSError: as for :func:`write_atomically`.
    """
    mark = uuid.uuid4().hex[:8]  # others may write the same files
    parts = {path: path.with_name(f".{path.name}.{mark}.part") for path in contents}
    path = next(iter(contents))
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            parts[path].write_bytes(content.encode() if isinstance(content, str) else content)
        for path, part in parts.items():
            part.replace(path)
    except OSError as error:  # which does not name the file when a disk is full
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        for part in parts.values():
            with contextlib.suppress(OSError):  # renamed, or never made
                part.unlink()


def read_json(path: str | Path, what: str = "") -> Any:
    """The value in a JSON file, in UTF-8, -16 or -32, with or without a byte order mark.

    Raises:
        ValueError: the file is missing or is not JSON; the message names it and ``what`` it is.
    """
    name = f"{what} {path}" if what else str(path)
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{name} does not exist") from None
    except RecursionError:
        raise ValueError(f"{name} is not readable JSON: it is nested too deeply") from None
    except OSError as error:
        raise ValueError(f"{name} is not readable: {error.strerror or error}") from None
    except ValueError as error:
        reason = foreign(path)
        raise ValueError(
            f"{name} is {reason}" if reason else f"{name} is not readable JSON: {error}"
        ) from None
