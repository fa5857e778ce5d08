"""A submitted request: its text as it is verified, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from dspark_jax.engine.reader import Generation, Reader, RoundTrace


@dataclass(frozen=True)
class Event:
    """News of a request.

    Attributes:
        text: that may be shown now; what may be the beginning of a stop string waits.
        token_ids: new tokens.
        logprobs: of these tokens, where the request asks for them.
        finish_reason: as in ``Generation``; empty while it runs.
        top_logprobs: of these tokens, as in ``Generation``.
        trace: the rounds that brought them, where the request asks for a trace.

    >>> *_, last = load().stream("Hello!", max_new_tokens=8)
    >>> last.finish_reason in ("stop", "length")
    True
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    trace: tuple[RoundTrace, ...] = ()


class Mailbox:
    """What the engine keeps of a request's stream: it outlives whoever reads.

    Attributes:
        cancelled: whether nobody wants the rest; the engine ends the request before its next round.
        bell: of the event loop in which somebody waits for news.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._events: deque[Event] = deque()
        self._reported = self._traced = 0
        self.cancelled = False
        self.bell: Bell | None = None

    @property
    def result(self) -> Generation:
        """The text so far."""
        return self._reader.result

    @property
    def finished(self) -> bool:
        """Whether nothing will be added any more."""
        return bool(self._reader.result.finish_reason)

    def cancel(self) -> None:
        """End the request; what it had said stays."""
        self.cancelled = True
        if not self.finished:
            self.report(self._reader.cancel())

    def fail(self, error: Exception) -> None:
        """End the request with an error; what it had said stays."""
        if not self.finished:
            self.report(self._reader.fail(error))

    def report(self, text: str) -> None:
        """Make an event of what the reader has taken in."""
        result = self.result
        tokens = tuple(result.token_ids[self._reported :])
        logprobs = tuple(result.logprobs[self._reported :])
        tops = tuple(result.top_logprobs[self._reported :])
        trace = tuple(result.trace[self._traced :])
        self._reported, self._traced = len(result.token_ids), len(result.trace)
        if text or tokens or result.finish_reason:
            self._events.append(Event(text, tokens, logprobs, result.finish_reason, tops, trace))
            if self.bell is not None:
                self.bell.ring()

    @property
    def has_news(self) -> bool:
        """Whether there is an event that nobody has read, or will be none any more."""
        return bool(self._events) or self.finished

    def take(self) -> Event | None:
        """The oldest event that nobody has read."""
        return self._events.popleft() if self._events else None


class Bell:
    """Wakes those who wait in an event loop for news of requests: once for all of a round, however
    many they are.

    Attributes:
        loop: that they wait in.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._waiting: dict[asyncio.Future[None], Mailbox] = {}
        self._rung = False

    def ring(self) -> None:
        """Some mailbox has news; from any thread."""
        if not self._rung:
            self._rung = True
            with contextlib.suppress(RuntimeError):  # the event loop is over, and all who waited
                self.loop.call_soon_threadsafe(self._answer)

    async def wait(self, mailbox: Mailbox) -> None:
        """Until a mailbox has news."""
        mailbox.bell = self
        if mailbox.has_news:  # or whoever reports sees the bell
            return
        future: asyncio.Future[None] = self.loop.create_future()
        self._waiting[future] = mailbox
        try:
            await future
        finally:
            del self._waiting[future]

    def _answer(self) -> None:
        self._rung = False  # before looking: what is reported from here on rings again
        for future, mailbox in self._waiting.items():
            if mailbox.has_news and not future.done():
                future.set_result(None)


class Stream:
    """Iterates over the events of a request, and where there are none yet drives the engine, or
    waits in an event loop for one that was started.

    ``for event in stream`` and ``async for event in stream`` end after the event with a finish
    reason. Events that nobody reads wait, at most as many as the request has tokens; the engine
    does not wait for anybody. Whoever goes away ends the request: a task that is cancelled while
    it waits for an event, and a stream that is dropped.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        drive: Callable[[], Any],
        news: Callable[[Mailbox], Awaitable[Any]],
        lock: threading.RLock,
    ) -> None:
        self._mailbox, self._lock = mailbox, lock
        self._drive, self._news = drive, news

    def __del__(self) -> None:
        self.abandon()

    @property
    def result(self) -> Generation:
        """The text so far, and after the last event all of it."""
        return self._mailbox.result

    @property
    def finished(self) -> bool:
        """Whether nothing will be added any more."""
        return self._mailbox.finished

    def cancel(self) -> None:
        """End the request, wherever it is; what it had said stays. No harm once it is over."""
        with self._lock:
            self._mailbox.cancel()

    def abandon(self) -> None:
        """Nobody wants the rest: the engine ends the request before its next round. Returns at
        once, which :meth:`cancel` does not while there is a round."""
        self._mailbox.cancelled = True

    def wait(self, timeout_s: float | None = None) -> Generation:
        """Drive the engine until the request is over; returns all of its text.

        Raises:
            TimeoutError: it takes longer than ``timeout_s``; it is cancelled then.
        """
        end_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not self.finished:
            if end_s is not None and time.monotonic() >= end_s:
                self.cancel()
                raise TimeoutError(f"the request is not over after {timeout_s} s: it is cancelled")
            self._drive()
        return self.result

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Event:
        while True:
            with self._lock:
                event = self._mailbox.take()
            if event is not None:
                return event
            if self.finished:
                raise StopIteration
            self._drive()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Event:
        while True:
            event = self._mailbox.take()
            if event is not None:
                return event
            if self.finished:
                raise StopAsyncIteration
            try:
                await self._news(self._mailbox)
            except asyncio.CancelledError:
                self._mailbox.cancelled = True
                raise
