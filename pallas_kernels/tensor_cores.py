"""What the attention kernels for NVIDIA GPUs share: matrices for the tensor cores, their products,
and a step of an online softmax.

Needs a jax with Mosaic GPU, see ``dispatch.py``.

Axes: M rows of a tile, S keys of a block, H width of a head.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = 64  # rows of a tensor-core product
BLOCK = 64  # keys of a step
STAGE_BYTES = 64 * 1024  # shared memory of a pipeline, so that two programs fit
LOG2_E = math.log2(math.e)
BY_ROW = plgpu.Layout.WGMMA.reduce(1)  # one value a row of a product
BY_COLUMN = plgpu.Layout.WGMMA.reduce(0)

Carry = tuple[jax.Array, jax.Array, jax.Array]


def layout(columns: int, dtype: Any) -> tuple[Any, Any]:
    """How a matrix lies in shared memory for the tensor cores and the copies."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(columns * itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // itemsize)), plgpu.SwizzleTransform(swizzle)


def matrix(columns: int, dtype: Any) -> Any:
    """Shared memory for 64 rows of a matrix."""
    return plgpu.SMEM((TILE, columns), dtype, transforms=layout(columns, dtype))


def stages(width: int) -> int:
    """Steps of two bfloat16 matrices that a pipeline holds at a time."""
    return STAGE_BYTES // (2 * TILE * width * 2)


def load(pairs: list[tuple[Any, Any]], barrier: Any) -> None:
    """Copies from memory into shared memory, all at once."""
    for source, smem in pairs:
        plgpu.copy_gmem_to_smem(source, smem, barrier)
    plgpu.barrier_wait(barrier)


def load_rows(source: Any) -> jax.Array:
    """One value for each row of a tile, out of memory: too few to be worth a copy beside."""
    return plgpu.load(source, layout=BY_ROW, optimized=False)  # type: ignore[call-arg]  # old jax


def store(pairs: list[tuple[Any, Any]]) -> None:
    """Copies what was written to shared memory into memory, all at once."""
    plgpu.commit_smem()
    for smem, place in pairs:
        plgpu.copy_smem_to_gmem(smem, place)
    plgpu.wait_smem_to_gmem(0)


def multiply(a_smem: Any, b_smem: Any) -> jax.Array:
    """A product by the tensor cores, in float32."""

    def product(sum_ref: Any) -> jax.Array:
        plgpu.wgmma(sum_ref, a_smem, b_smem)
        return sum_ref[...]

    shape = a_smem.shape[0], b_smem.shape[1]
    return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))


def position(block: Any, axis: int) -> jax.Array:
    """int32 positions of a block's keys along an axis of its scores."""
    shape = TILE, BLOCK
    offset = plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)
    return offset + block * BLOCK


def along_rows(x_M: jax.Array, columns: int) -> jax.Array:
    """[M, columns]: a value for each row."""
    return lax.broadcast_in_dim(x_M, (TILE, columns), [0])


def along_columns(x_M: jax.Array) -> jax.Array:
    """[S, M]: a value for each column."""
    return lax.broadcast_in_dim(x_M, (BLOCK, TILE), [1])


def scores(a_smem: Any, b_smem: Any) -> jax.Array:
    """float32 scaled products of all pairs of rows, to the base 2."""
    width = a_smem.shape[-1]
    return multiply(a_smem, b_smem.transpose((1, 0))) * (width**-0.5 * LOG2_E)


def softmax_step(
    score_MS: jax.Array, seen_MS: jax.Array, v_smem: Any, weight_smem: Any, carry: Carry
) -> Carry:
    """One more block of keys in an online softmax.

    Args:
        score_MS: float32 :func:`scores`.
        seen_MS: bool, which of them count.
        v_smem: values [S, H].
        weight_smem: room for the weights [M, S].
        carry: float32 weighted sum of values [M, H], highest score [M], sum of the weights [M].
    """
    out_MH, highest_M, total_M = carry
    score_MS = jnp.where(seen_MS, score_MS, -jnp.inf)
    new_M = jnp.maximum(highest_M, score_MS.max(axis=1))
    decay_M = jnp.exp2(highest_M - new_M)
    weight_MS = jnp.exp2(score_MS - along_rows(new_M, BLOCK))
    total_M = total_M * decay_M + weight_MS.sum(axis=1)
    weight_smem[...] = weight_MS.astype(weight_smem.dtype)
    plgpu.commit_smem()
    # In a product of its own, not added to what is there: the interpreter has no accumulator
    # that starts from a value.
    new_MH = multiply(weight_smem, v_smem)
    return out_MH * along_rows(decay_M, out_MH.shape[1]) + new_MH, new_M, total_M
