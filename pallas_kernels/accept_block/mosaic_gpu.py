"""The passes of verification as Mosaic GPU kernels; ``xla.py`` says what they mean.

A program reads a share of one row, block by block through asynchronous copies, and keeps a running
result for each place of a block: nothing crosses threads before the end. Shares are merged as
shards are. Rows lie as [V / L, L], so that every access is in bounds whatever V is; what a last
block has too much is filled with zeros by the copy and masked.

Axes beside those of ``xla.py``: L lanes, up to 128 tokens; Q = V / L; N shares of a row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import random
from pallas_kernels.accept_block import xla
from pallas_kernels.accept_block.xla import Draws, Law, Sample, Statistics

# Tokens of a block, which makes 8 numbers a thread of each running result: what a draw keeps of two
# laws fits into registers, with four programs or more on a multiprocessor.
PLACES = 1024
MOST_LANES, LEAST_LANES = 128, 16  # a row of a block has 32 bytes at least
STAGES = 4  # blocks under way
PROGRAMS = 1056  # eight a streaming multiprocessor of an H100 or H200
MIN_BLOCKS = 8  # of a share: a shorter one is not worth its merge
LOWEST = float(jnp.finfo(jnp.float32).min)
NOWHERE = 2**31 - 1


def statistics(logits_TV: jax.Array, temperature_T: jax.Array, floor_T: jax.Array) -> Statistics:
    """As :func:`pallas_kernels.accept_block.xla.statistics`, in one reading of the rows."""
    num_tokens = logits_TV.shape[1]
    name = "accept_statistics"
    kernel = _kernel(_statistics_kernel, name, len(logits_TV), num_tokens, "fiff", approx_math=True)
    scale_T = jnp.where(temperature_T == 0, 1, 1 / temperature_T)
    best_NT, first_NT, mass_NT, zero_NT = kernel(_in_lanes(logits_TV), scale_T, floor_T)
    first_NT = jnp.minimum(first_NT, num_tokens - 1)  # inside, if all logits are NaN
    parts_NT = Statistics(best_NT, first_NT, mass_NT, jnp.isfinite(zero_NT))
    return xla.merge(parts_NT, temperature_T)


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


def sample(
    logits_TV: jax.Array,
    temperature_T: jax.Array,
    floor_T: jax.Array,
    key_T2: jax.Array | None,
    axis_name: str | None = None,
) -> Sample:
    """As :func:`pallas_kernels.accept_block.xla.sample`, with the same random bits."""
    place_2T = jnp.zeros((2, len(logits_TV)), jnp.int32)  # which is not read
    return _sample(logits_TV, place_2T, temperature_T, floor_T, key_T2, axis_name, rest=False)


def sample_rest(
    logits_TV: jax.Array,
    row_B: jax.Array,
    without_B: jax.Array,
    temperature_B: jax.Array,
    floor_B: jax.Array,
    key_B2: jax.Array,
    axis_name: str | None = None,
) -> Sample:
    """As :func:`pallas_kernels.accept_block.xla.sample_rest`, with the same random bits."""
    place_2B = jnp.stack([row_B, without_B]).astype(jnp.int32)
    return _sample(logits_TV, place_2B, temperature_B, floor_B, key_B2, axis_name, rest=True)


def _sample(
    logits_TV: jax.Array,
    place_2T: jax.Array,
    temperature_T: jax.Array,
    floor_T: jax.Array,
    key_T2: jax.Array | None,
    axis_name: str | None,
    *,
    rest: bool,
) -> Sample:
    num_rows, num_tokens = place_2T.shape[1], logits_TV.shape[1]
    start = xla.shard_start(num_tokens, axis_name)
    body = functools.partial(_sample_kernel, noisy=key_T2 is not None, rest=rest)
    kernel = _kernel(body, "accept_sample", num_rows, num_tokens, "ffif")
    key_2T = jnp.zeros((2, num_rows), jnp.uint32) if key_T2 is None else key_T2.T
    given = place_2T, temperature_T, floor_T, key_2T, jnp.full(1, start, jnp.int32)
    best_NT, score_NT, token_NT, zero_NT = kernel(_in_lanes(logits_TV), *given)
    token_NT = start + jnp.minimum(token_NT, num_tokens - 1)  # inside, if all scores are NaN
    parts_NT = Sample(best_NT, score_NT, token_NT, jnp.isfinite(zero_NT))
    return xla.merge_samples(parts_NT, temperature_T)


def _sample_kernel(
    logits_ref: Any,
    place_ref: Any,
    temperature_ref: Any,
    floor_ref: Any,
    key_ref: Any,
    start_ref: Any,
    best_ref: Any,
    score_ref: Any,
    token_ref: Any,
    zero_ref: Any,
    *,
    num_tokens: int,
    blocks: int,
    noisy: bool,
    rest: bool,
) -> None:
    row, share = lax.axis_index("row"), lax.axis_index("share")
    source, without = (place_ref[0, row], place_ref[1, row]) if rest else (row, xla.NO_TOKEN)
    floor, temperature = floor_ref[row], temperature_ref[row]
    greedy = temperature == 0
    temperature = jnp.where(greedy, 1.0, temperature)
    key, start = (key_ref[0, row], key_ref[1, row]), start_ref[0]
    form = _Form.of(logits_ref, logits_ref.dtype)

    def step(indices: Any, logits_smem: Any, carry: Any) -> Any:
        best, score, token, zero = carry
        x = plgpu.layout_cast(logits_smem[...], form.layout).astype(jnp.float32)
        zero = zero + (x - x)  # NaN once anything is not finite
        here = form.tokens(share * blocks + indices[0])
        x = jnp.where(here < num_tokens, x, -jnp.inf)
        if rest:
            x = jnp.where(here + start == without, -jnp.inf, x)
        # Scores are relative to the best logit so far, as tiny temperatures need it.
        highest = jnp.maximum(x, best)
        score = score - (highest - best) / temperature
        new = jnp.where(x >= floor, (x - highest) / temperature, -jnp.inf)
        if noisy:
            silence = form.full(0.0, jnp.float32)
            new = new + lax.cond(greedy, lambda: silence, lambda: _noise(key, here + start))
        return highest, *_keep_best((score, token), new, here), zero

    nothing = form.full(-jnp.inf, jnp.float32), form.full(NOWHERE, jnp.int32)
    carry = form.full(LOWEST, jnp.float32), *nothing, form.full(0.0, jnp.float32)
    pipeline = _pipeline(step, [source], share, blocks, num_tokens, form, carry)
    best, score, token, zero = pipeline(logits_ref)
    highest = jnp.max(best)
    score = score - (highest - best) / temperature
    best_ref[share, row] = highest
    _put_best(score_ref, token_ref, (share, row), score, token)
    zero_ref[share, row] = jnp.sum(zero)


def draw(
    logits_TV: jax.Array,
    row_B: jax.Array,
    law_B: Law,
    draft_logits_BU: jax.Array,
    draft_law_B: Law,
    d2t_U: jax.Array | None,
    key_B2: jax.Array,
    axis_name: str | None = None,
) -> Draws:
    """As :func:`pallas_kernels.accept_block.xla.draw`, with the same random bits."""
    num_rows, num_tokens = key_B2.shape[0], logits_TV.shape[1]
    start = xla.shard_start(num_tokens, axis_name)
    draft_logits_BV = draft_logits_BU
    if d2t_U is not None:
        draft_logits_BV = jnp.full((num_rows, num_tokens), -jnp.inf, draft_logits_BU.dtype)
        put = draft_logits_BV.at[:, d2t_U]
        draft_logits_BV = put.set(draft_logits_BU, unique_indices=True, mode="drop")
    kernel = _kernel(_draw_kernel, "accept_draw", num_rows, num_tokens, "fifif")
    score_NB, token_NB, residual_score_NB, residual_token_NB, mass_NB = kernel(
        row_B.astype(jnp.int32),
        jnp.stack([_numbers(law_B), _numbers(draft_law_B)]),
        key_B2.T,
        jnp.full(1, start, jnp.int32),
        _in_lanes(logits_TV),
        _in_lanes(draft_logits_BV),
    )
    token_NB, residual_token_NB = (
        start + jnp.minimum(token, num_tokens - 1)  # inside, if all scores are NaN
        for token in (token_NB, residual_token_NB)
    )
    parts_NB = Draws(score_NB, token_NB, residual_score_NB, residual_token_NB, mass_NB)
    return xla.merge_draws(parts_NB)


def _draw_kernel(
    row_ref: Any,
    law_ref: Any,
    key_ref: Any,
    start_ref: Any,
    logits_ref: Any,
    draft_logits_ref: Any,
    score_ref: Any,
    token_ref: Any,
    residual_score_ref: Any,
    residual_token_ref: Any,
    mass_ref: Any,
    *,
    num_tokens: int,
    blocks: int,
) -> None:
    row, share = lax.axis_index("row"), lax.axis_index("share")
    key, start = (key_ref[0, row], key_ref[1, row]), start_ref[0]
    form = _Form.of(logits_ref, jnp.float32)  # one layout for both laws, whatever their dtypes

    def logprob(which: int, smem: Any, inside: jax.Array) -> jax.Array:
        best, log_mass, floor, temperature = (law_ref[which, i, row] for i in range(4))
        x = plgpu.layout_cast(smem[...], form.layout).astype(jnp.float32)
        kept = inside & (x >= floor)
        return jnp.where(kept, -((best - x) / temperature) - log_mass, -jnp.inf)

    def step(indices: Any, logits_smem: Any, draft_logits_smem: Any, carry: Any) -> Any:
        drawn, residual, mass = carry[:2], carry[2:4], carry[4]
        here = form.tokens(share * blocks + indices[0])
        inside = here < num_tokens
        noise = _noise(key, here + start)
        target = logprob(0, logits_smem, inside)
        drafted = logprob(1, draft_logits_smem, inside)
        excess = jnp.maximum(jnp.exp(target) - jnp.exp(drafted), 0.0)
        drawn = _keep_best(drawn, target + noise, here)
        residual = _keep_best(residual, jnp.log(excess) + noise, here)
        return *drawn, *residual, mass + excess

    nothing = form.full(-jnp.inf, jnp.float32), form.full(NOWHERE, jnp.int32)
    carry = *nothing, *nothing, form.full(0.0, jnp.float32)
    places = [row_ref[row], row]
    pipeline = _pipeline(step, places, share, blocks, num_tokens, form, carry)
    drawn_score, drawn_token, score, token, mass = pipeline(logits_ref, draft_logits_ref)
    _put_best(score_ref, token_ref, (share, row), drawn_score, drawn_token)
    _put_best(residual_score_ref, residual_token_ref, (share, row), score, token)
    mass_ref[share, row] = jnp.sum(mass)


def _noise(key: random.Words, token: jax.Array) -> jax.Array:
    counter = token.astype(jnp.uint32)
    word, _ = random.threefry2x32(key, (counter, jnp.zeros_like(counter)))
    return random.gumbel_from_bits(word)


def _keep_best(
    kept: tuple[jax.Array, ...], score: jax.Array, token: jax.Array
) -> tuple[jax.Array, jax.Array]:
    higher = score > kept[0]
    return jnp.where(higher, score, kept[0]), jnp.where(higher, token, kept[1])


def _put_best(
    score_ref: Any, token_ref: Any, place: Any, score: jax.Array, token: jax.Array
) -> None:
    """The first of the highest scores of a share."""
    best = jnp.max(score)
    score_ref[place] = best
    token_ref[place] = jnp.min(jnp.where(score == best, token, NOWHERE))


def _numbers(law_B: Law) -> jax.Array:
    """float32 [4, B]: what a program needs of a law. Temperature 0 counts as 1, as everywhere."""
    temperature_B = jnp.where(law_B.temperature_X == 0, 1, law_B.temperature_X)
    return jnp.stack([law_B.best_X, law_B.log_mass_X, law_B.floor_X, temperature_B])


# Blocks and shares.


def _kernel(
    body: Callable[..., None],
    name: str,
    num_rows: int,
    num_tokens: int,
    outs: str,
    approx_math: bool = False,
) -> Callable[..., Any]:
    """A program for each share of each row.

    Args:
        body: of a program, told ``num_tokens`` and the ``blocks`` of a share.
        name: of the kernel.
        num_rows: that are read.
        num_tokens: likewise.
        outs: a letter for each array [N, T] that comes out, i for int32 and f for float32.
        approx_math: functions may be less exact: not for noise, whose digits decide.
    """
    shares, blocks = _shares(num_rows, num_tokens)
    dtypes = {"f": jnp.float32, "i": jnp.int32}
    kernel: Callable[..., Any] = plgpu.kernel(
        functools.partial(body, num_tokens=num_tokens, blocks=blocks),
        out_type=tuple(jax.ShapeDtypeStruct((shares, num_rows), dtypes[out]) for out in outs),
        grid=(num_rows, shares),
        grid_names=("row", "share"),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=approx_math),
    )
    return kernel


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
