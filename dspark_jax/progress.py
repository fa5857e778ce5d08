"""Progress of long work: a bar on a terminal and in a notebook, and lines of a log elsewhere."""

from __future__ import annotations

import io
import logging
import sys
import time
from typing import Any

from tqdm.auto import tqdm as tqdm_here
from tqdm.std import tqdm

logger = logging.getLogger(__name__)

LINE_S = 10.0  # between two lines of a log


class _Lines(tqdm):
    """Says how far it is in whole lines: seldom, and once at the end."""

    _said = 0, 0.0  # how far, and when

    def display(self, *_: Any, **__: Any) -> None:
        """One line, if one is due."""
        (done, said_s), now_s = self._said, time.monotonic()
        if self.n > done and (now_s - said_s > LINE_S or self.n == self.total):
            self._said = self.n, now_s
            logger.info("%s", self)


def progress(iterable: Any = None, **options: Any) -> Any:
    """A ``tqdm`` bar for where stderr goes; options are those of ``tqdm``."""
    if sys.stderr.isatty() or "ipykernel" in sys.modules:
        return tqdm_here(iterable, **{"dynamic_ncols": True, **options})
    return _Lines(iterable, **{"ncols": 80, "file": io.StringIO(), **options})
