"""From the reports of rounds to text: where a request ends, and what may be shown of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dspark_jax.engine.grammar import Guide
from dspark_jax.engine.inputs import RoundReport
from dspark_jax.engine.request import Request, seed_of
from dspark_jax.engine.text import TextStream, special_ids
from dspark_jax.scheduler.history import Drafted, Kind, decided_drafts


@dataclass(frozen=True, eq=False)
class RoundTrace:
    """One round of one request, for research.

    Attributes:
        draft_G: int32 drafted tokens; None where the request did not draft, as in its first round.
        confidence_G: float32 confidence logits of the draft, before calibration; None without.
        verified: drafts that were verified, a prefix.
        accepted: those of them that were accepted.
        token_ids: committed tokens, a stop token included.
        num_rows: anchors and drafts that the round had room for, over all requests of a data
            shard: its bucket.
        seconds: since the round before was over or this one was launched, whichever came later,
            until the host had read it.

    >>> (result,) = load().generate("Hello!", max_new_tokens=8, trace=True)
    >>> result.trace[0].token_ids[:1] == tuple(result.token_ids[:1])
    True
    """

    draft_G: np.ndarray | None
    confidence_G: np.ndarray | None
    verified: int
    accepted: int
    token_ids: tuple[int, ...]
    num_rows: int
    seconds: float


@dataclass
class Generation:
    """The continuation of one request, growing while it is decoded.

    Attributes:
        prompt_tokens: tokens of the prompt.
        token_ids: new tokens; the stop token is not among them.
        text: decoded, cut before a stop string; empty without a tokenizer.
        accepted_lengths: tokens that each round after the first token committed, the bonus token
            counted and an overshoot past the limit too.
        verified_lengths: drafts that each of these rounds verified.
        accepted_drafts: drafts that each of these rounds accepted.
        confidence_logits: float32 [G] of the draft of each of these rounds; None where it did not
            draft, or has no confidence head.
        undrafted_rounds: how many of these rounds did not draft at all.
        logprobs: log-probability of each new token where the request asks for it.
        top_logprobs: ids and log-probabilities of the likeliest tokens at each new one, the best
            first, as many as the request asks for.
        finish_reason: ``"stop"`` (a stop id or string, or the end of the grammar), ``"length"``,
            ``"cancelled"`` or ``"error"``; empty while it runs.
        end_id: the stop id that ended it; None where it ended otherwise.
        error: what went wrong, after ``"error"``.
        seed: with which the same request gives the same text again.
        lossless: whether its text keeps the target's distribution, by all rules that made it.
        seconds: since the request got a slot, until its last round was read.
        cached_tokens: tokens of the prompt that were not read again, since an engine had stored
            what it knows of them.
        trace: every round, where the request asks for it.

    >>> (result,) = load().generate("Hello!", max_new_tokens=8)
    >>> result.rounds == len(result.accepted_lengths), result.finish_reason in ("stop", "length")
    (True, True)
    """

    prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    accepted_lengths: list[int] = field(default_factory=list)
    verified_lengths: list[int] = field(default_factory=list)
    accepted_drafts: list[int] = field(default_factory=list)
    confidence_logits: list[np.ndarray | None] = field(default_factory=list)
    undrafted_rounds: int = 0
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    finish_reason: str = ""
    end_id: int | None = None
    error: Exception | None = None
    seed: int | None = None
    lossless: bool = True
    seconds: float = 0.0
    cached_tokens: int = 0
    trace: list[RoundTrace] = field(default_factory=list)

    @property
    def rounds(self) -> int:
        """Rounds after the first token, which comes with the prompt."""
        return len(self.accepted_lengths)

    @property
    def accepted_length(self) -> float:
        """Mean committed tokens a round, the paper's tau; 0 before the first round."""
        return sum(self.accepted_lengths) / max(self.rounds, 1)


