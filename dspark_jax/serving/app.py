"""The application: routes, who may come in, and how much is taken from them."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import queue
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dspark_jax.engine import request as engine_request
from dspark_jax.engine.stream import Stream
from dspark_jax.serving.answers import Reply
from dspark_jax.serving.body import parse
from dspark_jax.serving.errors import ApiError, refused
from dspark_jax.serving.metrics import Metrics
from dspark_jax.serving.openapi import document
from dspark_jax.serving.protocol import Asked, read_chat, read_completion, read_tokenize
from dspark_jax.serving.running import Running
from dspark_jax.serving.served import Served

logger = logging.getLogger(__name__)

OPEN = {"/", "/health", "/ready", "/openapi.json"}  # nothing of anybody's is told there
# The page has its own script and style; it loads nothing and sends nothing elsewhere.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Settings:
    """What a server takes from its clients.

    Attributes:
        api_key: that they must show; empty for none.
        max_body_bytes: of a request.
        timeout_s: for an answer.
        body_s: for a body to arrive.
        cors_origin: of pages that may call the server; empty for none.

    Raises:
        ValueError: a value has no meaning.
    """

    api_key: str = ""
    max_body_bytes: int = 4 << 20
    timeout_s: float = 600.0
    body_s: float = 30.0
    cors_origin: str = ""

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "timeout_s", "body_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: give a positive number")
        if not self.api_key.isascii() or self.api_key.strip() != self.api_key:
            raise ValueError("the API key has spaces around it, or characters that are not ASCII")


class Service:
    """The state of a server.

    Attributes:
        app: to be run.
        ready: whether the engine has answered once.
        draining: whether nobody comes in any more.
        running: answers on their way.
    """

    def __init__(self, served: Served, settings: Settings | None = None) -> None:
        """The engine is started by whoever made it."""
        self.served, self.settings = served, settings or Settings()
        self.ready = self.draining = False
        self.running: set[Running] = set()
        self._metrics = Metrics(served.engine, served.name)
        # One thread for templates, tokenizer and grammars: in order, and not in the event loop.
        self._door = ThreadPoolExecutor(1, thread_name_prefix="dspark-door")
        routes = [
            Route("/v1/chat/completions", self._answer(read_chat), methods=["POST"]),
            Route("/v1/completions", self._answer(read_completion), methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._tell_metrics),
            Route("/openapi.json", self._openapi),
            Route("/", self._page),
        ]
        inner = Starlette(
            routes=routes,
            lifespan=self._lifespan,
            exception_handlers={ApiError: _tell, HTTPException: _tell_http, Exception: _tell_fault},
        )
        self.app: ASGIApp = Gate(inner, self.settings)

    def end_all(self) -> None:
        """The server stops: whoever still waits is told."""
        for one in list(self.running):
            one.end(ApiError(503, "the server stops", code="stopping"))

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """Warm up beside the first requests."""
        task = asyncio.ensure_future(self._warm_up())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        self._door.shutdown(wait=False)

    async def _warm_up(self) -> None:
        stream = self.served.engine.submit(engine_request.Request((0,), max_new_tokens=2))
        async for _ in stream:
            pass
        if stream.result.finish_reason == "error":
            logger.error("the engine cannot answer: %s", stream.result.error)
            return
        self.ready = True

    # Routes.

    def _answer(self, read: Callable[[dict[str, Any], Served], Asked]) -> Any:
        async def answer(request: Request) -> Any:
            if self.draining:
                raise ApiError(
                    503, "the server stops", code="stopping", headers={"Retry-After": "5"}
                )
            raw = await self._body(request)
            loop = asyncio.get_running_loop()
            asked, reply, streams = await loop.run_in_executor(self._door, self._submit, raw, read)
            one = Running(
                asked, streams, reply, self._metrics, self.settings.timeout_s, self.running.discard
            )
            self.running.add(one)
            for _ in streams:
                self._metrics.queued()
            return one

        return answer

    def _submit(
        self, raw: bytes, read: Callable[[dict[str, Any], Served], Asked]
    ) -> tuple[Asked, Reply, list[Stream]]:
        asked = read(parse(raw), self.served)
        requests = asked.requests(self.served)
        streams: list[Stream] = []
        try:
            for request in requests:
                streams.append(self.served.engine.submit(request, asked.priority))
        except queue.Full:
            for stream in streams:
                stream.abandon()
            raise ApiError(
                429, "the server is busy: try again later", code="queue_full",
                headers={"Retry-After": "1"},
            ) from None  # fmt: skip
        except ValueError as error:
            for stream in streams:
                stream.abandon()
            raise refused(error, asked.fields) from None
        return asked, Reply(asked, self.served, requests), streams

    async def _body(self, request: Request) -> bytes:
        """The body, as far as it is wanted."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # which pages of others cannot send unasked
            raise ApiError(415, f"the body is {kind[:60]!r}: send application/json")
        most, found = self.settings.max_body_bytes, bytearray()
        close = {"Connection": "close"}
        large = ApiError(413, f"the body has more than {most} bytes", headers=close)
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > most:
            raise large
        try:
            async with asyncio.timeout(self.settings.body_s):
                async for piece in request.stream():
                    found += piece
                    if len(found) > most:
                        raise large
        except TimeoutError:
            late = f"the body took longer than {self.settings.body_s:g} s"
            raise ApiError(408, late, code="timeout", headers=close) from None
        except ClientDisconnect:
            raise ApiError(400, "the body ended early") from None
        return bytes(found)

    async def _tokenize(self, request: Request) -> Response:
        raw = await self._body(request)
        loop = asyncio.get_running_loop()

        def work() -> list[int]:
            return read_tokenize(parse(raw), self.served)

        ids = await loop.run_in_executor(self._door, work)
        told = {"tokens": ids, "count": len(ids), "max_model_len": self.served.positions}
        return JSONResponse(told)

    async def _models(self, _: Request) -> Response:
        model = {
            "id": self.served.name,
            "object": "model",
            "created": 0,
            "owned_by": "dspark",
            "max_model_len": self.served.positions,
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def _ready(self, _: Request) -> Response:
        if self.draining or not self.ready:
            status = "stopping" if self.draining else "warming up"
            return JSONResponse({"status": status}, 503, {"Retry-After": "1"})
        return JSONResponse({"status": "ready"})

    async def _tell_metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4")

    async def _openapi(self, _: Request) -> Response:
        return JSONResponse(document(self.served.name))

    async def _page(self, _: Request) -> Response:
        page = resources.files("dspark_jax.serving").joinpath("page.html").read_bytes()
        safe = {
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        return Response(page, media_type="text/html; charset=utf-8", headers=safe)


class Gate:
    """Lets in who shows the key, and tells browsers which pages may call."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._origin = app, settings.cors_origin.encode()
        self._wanted = f"Bearer {settings.api_key}".encode() if settings.api_key else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or hand on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"])
        if self._origin and given.get(b"origin") == self._origin:
            send = self._allowing(send)
            if scope["method"] == "OPTIONS":
                await Response(status_code=204)(scope, receive, send)
                return
        shown = given.get(b"authorization", b"")
        known = not self._wanted or hmac.compare_digest(shown, self._wanted)
        if not known and scope["path"] not in OPEN:
            error = ApiError(
                401,
                "the API key is missing or wrong",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _allowing(self, send: Send) -> Send:
        allowed = [
            (b"access-control-allow-origin", self._origin),
            (b"access-control-allow-headers", b"authorization, content-type"),
            (b"vary", b"Origin"),
        ]

        async def allowing(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *allowed]}
            await send(message)

        return allowing


def error_response(error: ApiError) -> Response:
    """What a client is told of an error."""
    return JSONResponse(error.body, error.status, error.headers)


async def _tell(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(error)


async def _tell_http(request: Request, error: Exception) -> Response:
    """No such route, or not by this method."""
    assert isinstance(error, HTTPException)
    told = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return error_response(ApiError(error.status_code, told, headers=error.headers))


async def _tell_fault(_: Request, error: Exception) -> Response:
    """A fault of the server's: what it is stays in its log."""
    return error_response(ApiError(500, "the server made a mistake"))
