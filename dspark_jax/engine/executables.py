"""Compiled programs, shared by all engines of a process that ask for the same program and shapes.

On a CPU a program of 30 unrolled layers takes 600 to 1,100 memory mappings, and Linux gives a
process 65,530 of them unless ``vm.max_map_count`` says otherwise. Programs that were not used for
long are let go before half of these are taken; whoever needs one again gets it out of jax's
compilation cache.
"""

from __future__ import annotations

import gc
import itertools
import logging
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

logger = logging.getLogger(__name__)

Executable = Callable[..., Any]

SHARE = 0.45  # of the mappings of a process: the program to come must find room too
_MAPPINGS, _MOST = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")


class Program:
    """A program for arguments of one form, compiled when it is first asked for."""

    def __init__(self, make: Callable[..., Any], parts: tuple[Any, ...], args: Any) -> None:
        self._make, self._parts, self._args = make, parts, args
        self._executable: Executable | None = None
        self.used = 0

    @property
    def ready(self) -> bool:
        """Whether nobody has to wait for it."""
        return self._executable is not None

    def executable(self) -> Executable:
        """To be called with the arguments themselves."""
        self.used = next(_CLOCK)
        found = self._executable
        if found is None:
            with _LOCK:
                _make_room()
                found = self._make(*self._parts).lower(*self._args).compile()
                self._executable = found
        return found

    def forget(self) -> None:
        """Let go of the executable."""
        self._executable = None


_PROGRAMS: dict[Any, Program] = {}
_LOCK = threading.Lock()
_CLOCK = itertools.count(1)


def program_of(make: Callable[..., Any], parts: tuple[Any, ...], args: Any) -> Program:
    """The program ``make(*parts)``, a jitted function, for arguments like these.

    Args:
        make: a function of a module.
        parts: hashable.
        args: trees of ``jax.ShapeDtypeStruct``.
    """
    leaves, structure = jax.tree.flatten(args)
    key = make, parts, structure, tuple(leaves)
    return _PROGRAMS.setdefault(key, Program(make, parts, args))


def _make_room() -> None:
    """Let go of some executables where there are too many mappings."""
    if not (_MAPPINGS.exists() and _MOST.exists()):  # Linux alone has them
        return
    if _count_mappings() > SHARE * int(_MOST.read_text()):
        forget_programs(0.25)


def forget_programs(share: float) -> None:
    """Let go of a share of the executables, those unused for longest."""
    kept = sorted((one for one in _PROGRAMS.values() if one.ready), key=lambda one: one.used)
    old = kept[: math.ceil(share * len(kept))]
    for program in old:
        program.forget()
    gc.collect()
    logger.info("let go of %d of %d programs", len(old), len(kept))


def _count_mappings() -> int:
    with _MAPPINGS.open("rb") as lines:
        return sum(1 for _ in lines)
