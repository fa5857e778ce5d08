"""Several engines under Ray Serve (extra ``ray``), behind one door:

    serve run dspark_jax.serving.ray_app:build replicas=4 target=owner/name slots=32

Every replica is a whole server of one engine. The door sends a request to the replica that had the
last one with the same first page, so that its prefix store knows the beginning: replicas are ranked
by a hash of the page and of their ids (rendezvous hashing, Thaler and Ravishankar 1998), and where
the first is full, or gone, the next one is asked. A replica that dies breaks the answers that it
was giving, which their clients are told; nobody else notices.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from dspark_jax.engine import request as engine_request
from dspark_jax.engine.config import EngineConfig
from dspark_jax.model import load
from dspark_jax.serving.answers import DONE, sse
from dspark_jax.serving.app import Service, Settings, error_response
from dspark_jax.serving.errors import ApiError
from dspark_jax.serving.running import EVENTS
from dspark_jax.serving.served import serve_model

logger = logging.getLogger(__name__)

PAGE = 256  # characters of what a request begins with: about the 64 tokens of a page
TRIES = 2
LOST = (RayError, RayServeException, StopAsyncIteration)
BUSY = ApiError(
    429, "all replicas are busy: try again later", code="queue_full", headers={"Retry-After": "1"}
)
GONE = ApiError(503, "the replica is gone: ask again", code="replica_gone")


@dataclass(frozen=True)
class Options:
    """What is deployed.

    Attributes:
        target: of ``dspark_jax.load``.
        drafter: likewise; without one, the one that the target has.
        name: under which clients know the model; empty for the target's own.
        replicas: engines.
        slots: of each engine, as ``EngineConfig`` has them.
        positions: likewise.
        policy: likewise.
        prefix_bytes: likewise.
        queue: requests that may wait at the door.
        num_cpus: that Ray sets aside for a replica.
        num_gpus: likewise.

    Raises:
        ValueError: a value has no meaning.
    """

    target: str = "default"
    drafter: str = ""
    name: str = ""
    replicas: int = 1
    slots: int = 8
    positions: int = 2048
    queue: int = 256
    policy: str = ""
    prefix_bytes: int = 1 << 30
    num_cpus: float = 1.0
    num_gpus: float = 0.0

    def __post_init__(self) -> None:
        for name in ("replicas", "slots", "positions", "queue"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")


def read_options(given: Mapping[str, Any]) -> Options:
    """The options that ``serve run`` or a file of Ray's gives, numbers perhaps as texts.

    Raises:
        ValueError: one is unknown or has no meaning.
    """
    kinds: dict[str, Callable[[Any], Any]] = {
        field.name: type(field.default) for field in fields(Options)
    }
    found = {}
    for name, value in given.items():
        if name not in kinds:
            raise ValueError(f"{name[:60]} is no option: known are {', '.join(kinds)}")
        try:
            found[name] = kinds[name](value)
        except (TypeError, ValueError):
            raise ValueError(f"{name} is {value!r:.40}: give {kinds[name].__name__}") from None
    return Options(**found)


def build(given: Mapping[str, Any]) -> serve.Application:
    """The application, for ``serve run`` and ``serve deploy``.

    Args:
        given: :class:`Options` by name.
    """
    options = read_options(given)
    engines = serve.deployment(
        num_replicas=options.replicas,
        # A replica that has this many has no room: the next in rank is asked.
        max_ongoing_requests=options.slots,
        max_queued_requests=options.queue,
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        request_router_config=RequestRouterConfig(request_router_class=FirstPageRouter),
        graceful_shutdown_timeout_s=60.0,
    )(Replica)
    door = serve.deployment(
        max_ongoing_requests=options.replicas * options.slots + options.queue + 1,
        ray_actor_options={"num_cpus": 0},
    )(Door)
    return door.bind(engines.bind(asdict(options)))


class FirstPageRouter(RequestRouter):
    """Ranks replicas by the first page of a request: the same ones in the same order, as long as
    they are there."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The replicas, each a rank of its own."""
        page = b""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # where all of them are full
            page = pending_request.kwargs.get("page", b"")
        ids = [replica.replica_id.unique_id for replica in candidate_replicas]
        return [[candidate_replicas[place]] for place in ranked(page, ids)]


