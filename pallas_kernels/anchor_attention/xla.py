"""The meaning of the operation: products and a masked softmax, some blocks at a time."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.chunks import chunk_sizes, join_chunks, split_chunks

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def attend_blocks(
    q_BAGNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    own: tuple[jax.Array, jax.Array],
    anchor_BA: jax.Array,
    keep_BA: jax.Array,
) -> jax.Array:
    """[B, A, G, N, H] of as many blocks at a time as memory bears; the backward pass computes the
    scores again. The cost is A x G x (S + G), never (A x G)^2."""
    batch, anchors, slots, heads, _ = q_BAGNH.shape
    count, size = chunk_sizes(anchors, batch * slots * heads * (k_BSKH.shape[1] + slots))
    blocks = q_BAGNH, *own, anchor_BA, keep_BA
    if count == 1:
        return _attend_some(k_BSKH, v_BSKH, *blocks)
    attend = jax.checkpoint(lambda part: _attend_some(k_BSKH, v_BSKH, *part))
    parts = jax.tree.map(lambda x: split_chunks(x, count, size), blocks)
    return join_chunks(jax.lax.map(attend, parts), anchors)


def _attend_some(
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    q_BAGNH: jax.Array,
    k_BAGKH: jax.Array,
    v_BAGKH: jax.Array,
    anchor_BA: jax.Array,
    keep_BA: jax.Array,
) -> jax.Array:
    """All of these blocks at once; the scores of context and own block share one softmax."""
    *lead, heads, dim = q_BAGNH.shape
    length, kv_heads = k_BSKH.shape[1:3]
    q = q_BAGNH.reshape(*lead, kv_heads, heads // kv_heads, dim)
    to_context = _product("bagkrh,bskh->bakrgs", q, k_BSKH)
    to_block = _product("bagkrh,bawkh->bakrgw", q, k_BAGKH)
    visible_BAS = jnp.arange(length, dtype=jnp.int32) < anchor_BA[..., None]
    to_context = jnp.where(visible_BAS[:, :, None, None, None], to_context, -jnp.inf)
    score = jnp.concatenate([to_context, to_block], axis=-1) * dim**-0.5
    weight = jax.nn.softmax(score, axis=-1).astype(v_BSKH.dtype)
    # In the order of the products' own axes: XLA has no bfloat16 product on CPUs in some others.
    out = _product("bakrgs,bskh->bkargh", weight[..., :length], v_BSKH)
    out = jnp.moveaxis(out, 2, 1) + _product("bakrgw,bawkh->bakrgh", weight[..., length:], v_BAGKH)
    out_BAGNH = jnp.moveaxis(out.astype(v_BSKH.dtype), 4, 2).reshape(q_BAGNH.shape)
    return jnp.where(keep_BA[:, :, None, None, None], out_BAGNH, 0)
