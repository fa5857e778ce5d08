"""AdamW and its learning rate (``notebooks/concepts/training.md``)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from dspark_jax.config import TrainConfig


@struct.dataclass
class LearningRate:
    """An ``optax.Schedule`` whose numbers are arrays: programs serve runs of any length.

    Attributes:
        peak: the recipe's learning rate.
        warmup: updates of the warm-up.
        decay: updates after it.
        scale: 1 + cos(pi / decay), by which the cosine is divided; 0 for the shortest runs.
    """

    peak: np.float32
    warmup: np.float32
    decay: np.float32
    scale: np.float32

    def __call__(self, count: jax.Array) -> jax.Array:
        """float32, of update number ``count`` (from 0)."""
        ramp = (count + 1) / jnp.maximum(self.warmup, 1)
        turn = jnp.minimum(count - self.warmup, self.decay) / self.decay
        cosine = 1.0 + jnp.cos(jnp.pi * turn)
        falling = jnp.where(self.scale > 0, cosine / jnp.where(self.scale > 0, self.scale, 1), 1.0)
        return self.peak * jnp.where(count < self.warmup, ramp, falling)


def learning_rate(recipe: TrainConfig, total_steps: int) -> LearningRate:
    """Linear warm-up, then cosine to 0, with the reference's constants.

    With W = int(warmup_fraction * total) and T = total - W, step i < W has lr (i + 1) / W, and
    step i >= W has lr (1 + cos(pi t / T)) / (1 + cos(pi / T)), t = i - W: slightly above lr right
    after the warm-up, as in the reference implementation.
    """
    warmup = int(recipe.warmup_fraction * total_steps)
    decay = max(total_steps - warmup, 1)
    numbers = (recipe.learning_rate, warmup, decay, 1.0 + math.cos(math.pi / decay))
    return LearningRate(*map(np.float32, numbers))


def make_optimizer(recipe: TrainConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """AdamW behind a clip of the global gradient norm; its state does not depend on ``rate``."""
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm),
        optax.adamw(rate, weight_decay=recipe.weight_decay),
    )