def ranked(page: bytes, ids: Sequence[str]) -> list[int]:
    """The places of ids in the order in which they are asked for a page."""

    def weight(place: int) -> bytes:
        return hashlib.blake2b(ids[place].encode(), key=page[:64]).digest()

    return sorted(range(len(ids)), key=weight, reverse=True)


def first_page(raw: bytes) -> bytes:
    """A digest of what a request's text begins with; empty where it has none, or is wrong, which
    the replica says."""
    try:
        body = json.loads(raw)
        texts = [json.dumps(body[name]) for name in ("tools", "messages", "prompt") if name in body]
    except (ValueError, TypeError, RecursionError):
        return b""
    return hashlib.blake2b("".join(texts)[:PAGE].encode()).digest() if texts else b""


class Replica:
    """A server of one engine, which is asked by the door."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        """Loads the models and starts the engine."""
        options = Options(**given)
        model = load(options.target, options.drafter or None)
        names = ("slots", "positions", "policy", "prefix_bytes")
        config = EngineConfig(**{name: getattr(options, name) for name in names})
        self._open = contextlib.ExitStack()
        engine = self._open.enter_context(model.engine_of(config)).start()
        self._service = Service(serve_model(model, engine, options.name))
        first = engine.submit(engine_request.Request((0,), max_new_tokens=2)).wait()
        if first.error is not None:
            raise RuntimeError(f"the engine cannot answer: {first.error}")
        self._service.ready = True

    def __del__(self) -> None:
        self._open.close()

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        if self._service.served.engine.lost is not None:
            raise self._service.served.engine.lost

    async def answer(
        self, scope: dict[str, Any], raw: bytes, page: bytes
    ) -> AsyncGenerator[Any, None]:
        """The status and the headers of an answer, and then its body in pieces.

        Args:
            scope: of the request, as ASGI has it.
            raw: its body.
            page: by which the router has chosen this replica.
        """
        gone, sent = asyncio.Event(), asyncio.Queue[Any]()
        bodies = iter([{"type": "http.request", "body": raw}])

        async def receive() -> Any:
            for body in bodies:
                return body
            await gone.wait()
            return {"type": "http.disconnect"}

        task = asyncio.ensure_future(self._service.app(scope, receive, sent.put))
        task.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                if message["type"] == "http.response.start":
                    yield message["status"], message["headers"]
                else:
                    yield message.get("body", b"")
        finally:
            gone.set()
            await asyncio.wait({task})


class Door:
    """Hands requests to the replicas, and their answers back."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._ask = replicas.options(stream=True).answer

    async def __call__(self, request: Request) -> Response:
        """The answer of a replica. Where one goes before it has said anything, another is asked."""
        raw, most = bytearray(), Settings().max_body_bytes
        async for piece in request.stream():
            raw += piece
            if len(raw) > most:
                return error_response(ApiError(413, f"the body has more than {most} bytes"))
        names = ("type", "asgi", "http_version", "method", "path", "query_string", "headers")
        scope, page = {name: request.scope[name] for name in names}, first_page(bytes(raw))
        for _ in range(TRIES):
            pieces = self._ask.remote(scope, bytes(raw), page=page)
            try:
                status, headers = await anext(pieces)
            except BackPressureError:
                return error_response(BUSY)
            except LOST as error:
                logger.warning("a replica is gone: %s", type(error).__name__)
                continue
            events = (b"content-type", EVENTS[0][1]) in headers
            answer = StreamingResponse(_rest(pieces, events), status)
            answer.raw_headers = list(headers)
            return answer
        return error_response(GONE)


async def _rest(pieces: Any, events: bool) -> AsyncGenerator[bytes, None]:
    """What follows of an answer; whoever asked is told where it breaks off."""
    try:
        async for piece in pieces:
            yield piece
    except LOST:
        if not events:
            raise  # the connection breaks before all of the length that was promised
        yield sse(GONE.body) + DONE
    finally:
        pieces.cancel()  # no harm once it is over
