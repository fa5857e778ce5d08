"""The meaning of the operation: products and a masked softmax, on every device."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def attend_groups(
    q_PCNH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    slot_P: jax.Array | None,
    limit_PC: jax.Array,
    own: tuple[jax.Array, jax.Array] | None,
    own_seen_CW: jax.Array | None,
    window: int | None,
    scale: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """[P, C, N, H]: groups of rows against one slot's cache each; 0 where a row sees nothing."""
    groups, rows, heads, width = q_PCNH.shape
    kv_heads, length = k_BKSH.shape[1:3]
    if slot_P is not None:
        k_BKSH, v_BKSH = (cache.at[slot_P].get(mode="clip") for cache in (k_BKSH, v_BKSH))
    q = q_PCNH.reshape(groups, rows, kv_heads, heads // kv_heads, width)
    scale = width**-0.5 if scale is None else scale

    def capped(score: jax.Array) -> jax.Array:
        return score if softcap is None else softcap * jnp.tanh(score / softcap)

    score = capped(_product("pckgh,pksh->pkgcs", q, k_BKSH) * scale)
    # A row that sees nothing reads one key, so that its softmax exists, and is made 0 in the end.
    end_PC1 = limit_PC[..., None] if own is not None else jnp.maximum(limit_PC[..., None], 1)
    position_S = jnp.arange(length, dtype=jnp.int32)
    seen_PCS = position_S < end_PC1
    if window is not None:
        age_PCS = (end_PC1 - 1 - position_S) % length
        seen_PCS = age_PCS < jnp.minimum(window, end_PC1)
    score = jnp.where(seen_PCS[:, None, None], score, -jnp.inf)
    if own is not None:
        to_own = capped(_product("pckgh,pwkh->pkgcw", q, own[0]) * scale)
        if own_seen_CW is not None:
            to_own = jnp.where(own_seen_CW, to_own, -jnp.inf)
        score = jnp.concatenate([score, to_own], axis=-1)
    weight = jax.nn.softmax(score, axis=-1).astype(v_BKSH.dtype)
    # In the order of the product's own axes: another order makes a CPU copy the values first.
    out = _product("pkgcs,pksh->pkgch", weight[..., :length], v_BKSH)
    if own is not None:
        out += _product("pkgcw,pwkh->pkgch", weight[..., length:], own[1])
    else:
        out = jnp.where(limit_PC[:, None, None, :, None] > 0, out, 0)
    return jnp.moveaxis(out.astype(q.dtype), 3, 1).reshape(q_PCNH.shape)
