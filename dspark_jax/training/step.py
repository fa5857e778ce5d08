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
    """Everything that the steps change.

    Attributes:
        step: int32, batches done, of ``updates_per_batch`` optimiser updates each.
        params: trainable weights, float32.
        optimizer: state of the optimiser.
    """

    step: jax.Array
    params: DrafterParams
    optimizer: Any


@struct.dataclass
class Frozen:
    """What every step reads: the target, the drafter's vocabulary, and (reduced vocabulary) the
    place of every target token in it, ``t2d_V``."""

    target: TargetParams
    vocab: Vocab
    t2d_V: Any


@struct.dataclass
class Batch:
    """Sequences of one length bucket, with padding at the end.

    Attributes:
        token_BS: int32 ids.
        loss_mask_BS: bool, the supervised tokens.
        feature_BSFD, hidden_BSD: bfloat16 outputs of the target out of a cache; None where the
            step is to run the target.
    """

    token_BS: Any
    loss_mask_BS: Any
    feature_BSFD: Any = None
    hidden_BSD: Any = None


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


def anchors_of(recipe: TrainConfig, length: int) -> int:
    """Blocks a sequence in a bucket of this length."""
    return max(1, recipe.num_anchors * length // recipe.max_length)


def batch_loss(
    params: DrafterParams,
    frozen: Frozen,
    batch: Batch,
    feature_BSFD: jax.Array,
    teacher: Teacher,
    key: jax.Array,
    turn: jax.Array | float,
    cfg: DrafterConfig,
    recipe: TrainConfig,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics of a batch whose target features are given.

    The forward pass runs in ``recipe.dtype``; gradients and divergences are float32.
    """
    params = jax.tree.map(lambda x: x.astype(recipe.dtype), params)
    num_anchors = anchors_of(recipe, batch.token_BS.shape[1])
    anchor_BA, keep_BA = sample_anchors(key, batch.loss_mask_BS, num_anchors, turn)
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
    frozen: Frozen, batch: Batch, target_cfg: TargetConfig, cfg: DrafterConfig
) -> tuple[jax.Array, Teacher]:
    """Features and distributions of the frozen target for a batch."""
    hidden_BSD, feature_BSFD = batch.hidden_BSD, batch.feature_BSFD
    if feature_BSFD is None:
        hidden_BSD, feature_BSFD = encode(
            frozen.target, batch.token_BS, target_cfg, cfg.target_layer_ids
        )
    return feature_BSFD, teacher_probs(frozen.target.vocab, hidden_BSD, frozen.vocab.d2t_U)


def train_step(
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    target_cfg: TargetConfig,
    cfg: DrafterConfig,
    recipe: TrainConfig,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One batch; the target runs in the same program, unless the batch brings its outputs.

    The features serve ``updates_per_batch`` optimiser updates, each over
    ``sequences_per_update`` of the sequences in a shuffled order that starts again when all were
    used, then with other anchors. Many small updates over a large batch learn faster than few
    large ones, and the target's pass, most of the cost, is paid once. Everything depends on
    (seed, step) alone, so a resumed run draws the same.

    Returns:
        The next state and the metrics of this step, ``gradient_norm`` (before the clip) included;
        means over the updates, ``blocks`` their sum.
    """
    key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
    feature_BSFD, teacher = target_outputs(frozen, batch, target_cfg, cfg)
    size = batch.token_BS.shape[0]
    share = min(recipe.sequences_per_update or size, size)
    laps = -(-recipe.updates_per_batch * share // size)

    def update(carry: tuple[DrafterParams, Any], index: jax.Array) -> Any:
        params, optimizer_state = carry
        first = index * share
        lap = first // size
        order_B = jax.random.permutation(jax.random.fold_in(key, lap), size)
        chosen = order_B[(first + jnp.arange(share)) % size]
        part, feature, law = jax.tree.map(lambda x: x[chosen], (batch, feature_BSFD, teacher))
        (_, metrics), gradient = jax.value_and_grad(batch_loss, has_aux=True)(
            params, frozen, part, feature, law, key, lap / laps, cfg, recipe
        )
        change, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        return (optax.apply_updates(params, change), optimizer_state), metrics

    (params, optimizer_state), each = jax.lax.scan(
        update, (state.params, state.optimizer), jnp.arange(recipe.updates_per_batch)
    )
    metrics = {name: value.mean(0) for name, value in each.items()}
    metrics["blocks"] = each["blocks"].sum()
    return TrainState(state.step + 1, params, optimizer_state), metrics


def evaluation_step(
    params: DrafterParams,
    frozen: Frozen,
    batch: Batch,
    target_cfg: TargetConfig,
    cfg: DrafterConfig,
    recipe: TrainConfig,
) -> dict[str, jax.Array]:
    """Metrics of held-out sequences, always with the same anchors."""
    feature_BSFD, teacher = target_outputs(frozen, batch, target_cfg, cfg)
    key = jax.random.key(recipe.seed)
    return batch_loss(params, frozen, batch, feature_BSFD, teacher, key, 0.0, cfg, recipe)[1]
