"""What an engine is doing, in numbers."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from dspark_jax.engine.inputs import RoundReport
from dspark_jax.scheduler.history import Drafted, History, decided_drafts
from dspark_jax.scheduler.reliability import calibration_error
from dspark_jax.scheduler.temperatures import predicted_survival

WINDOW_S = 10.0  # of recent tokens
RECENT_DRAFTS = 1024  # by which confidences are judged


@dataclass(frozen=True, eq=False)
class Judged:
    """A draft with confidences that the target was asked about.

    Attributes:
        draft: with its logits.
        temperature_G: float32 of the confidences then.
    """

    draft: Drafted
    temperature_G: np.ndarray


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
        tokens: committed by all requests since the engine began.
        rounds: of all requests, the first of each aside; one of an engine counts for each of them.
        undrafted_rounds: those of them without a draft.
        verified_drafts: drafts that the target was given in these rounds.
        accepted_drafts_by_position: those of each position that were accepted.
        predicted_s: seconds of rounds by what the scheduler chose from, of those that it had a
            prediction for and that nothing disturbed.
        taken_s: seconds of the same rounds by the clock.
        judged: recent drafts with their confidences.

    >>> with Engine(load(), EngineConfig(slots=2, positions=512)) as engine:
    ...     engine.stats().waiting
    0
    """

    running: int
    waiting: int
    tokens_per_s: float
    accepted_length: float
    accept_rate_by_position: tuple[float, ...]
    prefix_queries: int = 0
    prefix_hits: int = 0
    prefix_tokens: int = 0
    tokens: int = 0
    rounds: int = 0
    undrafted_rounds: int = 0
    verified_drafts: int = 0
    accepted_drafts_by_position: tuple[int, ...] = ()
    predicted_s: float = 0.0
    taken_s: float = 0.0
    judged: tuple[Judged, ...] = field(default=(), repr=False)

    @property
    def calibration_error(self) -> float | None:
        """The expected calibration error of recent confidences, over the prefixes of blocks that
        were verified (``scheduler/reliability.py``); None before there are any."""
        judged = [one for one in self.judged if np.isfinite(one.draft.logit_G).all()]
        if not judged:
            return None
        logit_NG = np.stack([one.draft.logit_G for one in judged])
        temperature_NG = np.stack([one.temperature_G for one in judged])
        survival_NG = predicted_survival(logit_NG, temperature_NG)
        slot_G = np.arange(logit_NG.shape[1])
        seen_NG = slot_G < np.array([[one.draft.decided] for one in judged])
        label_NG = slot_G < np.array([[one.draft.accepted] for one in judged])
        return calibration_error(survival_NG[seen_NG], label_NG[seen_NG].astype(np.float64))


class Tally:
    """Counts what the rounds bring.

    Attributes:
        tokens: committed by all requests.
        prefix_queries: see :class:`Stats`.
        prefix_hits: likewise.
        prefix_tokens: likewise.
    """

    def __init__(self) -> None:
        self.tokens = self.prefix_queries = self.prefix_hits = self.prefix_tokens = 0
        self._recent: deque[tuple[float, int]] = deque()
        self._committed = self._rounds = self._undrafted = self._verified = 0
        self._predicted_s = self._taken_s = 0.0
        self._judged: deque[Judged] = deque(maxlen=RECENT_DRAFTS)
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
        self._undrafted += report.token_BC.shape[1] == 1
        self._verified += verified
        decided = min(accepted + 1, decided_drafts(count, accepted, verified))
        self._decided.update(range(decided))
        self._accepted.update(range(accepted))

    def judge(self, drafts: Iterable[Drafted], history: History) -> None:
        """What became of the drafts of a round that have confidences."""
        temperatures = {}
        for draft in drafts:
            if draft.kind not in temperatures:
                temperatures[draft.kind] = history.temperature_G(draft.kind)
            if draft.decided:
                self._judged.append(Judged(draft, temperatures[draft.kind]))

    def timed(self, predicted_s: float, taken_s: float) -> None:
        """What a round was to take, and what it took."""
        self._predicted_s += predicted_s
        self._taken_s += taken_s

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
            self.tokens,
            self._rounds,
            self._undrafted,
            self._verified,
            tuple(self._accepted[place] for place in sorted(self._decided)),
            self._predicted_s,
            self._taken_s,
            tuple(self._judged),
        )

    def _forget(self, now_s: float) -> None:
        while self._recent and self._recent[0][0] < now_s - WINDOW_S:
            self._recent.popleft()
