"""Rotary position embeddings."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.config import RopeConfig, TransformerConfig


def rope_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Inverse frequencies [H/2], float32, with the Llama-3 scaling where ``factor`` > 1."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequency = (1.0 / np.float32(rope.theta) ** exponent).astype(np.float32)
    if rope.factor == 1.0:
        return frequency
    wavelength = 2 * math.pi / frequency
    turns = rope.original_max_positions / wavelength
    band = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = np.clip(band, 0.0, 1.0)
    return (frequency * (keep + (1 - keep) / rope.factor)).astype(np.float32)


def rope_table(position_X: jax.Array, cfg: TransformerConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin [X, 1, H/2], float32, to be shared by all layers and heads."""
    frequency = jnp.asarray(rope_frequencies(cfg.rope, cfg.head_dim))
    angle = position_X[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_XNH: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """RoPE in the rotate-half convention, computed in float32."""
    cos, sin = table
    first, second = jnp.split(x_XNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_XNH.dtype)
