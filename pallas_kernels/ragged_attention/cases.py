"""Shapes of serving attention: what the tests prove and the benchmark measures."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.ragged_attention.groups import Groups, group_runs
from pallas_kernels.ragged_attention.pages import PAGE


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape.

    Attributes:
        name: of the case.
        groups: P; each reads a slot of its own.
        rows: C rows of a group.
        positions: S that a slot has room for, and about twice what it holds on average; a single
            one is full.
        heads: N.
        kv_heads: K.
        width: H.
        bidirectional: all rows of a group see what is before the group and W = C own keys;
            otherwise each row sees what is up to itself.
        window: positions that a row sees, or None.
        paged: whether the caches lie in pages, in no order.
    """

    name: str
    groups: int
    rows: int
    positions: int
    heads: int
    kv_heads: int
    width: int
    bidirectional: bool = False
    window: int | None = None
    paged: bool = False

    def small(self) -> Case:
        """The same in the least size that has all its features: for the interpreter."""
        return dataclasses.replace(
            self,
            groups=2,
            rows=min(self.rows, 3),
            positions=512,
            heads=self.heads // self.kv_heads,
            kv_heads=1,
            window=None if self.window is None else 200,
        )

    def limits(self, seed: int = 0) -> np.ndarray:
        """int32 limit_T. The first group is at the very start, and the last one at the end."""
        room = self.positions - self.rows
        start_P = np.random.default_rng(seed).integers(0, room + 1, self.groups)
        start_P[0] = 0
        start_P[-1] = room
        within = np.zeros(self.rows) if self.bidirectional else np.arange(1, self.rows + 1)
        return (start_P[:, None] + within).astype(np.int32).reshape(-1)

    def arguments(self, dtype: Any = jnp.bfloat16, seed: int = 0) -> dict[str, Any]:
        """What ``ragged_attention`` takes, with random queries, keys and values."""
        drawn = self.shapes(dtype)
        keys = iter(jax.random.split(jax.random.key(seed), 5))
        for name in ("q_TNH", "k_BKSH", "v_BKSH", "own"):
            drawn[name] = jax.tree.map(
                lambda x: jax.random.normal(next(keys), x.shape, dtype), drawn[name]
            )
        if self.paged:
            table = drawn["page_BX"]
            order = np.random.default_rng(seed).permutation(table.size)
            drawn["page_BX"] = jnp.asarray(order.reshape(table.shape), jnp.int32)
        return drawn | {"limit_T": jnp.asarray(self.limits(seed))}

    def shapes(self, dtype: Any = jnp.bfloat16) -> dict[str, Any]:
        """The same as shapes alone."""
        rows, table = self.groups * self.rows, None
        shape: tuple[int, ...] = self.groups, self.kv_heads, self.positions, self.width
        if self.paged:
            table = jax.ShapeDtypeStruct((self.groups, self.positions // PAGE), jnp.int32)
            shape = table.size, self.kv_heads, PAGE, self.width
        cache = jax.ShapeDtypeStruct(shape, dtype)
        own = jax.ShapeDtypeStruct((self.groups, self.rows, self.kv_heads, self.width), dtype)
        return {
            "q_TNH": jax.ShapeDtypeStruct((rows, self.heads, self.width), dtype),
            "k_BKSH": cache,
            "v_BKSH": cache,
            "limit_T": jax.ShapeDtypeStruct((rows,), jnp.int32),
            "own": (own, own) if self.bidirectional else None,
            "page_BX": table,
        }

    @property
    def grouping(self) -> Groups:
        """How the rows are grouped: in runs, one a slot."""
        return group_runs(None, self.groups, self.rows)

    def cost(self, itemsize: int = 2, seed: int = 0) -> tuple[int, int]:
        """(bytes, FLOPs) that nobody can do without: valid keys and values, queries, results."""
        limit_PC = self.limits(seed).reshape(self.groups, self.rows)
        first_PC = np.maximum(limit_PC - (self.window or self.positions), 0)
        keys = int(np.sum(limit_PC.max(1) - first_PC.min(1)))
        seen = int(np.sum(limit_PC - first_PC))
        if self.bidirectional:
            keys += self.groups * self.rows
            seen += self.groups * self.rows**2
        values = 2 * keys * self.kv_heads + 2 * self.groups * self.rows * self.heads
        return values * self.width * itemsize, 4 * seen * self.heads * self.width


CASES = (
    Case("verify 8 of 32 x 4096, 32/8 heads of 128", 32, 8, 4096, 32, 8, 128),
    Case("verify 8 of 32 x 8192, 40/8 heads of 128", 32, 8, 8192, 40, 8, 128),
    Case("verify 8 of 128 x 4096, 16/8 heads of 128", 128, 8, 4096, 16, 8, 128),
    Case("verify 5 of 32 x 1024, 9/3 heads of 64", 32, 5, 1024, 9, 3, 64),
    Case("verify 8 of 1 x 8192, 32/8 heads of 128", 1, 8, 8192, 32, 8, 128),
    Case("plain 1 of 32 x 4096, 32/8 heads of 128", 32, 1, 4096, 32, 8, 128),
    Case(
        "verify 8 of 32 x 8192, window 1024, 16/8 heads of 128",
        32,
        8,
        8192,
        16,
        8,
        128,
        window=1024,
    ),
    Case("draft 7 of 32 x 4096, 32/8 heads of 128", 32, 7, 4096, 32, 8, 128, bidirectional=True),
    Case("prompt 128 of 4 x 4096, 32/8 heads of 128", 4, 128, 4096, 32, 8, 128),
    Case("verify 8 of 32 x 4096, in pages, 32/8 heads of 128", 32, 8, 4096, 32, 8, 128, paged=True),
    Case("verify 8 of 1 x 8192, in pages, 32/8 heads of 128", 1, 8, 8192, 32, 8, 128, paged=True),
    Case(
        "draft 7 of 32 x 4096, in pages, 32/8 heads of 128",
        32,
        7,
        4096,
        32,
        8,
        128,
        bidirectional=True,
        paged=True,
    ),
    Case(
        "prompt 256 of 4 x 4096, in pages, 32/8 heads of 128", 4, 256, 4096, 32, 8, 128, paged=True
    ),
)
