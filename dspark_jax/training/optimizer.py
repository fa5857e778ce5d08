"""AdamW and its learning rate (``notebooks/concepts/training.md``), or others in their places."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from dspark_jax.config import TrainConfig

# A schedule of the learning rate -> a transformation of gradients, as ``optax.lion`` is.
Optimizer = Callable[[optax.Schedule], optax.GradientTransformation]


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


def make_optimizer(
    recipe: TrainConfig, rate: optax.Schedule, optimizer: Optimizer | None = None
) -> optax.GradientTransformation:
    """An optimiser behind a clip of the global gradient norm; its state does not depend on
    ``rate``.

    Args:
        recipe: for the clip, and the weight decay of AdamW.
        rate: float32 learning rate by the number of the update, from 0.
        optimizer: makes a transformation of a schedule; None for AdamW.
    """
    clip = optax.clip_by_global_norm(recipe.clip_norm)
    if optimizer is None:
        return optax.chain(clip, optax.adamw(rate, weight_decay=recipe.weight_decay))
    return optax.chain(clip, optimizer(rate))


def check_optimizer(recipe: TrainConfig, optimizer: Optimizer | None) -> None:
    """Refuse what cannot be an optimiser.

    Raises:
        ValueError: it is not a function of a schedule, or the recipe says more of AdamW than its
            schedule.
    """
    if optimizer is None:
        return
    if not callable(optimizer):
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__}: give the function that makes one of a "
            "learning rate, such as optax.lion, or lambda rate: optax.chain(..., optax.lion(rate))"
        )
    if recipe.weight_decay:
        raise ValueError(
            f"weight_decay is {recipe.weight_decay}, which is AdamW's, and another optimizer is "
            "given: set it to 0 and give the decay to the optimizer"
        )
