"""Mosaic GPU kernel: a tile of a group's rows against a part of its slot's cache.

The rows of one group that share a key/value head, C * N / K of them, are tiles of 64 rows. For
each tile, head and split of the valid range one program runs an online softmax over blocks of
keys, each a page of a cache that lies in pages: asynchronous copies bring the next blocks while the
tensor cores multiply this one. Nothing outside the range that some row of the tile sees is read.
The splits are merged by their log-sum-exps, and so are a block's own keys, which are few and are
left to XLA.

Source: Dao, Haziza, Massa, Sizov, "Flash-Decoding for long-context inference", 2023.

Axes beside those of ``api.py``: M rows of a group and key/value head (column-major: c * N / K + n),
a multiple of 64; X tiles of a group; Z splits.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import tensor_cores as tc
from pallas_kernels.tensor_cores import BLOCK, BY_ROW, LOG2_E, TILE

PROGRAMS = 264  # two a streaming multiprocessor of an H100 or H200
MIN_BLOCKS = 4  # of a split: a shorter one does not pay for its merge
LOWEST = -1e30  # a maximum of nothing that is still a number


def attend_groups(
    q_PCNH: jax.Array,
    k_LBKSH: jax.Array,
    v_LBKSH: jax.Array,
    layer: jax.Array | int,
    slot_P: jax.Array | None,
    limit_PC: jax.Array,
    page_BX: jax.Array | None,
    own: tuple[jax.Array, jax.Array] | None,
    window: int | None,
) -> jax.Array:
    """[P, C, N, H], as :func:`pallas_kernels.ragged_attention.xla.attend_groups`; the caches are
    [L, Q, K, PAGE, H] where there is a table of pages.

    Raises:
        ValueError: a dtype or a size that the kernel has no form for.
    """
    groups, rows, heads, width = q_PCNH.shape
    slots, kv_heads, positions = k_LBKSH.shape[1:4]
    if page_BX is not None:
        slots, positions = page_BX.shape[0], page_BX.shape[1] * positions
    if q_PCNH.dtype != jnp.bfloat16 or width not in (64, 128) or positions % BLOCK:
        raise ValueError(
            f"mosaic_gpu takes bfloat16, heads of 64 or 128 and positions in steps of {BLOCK}, and "
            f"this is {q_PCNH.dtype}, {width} and {positions}: choose xla"
        )
    shared = heads // kv_heads
    used = rows * shared
    tiles = pl.cdiv(used, TILE)
    q_PKCRH = jnp.moveaxis(q_PCNH.reshape(groups, rows, kv_heads, shared, width), 2, 1)
    q_PKMH = q_PKCRH.reshape(groups, kv_heads, used, width)
    padding = tiles * TILE - used
    q_PKMH = jnp.pad(q_PKMH, ((0, 0), (0, 0), (0, padding), (0, 0)))
    limit_PM = jnp.pad(jnp.repeat(limit_PC, shared, axis=1), ((0, 0), (0, padding)))
    limit_PM = limit_PM.astype(jnp.int32)
    if window is None:
        limit_PM = jnp.minimum(limit_PM, positions)

    if slot_P is None:
        slot_P = jnp.arange(groups, dtype=jnp.int32)
    plan_PX4 = _plan(limit_PM.reshape(groups, tiles, TILE), slot_P, layer, slots, window)
    most = max(1, positions // BLOCK // MIN_BLOCKS)
    splits = min(most, max(1, PROGRAMS // (groups * kv_heads * tiles)))
    single = splits == 1 and own is None
    out_ZPKMH, lse_ZPKM = _run_kernel(
        plan_PX4,
        q_PKMH,
        limit_PM,
        k_LBKSH,
        v_LBKSH,
        page_BX,
        splits=splits,
        window=window,
        # What a tile writes for nobody to read would cost as much as the rest of it.
        kept=TILE if tiles > 1 else pl.cdiv(used, 8) * 8,
        dtype=q_PCNH.dtype if single else jnp.float32,
    )
    parts = [(out_ZPKMH[..., :used, :], lse_ZPKM[..., :used])]
    if own is not None:
        parts.append(_attend_own(q_PKMH[:, :, :used], *own))
    out_PKMH = out_ZPKMH[0, :, :, :used] if single else _merge(parts).astype(q_PCNH.dtype)
    return jnp.moveaxis(out_PKMH.reshape(q_PKCRH.shape), 1, 2).reshape(q_PCNH.shape)


def _plan(
    limit_PXM: jax.Array,
    slot_P: jax.Array,
    layer: jax.Array | int,
    slots: int,
    window: int | None,
) -> jax.Array:
    """int32 [P, X, 4] of each tile: layer, slot, and the blocks [first, end) that its rows see."""
    end_PX = pl.cdiv(limit_PXM.max(-1), BLOCK)
    first_PX = jnp.zeros_like(end_PX)
    if window is not None:
        lowest_PX = jnp.where(limit_PXM > 0, limit_PXM, jnp.iinfo(jnp.int32).max).min(-1)
        first_PX = jnp.clip((lowest_PX - window) // BLOCK, 0, end_PX)
    layer_PX = jnp.full_like(end_PX, layer)
    slot_PX = jnp.broadcast_to(jnp.clip(slot_P, 0, slots - 1)[:, None], end_PX.shape)
    return jnp.stack([layer_PX, slot_PX, first_PX, end_PX], axis=-1).astype(jnp.int32)


Part = tuple[jax.Array, jax.Array]  # out_ZPKMH, normalised, and lse_ZPKM to the base 2, float32


def _run_kernel(
    plan_PX4: jax.Array,
    q_PKMH: jax.Array,
    limit_PM: jax.Array,
    k_LBKSH: jax.Array,
    v_LBKSH: jax.Array,
    page_BX: jax.Array | None,
    *,
    splits: int,
    window: int | None,
    kept: int,
    dtype: Any,
) -> Part:
    """Results of all splits in a dtype, of the first ``kept`` rows of each tile."""
    groups, kv_heads, rows, width = q_PKMH.shape
    tiles = rows // TILE
    table = [] if page_BX is None else [page_BX]
    kernel = plgpu.kernel(
        functools.partial(_kernel, splits=splits, window=window, kept=kept, paged=bool(table)),
        out_type=(
            jax.ShapeDtypeStruct((splits, groups, kv_heads, tiles * kept, width), dtype),
            jax.ShapeDtypeStruct((splits, groups, kv_heads, rows), jnp.float32),
        ),
        scratch_types=(
            tc.matrix(width, q_PKMH.dtype),
            tc.matrix(BLOCK, q_PKMH.dtype),
            plgpu.Barrier(),
        ),
        grid=(groups, kv_heads, tiles * splits),
        grid_names=("group", "head", "part"),
        kernel_name="ragged_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    return kernel(plan_PX4, q_PKMH, limit_PM, k_LBKSH, v_LBKSH, *table)


def _kernel(
    plan_ref: Any,
    q_ref: Any,
    limit_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    splits: int,
    window: int | None,
    kept: int,
    paged: bool,
) -> None:
    page_ref, out_ref, lse_ref, q_smem, weight_smem, barrier = refs if paged else (None, *refs)
    width = q_smem.shape[-1]
    group, head = lax.axis_index("group"), lax.axis_index("head")
    tile, split = lax.div(lax.axis_index("part"), splits), lax.rem(lax.axis_index("part"), splits)
    layer, slot, first, end = (plan_ref[group, tile, i] for i in range(4))
    share = lax.div(end - first + (splits - 1), splits)
    start = first + split * share
    count = jnp.clip(end - start, 0, share)
    rows = pl.ds(tile * TILE, TILE)

    tc.load([(q_ref.at[group, head, rows], q_smem)], barrier)
    limit_M = tc.load_rows(limit_ref.at[group, rows])

    def step(indices: Any, k_smem: Any, v_smem: Any, carry: Any) -> Any:
        position_MS = tc.position(start + indices[0], 1)
        seen_MS = position_MS < tc.along_rows(limit_M, BLOCK)
        if window is not None:
            seen_MS &= position_MS >= tc.along_rows(limit_M - window, BLOCK)
        return tc.softmax_step(tc.scores(q_smem, k_smem), seen_MS, v_smem, weight_smem, carry)

    def place(i: Any) -> Any:
        if paged:
            return layer, page_ref[slot, start + i], head, 0, 0
        if window is None:
            return layer, slot, head, start + i, 0
        # The positions are a ring, of whole blocks.
        return layer, slot, head, lax.rem(start + i, k_ref.shape[-2] // BLOCK), 0

    block = plgpu.BlockSpec(
        (None, None, None, BLOCK, width),
        place,
        transforms=tc.layout(width, k_ref.dtype),
    )
    nothing = (
        plgpu.layout_cast(jnp.full((TILE, width), 0.0, jnp.float32), plgpu.Layout.WGMMA),
        plgpu.layout_cast(jnp.full((TILE,), LOWEST, jnp.float32), BY_ROW),
        plgpu.layout_cast(jnp.full((TILE,), 0.0, jnp.float32), BY_ROW),
    )
    pipeline = plgpu.emit_pipeline(
        step,
        grid=(count,),
        in_specs=[block, block],
        max_concurrent_steps=tc.stages(width),
        init_carry=nothing,
    )
    out_MH, highest_M, total_M = pipeline(k_ref, v_ref)
    total_M = jnp.maximum(total_M, jnp.finfo(jnp.float32).tiny)  # of nothing: 0, weighing nothing
    lse_ref[split, group, head, rows] = highest_M + jnp.log2(total_M)
    out_MH = (out_MH / tc.along_rows(total_M, width)).astype(out_ref.dtype)

    def store(out_smem: Any) -> None:
        out_smem[...] = out_MH
        part = out_ref.at[split, group, head, pl.ds(tile * kept, kept)]
        tc.store([(out_smem.at[pl.ds(0, kept)], part)])

    # Behind the pipeline, so that it lies where the pipeline's blocks lay.
    pl.run_scoped(store, tc.matrix(width, out_ref.dtype))


def _attend_own(q_PKMH: jax.Array, k_PWKH: jax.Array, v_PWKH: jax.Array) -> Part:
    """The part of a block's own keys, as one more split."""
    score = jnp.einsum("pkmh,pwkh->pkmw", q_PKMH, k_PWKH, preferred_element_type=jnp.float32)
    score_PKMW = score * (q_PKMH.shape[-1] ** -0.5)
    lse_PKM1 = jax.nn.logsumexp(score_PKMW, axis=-1, keepdims=True)
    weight_PKMW = jnp.exp(score_PKMW - lse_PKM1).astype(v_PWKH.dtype)
    out_PKMH = jnp.einsum(
        "pkmw,pwkh->pkmh", weight_PKMW, v_PWKH, preferred_element_type=jnp.float32
    )
    return out_PKMH[None], lse_PKM1[None, ..., 0] * LOG2_E


def _merge(parts: list[Part]) -> jax.Array:
    """[P, K, M, H] float32: parts weighed by the sums of their exponentials."""
    out_ZPKMH = jnp.concatenate([out for out, _ in parts])
    lse_ZPKM = jnp.concatenate([lse for _, lse in parts])
    weight_ZPKM = jnp.exp2(lse_ZPKM - lse_ZPKM.max(0))
    total_PKM = weight_ZPKM.sum(0)
    return jnp.sum(out_ZPKMH * (weight_ZPKM / total_PKM)[..., None], axis=0)
