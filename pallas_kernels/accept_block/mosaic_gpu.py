"""The two passes of verification as Mosaic GPU kernels; ``xla.py`` says what they mean.

A program reads a share of one row, block by block through asynchronous copies, and keeps a running
result for each place of a block: nothing crosses threads before the end. Shares are merged as
shards are. Rows lie as [V / L, L], so that every access is in bounds whatever V is; what a last
block has too much is filled with zeros by the copy and masked.

Axes beside those of ``xla.py``: L lanes, up to 128 tokens; Q = V / L; N shares of a row.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import random
from pallas_kernels.accept_block import xla
from pallas_kernels.accept_block.xla import Fallen, Law, Statistics

# Tokens of a block, which makes 8 numbers a thread of each running result: what a draw keeps of two
# laws fits into registers, with four programs or more on a multiprocessor.
PLACES = 1024
MOST_LANES, LEAST_LANES = 128, 16  # a row of a block has 32 bytes at least
STAGES = 4  # blocks under way
PROGRAMS = 1056  # eight a streaming multiprocessor of an H100 or H200
MIN_BLOCKS = 8  # of a share: a shorter one is not worth its merge
LOWEST = float(jnp.finfo(jnp.float32).min)
NOWHERE = 2**31 - 1


def statistics(logits_XV: jax.Array, temperature_X: jax.Array, floor_X: jax.Array) -> Statistics:
    """As :func:`pallas_kernels.accept_block.xla.statistics`, in one reading of the rows."""
    num_rows, num_tokens = logits_XV.shape
    shares, blocks = _shares(num_rows, num_tokens)
    kernel = plgpu.kernel(
        functools.partial(_statistics_kernel, num_tokens=num_tokens, blocks=blocks),
        out_type=(
            jax.ShapeDtypeStruct((shares, num_rows), jnp.float32),
            jax.ShapeDtypeStruct((shares, num_rows), jnp.int32),
            jax.ShapeDtypeStruct((shares, num_rows), jnp.float32),
            jax.ShapeDtypeStruct((shares, num_rows), jnp.float32),
        ),
        grid=(num_rows, shares),
        grid_names=("row", "share"),
        kernel_name="accept_statistics",
        compiler_params=plgpu.CompilerParams(approx_math=True),
    )
    scale_X = jnp.where(temperature_X == 0, 1, 1 / temperature_X)
    best_NX, first_NX, mass_NX, zero_NX = kernel(_in_lanes(logits_XV), scale_X, floor_X)
    first_NX = jnp.minimum(first_NX, num_tokens - 1)  # inside, if all logits are NaN
    parts_NX = Statistics(best_NX, first_NX, mass_NX, jnp.isfinite(zero_NX))
    return xla.merge(parts_NX, temperature_X)


def _statistics_kernel(
    logits_ref: Any,
    scale_ref: Any,
    floor_ref: Any,
    best_ref: Any,
    first_ref: Any,
    mass_ref: Any,
    zero_ref: Any,
    *,
    num_tokens: int,
    blocks: int,
) -> None:
    row, share = lax.axis_index("row"), lax.axis_index("share")
    scale, floor = scale_ref[row], floor_ref[row]
    form = _Form.of(logits_ref, logits_ref.dtype)

    def step(indices: Any, logits_smem: Any, carry: Any) -> Any:
        best, first, mass, zero = carry
        x = plgpu.layout_cast(logits_smem[...], form.layout).astype(jnp.float32)
        zero = zero + (x - x)  # NaN once anything is not finite
        token = form.tokens(share * blocks + indices[0])
        x = jnp.where(token < num_tokens, x, -jnp.inf)
        higher = x > best
        # One exponential: of what was the best before, or of what is not the best now.
        decay = jnp.exp((jnp.minimum(x, best) - jnp.maximum(x, best)) * scale)
        kept = jnp.where(x >= floor, 1.0, 0.0)
        mass = jnp.where(higher, mass * decay + kept, mass + kept * decay)
        return jnp.maximum(x, best), jnp.where(higher, token, first), mass, zero

    zeros = form.full(0.0, jnp.float32)
    carry = form.full(LOWEST, jnp.float32), form.full(0, jnp.int32), zeros, zeros
    pipeline = _pipeline(step, [row], share, blocks, num_tokens, form, carry)
    best, first, mass, zero = pipeline(logits_ref)
    highest = jnp.max(best)
    best_ref[share, row] = highest
    first_ref[share, row] = jnp.min(jnp.where(best == highest, first, NOWHERE))
    mass_ref[share, row] = jnp.sum(mass * jnp.exp((best - highest) * scale))
    zero_ref[share, row] = jnp.sum(zero)


def draw(
    logits_TV: jax.Array,
    row_B: jax.Array | None,
    law_B: Law,
    fallen: Fallen | None,
    key_B2: jax.Array,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """As :func:`pallas_kernels.accept_block.xla.draw`, with the same random bits.

    A program draws from both laws, the target's and the residual, and sums the residual's mass:
    which of them counts is known only at the end.
    """
    num_rows, num_tokens = key_B2.shape[0], logits_TV.shape[1]
    shares, blocks = _shares(num_rows, num_tokens)
    start = xla.shard_start(num_tokens, axis_name)
    place_B = jnp.arange(num_rows, dtype=jnp.int32) if row_B is None else row_B.astype(jnp.int32)
    arrays, places, laws = [logits_TV], [place_B], [law_B]
    if fallen is not None:
        draft_YV, draft_place_B = _draft_rows(fallen, num_tokens)
        arrays, places = [logits_TV, draft_YV], [place_B, draft_place_B]
        laws = [law_B, fallen.law_B]
    score = jax.ShapeDtypeStruct((shares, num_rows), jnp.float32)
    token = jax.ShapeDtypeStruct((shares, num_rows), jnp.int32)
    kernel = plgpu.kernel(
        functools.partial(_draw_kernel, num_laws=len(laws), num_tokens=num_tokens, blocks=blocks),
        out_type=(score, token) if fallen is None else (score, token, score, token, score),
        grid=(num_rows, shares),
        grid_names=("row", "share"),
        kernel_name="accept_draw",
    )
    place_YB = jnp.stack(places).astype(jnp.int32)
    law_Y4B = jnp.stack([_numbers(law_B) for law_B in laws])
    start_1 = jnp.full(1, start, jnp.int32)
    refs = [_in_lanes(array) for array in arrays]
    drawn = kernel(place_YB, law_Y4B, key_B2.T, start_1, *refs)
    score_B, token_B = _best_share(*drawn[:2])
    if fallen is not None:
        residual_score_B, residual_token_B = _best_share(*drawn[2:4])
        mass_B = jnp.sum(drawn[4], axis=0)
        if axis_name is not None:
            mass_B = lax.psum(mass_B, axis_name)
        from_residual_B = fallen.fell_B & (mass_B > xla.LEAST_MASS)
        score_B = jnp.where(from_residual_B, residual_score_B, score_B)
        token_B = jnp.where(from_residual_B, residual_token_B, token_B)
    return score_B, start + jnp.minimum(token_B, num_tokens - 1)  # inside, if all scores are NaN


def _draw_kernel(
    place_ref: Any,
    law_ref: Any,
    key_ref: Any,
    start_ref: Any,
    *refs: Any,
    num_laws: int,
    num_tokens: int,
    blocks: int,
) -> None:
    row, share = lax.axis_index("row"), lax.axis_index("share")
    sources = refs[:num_laws]
    outs = refs[num_laws:]
    key = key_ref[0, row], key_ref[1, row]
    start = start_ref[0]
    # One layout for both laws, whatever their dtypes.
    form = _Form.of(sources[0], jnp.float32 if num_laws > 1 else sources[0].dtype)

    def logprob(which: int, smem: Any, inside: jax.Array) -> jax.Array:
        best, log_mass, floor, temperature = (law_ref[which, i, row] for i in range(4))
        x = plgpu.layout_cast(smem[...], form.layout).astype(jnp.float32)
        kept = inside & (x >= floor)
        return jnp.where(kept, -((best - x) / temperature) - log_mass, -jnp.inf)

    def step(indices: Any, *args: Any) -> Any:
        *smems, carry = args
        token = form.tokens(share * blocks + indices[0])
        inside = token < num_tokens
        counter = (token + start).astype(jnp.uint32)
        word, _ = random.threefry2x32(key, (counter, jnp.zeros_like(counter)))
        noise = random.gumbel_from_bits(word)
        target = logprob(0, smems[0], inside)
        kept = _keep_best(carry[:2], target + noise, token)
        if num_laws == 1:
            return kept
        excess = jnp.maximum(jnp.exp(target) - jnp.exp(logprob(1, smems[1], inside)), 0.0)
        return (
            *kept,
            *_keep_best(carry[2:4], jnp.log(excess) + noise, token),
            carry[4] + excess,
        )

    nothing = form.full(-jnp.inf, jnp.float32), form.full(NOWHERE, jnp.int32)
    carry: tuple[jax.Array, ...] = nothing
    if num_laws > 1:
        carry = (*nothing, *nothing, form.full(0.0, jnp.float32))
    places = [place_ref[which, row] for which in range(num_laws)]
    pipeline = _pipeline(step, places, share, blocks, num_tokens, form, carry)
    results = pipeline(*sources)
    for pair in range(num_laws):
        score, token = results[2 * pair : 2 * pair + 2]
        best = jnp.max(score)
        outs[2 * pair][share, row] = best
        outs[2 * pair + 1][share, row] = jnp.min(jnp.where(score == best, token, NOWHERE))
    if num_laws > 1:
        outs[4][share, row] = jnp.sum(results[4])


def _keep_best(
    kept: tuple[jax.Array, ...], score: jax.Array, token: jax.Array
) -> tuple[jax.Array, jax.Array]:
    higher = score > kept[0]
    return jnp.where(higher, score, kept[0]), jnp.where(higher, token, kept[1])


def _best_share(score_NB: jax.Array, token_NB: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first of the highest scores over the shares of a row."""
    best_B = jnp.max(score_NB, axis=0)
    return best_B, jnp.min(jnp.where(score_NB == best_B, token_NB, NOWHERE), axis=0)


