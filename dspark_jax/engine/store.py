"""What becomes of texts that give up their slots, and what new ones find of them."""

from __future__ import annotations

from collections.abc import Sequence

from dspark_jax.engine.plan import Keep
from dspark_jax.engine.pool import PoolConfig
from dspark_jax.engine.prefix import Prefixes
from dspark_jax.engine.seats import Tenant


class Store:
    """The prefixes of every data shard; where there is no pool, nothing is ever stored.

    Texts are copied out of their slots before the next round, while nobody else has taken these:
    who enters before it finds them already. Pages that slots hold stay where they are.

    Attributes:
        shards: what is stored in each.
    """

    def __init__(self, pool: PoolConfig | None, num_shards: int) -> None:
        """Empty."""
        sizes = 0, 0, 0
        if pool is not None:
            sizes = pool.pages, pool.snapshots, pool.largest.num_pages
        pages, snapshots, among = (size // num_shards for size in sizes)
        self._there = pool is not None
        self.shards = [Prefixes(pages, snapshots, among) for _ in range(num_shards)]
        self._waiting: list[Keep] = []

    def clear(self, tenants: Sequence[Tenant] = ()) -> None:
        """Forget everything, and what these tenants have read besides."""
        self._waiting = []
        for prefixes in self.shards:
            prefixes.clear()
        for tenant in tenants:
            tenant.current = False

    def leave(self, tenant: Tenant, num_slots: int, *, still: bool = False) -> None:
        """A text is about to give up its slot: store what it has read.

        Args:
            tenant: with the tokens that are known of it.
            num_slots: of a data shard.
            still: whether its slot stays as it is whatever the rounds in flight do. Else it may
                have gone on in them, behind what is known.
        """
        if not (self._there and tenant.current and tenant.slot >= 0):
            return
        if tenant.reader.result.finish_reason == "error":
            return
        ids, count = (*tenant.request.prompt_ids, *tenant.committed), tenant.read
        if tenant.decoding:
            count, still = len(ids) - 1, still or not tenant.pending
        else:
            still = True
        anchor = ids[count] if still else None
        kept = self.shards[tenant.slot // num_slots].keep(ids[:count], anchor, tenant.pages)
        if kept.pages or kept.snapshot >= 0:
            self._waiting.append(Keep(tenant.slot, kept))

    def take(self) -> tuple[Keep, ...]:
        """What the next plan has to copy."""
        taken, self._waiting = tuple(self._waiting), []
        return taken
