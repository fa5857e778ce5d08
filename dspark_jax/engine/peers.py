"""One engine over the devices of several processes: what they say to each other.

Process 0 decides and tells; the others hear, and do the same. What is told goes over connections of
the processes' own: a broadcast by the devices would stand behind the rounds in flight, so that no
round could be planned before the one before it was over. A process that ends closes its
connections, which whoever hears or tells next notices at once.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dspark_jax.axes import spans_processes

_PLACE_BYTES = 1024  # of what says where process 0 is found


class Gone(RuntimeError):
    """A process of several has ended or failed, so that none can go on."""

    def __init__(self, what: str) -> None:
        """What has happened."""
        again = "start all of them again, since a mesh over several processes needs every one"
        super().__init__(f"{' '.join(what.split())}: {again}")


class Peers:
    """The other processes, as one of them sees them: process 0 all, each of the others that one."""

    def __init__(self, connections: Sequence[Connection]) -> None:
        """Connections that are open."""
        self._connections = connections

    @property
    def follows(self) -> bool:
        """Whether this process does what process 0 decides."""
        return jax.process_index() > 0

    def tell(self, *what: Any) -> None:
        """Send values to all others; nothing at all says that there is no more.

        Raises:
            Gone: one is not there any more.
        """
        try:
            for connection in self._connections:
                connection.send(what)
        except OSError as error:
            raise Gone(f"another process is gone ({error})") from None

    def hear(self) -> Any:
        """The values that process 0 tells next; none where there is no more.

        Raises:
            Gone: it is not there any more.
        """
        try:
            return self._connections[0].recv()
        except (EOFError, OSError):
            raise Gone("process 0 is gone") from None

    def agree(self, value: Any) -> Any:
        """The value that process 0 has."""
        if self.follows:
            (value,) = self.hear()
        else:
            self.tell(value)
        return value

    def close(self) -> None:
        """Hang up."""
        for connection in self._connections:
            connection.close()


def nobody(*what: Any) -> None:
    """Who is told where one process has all devices."""


def meet(mesh: Mesh | None) -> Peers | None:
    """The other processes whose devices are in a mesh; None where there are none. All of them must
    call this.

    Raises:
        ValueError: the mesh leaves out devices of these processes.
        RuntimeError: process 0 cannot be reached.
    """
    if mesh is None or not spans_processes(mesh):
        return None
    if mesh.size != jax.device_count():
        raise ValueError(
            f"the mesh has {mesh.size} devices, but the {jax.process_count()} processes have "
            f"{jax.device_count()}: give sizes whose product is that, or start fewer processes"
        )
    if jax.process_index() > 0:
        return Peers([_reach(**json.loads(_share("")))])
    key = secrets.token_bytes(16)
    with Listener(("", 0), backlog=jax.process_count(), authkey=key) as listener:
        place = {"hosts": _own_hosts(), "port": listener.address[1], "key": key.hex()}
        _share(json.dumps(place))
        return Peers(_accept(listener, jax.process_count() - 1))


def _share(text: str) -> str:
    """The text that process 0 has."""
    padded_X = np.frombuffer(text.encode().ljust(_PLACE_BYTES), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded_X), np.uint8)).decode()


def _accept(listener: Listener, count: int) -> list[Connection]:
    found: list[Connection] = []
    while len(found) < count:
        try:
            found.append(_prompt(listener.accept()))
        except (AuthenticationError, EOFError, OSError):
            continue  # somebody else
    return found


def _reach(hosts: Sequence[str], port: int, key: str) -> Connection:
    for host in hosts:
        try:
            return _prompt(Client((host, port), authkey=bytes.fromhex(key)))
        except OSError:
            continue
    raise RuntimeError(
        f"process 0 cannot be reached at {' or '.join(hosts)}, port {port}: let processes connect "
        "to each other's hosts"
    )


def _prompt(connection: Connection) -> Connection:
    """A connection that waits with nothing in order to send it with more."""
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _own_hosts() -> list[str]:
    """Where others may find this one: the address that it has for them, and its name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody:
        try:
            nobody.connect(("192.0.2.1", 9))  # sends nothing, and no host has that address
            return [nobody.getsockname()[0], socket.gethostname()]
        except OSError:  # no network at all
            return [socket.gethostname(), "localhost"]
