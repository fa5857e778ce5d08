"""The DSpark loss and its metrics (paper, section 3.3; spec sections 8 and 10).

    loss = 0.1 CE + 0.9 |p^d - p^t|_1 + 1.0 BCE(c_k, 1 - |p^d - p^t|_1 / 2)

Each term is a weighted mean over the supervised slots of the whole batch. Divergences are computed
in float32: in bfloat16 the gradient of the total variation cancels.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dspark_jax.config import DrafterConfig
from dspark_jax.models import cache as kv
from dspark_jax.models.drafter import DrafterParams, block_hidden, inject
from dspark_jax.models.heads import bias_logits, block_codes, confidence_logit
from dspark_jax.models.target import Vocab, unembed
from dspark_jax.training.anchors import BlockLabels

EPSILON = 1e-6


@struct.dataclass
class Teacher:
    """The target's distribution at every position of the sequences, over the draft vocabulary.

    Attributes:
        prob_BSU: float32 probabilities of the draft vocabulary's tokens.
        outside_BS: float32 mass of all other tokens.
    """

    prob_BSU: jax.Array
    outside_BS: jax.Array


@struct.dataclass
class BlockOutputs:
    """What the drafter says of all blocks: logits float32, confidence logits or None."""

    logits_BAGU: jax.Array
    confidence_logit_BAG: Any


def teacher_probs(target_vocab: Vocab, hidden_BSD: jax.Array, d2t_U: jax.Array | None) -> Teacher:
    """The target's distributions from its last (normalised) hidden states.

    One sequence at a time, so that only [S, V] logits exist at once.
    """

    def one(hidden_SD: jax.Array) -> Teacher:
        prob_SV = jax.nn.softmax(unembed(target_vocab, hidden_SD), axis=-1)
        if d2t_U is None:
            return Teacher(prob_SV, jnp.zeros(prob_SV.shape[0]))
        prob_SU = jnp.take(prob_SV, d2t_U, axis=1, mode="clip")
        return Teacher(prob_SU, jnp.maximum(1.0 - prob_SU.sum(-1), 0.0))

    return jax.lax.map(one, hidden_BSD)


def draft_blocks(
    drafter: DrafterParams,
    vocab: Vocab,
    feature_BSFD: jax.Array,
    labels: BlockLabels,
    anchor_BA: jax.Array,
    keep_BA: jax.Array,
    cfg: DrafterConfig,
) -> BlockOutputs:
    """Teacher-forced forward pass of all blocks of a batch of sequences."""
    position_BS = jnp.broadcast_to(
        jnp.arange(feature_BSFD.shape[1], dtype=jnp.int32), feature_BSFD.shape[:2]
    )
    context = kv.KVCache(*inject(drafter, feature_BSFD, position_BS, cfg))
    first_BA = labels.previous_BAG[..., 0]
    hidden_BAGD = block_hidden(drafter, vocab, first_BA, anchor_BA, context, cfg, keep_BA)
    logits_BAGU, embedding = unembed(vocab, hidden_BAGD), None
    if drafter.head is not None:
        code, embedding = block_codes(
            drafter.head, labels.previous_BAG, hidden_BAGD, cfg.markov_head
        )
        logits_BAGU = logits_BAGU + bias_logits(drafter.head, code)
    confidence = None
    if drafter.confidence is not None:
        confidence = confidence_logit(drafter.confidence, hidden_BAGD, embedding, cfg)
    return BlockOutputs(logits_BAGU, confidence)


def slot_weights(supervised_BAG: jax.Array, decay: float) -> jax.Array:
    """``exp(-(k-1)/decay)`` for supervised slots, 0 elsewhere; ``decay`` 0 is no decay."""
    if not decay:
        return supervised_BAG.astype(jnp.float32)
    slot_G = jnp.arange(supervised_BAG.shape[-1], dtype=jnp.float32)
    return supervised_BAG * jnp.exp(-slot_G / decay)


def weighted_mean(value: jax.Array, weight: jax.Array) -> jax.Array:
    """``sum(value * weight) / (sum(weight) + 1e-6)``; 0-weight entries may hold anything finite."""
    return jnp.sum(value * weight) / (jnp.sum(weight) + EPSILON)


def dspark_loss(
    outputs: BlockOutputs,
    teacher: Teacher,
    labels: BlockLabels,
    keep_BA: jax.Array,
    t2d_V: jax.Array | None,
    *,
    ce_weight: float = 0.1,
    l1_weight: float = 0.9,
    confidence_weight: float = 1.0,
    decay: float = 4.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics of a batch.

    Args:
        outputs: of the drafter.
        teacher: of the target.
        labels: of the blocks.
        keep_BA: False for dummy blocks.
        t2d_V: int32 place of every token in the draft vocabulary, -1 outside it; None where the
            draft vocabulary is all of V. The cross-entropy skips labels outside.
        ce_weight, l1_weight, confidence_weight: a term of weight 0 is skipped.
        decay: see :func:`slot_weights`.

    Returns:
        The loss (float32 scalar) and its parts and metrics; those ending in ``_G`` are per slot.
    """
    weight_BAG = slot_weights(labels.supervised_BAG, decay)
    loss = jnp.zeros(())
    metrics: dict[str, jax.Array] = {}

    if ce_weight:
        label_BAG = labels.label_BAG if t2d_V is None else t2d_V[labels.label_BAG]
        entropy_BAG = optax.softmax_cross_entropy_with_integer_labels(
            outputs.logits_BAGU, jnp.maximum(label_BAG, 0)
        )
        metrics["ce"] = weighted_mean(entropy_BAG, weight_BAG * (label_BAG >= 0))
        loss += ce_weight * metrics["ce"]

    batch_B11 = jnp.arange(keep_BA.shape[0])[:, None, None]
    prob_BAGU = jax.nn.softmax(outputs.logits_BAGU, axis=-1)
    teacher_BAGU = teacher.prob_BSU[batch_B11, labels.position_BAG]
    outside_BAG = teacher.outside_BS[batch_B11, labels.position_BAG]
    l1_BAG = jnp.abs(prob_BAGU - teacher_BAGU).sum(-1) + outside_BAG
    if l1_weight:
        metrics["l1"] = weighted_mean(l1_BAG, weight_BAG)
        loss += l1_weight * metrics["l1"]

    accept_BAG = jax.lax.stop_gradient(jnp.clip(1.0 - 0.5 * l1_BAG, 0.0, 1.0))
    if confidence_weight and outputs.confidence_logit_BAG is not None:
        logit_BAG = outputs.confidence_logit_BAG
        bce_BAG = optax.sigmoid_binary_cross_entropy(logit_BAG, accept_BAG)
        metrics["confidence"] = weighted_mean(bce_BAG, weight_BAG)
        loss += confidence_weight * metrics["confidence"]
        error_BAG = jax.nn.sigmoid(logit_BAG) - accept_BAG
        metrics["confidence_abs_error"] = weighted_mean(jnp.abs(error_BAG), weight_BAG)
        metrics["confidence_bias"] = weighted_mean(error_BAG, weight_BAG)

    supervised = labels.supervised_BAG.astype(jnp.float32)
    blocks = keep_BA.sum()
    survival_BAG = jnp.cumprod(accept_BAG * supervised, axis=-1)
    count_G = jnp.maximum(supervised.sum((0, 1)), 1.0)
    metrics["accept_rate_G"] = (accept_BAG * supervised).sum((0, 1)) / count_G
    metrics["accepted_length"] = 1.0 + survival_BAG.sum() / jnp.maximum(blocks, 1)
    metrics["blocks"] = blocks
    metrics["loss"] = loss
    return loss, metrics
