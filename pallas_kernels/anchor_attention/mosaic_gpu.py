"""Mosaic GPU kernels: tiles of rows against the context before their anchors, and the gradients.

The rows that share a key/value head, slots and heads of one block after the other, are cut into
tiles of 64, whatever the blocks. Anchors ascend, so the few blocks of a tile see about the same
context, and a tile reads no further than the last of them does:

- forward: a program a tile runs an online softmax over blocks of 64 keys. It begins with the
  result of the blocks' own keys, which are few and are left to XLA.
- queries' gradient: a program a tile computes the scores again, over the same keys.
- keys' and values' gradients: a program a block of keys, over the tiles that see some of it, which
  are the last ones of the sequence. Nothing is added up in memory.

Asynchronous copies bring the next step's operands while the tensor cores multiply this one's. No
order of the anchors is needed for the result: it is what makes it cheap.

Source: Dao, "FlashAttention-2", 2023.

Axes beside those of ``api.py``: R = N / K heads that share keys; C = G * R rows of a block; M rows
of a sequence (row a * C + g * R + r), filled up to whole tiles; X tiles; Y blocks of context.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tensor_cores as tc
from pallas_kernels.anchor_attention import SAVED
from pallas_kernels.tensor_cores import BLOCK, BY_COLUMN, BY_ROW, LOG2_E, TILE

Own = tuple[jax.Array, jax.Array]
_product_f32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


@jax.custom_vjp
def attend_blocks(
    q_BAGNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    own: Own,
    anchor_BA: jax.Array,
    keep_BA: jax.Array,
) -> jax.Array:
    """[B, A, G, N, H], as :func:`pallas_kernels.anchor_attention.xla.attend_blocks`.

    Raises:
        ValueError: a dtype or a size that the kernels have no form for.
    """
    return _forward(q_BAGNH, k_BSKH, v_BSKH, own, anchor_BA, keep_BA)[0]


def _attend_forward(*arguments: Any) -> tuple[jax.Array, Any]:
    out_BAGNH, lse_BKM = (checkpoint_name(x, SAVED) for x in _forward(*arguments))
    return out_BAGNH, (*arguments, out_BAGNH, lse_BKM)


def _attend_backward(saved: Any, dout_BAGNH: jax.Array) -> tuple[Any, ...]:
    arguments = *saved, dout_BAGNH
    return *_backward(*arguments), None, None


attend_blocks.defvjp(_attend_forward, _attend_backward)


def _forward(
    q_BAGNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    own: Own,
    anchor_BA: jax.Array,
    keep_BA: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The result, and float32 lse_BKM of the scores to the base 2."""
    width = q_BAGNH.shape[-1]
    if q_BAGNH.dtype != jnp.bfloat16 or width not in (64, 128):
        raise ValueError(
            f"mosaic_gpu takes bfloat16 and heads of 64 or 128, and this is {q_BAGNH.dtype} and "
            f"{width}: choose xla"
        )
    kv_heads = k_BSKH.shape[2]
    q_BKACH = _to_blocks(q_BAGNH, kv_heads)
    score_BKACW = _own_scores(q_BKACH, own[0])
    lse_BKAC1 = LOG2_E * jax.nn.logsumexp(score_BKACW / LOG2_E, axis=-1, keepdims=True)
    weight_BKACW = jnp.exp2(score_BKACW - lse_BKAC1).astype(q_BAGNH.dtype)
    own_BKACH = _product_f32("bkacw,bawkh->bkach", weight_BKACW, own[1]).astype(q_BAGNH.dtype)
    keep_BA11 = keep_BA[:, None, :, None, None]
    begin_BKMH = _to_rows(jnp.where(keep_BA11, own_BKACH, 0))
    begin_BKM = _to_rows(jnp.where(keep_BA11, lse_BKAC1, 0)[..., 0])

    limit_BM = _limits(anchor_BA, keep_BA, q_BKACH.shape[3], k_BSKH.shape[1])
    ends_BX, q_BKMH = _ends(limit_BM), _to_rows(q_BKACH)
    outs = _like(q_BKMH), _like(begin_BKM)
    kernel = _launch(_forward_kernel, "anchor_attention", q_BKMH, ends_BX.shape[1], outs)
    k_BSKH, v_BSKH = _fill_up(k_BSKH), _fill_up(v_BSKH)
    out_BKMH, lse_BKM = kernel(ends_BX, limit_BM, q_BKMH, k_BSKH, v_BSKH, begin_BKMH, begin_BKM)
    return _from_rows(out_BKMH, q_BAGNH.shape), lse_BKM


