"""Predicted against actual seconds of rounds, while the engine works."""

from __future__ import annotations

import logging
import statistics
import time
from collections import defaultdict, deque

from dspark_jax.scheduler.profile import REMEDY, Profile, describe
from dspark_jax.scheduler.shape import Shape

WINDOW = 64  # recent rounds of a size, whose median counts
TOLERANCE = 0.2  # of the predicted seconds

logger = logging.getLogger(__name__)


class Drift:
    """Takes the time of rounds, and compares it with a profile.

    The seconds of a size are logged after 64, 128, 256, ... rounds of it. The first time that the
    median of recent ones is off by more than `TOLERANCE`, a warning says so.
    """

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._recent: defaultdict[Shape, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._counts: defaultdict[Shape, int] = defaultdict(int)
        self._warned = False
        self._last_s = 0.0

    def read(self, shape: Shape, steady: bool, now_s: float | None = None) -> None:
        """A round has been read just now.

        Args:
            shape: its size.
            steady: it was launched before the one before it was read, and did nothing but decode:
                so that the time since then is its own.
            now_s: seconds of a monotonic clock.
        """
        now_s = time.perf_counter() if now_s is None else now_s
        seconds, self._last_s = now_s - self._last_s, now_s
        if not steady:
            return
        self._recent[shape].append(seconds)
        self._counts[shape] += 1
        if self._counts[shape] % WINDOW == 0:
            self._compare(shape)

    def actual_s(self) -> dict[Shape, float]:
        """Median seconds of the recent rounds of every size that was seen."""
        return {shape: statistics.median(recent) for shape, recent in self._recent.items()}

    def _compare(self, shape: Shape) -> None:
        predicted_s = self._profile.round_s[shape]
        actual_s, count = statistics.median(self._recent[shape]), self._counts[shape] // WINDOW
        said = (describe(shape), 1000 * predicted_s, 1000 * actual_s)
        if count & (count - 1) == 0:
            logger.info("rounds of %s: %.2f ms predicted, %.2f ms actual", *said)
        if abs(actual_s / predicted_s - 1) > TOLERANCE and not self._warned:
            self._warned = True
            logger.warning(
                "rounds of %s should take %.2f ms and take %.2f ms: the profile does not describe "
                "this machine any more, %s", *said, REMEDY,
            )  # fmt: skip
