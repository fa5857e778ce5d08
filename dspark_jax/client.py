"""A client of servers with OpenAI's interface: answers to chats, piece by piece.

Server-sent events are read as their specification has them, as far as such servers use it: a
``data:`` line an event, JSON in it, ``[DONE]`` at the end. What a server says is checked, since
nobody knows who it is.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

CONNECT_S, READ_S = 10.0, 600.0  # a long prompt may wait for its turn
MOST_LINE = 1 << 24  # bytes of an event


class ServerError(ValueError):
    """A server that cannot be reached, refuses a request or does not keep to its interface."""


@dataclass(frozen=True)
class Piece:
    """What one event adds to an answer.

    Attributes:
        text: of the answer.
        thought: of what the model thinks beforehand, where the server tells it apart.
        tokens: of the whole answer, where the server says so; at its end.
    """

    text: str = ""
    thought: str = ""
    tokens: int | None = None


class Client:
    """Asks one server; ``async with`` lets go of its connections."""

    def __init__(self, url: str, api_key: str = "", transport: Any = None) -> None:
        """Connects to nobody yet.

        Args:
            url: of the server, with or without ``/v1`` at its end.
            api_key: that it wants; empty for none.
            transport: of httpx, in place of the network.

        Raises:
            ValueError: this is no address of a server, or no key.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        try:
            parts = httpx.URL(self.url)
        except httpx.InvalidURL:
            parts = httpx.URL()
        if parts.scheme not in ("http", "https") or not parts.host:
            raise ValueError(f"url is {url!r:.80}: give one like http://127.0.0.1:8000")
        if not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("the API key has characters that are not ASCII: give another")
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(READ_S, connect=CONNECT_S),
            limits=httpx.Limits(max_connections=None),
            transport=transport,
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def model(self) -> str:
        """The name of the first model that the server has.

        Raises:
            ServerError: it has none, or does not say.
        """
        with self._telling():
            reply = await self._http.get(f"{self.url}/v1/models")
            await self._check(reply)
            try:
                name = reply.json()["data"][0]["id"]
            except (ValueError, LookupError, TypeError, RecursionError):
                name = None
        if not isinstance(name, str):
            raise ServerError(f"{self.url}: it names no model at /v1/models")
        return name

    async def answer(self, body: Mapping[str, Any]) -> AsyncGenerator[Piece, None]:
        """An answer as it comes.

        Args:
            body: of a request for a chat completion, but what makes it come in pieces.

        Raises:
            ServerError: the server refuses it, or stops in the middle.
        """
        streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
        with self._telling():
            async with self._http.stream(
                "POST", f"{self.url}/v1/chat/completions", json=streamed
            ) as reply:
                await self._check(reply)
                events = Events(self.url)
                async for raw in reply.aiter_bytes():
                    for piece in events.feed(raw):
                        yield piece
                    if events.over:
                        return
        raise ServerError(f"{self.url}: it stopped in the middle of an answer")

    async def _check(self, reply: httpx.Response) -> None:
        """Raises ServerError for whatever is no success."""
        if reply.is_success:
            return
        try:
            await reply.aread()
            told = reply.json()["error"]["message"]
        except (ValueError, LookupError, TypeError, RecursionError):
            told = reply.reason_phrase
        raise ServerError(f"{self.url}: {reply.status_code}: {told!s:.300}")

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Turns what goes wrong on the way into ServerError."""
        try:
            yield
        except httpx.HTTPError as error:
            told = str(error) or type(error).__name__
            raise ServerError(f"{self.url}: {told}") from None


class Events:
    """Reads server-sent events out of bytes, wherever these are cut.

    Attributes:
        over: whether the last one was the end.
    """

    def __init__(self, origin: str) -> None:
        """``origin`` is named where something is wrong."""
        self._origin, self._held = origin, b""
        self.over = False

    def feed(self, raw: bytes) -> Iterator[Piece]:
        """The pieces that these bytes make whole.

        Raises:
            ServerError: they are no such events, or the server says that something is wrong.
        """
        *lines, self._held = (self._held + raw).split(b"\n")
        if len(self._held) > MOST_LINE:
            raise ServerError(f"{self._origin}: an event has more than {MOST_LINE} bytes")
        for line in lines:
            if not line.startswith(b"data:"):
                continue  # comments and names of events
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                self.over = True
                return
            yield self._piece(data)

    def _piece(self, data: bytes) -> Piece:
        try:
            event = json.loads(data)
            if (error := event.get("error")) is not None:
                raise ServerError(f"{self._origin}: {error['message']!s:.300}")
            choices, usage = event["choices"], event.get("usage") or {}
            delta = choices[0].get("delta") or {} if choices else {}
            tokens = usage.get("completion_tokens")
            texts = [delta.get(name) or "" for name in ("content", "reasoning_content")]
        except ServerError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ServerError(f"{self._origin}: no chat completion: {data[:60]!r}") from None
        if not all(isinstance(text, str) for text in texts) or type(tokens) not in (
            int, type(None),
        ):  # fmt: skip
            raise ServerError(f"{self._origin}: no chat completion: {data[:60]!r}")
        return Piece(texts[0], texts[1], tokens)
