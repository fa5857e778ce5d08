"""What an engine is doing, in numbers."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from dspark_jax.engine.inputs import RoundReport
from dspark_jax.scheduler.history import decided_drafts

WINDOW_S = 10.0  # of recent tokens


@dataclass(frozen=True)
class Stats:
    """An engine at a moment.

    Attributes:
        running: requests that have a slot.
        waiting: requests that have none yet.
        tokens_per_s: committed tokens of all requests a second, over the last ten seconds.
        accepted_length: committed tokens of a request and round since the engine began, the first
            round of each request aside; 0 before there is one.
        accept_rate_by_position: of the drafts of each position that were decided about, the share
            that was accepted; as far as there were any.
        prefix_queries: prompts that were looked up among the stored prefixes; 0 without a store.
        prefix_hits: those of which something was stored.
        prefix_tokens: tokens of prompts that were not read again.
    """

    running: int
    waiting: int
    tokens_per_s: float
    accepted_length: float
    accept_rate_by_position: tuple[float, ...]
    prefix_queries: int = 0
    prefix_hits: int = 0
    prefix_tokens: int = 0


class Tally:
    """Counts what the rounds bring.

    Attributes:
        tokens: committed by all requests.
        prefix_queries, prefix_hits, prefix_tokens: see :class:`Stats`.
    """

    def __init__(self) -> None:
        self.tokens = self.prefix_queries = self.prefix_hits = self.prefix_tokens = 0
        self._recent: deque[tuple[float, int]] = deque()
        self._committed = self._rounds = 0
        self._decided, self._accepted = Counter[int](), Counter[int]()

    def read(self, report: RoundReport, slot: int, first: bool, now_s: float) -> None:
        """One request of one round, on a monotonic clock."""
        reported = report.count_B, report.accepted_B, report.verified_B
        count, accepted, verified = (int(value_B[slot]) for value_B in reported)
        self.tokens += count
        self._recent.append((now_s, count))
        self._forget(now_s)
        if first:
            return
        self._committed, self._rounds = self._committed + count, self._rounds + 1
        decided = min(accepted + 1, decided_drafts(count, accepted, verified))
        self._decided.update(range(decided))
        self._accepted.update(range(accepted))

    def looked_up(self, count: int) -> None:
        """A prompt of which so many tokens were stored."""
        self.prefix_queries += 1
        self.prefix_hits += count > 0
        self.prefix_tokens += count

    def stats(self, running: int, waiting: int, now_s: float) -> Stats:
        """All of it; from any thread."""
        recent = [entry for entry in list(self._recent) if entry[0] >= now_s - WINDOW_S]
        seconds = max(now_s - recent[0][0], 1e-3) if recent else 1.0
        rates = (
            round(self._accepted[place] / self._decided[place], 4)
            for place in sorted(self._decided)
        )
        return Stats(
            running,
            waiting,
            round(sum(count for _, count in recent) / seconds, 2),
            round(self._committed / max(self._rounds, 1), 4),
            tuple(rates),
            self.prefix_queries,
            self.prefix_hits,
            self.prefix_tokens,
        )

    def _forget(self, now_s: float) -> None:
        while self._recent and self._recent[0][0] < now_s - WINDOW_S:
            self._recent.popleft()
