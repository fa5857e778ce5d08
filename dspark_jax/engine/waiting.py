"""Requests that have no slot yet: who is next, and how many there are."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator

from dspark_jax.engine.seats import Tenant

FIRST = -(2**63)  # before every priority


class Waiting:
    """Higher priorities first, then by arrival.

    :meth:`add` and :attr:`wanted` may be called from any thread at any time; all the rest belongs
    to the thread that runs the rounds.
    """

    def __init__(self) -> None:
        self._arrived: deque[tuple[int, int, Tenant]] = deque()
        self._heap: list[tuple[int, int, Tenant]] = []

    def add(self, tenant: Tenant, priority: int) -> None:
        """Somebody arrives."""
        self._arrived.append((-priority, tenant.arrival, tenant))

    def put_back(self, tenant: Tenant) -> None:
        """Somebody had a slot, and is to have the next one."""
        heapq.heappush(self._heap, (FIRST, tenant.arrival, tenant))

    def __len__(self) -> int:
        return len(self._arrived) + len(self._heap)

    def __iter__(self) -> Iterator[Tenant]:
        self._seat()
        return iter([tenant for _, _, tenant in self._heap])

    @property
    def wanted(self) -> int:
        """How many of them somebody still waits for."""
        entries = [*self._heap, *self._arrived]
        return sum(not tenant.mailbox.cancelled for _, _, tenant in entries)

    @property
    def first(self) -> Tenant:
        """Who is next."""
        self._seat()
        return self._heap[0][-1]

    def pop(self) -> None:
        """The first one has a slot now."""
        heapq.heappop(self._heap)

    def returned(self) -> list[Tenant]:
        """Those who had a slot before."""
        return [tenant for priority, _, tenant in self._heap if priority == FIRST]

    def drop(self, tenant: Tenant) -> None:
        """Forget one, if it is here."""
        self._seat()
        self._heap = [entry for entry in self._heap if entry[-1] is not tenant]
        heapq.heapify(self._heap)

    def clear(self) -> None:
        """Forget all."""
        self._arrived.clear()
        self._heap = []

    def _seat(self) -> None:
        """Those who have arrived take their places."""
        while self._arrived:
            heapq.heappush(self._heap, self._arrived.popleft())