def _backward(
    q_BAGNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    own: Own,
    anchor_BA: jax.Array,
    keep_BA: jax.Array,
    out_BAGNH: jax.Array,
    lse_BKM: jax.Array,
    dout_BAGNH: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, Own]:
    """Gradients of queries, context keys, context values, and own keys and values."""
    positions, kv_heads = k_BSKH.shape[1:3]
    dtype, scale = q_BAGNH.dtype, q_BAGNH.shape[-1] ** -0.5
    q_BKACH, dout_BKACH = _to_blocks(q_BAGNH, kv_heads), _to_blocks(dout_BAGNH, kv_heads)
    out_BKACH = _to_blocks(out_BAGNH, kv_heads)
    # What a score does to the loss beyond its own weight's share: nothing on the whole.
    delta_BKAC = jnp.sum(out_BKACH.astype(jnp.float32) * dout_BKACH, axis=-1)

    rows = delta_BKAC.shape[2] * delta_BKAC.shape[3]
    lse_BKAC = lse_BKM[:, :, :rows].reshape(delta_BKAC.shape)
    weight_BKACW = jnp.exp2(_own_scores(q_BKACH, own[0]) - lse_BKAC[..., None])
    weight_BKACW = jnp.where(keep_BA[:, None, :, None, None], weight_BKACW, 0)
    dweight_BKACW = _product_f32("bkach,bawkh->bkacw", dout_BKACH, own[1])
    dscore_BKACW = scale * weight_BKACW * (dweight_BKACW - delta_BKAC[..., None])
    dscore_BKACW, weight_BKACW = dscore_BKACW.astype(dtype), weight_BKACW.astype(dtype)
    begin_BKACH = _product_f32("bkacw,bawkh->bkach", dscore_BKACW, own[0]).astype(dtype)
    own_gradients = (
        _product_f32("bkacw,bkach->bawkh", dscore_BKACW, q_BKACH).astype(dtype),
        _product_f32("bkacw,bkach->bawkh", weight_BKACW, dout_BKACH).astype(dtype),
    )

    limit_BM = _limits(anchor_BA, keep_BA, q_BKACH.shape[3], positions)
    q_BKMH, dout_BKMH = _to_rows(q_BKACH), _to_rows(dout_BKACH)
    k_BSKH, v_BSKH = _fill_up(k_BSKH), _fill_up(v_BSKH)
    limit_BKM = jnp.broadcast_to(limit_BM[:, None].astype(jnp.float32), lse_BKM.shape)
    row_BK3M = jnp.stack([lse_BKM, _to_rows(delta_BKAC), limit_BKM], axis=2)
    ends_BX = _ends(limit_BM)
    given = row_BK3M, q_BKMH, dout_BKMH, k_BSKH, v_BSKH
    name = "anchor_attention_backward"
    tiles, out, barrier = ends_BX.shape[1], _like(q_BKMH), plgpu.Barrier()
    to_queries = _launch(_backward_q_kernel, f"{name}_q", q_BKMH, tiles, out, barrier)
    dq_BKMH = to_queries(ends_BX, *given, _to_rows(begin_BKACH))
    # The first blocks of keys, which most tiles see, come first.
    blocks, outs = k_BSKH.shape[1] // BLOCK, (_like(k_BSKH), _like(v_BSKH))
    to_keys = _launch(_backward_kv_kernel, f"{name}_kv", q_BKMH, blocks, outs)
    dk_BSKH, dv_BSKH = to_keys(_viewers(ends_BX, blocks), *given)
    dq_BAGNH = _from_rows(dq_BKMH, q_BAGNH.shape)
    return dq_BAGNH, dk_BSKH[:, :positions], dv_BSKH[:, :positions], own_gradients


