"""Attention of whole sequences, where nothing is kept: training features."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dspark_jax.axes import MESH_RULES
from dspark_jax.models.layers import cap
from pallas_kernels import devices
from pallas_kernels.chunks import by_sequences
from pallas_kernels.ragged_attention.api import ragged_attention
from pallas_kernels.ragged_attention.groups import group_runs
from pallas_kernels.ragged_attention.pages import PAGE

ATTENTION_ROWS = 128  # queries at a time


def attend_causally(
    q_BSNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    window: int = 0,
    scale: float | None = None,
    softcap: float | None = None,
    kernels: str = "xla",
) -> jax.Array:
    """Grouped-query attention of whole sequences, each position to itself and those before it.

    Args:
        q_BSNH: queries; N is a multiple of K, and query head n reads key head n // (N // K).
        k_BSKH: keys.
        v_BSKH: values.
        window: the last so many positions are seen, the own one included; 0 for all.
        scale: of the scores; None for H ** -0.5.
        softcap: scores become ``softcap * tanh(score / softcap)``; None leaves them.
        kernels: the implementation of ``ragged_attention``, for which there is no derivative; or
            "xla": ``ATTENTION_ROWS`` queries at a time against the keys that some of them see, so
            that half of the scores, or all but a window, are never computed.

    Returns:
        [B, S, N, H] in the dtype of the queries; softmax in float32.

    Raises:
        ValueError: dtypes or sizes that the kernel has no form for.
    """
    attend: Callable[..., jax.Array]
    if kernels == "xla":
        scale = q_BSNH.shape[-1] ** -0.5 if scale is None else scale
        attend = functools.partial(_attend_causally, window=window, scale=scale, softcap=softcap)
        return by_sequences(attend, q_BSNH, k_BSKH, v_BSKH)
    attend = functools.partial(
        _attend_by_kernel, window=window, scale=scale, softcap=softcap, kernels=kernels
    )
    return _by_device(attend, q_BSNH, k_BSKH, v_BSKH)


def _attend_causally(
    q_BSNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    window: int,
    scale: float,
    softcap: float | None,
) -> jax.Array:
    batch, length, _, dim = q_BSNH.shape
    kv_heads = k_BSKH.shape[2]
    k_BKSH, v_BKSH = jnp.moveaxis(k_BSKH, 2, 1), jnp.moveaxis(v_BSKH, 2, 1)
    q = q_BSNH.reshape(batch, length, kv_heads, -1, dim)
    parts = []
    for first in range(0, length, ATTENTION_ROWS):
        end = min(first + ATTENTION_ROWS, length)
        start = max(0, first - window + 1) if window else 0
        k, v = k_BKSH[:, :, start:end], v_BKSH[:, :, start:end]
        part = jnp.moveaxis(q[:, first:end], 1, 3)
        score = jnp.einsum("bkrth,bksh->bkrts", part, k, preferred_element_type=jnp.float32)
        score = cap(score * scale, softcap)
        age_TS = jnp.arange(first, end)[:, None] - jnp.arange(start, end)
        visible_TS = (age_TS >= 0) & (age_TS < window) if window else age_TS >= 0
        weight = jax.nn.softmax(jnp.where(visible_TS, score, -jnp.inf), axis=-1).astype(v.dtype)
        # In the order of the product's own axes: another order makes a CPU copy the values first.
        out = jnp.einsum("bkrts,bksh->bkrth", weight, v, preferred_element_type=jnp.float32)
        parts.append(jnp.moveaxis(out.astype(v.dtype), 3, 1))
    return jnp.concatenate(parts, axis=1).reshape(q_BSNH.shape)


def _by_device(attend: Callable[..., jax.Array], *arrays_BSXH: jax.Array) -> jax.Array:
    """``attend(*arrays)``, by all devices of the mesh in use, each on its sequences and heads."""
    free = devices.free_axes()
    if not free:
        return attend(*arrays_BSXH)
    _, k_BSKH, _ = arrays_BSXH
    sequences = devices.split_over(MESH_RULES["B"], k_BSKH.shape[0])
    split = PartitionSpec(sequences, None, devices.split_over(MESH_RULES["K"], k_BSKH.shape[2]))
    return jax.shard_map(
        attend, in_specs=split, out_specs=split, axis_names=set(free), check_vma=False
    )(*arrays_BSXH)


def _attend_by_kernel(
    q_BSNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    window: int,
    scale: float | None,
    softcap: float | None,
    kernels: str,
) -> jax.Array:
    """Every sequence is a group of rows, and its cache are its own keys and values."""
    batch, length = q_BSNH.shape[:2]

    def cache(x_BSKH: jax.Array) -> jax.Array:
        padding = ((0, 0), (0, -length % PAGE), (0, 0), (0, 0))
        return jnp.swapaxes(jnp.pad(x_BSKH, padding), 1, 2)

    out_TNH = ragged_attention(
        q_BSNH.reshape(-1, *q_BSNH.shape[2:]),
        cache(k_BSKH),
        cache(v_BSKH),
        group_runs(None, batch, length),
        jnp.tile(jnp.arange(1, length + 1, dtype=jnp.int32), batch),
        window=window or None,
        scale=scale,
        softcap=softcap,
        implementation=kernels,
    )
    return out_TNH.reshape(q_BSNH.shape)
