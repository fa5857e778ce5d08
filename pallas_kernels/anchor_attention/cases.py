"""Shapes of training attention that tests and benchmarks share, and random inputs of these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Case:
    """One shape.

    Attributes:
        batch: B.
        anchors: A.
        slots: G.
        positions: S.
        heads: N.
        kv_heads: K.
        width: H.
        dtype: of all arrays.
    """

    batch: int
    anchors: int
    slots: int
    positions: int
    heads: int
    kv_heads: int
    width: int
    dtype: str = "bfloat16"

    @property
    def name(self) -> str:
        """For tables."""
        return (
            f"{self.batch} x {self.anchors} blocks of {self.slots}, {self.positions} positions, "
            f"{self.heads}/{self.kv_heads} heads of {self.width} {self.dtype}"
        )

    def anchors_of(self, seed: int = 0) -> np.ndarray:
        """int32 anchor_BA: ascending, anywhere that leaves room for a whole block."""
        shape = self.batch, self.anchors
        drawn = np.random.default_rng(seed).integers(0, self.positions - self.slots, shape)
        return np.sort(drawn, axis=1).astype(np.int32)

    def cost(self, seed: int = 0) -> tuple[int, int]:
        """(bytes, FLOPs) that a forward pass cannot do without: each array once, and every slot
        against the context before its anchor and its own block."""
        rows = self.batch * self.anchors * self.slots
        context = self.batch * self.positions
        values = 2 * rows * self.heads + 2 * (rows + context) * self.kv_heads
        seen = self.slots * int(np.sum(self.anchors_of(seed) + self.slots))
        flops = 4 * seen * self.heads * self.width
        return values * self.width * jnp.dtype(self.dtype).itemsize, flops


CASES = (
    Case(4, 128, 7, 448, 9, 3, 64, dtype="float32"),
    Case(1, 128, 7, 1024, 16, 8, 128, dtype="float32"),
    Case(4, 512, 7, 4096, 32, 8, 128),
    Case(4, 512, 7, 4096, 16, 8, 128),
    Case(8, 512, 7, 2048, 40, 8, 128),
    Case(32, 128, 7, 448, 9, 3, 64),
)


def make_inputs(case: Case, seed: int = 0) -> tuple[Any, ...]:
    """Positional arguments of ``anchor_attention``; every block is kept."""
    rows = case.batch, case.anchors, case.slots
    context_shape = case.batch, case.positions, case.kv_heads, case.width
    own_shape = *rows, case.kv_heads, case.width
    shapes = ((*rows, case.heads, case.width), context_shape, context_shape, own_shape, own_shape)
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    q, k, v, *own = (
        jax.random.normal(key, shape, case.dtype) for key, shape in zip(keys, shapes, strict=True)
    )
    keep_BA = jnp.ones((case.batch, case.anchors), bool)
    return q, k, v, tuple(own), jnp.asarray(case.anchors_of(seed)), keep_BA
