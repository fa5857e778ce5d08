"""A trace of what devices do in some of many turns, for XProf, TensorBoard or Perfetto."""

from __future__ import annotations

import logging
from pathlib import Path

import jax

logger = logging.getLogger(__name__)

SKIPPED = 3  # turns in which programs are compiled


class Trace:
    """Records some turns, steps of a training or rounds of an engine; a context manager that ends
    the recording."""

    def __init__(self, directory: str | Path, count: int, skip: int = SKIPPED) -> None:
        """Nothing is recorded yet.

        Args:
            directory: where the trace goes, in ``plugins/profile``.
            count: turns to record.
            skip: turns before them.
        """
        self.directory = Path(directory)
        self._first, self._end = skip, skip + count
        self._turns = 0
        self._open = False

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        if self._turns <= self._first:
            logger.warning(
                "there is no trace in %s: it was over after %d turns, and the first %d are left "
                "out, as programs are compiled in them",
                self.directory, self._turns, self._first,
            )  # fmt: skip

    def turn(self) -> None:
        """Say that a turn begins."""
        if self._turns == self._first:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # whose events are many and slow: devices are meant
            jax.profiler.start_trace(str(self.directory), profiler_options=options)
            self._open = True
        if self._turns == self._end:
            self._stop()
        self._turns += 1

    def _stop(self) -> None:
        if self._open:
            self._open = False
            jax.profiler.stop_trace()
            logger.info("a trace of %d turns is in %s", self._turns - self._first, self.directory)
