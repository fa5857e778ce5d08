"""The meaning of the operation: products and a masked softmax, some blocks at a time."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.chunks import by_sequences, chunk_sizes, join_chunks, split_chunks

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def attend_blocks(
    q_BAGNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    own: tuple[jax.Array, jax.Array],
    anchor_BA: jax.Array,
    keep_BA: jax.Array,
    window: int | None = None,
    scale: float | None = None,
) -> jax.Array:
    """[B, A, G, N, H] of as many blocks at a time as memory bears; the backward pass computes the
    scores again. The cost is A x G x (S + G), never (A x G)^2."""
    scale = q_BAGNH.shape[-1] ** -0.5 if scale is None else scale
    attend = functools.partial(_attend_all, window, scale)
    return by_sequences(attend, q_BAGNH, k_BSKH, v_BSKH, *own, anchor_BA, keep_BA)


def _attend_all(
    window: int | None,
    scale: float,
    q_BAGNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *rest: jax.Array,
) -> jax.Array:
    """All blocks of some sequences."""
    batch, anchors, slots, heads, _ = q_BAGNH.shape
    count, size = chunk_sizes(anchors, batch * slots * heads * (k_BSKH.shape[1] + slots))
    blocks = q_BAGNH, *rest
    if count == 1:
        return _attend_some(window, scale, k_BSKH, v_BSKH, *blocks)
    attend = jax.checkpoint(lambda part: _attend_some(window, scale, k_BSKH, v_BSKH, *part))
    parts = jax.tree.map(lambda x: split_chunks(x, count, size), blocks)
    return join_chunks(jax.lax.map(attend, parts), anchors)


def _attend_some(
    window: int | None,
    scale: float,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_BAGNH: jax.Array,
    k_BAGKH: jax.Array,
    v_BAGKH: jax.Array,
    anchor_BA: jax.Array,
    keep_BA: jax.Array,
) -> jax.Array:
    """All of these blocks at once; the scores of context and own block share one softmax.

    Its sum divides the result and not the weights, which are as many times larger as the context
    is longer than a head is wide.
    """
    batch, anchors, slots, _, dim = q_BAGNH.shape
    length, kv_heads = k_BSKH.shape[1:3]
    # R: the slots and query heads of a block that read one key head.
    q = q_BAGNH.reshape(batch, anchors, slots, kv_heads, -1, dim)
    q_BKARH = jnp.moveaxis(q, 3, 1).reshape(batch, kv_heads, anchors, -1, dim)
    k_BKSH, v_BKSH, k_BKAGH, v_BKAGH = (
        jnp.moveaxis(x, -2, 1) for x in (k_BSKH, v_BSKH, k_BAGKH, v_BAGKH)
    )
    to_context = _product("bkarh,bksh->bkars", q_BKARH, k_BKSH) * scale
    to_block = _product("bkarh,bkagh->bkarg", q_BKARH, k_BKAGH) * scale
    position_S = jnp.arange(length, dtype=jnp.int32)
    visible_BAS = position_S < anchor_BA[..., None]
    if window is not None:
        visible_BAS &= position_S >= anchor_BA[..., None] - window
    to_context = jnp.where(visible_BAS[:, None, :, None], to_context, -jnp.inf)
    peak = jnp.maximum(to_context.max(-1), to_block.max(-1))[..., None]
    peak = jax.lax.stop_gradient(peak)
    to_context, to_block = jnp.exp(to_context - peak), jnp.exp(to_block - peak)
    total = to_context.sum(-1) + to_block.sum(-1)
    dtype = v_BSKH.dtype
    out = _product("bkars,bksh->bkarh", to_context.astype(dtype), v_BKSH)
    out = out + _product("bkarg,bkagh->bkarh", to_block.astype(dtype), v_BKAGH)
    out = (out / total[..., None]).astype(dtype)
    out = out.reshape(batch, kv_heads, anchors, slots, -1, dim)
    out_BAGNH = jnp.moveaxis(out, 1, 3).reshape(q_BAGNH.shape)
    return jnp.where(keep_BA[:, :, None, None, None], out_BAGNH, 0)
