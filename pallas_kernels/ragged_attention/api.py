"""Attention of 1 to a few query rows a slot against the slot's own cache, of its own length.

For row t of slot b with head n reading kv head m = n // (N / K), and w the window or infinity:

    score[s] = cap(scale q[t, n] . k[b, m, s])      for limit[t] - w <= s < limit[t]
    out[t, n] = sum_s softmax(score)[s] v[b, m, s]

Under a window the S places of a cache are a ring: position s lies at s % S, and every position that
a row may see is the last one that was written to its place. Without one a cache may lie in pages
(:mod:`~pallas_kernels.ragged_attention.pages`).

A row's limit alone says what it sees: its position + 1 in verification and in a chunk of a
prompt, the end of its block in a bidirectional block that lies in the cache. A block that does not
lie there brings its keys along (``own``): all of its rows see all of them, or of one that is not a
block those that ``own_seen`` names.

Axes: T flat rows, P groups of C rows, W keys of an own block, B slots, S positions, N query heads,
K key/value heads, H head width, L layers, X any of these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from pallas_kernels import devices, dispatch
from pallas_kernels.ragged_attention import xla
from pallas_kernels.ragged_attention.groups import Groups
from pallas_kernels.ragged_attention.pages import PAGE, gather_pages

__all__ = ["ragged_attention"]


def ragged_attention(
    q_TNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    groups: Groups,
    limit_T: jax.Array,
    *,
    layer: jax.Array | int | None = None,
    page_BX: jax.Array | None = None,
    own: tuple[jax.Array, jax.Array] | None = None,
    own_seen_CW: jax.Array | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    heads_axis: str | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """Grouped-query attention of flat rows, each to a range of its slot's cache.

    Args:
        q_TNH: queries, rotated; N is a multiple of K.
        k_BKSH: keys of all slots, in the dtype of the queries; with ``layer``, of all layers, [L,
            B, K, S, H]. Those that a row may not see can be anything.
        v_BKSH: values, likewise; all of them must be finite.
        groups: which rows attend to which slot (:mod:`~pallas_kernels.ragged_attention.groups`).
        limit_T: int32: row t sees the positions before it; at most S without a window.
        layer: int32, which layer of the caches is meant; None for caches of one layer.
        page_BX: int32 pages of every slot, of caches in pages, which are [Q, K, PAGE, H] or
            [L, Q, K, PAGE, H]; None for caches that lie in one piece. No window then.
        own: keys and values [P, W, K, H] that all rows of a group see beside the cache.
        own_seen_CW: bool, which of them the rows see, of every group alike; None for all. Of a row
            at least one. Only "xla" knows it.
        window: the last so many positions before the limit are seen, static; None for all.
        scale: of the scores; None for H ** -0.5.
        softcap: scores become ``softcap * tanh(score / softcap)``; None leaves them.
        heads_axis: axis of the mesh that query and key/value heads are split over, where there is a
            mesh and they divide: each device then runs the kernel on its own heads. XLA finds that
            out by itself.
        implementation: "xla" anywhere, in any dtype; "mosaic_gpu" on NVIDIA GPUs of compute
            capability 9, in bfloat16, for H of 64 or 128 and S a multiple of 64.

    Returns:
        [T, N, H] in the dtype of the queries. Rows that see nothing, and rows of no group
        (padding), are 0. Scores and softmax are in float32.

    Raises:
        ValueError: shapes, dtypes or names that do not fit.
        RuntimeError: the implementation does not run on this jax.
    """
    dispatch.check_name(implementation)
    _check(q_TNH, k_BKSH, v_BKSH, groups, limit_T, layer, page_BX, own, window)
    q_PCNH, limit_PC = groups.gather(q_TNH), groups.gather(limit_T)
    if implementation == "xla":
        if layer is not None:
            k_BKSH, v_BKSH = k_BKSH[layer], v_BKSH[layer]
        slot_P = groups.slot_P
        if page_BX is not None:
            k_BKSH, v_BKSH = (gather_pages(pool, page_BX, slot_P) for pool in (k_BKSH, v_BKSH))
            slot_P = None
        given = q_PCNH, k_BKSH, v_BKSH, slot_P, limit_PC, own, own_seen_CW
        out_PCNH = xla.attend_groups(*given, window, scale, softcap)
        return groups.scatter(out_PCNH)
    problem = dispatch.version_problem()
    if problem:
        raise RuntimeError(problem)
    from pallas_kernels.ragged_attention import mosaic_gpu

    if layer is None:
        k_BKSH, v_BKSH, layer = k_BKSH[None], v_BKSH[None], jnp.int32(0)
    if own_seen_CW is not None:
        raise ValueError("own_seen_CW is given: mosaic_gpu has no form with it, choose xla")
    if softcap is not None:
        raise ValueError(f"softcap is {softcap}: mosaic_gpu has no form with it, choose xla")
    attend = functools.partial(mosaic_gpu.attend_groups, window=window)
    own_scale = q_TNH.shape[-1] ** -0.5
    if scale not in (None, own_scale):
        q_PCNH = (q_PCNH.astype(jnp.float32) * (scale / own_scale)).astype(q_PCNH.dtype)
    arguments = q_PCNH, k_BKSH, v_BKSH, layer, groups.slot_P, limit_PC, page_BX, own
    return groups.scatter(_over_heads(attend, heads_axis, *arguments))


def _over_heads(attend: Callable[..., jax.Array], axis: str | None, *arguments: Any) -> jax.Array:
    """``attend(*arguments)``, by all devices of a mesh whose axes are not in use yet."""
    free = devices.free_axes()
    if axis not in free:
        return attend(*arguments)
    split = devices.split_over([axis], arguments[1].shape[2])
    rows, cache, whole = P(None, None, split), P(None, None, split), P()
    return jax.shard_map(
        attend,
        in_specs=(rows, cache, cache, whole, whole, whole, whole, rows),
        out_specs=rows,
        axis_names=set(free),
        check_vma=False,
    )(*arguments)


def _check(
    q_TNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    groups: Groups,
    limit_T: jax.Array,
    layer: jax.Array | int | None,
    page_BX: jax.Array | None,
    own: tuple[jax.Array, jax.Array] | None,
    window: int | None,
) -> None:
    expected_ndim = 4 if layer is None else 5
    if q_TNH.ndim != 3 or k_BKSH.ndim != expected_ndim or k_BKSH.shape != v_BKSH.shape:
        raise ValueError(
            f"queries {q_TNH.shape}, keys {k_BKSH.shape}, values {v_BKSH.shape}: give [T, N, H] "
            "and twice [B, K, S, H], or [L, B, K, S, H] with a layer"
        )
    rows, heads, width = q_TNH.shape
    slots, kv_heads, size, kv_width = k_BKSH.shape[-4:]
    if page_BX is not None:
        slots = page_BX.shape[0]
        if size != PAGE or page_BX.ndim != 2 or window is not None:
            raise ValueError(
                f"pages of {size} positions, a table {page_BX.shape} of them, window {window}: "
                f"pages have {PAGE}, their table is [B, X], and they know no window"
            )
    if width != kv_width or heads % kv_heads:
        raise ValueError(
            f"{heads} query heads of {width} cannot read {kv_heads} key heads of {kv_width}"
        )
    if not q_TNH.dtype == k_BKSH.dtype == v_BKSH.dtype:
        raise ValueError(f"dtypes differ: {q_TNH.dtype}, {k_BKSH.dtype}, {v_BKSH.dtype}")
    count = groups.num_groups
    placed = count * groups.rows_per_group if groups.group_T is None else groups.group_T.shape[0]
    if not limit_T.shape == (rows,) == (placed,):
        raise ValueError(f"{rows} rows, {placed} of them placed, and limits {limit_T.shape}")
    if groups.slot_P is None and count != slots:
        raise ValueError(f"{count} groups without slots, and {slots} slots in the cache")
    if own is not None:
        expected = (count, own[0].shape[1], kv_heads, width)
        if own[0].shape != expected or own[1].shape != expected:
            raise ValueError(
                f"own keys {own[0].shape}, values {own[1].shape}: give twice [P, W, K, H]"
            )
    if window is not None and window < 1:
        raise ValueError(f"window is {window}: give at least 1 position, or None for all")
