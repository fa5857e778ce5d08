"""Runs the application: a socket, an event loop, and an end that leaves nobody in the middle."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator

import uvicorn

from dspark_jax.serving.app import Service

logger = logging.getLogger(__name__)

WAITING = 128  # connections that nobody has accepted
# Longer than clients and proxies keep a connection that is idle (5 to 60 seconds): where both sides
# close one at the same time, a request that was just sent is lost.
IDLE_S = 75
STOP_S = 5  # for answers to be sent once they are over
INTERRUPTED = 130


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on; port 0 takes a free one.

    Raises:
        OSError: the address cannot be had.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _, _, _, address = found[0]
    try:
        return socket.create_server(address[:2], family=family, backlog=WAITING)
    except OSError as error:
        raise OSError(error.errno, f"cannot listen: {error.strerror}", f"{host}:{port}") from None


class Server(uvicorn.Server):
    """Serves until a signal comes or somebody calls :meth:`stop`.

    The first signal lets nobody in and waits for the answers on their way; the second ends the
    process at once.
    """

    def __init__(self, service: Service, drain_s: float) -> None:
        """``drain_s`` is how long answers on their way may take after the first signal."""
        self._service, self._drain_s = service, drain_s
        self._draining: asyncio.Task[None] | None = None
        config = uvicorn.Config(
            service.app,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=IDLE_S,
            timeout_graceful_shutdown=STOP_S,
            lifespan="on",
        )
        super().__init__(config)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's, which closes its door before answers are over."""
        loop = asyncio.get_running_loop()
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.stop)
        except RuntimeError:  # not in the main thread: whoever made it stops it
            pass
        yield

    async def on_tick(self, counter: int) -> bool:
        """Whether to end, asked ten times a second: an engine that is lost answers nobody."""
        ended = await super().on_tick(counter)
        return ended or self._service.served.engine.lost is not None

    def stop(self) -> None:
        """Drain, and then end; at once when it is called again. In the event loop."""
        if self._draining is not None:
            logger.warning("stopped before all answers were over")
            os._exit(INTERRUPTED)
        logger.info("stopping: %d answers are on their way", len(self._service.running))
        self._draining = asyncio.ensure_future(self._drain())

    async def _drain(self) -> None:
        self._service.draining = True
        loop = asyncio.get_running_loop()
        end_s = loop.time() + self._drain_s
        while self._service.running and loop.time() < end_s:
            await asyncio.sleep(0.02)
        self._service.end_all()
        self.should_exit = True


def run(service: Service, sock: socket.socket, drain_s: float) -> None:
    """Serve until a signal comes and the answers on their way are over.

    Args:
        service: that answers.
        sock: of :func:`listen`.
        drain_s: for these answers.

    Raises:
        RuntimeError: the server did not start, or its engine has lost another process.
    """
    server = Server(service, drain_s)
    asyncio.run(server.serve([sock]))
    if service.served.engine.lost is not None:
        raise service.served.engine.lost
    if not server.started:
        raise RuntimeError("the server did not start")
