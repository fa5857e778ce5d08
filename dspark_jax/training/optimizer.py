"""AdamW and its learning rate (spec sections 8 and 10)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax

from dspark_jax.config import TrainConfig


def learning_rate(recipe: TrainConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up, then cosine to 0, with the reference's constants.

    With W = int(warmup_fraction * total) and T = total - W, step i < W has lr (i + 1) / W, and
    step i >= W has lr (1 + cos(pi t / T)) / (1 + cos(pi / T)), t = i - W: slightly above lr right
    after the warm-up (spec section 10).
    """
    warmup = int(recipe.warmup_fraction * total_steps)
    decay = max(total_steps - warmup, 1)
    scale = 1.0 + math.cos(math.pi / decay)

    def schedule(count: jax.Array) -> jax.Array:
        ramp = (count + 1) / max(warmup, 1)
        cosine = 1.0 + jnp.cos(jnp.pi * jnp.minimum(count - warmup, decay) / decay)
        factor = jnp.where(count < warmup, ramp, cosine / scale if scale > 0 else 1.0)
        return recipe.learning_rate * factor

    return schedule


def make_optimizer(recipe: TrainConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW behind a clip of the global gradient norm."""
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm),
        optax.adamw(learning_rate(recipe, total_steps), weight_decay=recipe.weight_decay),
    )
