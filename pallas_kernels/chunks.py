"""An axis a few entries at a time: what is too large to exist at once is computed in chunks."""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Elements of the largest array of one chunk: 128 MB in float32.
CHUNK_ELEMENTS = 2**25


def chunk_sizes(length: int, elements: int) -> tuple[int, int]:
    """(count, size) of the fewest chunks, all of one size, that stay below ``CHUNK_ELEMENTS``.

    Args:
        length: of the axis.
        elements: of the largest array that one entry of the axis needs.
    """
    most = max(1, CHUNK_ELEMENTS // elements)
    count = -(-length // most)
    return count, -(-length // count)


def split_chunks(x_BAX: jax.Array, count: int, size: int) -> jax.Array:
    """[count, B, size, ...]: the second axis in chunks, filled up with zeros."""
    padding = [(0, 0)] * x_BAX.ndim
    padding[1] = (0, count * size - x_BAX.shape[1])
    x_BAX = jnp.pad(x_BAX, padding)
    return jnp.moveaxis(x_BAX.reshape(x_BAX.shape[0], count, size, *x_BAX.shape[2:]), 1, 0)


def join_chunks(x_CBAX: jax.Array, length: int) -> jax.Array:
    """The inverse of :func:`split_chunks`: the first ``length`` entries of the axis."""
    x_BCAX = jnp.moveaxis(x_CBAX, 0, 1)
    return x_BCAX.reshape(x_BCAX.shape[0], -1, *x_BCAX.shape[3:])[:, :length]