class Reader:
    """Turns the reports of one slot into a :class:`Generation`."""

    def __init__(self, request: Request, limit: int, tokenizer: Any, num_tokens: int = 0) -> None:
        """Nothing is read yet.

        Args:
            request: in ids.
            limit: new tokens at most.
            tokenizer: of the target; None makes no text.
            num_tokens: of the target's vocabulary, for a grammar.

        Raises:
            ValueError: the request's grammar cannot be followed.
        """
        self.request = request
        self.limit = limit
        self.result = Generation(len(request.prompt_ids), seed=seed_of(request.key))
        shown_ids = frozenset(request.shown_ids)
        self._stream = None if tokenizer is None else TextStream(tokenizer, shown_ids)
        self._held = ""
        self._ends = set(request.stop_ids)
        if tokenizer is not None:
            self._ends.update(special_ids(tokenizer, request.stop_strings))
        self.guide: Guide | None = None
        if request.grammar is not None:
            self.guide = Guide(request.grammar, tokenizer, num_tokens, self._ends)

    def read(self, report: RoundReport, slot: int, first: bool) -> str:
        """Take in one round; returns the text that may be shown now."""
        result = self.result
        count = int(report.count_B[slot])
        if result.finish_reason or not count:
            return ""
        if not first:
            result.accepted_lengths.append(count)
            result.verified_lengths.append(int(report.verified_B[slot]))
            result.accepted_drafts.append(int(report.accepted_B[slot]))
            logit_BG = report.confidence_logit_BG
            logit_G = None if logit_BG is None else np.array(logit_BG[slot])  # not the whole batch
            result.confidence_logits.append(logit_G)
            result.undrafted_rounds += report.token_BC.shape[1] == 1
        if not report.finite_B[slot]:
            return self.fail(FloatingPointError("the target's logits are not finite"))
        for column, token in enumerate(report.token_BC[slot, :count].tolist()):
            if token in self._ends:
                if self.guide is not None and not self.guide.accepting:
                    raise ValueError(f"the grammar does not end here: {self.guide.error}")
                result.finish_reason, result.end_id = "stop", token
                break
            result.token_ids.append(token)
            if self.request.logprobs:
                result.logprobs.append(float(report.logprob_BC[slot, column]))
            if self.request.top_logprobs:
                result.top_logprobs.append(self._tops(report, slot, column))
            if self._find_stop_string(token):
                result.finish_reason = "stop"
                break
            if self.guide is not None and self.guide.take(token):
                result.finish_reason = "stop"
                break
            if len(result.token_ids) == self.limit:
                result.finish_reason = "length"
                break
        return self._finish() if result.finish_reason else self._show()

    def _tops(self, report: RoundReport, slot: int, column: int) -> tuple[tuple[int, float], ...]:
        """The likeliest tokens at a place, as many as the request asks for."""
        both = report.top_id_BCK, report.top_logprob_BCK
        count = self.request.top_logprobs
        ids, logprobs = (top_BCK[slot, column, :count].tolist() for top_BCK in both)
        return tuple(zip(ids, logprobs, strict=True))

    def note(
        self, report: RoundReport, slot: int, first: bool, num_rows: int, seconds: float
    ) -> None:
        """Keep a round for the trace. In its first one nobody has drafted, whatever others did."""
        drafted = report.draft_BG is not None and not first
        logit_BG = None if first else report.confidence_logit_BG
        count = int(report.count_B[slot])
        self.result.trace.append(
            RoundTrace(
                np.array(report.draft_BG[slot]) if drafted else None,
                None if logit_BG is None else np.array(logit_BG[slot]),
                int(report.verified_B[slot]),
                int(report.accepted_B[slot]),
                tuple(report.token_BC[slot, :count].tolist()),
                num_rows,
                seconds,
            )
        )

    def end_with_grammar(self) -> str:
        """End the request where its grammar allows no further token, which is an error unless the
        text may end there; returns the text that was still held back."""
        assert self.guide is not None
        if not self.guide.accepting:
            return self.fail(ValueError(f"the grammar does not go on: {self.guide.error}"))
        self.result.finish_reason = "stop"
        return self._finish()

    def cancel(self) -> str:
        """End the request here; returns the text that was still held back."""
        self.result.finish_reason = "cancelled"
        return self._finish()

    def fail(self, error: Exception) -> str:
        """End the request with an error; returns the text that was still held back."""
        self.result.finish_reason, self.result.error = "error", error
        self._stream = None  # it may be what failed
        return self._finish()

    def may_outlast(self, most: int) -> bool:
        """Whether the request surely goes on after ``most`` further tokens, stop tokens aside."""
        left = self.limit - len(self.result.token_ids)
        return not self.result.finish_reason and left > most

    def _find_stop_string(self, token: int) -> bool:
        if self._stream is None:
            return False
        self._held += self._stream.push([token])
        ends = [self._held.find(text) for text in self.request.stop_strings if text in self._held]
        if ends:
            self._held = self._held[: min(ends)]
            self._stream = None
        return bool(ends)

    def _show(self) -> str:
        """What cannot be the beginning of a stop string any more."""
        keep = max(
            (
                size
                for text in self.request.stop_strings
                for size in range(1, len(text))
                if self._held.endswith(text[:size])
            ),
            default=0,
        )
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        self.result.text += shown
        return shown

    def _finish(self) -> str:
        if self._stream is not None:
            self._held += self._stream.finish()
        shown, self._held = self._held, ""
        self.result.text += shown
        return shown


def drafted_by(kind: Kind, report: RoundReport, slot: int) -> Drafted:
    """The draft of a slot, from the report of a round that drafted."""
    reported = report.count_B, report.accepted_B, report.verified_B
    count, accepted, verified = (int(value_B[slot]) for value_B in reported)
    decided = decided_drafts(count, accepted, verified)
    return Drafted(kind, report.confidence_logit_BG[slot], accepted, decided)
