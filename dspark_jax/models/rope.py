"""Rotary position embeddings of every kind."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.config import RopeConfig

Table = tuple[jax.Array, jax.Array]


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Inverse frequencies [H/2], float32, scaled as the kind says.

    Sources: Chen et al. 2023 (linear), Peng et al. 2023 (YaRN), Ding et al. 2024 (longrope),
    Llama 3.1 (llama3), Gemma 4 (proportional: the rotated channels are the first ones, and their
    frequencies those of the whole width).
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    if rope.kind == "linear":
        return (frequency / np.float32(rope.factor)).astype(np.float32)
    if rope.kind == "llama3":
        turns = rope.original_max_positions * frequency / (2 * math.pi)
        band = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        return _slowed(frequency, 1 - np.clip(band, 0.0, 1.0), rope.factor)
    if rope.kind == "yarn":
        return _slowed(frequency, _yarn_ramp(rope, head_dim), rope.factor)
    if rope.kind == "longrope":
        return (frequency / np.array(rope.short_factors, np.float32)).astype(np.float32)
    if rope.kind == "proportional":
        turning = np.arange(head_dim // 2) < int(rope.rotated * head_dim // 2)
        return np.where(turning, frequency / np.float32(rope.factor), 0).astype(np.float32)
    return frequency


def _slowed(frequency: np.ndarray, share: np.ndarray, factor: float) -> np.ndarray:
    """Frequencies of which a share in [0, 1] is divided by the factor."""
    return (frequency * (1 - share + share / factor)).astype(np.float32)


def _yarn_ramp(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """YaRN's share of every channel: 0 where it turns often over the original context, 1 where
    it turns seldom, and linear in between."""

    def channel(turns: float) -> float:
        wavelengths = rope.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(wavelengths) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    return np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0, 1)


def rope_table(position_X: jax.Array, rope: RopeConfig, head_dim: int) -> Table:
    """cos and sin [X, 1, H/2], float32, to be shared by layers and heads."""
    frequency = jnp.asarray(rope_frequencies(rope, head_dim))
    angle = position_X[..., None, None].astype(jnp.float32) * frequency
    scale = np.float32(rope.attention_factor)
    return jnp.cos(angle) * scale, jnp.sin(angle) * scale


def rotate(x_XNH: jax.Array, table: Table) -> jax.Array:
    """RoPE in the rotate-half convention, computed in float32."""
    cos, sin = table
    first, second = jnp.split(x_XNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_XNH.dtype)


def rotate_pairs(x_XNH: jax.Array, table: Table, *, back: bool = False) -> jax.Array:
    """RoPE of the last channels, as many as the table has frequencies for, in neighbouring pairs;
    computed in float32.

    Args:
        x_XNH: heads.
        table: cos and sin [X, 1, R/2] for R rotated channels.
        back: whether to turn them the other way.
    """
    cos, sin = table
    sin = -sin if back else sin
    width = 2 * cos.shape[-1]
    kept, turning = x_XNH[..., :-width], x_XNH[..., -width:].astype(jnp.float32)
    even, odd = turning[..., ::2], turning[..., 1::2]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return jnp.concatenate([kept, turned.reshape(turning.shape).astype(x_XNH.dtype)], axis=-1)
