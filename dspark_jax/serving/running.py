"""Requests of one body while they run: their answer is sent, and they end with their client."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any

from starlette.types import Receive, Scope, Send

from dspark_jax.engine.reader import Generation
from dspark_jax.engine.stream import Event, Stream
from dspark_jax.serving.answers import DONE, Reply, sse
from dspark_jax.serving.errors import ApiError
from dspark_jax.serving.metrics import Metrics
from dspark_jax.serving.protocol import Asked

logger = logging.getLogger(__name__)

EVENTS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Running:
    """An answer on its way; an ASGI application for its one request.

    Whatever ends it early (the client goes, its time is up, the server stops) makes the engine
    drop its requests before the next round.
    """

    def __init__(
        self,
        asked: Asked,
        streams: Sequence[Stream],
        reply: Reply,
        metrics: Metrics,
        timeout_s: float,
        over: Callable[[Running], None],
    ) -> None:
        """``over`` is called when the engine has nothing to do with it any more."""
        self._asked, self._streams, self._reply = asked, streams, reply
        self._metrics, self._timeout_s, self._over = metrics, timeout_s, over
        self._began_s = time.perf_counter()
        self._ended: asyncio.Future[ApiError | None] = asyncio.get_running_loop().create_future()

    def end(self, error: ApiError | None) -> None:
        """Stop here; ``error`` is what the client is told, None for one that has gone."""
        if not self._ended.done():
            self._ended.set_result(error)
        for stream in self._streams:
            stream.abandon()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        late = ApiError(504, f"the answer took longer than {self._timeout_s:g} s", code="timeout")
        timer = asyncio.get_running_loop().call_later(self._timeout_s, self.end, late)
        watcher = asyncio.ensure_future(self._watch(receive))
        try:
            if self._asked.stream:
                await self._stream(send)
            else:
                await self._whole(send)
        except OSError:  # the client has gone
            pass
        finally:
            timer.cancel()
            watcher.cancel()
            await self._settle()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.end(None)

    async def _settle(self) -> None:
        """Let the engine end what still runs."""
        self.end(None)
        try:
            for stream in self._streams:
                async for _ in stream:
                    pass
        finally:
            self._over(self)
        for result in self.results:
            self._metrics.finished(result)

    async def _until_over(self, work: Coroutine[Any, Any, None]) -> ApiError | None:
        """Do something until it is done, or the answer ends early; returns what went wrong.

        Raises:
            ConnectionError: the client has gone.
        """
        task = asyncio.ensure_future(work)
        try:
            either: set[asyncio.Future[Any]] = {task, self._ended}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            task.cancel()
            await asyncio.wait({task})
        if not self._ended.done():
            task.result()  # its exception, if there is one
            return self._error()
        error = self._ended.result()
        if error is None:
            raise ConnectionError
        return error

    async def _whole(self, send: Send) -> None:
        async def read() -> None:
            async for _ in self._events():
                pass

        error = await self._until_over(read())
        told = self._reply.whole(self.results) if error is None else error.body
        raw = json.dumps(told).encode()
        head = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(raw))]
        status = 200 if error is None else error.status
        await send({"type": "http.response.start", "status": status, "headers": head})
        await send({"type": "http.response.body", "body": raw})

    async def _stream(self, send: Send) -> None:
        async def write(raw: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": raw, "more_body": more})

        async def pieces() -> None:
            openings = map(self._reply.opening, range(len(self._streams)))
            await write(b"".join(sse(piece) for piece in openings if piece))
            async for index, event in self._events():
                if event.finish_reason in ("cancelled", "error"):
                    return
                piece = self._reply.piece(index, event)
                if piece is not None:
                    await write(sse(piece))

        await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
        error = await self._until_over(pieces())
        if error is not None:
            last = sse(error.body)
        else:
            last = sse(self._reply.usage_piece(self.results)) if self._asked.usage else b""
        await write(last + DONE, more=False)

    @property
    def results(self) -> list[Generation]:
        """The texts so far."""
        return [stream.result for stream in self._streams]

    def _error(self) -> ApiError | None:
        """What went wrong in the engine, if anything did."""
        for result in self.results:
            if result.finish_reason == "error":
                logger.error("a request failed: %s", result.error)
                return ApiError(500, "the engine could not go on with this request")
            if result.finish_reason == "cancelled":
                return ApiError(503, "the engine has stopped", code="stopping")
        return None

    async def _events(self) -> AsyncIterator[tuple[int, Event]]:
        """The events as they come; the metrics hear when that was."""
        last_s: dict[int, float] = {}
        async for index, event in merged(self._streams):
            if event.token_ids:
                now_s = time.perf_counter()
                if index in last_s:
                    self._metrics.token(now_s - last_s[index])
                else:
                    self._metrics.first_token(now_s - self._began_s)
                last_s[index] = now_s
            yield index, event


async def merged(streams: Sequence[Stream]) -> AsyncIterator[tuple[int, Event]]:
    """The events of several streams as they come, with the streams' numbers."""
    if len(streams) == 1:
        async for event in streams[0]:
            yield 0, event
        return
    found: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()

    async def forward(index: int, stream: Stream) -> None:
        try:
            async for event in stream:
                found.put_nowait((index, event))
        finally:
            found.put_nowait(None)

    tasks = [asyncio.ensure_future(forward(*one)) for one in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            one = await found.get()
            if one is None:
                left -= 1
            else:
                yield one
    finally:
        for task in tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
