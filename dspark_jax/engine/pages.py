"""Which pages of the caches a request holds: as many as its text needs.

The host gives them out before a round, for whatever the rounds in flight may bring. What is stored
of texts that are over stays in the pages that they had, and requests that begin alike hold the same
ones; where pages run short, what is stored goes first. Pages that nobody holds are free: whoever
ends or is sent back gives his up without a word to the device, since the rounds that may still
write to them were launched before those that write there next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dspark_jax.engine.prefix import Prefix, Prefixes
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

    def grow(self, part: Sequence[Tenant], stored: Prefixes) -> bool:
        """Let the tenants of a data shard have what their next round needs; nothing is given to
        anyone where there is not enough for all. Returns whether there was."""
        missing = [self._missing(tenant) for tenant in part]
        free = self._free(part, stored, sum(missing)) if any(missing) else []
        if sum(missing) > len(free):
            return False
        for tenant, count in zip(part, missing, strict=True):
            tenant.pages += free[:count]
            free = free[count:]
        return True

    def enter(
        self, tenant: Tenant, part: Sequence[Tenant], prefix: Prefix, stored: Prefixes
    ) -> Prefix | None:
        """Let a request have what its prompt needs, if as many pages are left then as there are
        tenants in its data shard: they will need some, too.

        Args:
            tenant: without pages.
            part: the tenants of the data shard.
            prefix: what is stored of its prompt: whole pages are its own, too, from now on.
            stored: in the data shard.

        Returns:
            The prefix, with the page of it that has to be copied; None where there is no room.
        """
        if not self.count:
            return prefix
        whole = prefix.count // PAGE
        tenant.pages = list(prefix.pages[:whole])
        missing = self._missing(tenant)
        free = self._free([*part, tenant], stored, missing + len(part)) if missing else []
        if missing and len(free) < missing + len(part):
            tenant.pages = []
            return None
        tenant.pages += free[:missing]
        if prefix.count % PAGE:
            prefix = replace(prefix, copy=(prefix.pages[whole], tenant.pages[whole]))
        return prefix

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

    def _free(self, part: Sequence[Tenant], stored: Prefixes, wanted: int) -> list[int]:
        """The pages that no tenant of a data shard holds, and where they are fewer than are wanted,
        those of what was stored longest ago."""
        free_Q = np.ones(self.count, bool)
        for tenant in part:
            free_Q[tenant.pages] = False
        while (free_Q & ~stored.held_Q).sum() < wanted and stored.give_up():
            pass
        found: list[int] = np.flatnonzero(free_Q & ~stored.held_Q).tolist()
        return found