def _to_blocks(x_BAGNH: jax.Array, kv_heads: int) -> jax.Array:
    """[B, K, A, C, H]: the rows of each block that share a key/value head."""
    batch, anchors, slots, heads, width = x_BAGNH.shape
    x = x_BAGNH.reshape(batch, anchors, slots, kv_heads, heads // kv_heads, width)
    return jnp.moveaxis(x, 3, 1).reshape(batch, kv_heads, anchors, -1, width)


def _to_rows(x_BKACX: jax.Array) -> jax.Array:
    """[B, K, M, ...]: rows of all blocks, filled up to whole tiles with zeros."""
    batch, kv_heads, anchors, rows, *rest = x_BKACX.shape
    x_BKMX = x_BKACX.reshape(batch, kv_heads, anchors * rows, *rest)
    filling = [(0, 0)] * x_BKMX.ndim
    filling[2] = 0, -x_BKMX.shape[2] % TILE
    return jnp.pad(x_BKMX, filling)


def _from_rows(x_BKMH: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B, A, G, N, H], the inverse of :func:`_to_blocks` and :func:`_to_rows`."""
    batch, anchors, slots, heads, width = shape
    kv_heads = x_BKMH.shape[1]
    used = anchors * slots * heads // kv_heads
    x = x_BKMH[:, :, :used].reshape(batch, kv_heads, anchors, slots, heads // kv_heads, width)
    return jnp.moveaxis(x, 1, 3).reshape(shape)


def _fill_up(x_BSKH: jax.Array) -> jax.Array:
    """The context in whole blocks of keys."""
    return jnp.pad(x_BSKH, ((0, 0), (0, -x_BSKH.shape[1] % BLOCK), (0, 0), (0, 0)))


def _own_scores(q_BKACH: jax.Array, k_BAWKH: jax.Array) -> jax.Array:
    """float32 [B, K, A, C, W], to the base 2."""
    scale = q_BKACH.shape[-1] ** -0.5 * LOG2_E
    return scale * _product_f32("bkach,bawkh->bkacw", q_BKACH, k_BAWKH)


def _limits(anchor_BA: jax.Array, keep_BA: jax.Array, rows: int, positions: int) -> jax.Array:
    """int32 limit_BM: each row sees the positions before it."""
    limit_BA = jnp.where(keep_BA, jnp.clip(anchor_BA, 0, positions), 0).astype(jnp.int32)
    return _to_rows(jnp.repeat(limit_BA, rows, axis=1)[:, None, :, None])[:, 0]


def _ends(limit_BM: jax.Array) -> jax.Array:
    """int32 [B, X]: the blocks of keys that some row of a tile sees are those before it."""
    return pl.cdiv(limit_BM.reshape(limit_BM.shape[0], -1, TILE).max(-1), BLOCK)


def _viewers(ends_BX: jax.Array, blocks: int) -> jax.Array:
    """int32 [B, Y, 2]: all tiles that see some of a block of keys lie in [first, end)."""
    tiles = ends_BX.shape[1]
    sees_BYX = ends_BX[:, None] > jnp.arange(blocks)[:, None]
    tile_X = jnp.arange(tiles, dtype=jnp.int32)
    first_BY = jnp.where(sees_BYX, tile_X, tiles).min(-1)
    end_BY = jnp.where(sees_BYX, tile_X + 1, 0).max(-1)
    return jnp.stack([first_BY, jnp.maximum(end_BY, first_BY)], axis=-1)


def _launch(
    body: Callable[..., None],
    name: str,
    q_BKMH: jax.Array,
    programs: int,
    out_type: Any,
    *scratch: Any,
) -> Callable[..., Any]:
    """A kernel of so many programs for each sequence and head.

    Each has room for two matrices of rows and one of weights, a barrier for two copies, and what is
    given in ``scratch``. The last axis runs first: programs side by side read the same keys.
    """
    batch, kv_heads, _, width = q_BKMH.shape
    rows, weights = (tc.matrix(columns, q_BKMH.dtype) for columns in (width, BLOCK))
    kernel: Callable[..., Any] = plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=(rows, rows, weights, plgpu.Barrier(num_arrivals=2), *scratch),
        grid=(batch, kv_heads, programs),
        grid_names=("sequence", "head", "program"),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return kernel


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _forward_kernel(
    ends_ref: Any,
    limit_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    begin_ref: Any,
    begin_lse_ref: Any,
    out_ref: Any,
    lse_ref: Any,
    q_smem: Any,
    out_smem: Any,
    weight_smem: Any,
    barrier: Any,
) -> None:
    width = q_smem.shape[-1]
    sequence, head, tile = _tile_of_program(ends_ref.shape[1])
    rows = pl.ds(tile * TILE, TILE)
    part = sequence, head, rows
    tc.load([(q_ref.at[part], q_smem), (begin_ref.at[part], out_smem)], barrier)
    limit_M = tc.load_rows(limit_ref.at[sequence, rows])
    highest_M = tc.load_rows(begin_lse_ref.at[sequence, head, rows])
    total_M = plgpu.layout_cast(jnp.full((TILE,), 1, jnp.float32), BY_ROW)
    out_MH = plgpu.layout_cast(out_smem[...], plgpu.Layout.WGMMA).astype(jnp.float32)

    def step(indices: Any, k_smem: Any, v_smem: Any, carry: Any) -> Any:
        seen_MS = tc.position(indices[0], 1) < tc.along_rows(limit_M, BLOCK)
        return tc.softmax_step(tc.scores(q_smem, k_smem), seen_MS, v_smem, weight_smem, carry)

    keys = _keys_of_step(sequence, head, k_ref)
    pipeline = plgpu.emit_pipeline(
        step,
        grid=(ends_ref[sequence, tile],),
        in_specs=[keys, keys],
        max_concurrent_steps=tc.stages(width),
        init_carry=(out_MH, highest_M, total_M),
    )
    out_MH, highest_M, total_M = pipeline(k_ref, v_ref)
    lse_ref[sequence, head, rows] = highest_M + jnp.log2(total_M)
    out_smem[...] = (out_MH / tc.along_rows(total_M, width)).astype(out_smem.dtype)
    tc.store([(out_smem, out_ref.at[part])])


def _backward_q_kernel(
    ends_ref: Any,
    row_ref: Any,
    q_ref: Any,
    dout_ref: Any,
    k_ref: Any,
    v_ref: Any,
    begin_ref: Any,
    dq_ref: Any,
    q_smem: Any,
    dout_smem: Any,
    dscore_smem: Any,
    barrier: Any,
    begin_barrier: Any,
) -> None:
    width = q_smem.shape[-1]
    sequence, head, tile = _tile_of_program(ends_ref.shape[1])
    rows = pl.ds(tile * TILE, TILE)
    part = sequence, head, rows
    tc.load([(q_ref.at[part], q_smem), (dout_ref.at[part], dout_smem)], barrier)
    lse_M, delta_M, limit_M = (tc.load_rows(row_ref.at[sequence, head, i, rows]) for i in range(3))
    limit_M = limit_M.astype(jnp.int32)

    def sum_up(dq_sum: Any) -> jax.Array:
        def step(indices: Any, k_smem: Any, v_smem: Any) -> None:
            score_MS = tc.scores(q_smem, k_smem)
            dweight_MS = tc.multiply(dout_smem, v_smem.transpose((1, 0)))
            seen_MS = tc.position(indices[0], 1) < tc.along_rows(limit_M, BLOCK)
            weight_MS = jnp.exp2(score_MS - tc.along_rows(lse_M, BLOCK))
            dscore_MS = weight_MS * (dweight_MS - tc.along_rows(delta_M, BLOCK))
            dscore_smem[...] = jnp.where(seen_MS, dscore_MS, 0).astype(dscore_smem.dtype)
            plgpu.commit_smem()
            plgpu.wgmma(dq_sum, dscore_smem, k_smem)
            plgpu.wgmma_wait(0)

        keys = _keys_of_step(sequence, head, k_ref)
        plgpu.emit_pipeline(
            step,
            grid=(ends_ref[sequence, tile],),
            in_specs=[keys, keys],
            max_concurrent_steps=tc.stages(width),
        )(k_ref, v_ref)
        return dq_sum[...]

    dq_MH = pl.run_scoped(sum_up, plgpu.WGMMAAccumulatorRef((TILE, width), jnp.float32))
    # No product reads the queries any more: the last step waited for them before it stored scores.
    tc.load([(begin_ref.at[part], q_smem)], begin_barrier)
    begin_MH = plgpu.layout_cast(q_smem[...], plgpu.Layout.WGMMA).astype(jnp.float32)
    dout_smem[...] = (begin_MH + dq_MH * width**-0.5).astype(dout_smem.dtype)
    tc.store([(dout_smem, dq_ref.at[part])])


def _backward_kv_kernel(
    viewers_ref: Any,
    row_ref: Any,
    q_ref: Any,
    dout_ref: Any,
    k_ref: Any,
    v_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    k_smem: Any,
    v_smem: Any,
    score_smem: Any,
    barrier: Any,
) -> None:
    width = k_smem.shape[-1]
    sequence, head, block = (lax.axis_index(name) for name in ("sequence", "head", "program"))
    part = sequence, pl.ds(block * BLOCK, BLOCK), head
    first, end = viewers_ref[sequence, block, 0], viewers_ref[sequence, block, 1]

    @pl.when(end > first)
    def _() -> None:
        tc.load([(k_ref.at[part], k_smem), (v_ref.at[part], v_smem)], barrier)

    def sum_up(dk_sum: Any, dv_sum: Any) -> tuple[jax.Array, jax.Array]:
        def step(_: Any, q_smem: Any, dout_smem: Any, row_smem: Any) -> None:
            lse_M, delta_M, limit_M = (plgpu.layout_cast(row_smem[i], BY_COLUMN) for i in range(3))
            score_SM = tc.scores(k_smem, q_smem)
            seen_SM = tc.position(block, 0) < tc.along_columns(limit_M.astype(jnp.int32))
            weight_SM = jnp.exp2(score_SM - tc.along_columns(lse_M))
            weight_SM = jnp.where(seen_SM, weight_SM, 0)
            score_smem[...] = weight_SM.astype(score_smem.dtype)
            plgpu.commit_smem()
            plgpu.wgmma(dv_sum, score_smem, dout_smem)
            dweight_SM = tc.multiply(v_smem, dout_smem.transpose((1, 0)))
            plgpu.wgmma_wait(0)
            dscore_SM = weight_SM * (dweight_SM - tc.along_columns(delta_M))
            # In the weights' place: one more matrix, and two programs would not fit.
            score_smem[...] = dscore_SM.astype(score_smem.dtype)
            plgpu.commit_smem()
            plgpu.wgmma(dk_sum, score_smem, q_smem)
            plgpu.wgmma_wait(0)

        matrix = plgpu.BlockSpec(
            (None, None, TILE, width),
            lambda i: (sequence, head, first + i, 0),
            transforms=tc.layout(width, q_ref.dtype),
        )
        row = plgpu.BlockSpec((None, None, 3, TILE), lambda i: (sequence, head, 0, first + i))
        plgpu.emit_pipeline(
            step,
            grid=(end - first,),
            in_specs=[matrix, matrix, row],
            max_concurrent_steps=tc.stages(width),
        )(q_ref, dout_ref, row_ref)
        return dk_sum[...], dv_sum[...]

    total = plgpu.WGMMAAccumulatorRef((BLOCK, width), jnp.float32)
    dk_SH, dv_SH = pl.run_scoped(sum_up, total, total)
    k_smem[...] = (dk_SH * width**-0.5).astype(k_smem.dtype)
    v_smem[...] = dv_SH.astype(v_smem.dtype)
    tc.store([(k_smem, dk_ref.at[part]), (v_smem, dv_ref.at[part])])


def _tile_of_program(tiles: int) -> tuple[Any, Any, Any]:
    """Sequence, head and tile. The last tiles, whose rows see most, come first."""
    tile = tiles - 1 - lax.axis_index("program")
    return lax.axis_index("sequence"), lax.axis_index("head"), tile


def _keys_of_step(sequence: Any, head: Any, k_ref: Any) -> Any:
    """What step i of a tile's pipeline reads: block i of a head's keys or values."""
    width = k_ref.shape[-1]
    return plgpu.BlockSpec(
        (None, BLOCK, None, width),
        lambda i: (sequence, i, head, 0),
        transforms=tc.layout(width, k_ref.dtype),
    )
