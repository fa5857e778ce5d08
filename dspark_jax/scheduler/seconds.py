"""Seconds of rounds, learnt from the rounds that an engine runs anyway.

Nobody waits for a measurement: an engine starts with what a profile says, or without knowing what
its rounds cost. Then it drafts as many whole blocks as a verdict needs, and decodes plainly until
it knows what plain rounds take. A round that was never seen is taken to cost what the dearest round
that does no more costs, which it cannot undercut: so whatever might pay is tried, for as many
rounds as a verdict needs, and judged by what it took. What was slow by chance costs no more than
rounds that do more, or it would never be tried again.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Mapping

from dspark_jax.scheduler.budget import RoundCosts
from dspark_jax.scheduler.choice import DELAY
from dspark_jax.scheduler.shape import Shape, Sizes, holds

WINDOW = 16  # recent rounds of a size, whose lower quartile counts
ENOUGH = 3  # of them, for a verdict


class Seconds:
    """Takes the time of rounds and says what the next ones will cost.

    Condition (e) of a lossless schedule (``schedule.py``) is kept for times as for confidences: the
    costs of a round come from rounds that are `DELAY` old, by their number.
    """

    def __init__(self, before_s: Mapping[Shape, float]) -> None:
        """Start with the seconds of earlier engines, which those of this one replace."""
        self._before_s = dict(before_s)
        self._recent: defaultdict[Shape, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._waiting: deque[tuple[int, Shape, float]] = deque()
        self._last_s = 0.0

    def read(self, number: int, shape: Shape, steady: bool, now_s: float | None = None) -> None:
        """A round has been read just now.

        Args:
            number: of the round.
            shape: its size.
            steady: it was launched before the one before it was read, its program was ready, and
                it did nothing but decode: so that the time since then is its own.
            now_s: seconds of a monotonic clock.
        """
        now_s = time.perf_counter() if now_s is None else now_s
        seconds, self._last_s = now_s - self._last_s, now_s
        if steady:
            self._waiting.append((number, shape, seconds))

    def costs(
        self, number: int, sizes: Sizes, rows: tuple[int, ...], num_draft: int, num_shards: int = 1
    ) -> RoundCosts | None:
        """The costs that round ``number`` chooses among.

        Args:
            number: of the round that is planned.
            sizes: of the state.
            rows: of a data shard, ascending, that a round with drafts may have.
            num_draft: drafts of a block.
            num_shards: data shards, whose rows count together.

        Returns:
            The seconds of whole rounds, that of the draft among them; None while those of plain
            rounds are not known.
        """
        self._take_in(number)
        seen_s = self.known_s()
        plain = Shape(sizes, 0, sizes.slots, 0)
        if plain not in seen_s:
            return None
        known_s = {
            shape: min(s for other, s in seen_s.items() if holds(other, shape)) for shape in seen_s
        }
        drafted = [Shape(sizes, num_draft, count, 0) for count in rows]
        return RoundCosts(
            buckets=tuple(num_shards * count for count in rows),
            verify_s_K=tuple(
                max(s for other, s in known_s.items() if holds(shape, other)) for shape in drafted
            ),
            draft_s=0.0,
            undrafted_s=known_s[plain],
        )

    def chunks_within(
        self, number: int, sizes: Sizes, counts: tuple[int, ...], limit_s: float
    ) -> tuple[int, ...]:
        """How many pieces of prompts a round may read without taking longer than a limit.

        What a number costs that was never seen follows from those below it, as if every piece cost
        the same; where none was seen, all may be tried.

        Args:
            number: of the round that is planned.
            sizes: of the state.
            counts: ascending numbers of pieces.
            limit_s: seconds.

        Returns:
            Those numbers; the first in any case, or prompts would never be read.
        """
        self._take_in(number)
        dearest_s: dict[int, float] = {}
        for shape, seconds in self.known_s().items():
            if shape.sizes == sizes:
                dearest_s[shape.num_chunks] = max(seconds, dearest_s.get(shape.num_chunks, 0.0))
        plain_s = dearest_s.pop(0, 0.0)

        def expected_s(count: int) -> float:
            seen = max((known for known in dearest_s if known <= count), default=0)
            return plain_s + (dearest_s[seen] - plain_s) * count / seen if seen else 0.0

        return (counts[0], *(count for count in counts[1:] if expected_s(count) <= limit_s))

    def _take_in(self, number: int) -> None:
        """The rounds that count for the choices of a round."""
        while self._waiting and self._waiting[0][0] <= number - DELAY:
            _, shape, seconds = self._waiting.popleft()
            self._recent[shape].append(seconds)

    def known_s(self) -> dict[Shape, float]:
        """Lower quartile of the seconds of the rounds of every size that is known."""
        recent_s = {
            shape: sorted(recent)[len(recent) // 4]  # others on the machine only ever add
            for shape, recent in self._recent.items()
            if len(recent) >= ENOUGH
        }
        return self._before_s | recent_s
