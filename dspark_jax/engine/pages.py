"""Which pages of the caches a request holds: as many as its text needs.

The host gives them out before a round, for whatever the rounds in flight may bring. Pages that
nobody holds are free: whoever ends or is sent back gives his up without a word to the device, since
the rounds that may still write to them were launched before those that write there next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dspark_jax.engine.seats import Tenant, room
from dspark_jax.scheduler.shape import Sizes
from pallas_kernels.ragged_attention.pages import PAGE


def pages_for(positions: int) -> int:
    """Pages that hold so many positions."""
    return -(-positions // PAGE)


@dataclass(frozen=True)
class Pages:
    """The pages of every data shard; where there are none, nobody needs any.

    Attributes:
        count: of a data shard; 0 for caches without pages.
        columns: most rows of a request in a round.
    """

    count: int
    columns: int

    def grow(self, part: Sequence[Tenant]) -> bool:
        """Let the tenants of a data shard have what their next round needs; nothing is given to
        anyone where there is not enough for all. Returns whether there was."""
        missing = [self._missing(tenant) for tenant in part]
        free = self._free(part) if any(missing) else []
        if sum(missing) > len(free):
            return False
        for tenant, count in zip(part, missing, strict=True):
            tenant.pages += free[:count]
            free = free[count:]
        return True

    def enter(self, tenant: Tenant, part: Sequence[Tenant]) -> bool:
        """Let a request have what its prompt needs, if as many pages are left then as there are
        tenants in its data shard: they will need some, too. Returns whether it has."""
        missing = self._missing(tenant)
        free = self._free(part) if missing else []
        if missing and len(free) < missing + len(part):
            return False
        tenant.pages += free[:missing]
        return True

    def table(self, tenants: Sequence[Tenant], sizes: Sizes, shards: int) -> np.ndarray | None:
        """int32 [B, X]: the pages of every slot over all data shards, and a number that no page has
        where there is none; None without pages."""
        if not self.count:
            return None
        shape = sizes.slots * shards, pages_for(sizes.positions)
        page_BX = np.full(shape, self.count, np.int32)
        for tenant in tenants:
            page_BX[tenant.slot, : len(tenant.pages)] = tenant.pages
        return page_BX

    def _missing(self, tenant: Tenant) -> int:
        need = pages_for(room(tenant, self.columns)) if self.count else 0
        return max(0, need - len(tenant.pages))

    def _free(self, part: Sequence[Tenant]) -> list[int]:
        """The pages that no tenant of a data shard holds."""
        free = np.ones(self.count, bool)
        for tenant in part:
            free[tenant.pages] = False
        found: list[int] = np.flatnonzero(free).tolist()
        return found
