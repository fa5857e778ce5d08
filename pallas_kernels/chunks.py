"""An axis a few entries at a time: what is too large to exist at once is computed in chunks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.devices import free_axes

# Elements of the largest array of one chunk: 128 MB in float32.
CHUNK_ELEMENTS = 2**25
# Rows of logits at a time, of 0.2 to 1 MB each: 2 to 8 take as long, 1 takes 1.6 times that.
CPU_ROWS = 4


def chunk_sizes(length: int, elements: int, limit: int | None = None) -> tuple[int, int]:
    """(count, size) of few chunks, all of one size, that stay below ``CHUNK_ELEMENTS``: of twice
    the fewest at most, a number that leaves none to be filled up, if there is one.

    Args:
        length: of the axis.
        elements: of the largest array that one entry of the axis needs.
        limit: lower than ``CHUNK_ELEMENTS``, where smaller chunks are faster.
    """
    most = max(1, min(limit or CHUNK_ELEMENTS, CHUNK_ELEMENTS) // elements)
    fewest = -(-length // most)
    even = (count for count in range(fewest, 2 * fewest + 1) if length % count == 0)
    count = next(even, fewest)
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


def by_sequences(function: Callable[..., Any], *arrays_BX: Any) -> Any:
    """``function`` of arrays with a leading axis of sequences; each one's result is its own alone.

    On a CPU one sequence after the other, whose backward pass computes it again: what lies between
    input and result then stays in the cache (attention of 8 x 448 positions is 4 times as fast).
    All at once on other devices, and where a mesh splits the sequences.

    Args:
        function: of trees of arrays [B, ...], to an array [B, ...]; any B.
        arrays_BX: the trees.
    """
    if math.prod(free_axes().values()) > 1:
        return function(*arrays_BX)

    @jax.checkpoint
    def one(arrays_X: Any) -> Any:
        return function(*jax.tree.map(lambda x: x[None], arrays_X))[0]

    return jax.lax.platform_dependent(
        *arrays_BX, cpu=lambda *arrays: jax.lax.map(one, arrays), default=function
    )


def by_rows(
    function: Callable[..., Any],
    *arrays_TX: jax.Array,
    on_cpu: Callable[..., Any] | None = None,
) -> Any:
    """``function`` of arrays with a leading axis of rows; each row's result is its own alone.

    On a CPU, where XLA writes out what it reduces, a few rows at a time: what is written then stays
    in the cache and is never as large as the arrays. Elsewhere all rows at once.

    Args:
        function: of arrays [T, ...], to a tree of arrays [T, ...]; any T.
        arrays_TX: the rows; bfloat16 ones are never widened as a whole.
        on_cpu: the same with conditions and loops in it, if it is the faster for them: where the
            host does not compute itself, it waits for them.
    """
    in_few = functools.partial(_in_few_rows, on_cpu or function)
    return jax.lax.platform_dependent(*arrays_TX, cpu=in_few, default=function)


def _in_few_rows(function: Callable[..., Any], *arrays_TX: jax.Array) -> Any:
    num_rows = arrays_TX[0].shape[0]
    if num_rows <= CPU_ROWS:
        return function(*arrays_TX)
    words_TX, dtypes = [_as_words(x_TX) for x_TX in arrays_TX], [x_TX.dtype for x_TX in arrays_TX]

    def few(start: jax.Array) -> Any:
        part = (jax.lax.dynamic_slice_in_dim(x_TX, start, CPU_ROWS) for x_TX in words_TX)
        return function(*map(jax.lax.bitcast_convert_type, part, dtypes))

    def step(turn: jax.Array, done_TX: Any) -> Any:
        # The last rows begin early enough to be as many: some are computed again.
        start = jnp.minimum(turn * CPU_ROWS, num_rows - CPU_ROWS)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        return jax.tree.map(put, done_TX, few(start))

    forms = jax.eval_shape(few, jnp.int32(0))
    nothing_TX = jax.tree.map(lambda x: jnp.zeros((num_rows, *x.shape[1:]), x.dtype), forms)
    return jax.lax.fori_loop(0, -(-num_rows // CPU_ROWS), step, nothing_TX)


def _as_words(x_TX: jax.Array) -> jax.Array:
    """bfloat16 as the uint16 that it is in memory: before XLA for CPUs takes a slice of a bfloat16
    array, it makes all of it float32."""
    return jax.lax.bitcast_convert_type(x_TX, jnp.uint16) if x_TX.dtype == jnp.bfloat16 else x_TX
