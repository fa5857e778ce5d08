"""One training step: frozen target, drafter, loss, AdamW (spec section 8)."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dspark_jax.config import DrafterConfig, TargetConfig, TrainConfig
from dspark_jax.models.drafter import DrafterParams
from dspark_jax.models.target import TargetParams, Vocab, encode
from dspark_jax.training.anchors import block_labels, sample_anchors
from dspark_jax.training.losses import Teacher, draft_blocks, dspark_loss, teacher_probs


@struct.dataclass
class TrainState:
    """A run's state: what the steps change, and the scale of the features that they rely on.

    Attributes:
        step: int32, optimiser steps done.
        params: trainable weights, float32; ``fc`` reads features in units of ``feature_scale_FE``
            until :func:`deployed` folds these in.
        optimizer: state of the optimiser.
        feature_scale_FE: float32 root mean square of every feature channel (:func:`feature_scale`).
    """

    step: jax.Array
    params: DrafterParams
    optimizer: Any
    feature_scale_FE: jax.Array


@struct.dataclass
class Frozen:
    """What every step reads: the target, the drafter's vocabulary, and (reduced vocabulary) the
    place of every target token in it, ``t2d_V``."""

    target: TargetParams
    vocab: Vocab
    t2d_V: Any


@struct.dataclass
class Batch:
    """Sequences of one length bucket: token_BS int32, loss_mask_BS bool; padding at the end."""

    token_BS: Any
    loss_mask_BS: Any


def learning_rate(recipe: TrainConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up, then cosine to 0, with the reference's constants.

    With W = int(warmup_fraction * total) and T = total - W, step i >= W has
    lr (1 + cos(pi t / T)) / (1 + cos(pi / T)), t = i - W: slightly above lr right after the
    warm-up (spec section 10).
    """
    warmup = int(recipe.warmup_fraction * total_steps)
    decay = max(total_steps - warmup, 1)
    scale = 1.0 + math.cos(math.pi / decay)

    def schedule(count: jax.Array) -> jax.Array:
        ramp = count / max(warmup, 1)
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


def anchors_of(recipe: TrainConfig, length: int) -> int:
    """Blocks a sequence in a bucket of this length."""
    return max(1, recipe.num_anchors * length // recipe.max_length)


def feature_scale(
    frozen: Frozen, batch: Batch, target_cfg: TargetConfig, cfg: DrafterConfig
) -> jax.Array:
    """float32 [F, E]: mean square of every feature channel over the supervised positions.

    A residual stream has a few channels hundreds of times larger than the rest, nearly constant,
    and late layers are ten times larger than early ones. Unscaled, they drown everything else in
    ``fc``, and one step of Adam, which moves all weights alike, moves their share of the context
    by more than its own size. In units of their root mean square all channels learn alike.
    """
    _, feature_BSFE = encode(frozen.target, batch.token_BS, target_cfg, cfg.target_layer_ids)
    weight_BS = batch.loss_mask_BS.astype(jnp.float32)
    square_BSFE = jnp.square(feature_BSFE.astype(jnp.float32))
    return jnp.einsum("bs,bsfe->fe", weight_BS, square_BSFE) / weight_BS.sum()


def deployed(state: TrainState) -> DrafterParams:
    """The weights as a checkpoint holds them: ``fc`` reads raw features."""
    scale_FE1 = state.feature_scale_FE[..., None]
    params = state.params
    return params.replace(fc_FED=params.fc_FED / scale_FE1)  # type: ignore[attr-defined]


def batch_loss(
    params: DrafterParams,
    frozen: Frozen,
    batch: Batch,
    feature_BSFD: jax.Array,
    teacher: Teacher,
    key: jax.Array,
    cfg: DrafterConfig,
    recipe: TrainConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics of a batch whose target features are given, in the units of ``params``."""
    num_anchors = anchors_of(recipe, batch.token_BS.shape[1])
    anchor_BA, keep_BA = sample_anchors(key, batch.loss_mask_BS, num_anchors)
    labels = block_labels(batch.token_BS, batch.loss_mask_BS, anchor_BA, keep_BA, cfg.block_size)
    outputs = draft_blocks(params, frozen.vocab, feature_BSFD, labels, anchor_BA, keep_BA, cfg)
    return dspark_loss(
        outputs,
        teacher,
        labels,
        keep_BA,
        frozen.t2d_V,
        ce_weight=recipe.ce_weight,
        l1_weight=recipe.l1_weight,
        confidence_weight=recipe.confidence_weight,
        decay=recipe.loss_decay,
    )


def target_outputs(
    state: TrainState, frozen: Frozen, batch: Batch, target_cfg: TargetConfig, cfg: DrafterConfig
) -> tuple[jax.Array, Teacher]:
    """Scaled features and distributions of the frozen target for a batch."""
    hidden_BSD, feature_BSFD = encode(
        frozen.target, batch.token_BS, target_cfg, cfg.target_layer_ids
    )
    teacher = teacher_probs(frozen.target.vocab, hidden_BSD, frozen.vocab.d2t_U)
    return feature_BSFD.astype(jnp.float32) / state.feature_scale_FE, teacher


def train_step(
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    target_cfg: TargetConfig,
    cfg: DrafterConfig,
    recipe: TrainConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step with online features: the target runs in the same program.

    The anchors depend on (seed, step) alone, so a resumed run draws the same ones.

    Returns:
        The next state and the metrics of this step, ``gradient_norm`` (before the clip) included.
    """
    key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
    feature_BSFD, teacher = target_outputs(state, frozen, batch, target_cfg, cfg)
    (_, metrics), gradient = jax.value_and_grad(batch_loss, has_aux=True)(
        state.params, frozen, batch, feature_BSFD, teacher, key, cfg, recipe
    )
    update, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
    metrics["gradient_norm"] = optax.global_norm(gradient)
    params = optax.apply_updates(state.params, update)
    return TrainState(state.step + 1, params, optimizer_state, state.feature_scale_FE), metrics


def evaluation_step(
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    target_cfg: TargetConfig,
    cfg: DrafterConfig,
    recipe: TrainConfig,
) -> dict[str, jax.Array]:
    """Metrics of held-out sequences, always with the same anchors."""
    feature_BSFD, teacher = target_outputs(state, frozen, batch, target_cfg, cfg)
    key = jax.random.key(recipe.seed)
    return batch_loss(state.params, frozen, batch, feature_BSFD, teacher, key, cfg, recipe)[1]
