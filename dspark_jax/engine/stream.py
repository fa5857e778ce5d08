"""A submitted request: its text as it is verified, for threads and for asyncio."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from dspark_jax.engine.reader import Generation, Reader


@dataclass(frozen=True)
class Event:
    """News of a request.

    Attributes:
        text: that may be shown now; what may be the beginning of a stop string waits.
        token_ids: new tokens.
        logprobs: of these tokens, where the request asks for them.
        finish_reason: as in ``Generation``; empty while it runs.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


class Stream:
    """Iterates over the events of a request, and drives the engine where there are none yet.

    ``for event in stream`` and ``async for event in stream`` end after the event with a finish
    reason. Events that nobody reads wait, at most as many as the request has tokens; the engine
    does not wait for anybody.

    Attributes:
        result: the text so far, and after the last event all of it.
    """

    def __init__(
        self,
        reader: Reader,
        drive: Callable[[], Any],
        drive_async: Callable[[], Awaitable[Any]],
        lock: threading.RLock,
    ) -> None:
        self._reader, self._lock = reader, lock
        self._drive, self._drive_async = drive, drive_async
        self._events: deque[Event] = deque()
        self._reported = 0
        self.cancelled = False

    @property
    def result(self) -> Generation:
        """The text so far."""
        return self._reader.result

    @property
    def finished(self) -> bool:
        """Whether nothing will be added any more."""
        return bool(self._reader.result.finish_reason)

    def cancel(self) -> None:
        """End the request, wherever it is; what it had said stays. No harm once it is over."""
        with self._lock:
            self.cancelled = True
            if not self.finished:
                self.report(self._reader.cancel())

    def report(self, text: str) -> None:
        """Make an event of what the reader has taken in (the engine calls this)."""
        result = self.result
        tokens = tuple(result.token_ids[self._reported :])
        logprobs = tuple(result.logprobs[self._reported :])
        self._reported = len(result.token_ids)
        if text or tokens or result.finish_reason:
            self._events.append(Event(text, tokens, logprobs, result.finish_reason))

    def wait(self) -> Generation:
        """Drive the engine until the request is over; returns all of its text."""
        while not self.finished:
            self._drive()
        return self.result

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Event:
        while True:
            with self._lock:
                if self._events:
                    return self._events.popleft()
                if self.finished:
                    raise StopIteration
            self._drive()

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Event:
        while True:
            if self._events:
                return self._events.popleft()
            if self.finished:
                raise StopAsyncIteration
            await self._drive_async()
