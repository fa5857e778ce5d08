"""Prompts of our own writing, for measurements without a network: ``own:math`` and others.

The files beside this one are public domain (CC0 1.0). They are small on purpose: published sets say
more of a drafter, and these say something at once.
"""

from __future__ import annotations

from pathlib import Path

PREFIX = "own:"
NAMES = ("math", "code", "chat")


def find(source: str) -> str:
    """The path of a file of prompts.

    Args:
        source: a path, which is given back, or ``own:`` and one of ``NAMES``.

    Raises:
        ValueError: there is no such set.

    >>> find("own:math").endswith("math.jsonl"), find("mine.jsonl")
    (True, 'mine.jsonl')
    """
    if not source.startswith(PREFIX):
        return source
    name = source.removeprefix(PREFIX)
    if name not in NAMES:
        raise ValueError(f"{source!r} is no set of prompts: known are {', '.join(NAMES)}")
    return str(Path(__file__).parent / f"{name}.jsonl")