def _draft_rows(fallen: Fallen, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """Logits of the drafter over the target's vocabulary, and the row of each request."""
    if fallen.d2t_U is None:
        return fallen.logits_XU, fallen.row_B
    num_rows = fallen.row_B.shape[0]
    logits_BU = fallen.logits_XU[fallen.row_B]
    nothing_BV = jnp.full((num_rows, num_tokens), -jnp.inf, logits_BU.dtype)
    logits_BV = nothing_BV.at[:, fallen.d2t_U].set(logits_BU, unique_indices=True, mode="drop")
    return logits_BV, jnp.arange(num_rows)


def _numbers(law_B: Law) -> jax.Array:
    """float32 [4, B]: what a program needs of a law. Temperature 0 counts as 1, as everywhere."""
    temperature_B = jnp.where(law_B.temperature_X == 0, 1, law_B.temperature_X)
    return jnp.stack([law_B.best_X, law_B.log_mass_X, law_B.floor_X, temperature_B])


# Blocks and shares.


def _shares(num_rows: int, num_tokens: int) -> tuple[int, int]:
    """Shares of a row and blocks of a share: enough programs, each with enough to do."""
    blocks = pl.cdiv(num_tokens, PLACES)
    shares = max(1, min(PROGRAMS // num_rows, blocks // MIN_BLOCKS))
    blocks_per_share = pl.cdiv(blocks, shares)
    return pl.cdiv(blocks, blocks_per_share), blocks_per_share


def _in_lanes(logits_XV: jax.Array) -> jax.Array:
    """[X, Q, L]. Copies where V is not even a multiple of LEAST_LANES."""
    num_rows, num_tokens = logits_XV.shape
    lanes = math.gcd(num_tokens, MOST_LANES)
    if lanes < LEAST_LANES:
        lanes = MOST_LANES
        logits_XV = jnp.pad(logits_XV, ((0, 0), (0, -num_tokens % lanes)))
    return logits_XV.reshape(num_rows, -1, lanes)


def _pipeline(
    step: Any,
    places: list[jax.Array],
    share: jax.Array,
    blocks: int,
    num_tokens: int,
    form: _Form,
    carry: Any,
) -> Any:
    """``step`` over the blocks of a share, of one row of each array."""
    first = share * blocks
    count = jnp.minimum(blocks, pl.cdiv(num_tokens, PLACES) - first)
    specs = [
        plgpu.BlockSpec((None, *form.shape), lambda i, place=place: (place, first + i, 0))
        for place in places
    ]
    return plgpu.emit_pipeline(
        step, grid=(count,), in_specs=specs, max_concurrent_steps=STAGES, init_carry=carry
    )


class _Form(NamedTuple):
    """A block in registers: its shape [PLACES / L, L], and which thread has what of it."""

    shape: tuple[int, int]
    layout: Any

    @classmethod
    def of(cls, ref: Any, dtype: Any) -> _Form:
        """Of rows in lanes; a thread has 16 bytes of a dtype at a time."""
        lanes = ref.shape[-1]
        shape = PLACES // lanes, lanes
        vector = 16 // jnp.dtype(dtype).itemsize
        return cls(shape, plgpu.Layout.WG_STRIDED(shape, vec_size=vector))

    def full(self, value: float, dtype: Any) -> jax.Array:
        """One value everywhere."""
        return plgpu.layout_cast(jnp.full(self.shape, value, dtype), self.layout)

    def tokens(self, block: jax.Array) -> jax.Array:
        """int32: the token of every place."""
        q, lane = (
            plgpu.broadcasted_iota(jnp.int32, self.shape, axis, layout=self.layout)
            for axis in (0, 1)
        )
        rows, lanes = self.shape
        return (block * rows + q) * lanes + lane
