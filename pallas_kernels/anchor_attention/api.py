"""Attention of many training blocks to one context each before its anchor, and to themselves.

For slot g of block a with anchor position p[a], head n reading kv head m = n // (N / K):

    score[s] = scale q[a, g, n] . k[s, m]                       for p[a] - window <= s < p[a]
    score[S + w] = scale q[a, g, n] . k_own[a, w, m]            for all w < G
    out[a, g, n] = sum softmax(score) [v, v_own[a]][:, m]

The context of a block is strictly before its anchor, whose key and value are the first of its own
block; blocks do not see each other. Every part is differentiable.

Axes: B sequences, A blocks a sequence, G slots a block, S positions, N query heads, K key/value
heads, H head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from pallas_kernels import devices, dispatch
from pallas_kernels.anchor_attention import SAVED, xla

__all__ = ["SAVED", "anchor_attention"]


def anchor_attention(
    q_BAGNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    own: tuple[jax.Array, jax.Array],
    anchor_BA: jax.Array,
    keep_BA: jax.Array,
    *,
    window: int | None = None,
    scale: float | None = None,
    sequences_axes: Sequence[str] = (),
    heads_axis: str | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """Grouped-query attention of blocks, each to the context before its anchor and to itself.

    Args:
        q_BAGNH: queries, rotated; N is a multiple of K.
        k_BSKH: keys of the context, in the dtype of the queries. All of it must be finite.
        v_BSKH: values, likewise.
        own: keys and values [B, A, W, K, H] that all slots of a block see beside the context:
            those of its own slots, W = G, or with "xla" others.
        anchor_BA: int32 in [0, S], positions of the anchors, ascending in a sequence where a
            block is kept.
        keep_BA: bool, False for a block that attends to nothing and gives 0.
        window: the last so many positions before the anchor are seen, static; None for all.
        scale: of the scores; None for H ** -0.5.
        sequences_axes: axes of the mesh that sequences are split over, where there is a mesh and
            they divide: each device then runs the kernels on its own sequences. XLA finds that out
            by itself.
        heads_axis: the same of query and key/value heads.
        implementation: "xla" anywhere, in any dtype; "mosaic_gpu" on NVIDIA GPUs of compute
            capability 9, in bfloat16, for H of 64 or 128.

    Returns:
        [B, A, G, N, H] in the dtype of the queries. Scores and softmax are in float32. It bears the
        name ``SAVED`` for policies of ``jax.checkpoint``, as do the log-sum-exps of the kernels.

    Raises:
        ValueError: shapes, dtypes or names that do not fit.
        RuntimeError: the implementation does not run on this jax.
    """
    dispatch.check_name(implementation)
    arguments = q_BAGNH, k_BSKH, v_BSKH, own, anchor_BA, keep_BA
    _check(*arguments, any_own=implementation == "xla")
    if implementation == "xla":
        return checkpoint_name(xla.attend_blocks(*arguments, window, scale), SAVED)
    problem = dispatch.version_problem()
    if problem:
        raise RuntimeError(problem)
    if window is not None or scale not in (None, q_BAGNH.shape[-1] ** -0.5):
        raise ValueError(
            f"window is {window} and scale {scale}: mosaic_gpu has no form with them, choose xla"
        )
    from pallas_kernels.anchor_attention import mosaic_gpu

    return _by_device(mosaic_gpu.attend_blocks, sequences_axes, heads_axis, *arguments)


def _by_device(
    attend: Callable[..., jax.Array],
    sequences_axes: Sequence[str],
    heads_axis: str | None,
    *arguments: Any,
) -> jax.Array:
    """``attend(*arguments)``, by all devices of a mesh whose axes are not in use yet."""
    free = devices.free_axes()
    if not free:
        return attend(*arguments)
    batch, _, kv_heads, _ = arguments[1].shape
    sequences = devices.split_over(sequences_axes, batch)
    heads = devices.split_over([heads_axis], kv_heads)
    blocks, context, whole = (
        P(sequences, None, None, heads),
        P(sequences, None, heads),
        P(sequences),
    )
    return jax.shard_map(
        attend,
        in_specs=(blocks, context, context, blocks, whole, whole),
        out_specs=blocks,
        axis_names=set(free),
        check_vma=False,
    )(*arguments)


def _check(
    q_BAGNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    own: tuple[jax.Array, jax.Array],
    anchor_BA: jax.Array,
    keep_BA: jax.Array,
    *,
    any_own: bool,
) -> None:
    if q_BAGNH.ndim != 5 or k_BSKH.ndim != 4 or k_BSKH.shape != v_BSKH.shape:
        raise ValueError(
            f"queries {q_BAGNH.shape}, keys {k_BSKH.shape}, values {v_BSKH.shape}: give "
            "[B, A, G, N, H] and twice [B, S, K, H]"
        )
    batch, anchors, slots, heads, width = q_BAGNH.shape
    sequences, _, kv_heads, kv_width = k_BSKH.shape
    if sequences != batch or kv_width != width or heads % kv_heads:
        raise ValueError(
            f"{heads} query heads of {width} in {batch} sequences cannot read {kv_heads} key heads "
            f"of {kv_width} in {sequences}"
        )
    seen = own[0].shape[2] if any_own and own[0].ndim == 5 else slots
    expected = (batch, anchors, seen, kv_heads, width)
    if own[0].shape != expected or own[1].shape != expected:
        raise ValueError(f"own keys {own[0].shape}, values {own[1].shape}: give twice {expected}")
    dtypes = {x.dtype.name for x in (q_BAGNH, k_BSKH, v_BSKH, *own)}
    if len(dtypes) > 1:
        raise ValueError(f"dtypes differ: {', '.join(sorted(dtypes))}")
    if not anchor_BA.shape == keep_BA.shape == (batch, anchors):
        raise ValueError(
            f"anchors {anchor_BA.shape}, kept {keep_BA.shape}: give twice {(batch, anchors)}"
        )
    if keep_BA.dtype != jnp.bool_ or not jnp.issubdtype(anchor_BA.dtype, jnp.integer):
        raise ValueError(f"anchors {anchor_BA.dtype}, kept {keep_BA.dtype}: give int32 and bool")
