"""The DSpark loss and its metrics (paper, section 3.3; ``notebooks/concepts/training.md``).

    loss = 0.1 CE + 0.9 |p^d - p^t|_1 + 1.0 BCE(c_k, 1 - |p^d - p^t|_1 / 2)

unless another :class:`~dspark_jax.training.loss_terms.Loss` is given. Each term is a weighted mean
over the supervised slots of the whole batch. Divergences are computed in float32: in bfloat16 the
gradient of the total variation cancels.

The distributions of a batch's slots would be far larger than everything else, so they exist for a
few blocks at a time: :func:`head_loss` goes through the blocks in chunks and takes the gradient of
a chunk while its logits are there. Nothing is computed twice, and memory does not grow with the
vocabulary. The target's side is the same in every update of a batch: where it fits,
:func:`spell_out` computes it once for all of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.config import DrafterConfig
from dspark_jax.models.drafters.family import BlockOutputs, Lessons
from dspark_jax.models.drafters.table import drafter_of
from dspark_jax.models.layers import matmul
from dspark_jax.models.vocab import Vocab, lm_head, unembed
from dspark_jax.training.anchors import BlockLabels
from dspark_jax.training.loss_terms import (
    DSPARK,
    Loss,
    SlotWeights,
    WeightedTerms,
    confidence_metrics,
    cross_entropy,
    l1_distance,
    metric_name,
    soft_cross_entropy,
)
from dspark_jax.training.teacher import Teacher
from pallas_kernels.chunks import chunk_sizes, join_chunks, split_chunks

EPSILON = 1e-6
# Logits of a chunk on a CPU: 8 MB, which its caches hold. 2 to 4 times more or fewer are slower.
CPU_CHUNK_ELEMENTS = 2**21


@struct.dataclass
class LossTerms:
    """Sums over slots that the metrics are made of.

    Attributes:
        ce: float32, weighted sum of cross-entropies with the labels.
        soft: of those with the target's distributions.
        others: float32, weighted sums of the terms that jax differentiates, in their order.
        l1_BAG: float32 ``|p^d - p^t|_1`` of every slot.
    """

    ce: jax.Array
    soft: jax.Array
    others: tuple[jax.Array, ...]
    l1_BAG: jax.Array


@jax.named_scope("draft")
def draft_blocks(
    drafter: Any,
    vocab: Vocab,
    feature_BSFD: jax.Array,
    labels: BlockLabels,
    anchor_BA: jax.Array,
    keep_BA: jax.Array,
    cfg: DrafterConfig,
    *,
    kernels: str = "xla",
) -> BlockOutputs:
    """Teacher-forced forward pass of all blocks of a batch of sequences; ``kernels`` names the
    implementation of the operations of ``pallas_kernels``."""
    train_blocks = drafter_of(cfg).train_blocks
    if train_blocks is None:
        raise ValueError("a drafter of this kind cannot be trained or exported: name another")
    given = feature_BSFD, labels.token_BS, labels.previous_BAG, anchor_BA, keep_BA
    return train_blocks(drafter, vocab, *given, cfg, kernels=kernels)


def draft_logits(base_XU: jax.Array, w2_RU: Any, code_XR: Any) -> jax.Array:
    """Logits of the draft distributions [X, U], float32: LM head and sequential bias."""
    if w2_RU is None:
        return base_XU
    return base_XU + jnp.matmul(code_XR, w2_RU, preferred_element_type=jnp.float32)


@struct.dataclass
class _Slots:
    """What a chunk reads beside the drafter's outputs: all fixed, all [B, A, G, ...].

    Of the target its rows of ``law_TU``, or its hidden states with the normaliser.
    """

    row_BAG: Any
    hidden_BAGD: Any
    log_norm_BAG: Any
    label_BAG: jax.Array
    ce_weight_BAG: jax.Array
    l1_weight_BAG: jax.Array
    soft_weight_BAG: Any
    other_weight_BAG: Any


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def head_loss(
    count_size: tuple[int, int],
    others: WeightedTerms,
    w2_RU: jax.Array | None,
    hidden_BAGD: jax.Array,
    code_BAGR: jax.Array | None,
    vocab: Vocab,
    law_TU: Any,
    slots: _Slots,
) -> tuple[jax.Array, LossTerms]:
    """The sum over all slots of ``ce_weight * CE + l1_weight * |p^d - p^t|_1 + soft_weight * CE``
    with the target's distribution, and of ``other_weight`` times the other terms.

    Args:
        count_size: how many chunks of how many anchors.
        others: terms that jax differentiates, with their weights.
        w2_RU: what the logits are made of; the gradient is theirs.
        hidden_BAGD: likewise.
        code_BAGR: likewise.
        vocab: the drafter's LM head, which for a reduced vocabulary is a part of the target's.
        law_TU: of :func:`spell_out`, or None.
        slots: the target's side, labels and weights.

    Returns:
        The loss, float32, and its terms, which carry no gradient.
    """
    arguments = w2_RU, hidden_BAGD, code_BAGR, vocab, law_TU, slots
    loss, terms, _ = _scan_chunks(False, count_size, others, *arguments)
    return loss, terms


def _head_loss_forward(count_size: tuple[int, int], others: WeightedTerms, *arguments: Any) -> Any:
    loss, terms, gradients = _scan_chunks(True, count_size, others, *arguments)
    return (loss, terms), (gradients, arguments[3:])


def _head_loss_backward(_: Any, __: Any, kept: Any, cotangent: Any) -> Any:
    gradients, fixed = kept
    scaled = jax.tree.map(lambda x: (cotangent[0] * x).astype(x.dtype), gradients)
    return *scaled, *jax.tree.map(lambda _: None, fixed)


head_loss.defvjp(_head_loss_forward, _head_loss_backward)


def _scan_chunks(
    with_gradient: bool,
    count_size: tuple[int, int],
    others: WeightedTerms,
    w2_RU: Any,
    hidden_BAGD: jax.Array,
    code_BAGR: Any,
    vocab: Vocab,
    law_TU: Any,
    slots: _Slots,
) -> tuple[jax.Array, LossTerms, Any]:
    """Loss, terms, and the gradients of w2, hidden and code (None where not asked for)."""
    anchors = hidden_BAGD.shape[1]
    parts = jax.tree.map(lambda x: split_chunks(x, *count_size), (hidden_BAGD, code_BAGR, slots))

    def step(carry: Any, part: Any) -> Any:
        loss, ce, soft, more, w2_gradient = carry
        hidden, code, some = part
        base = unembed(vocab, hidden)
        logits = draft_logits(base, w2_RU, code)
        sums, l1, logit_gradient = _chunk_loss(logits, vocab, law_TU, some, others)
        more = jax.tree.map(jnp.add, more, sums[3])
        carry = (loss + sums[0], ce + sums[1], soft + sums[2], more, w2_gradient)
        if not with_gradient:
            return carry, (l1, None)
        slope = logit_gradient.astype(hidden.dtype)
        head_slope = slope
        if vocab.softcap is not None:  # d tanh(x) = 1 - tanh(x)^2
            head_slope = (logit_gradient * (1 - (base / vocab.softcap) ** 2)).astype(slope.dtype)
        hidden_gradient, code_gradient = matmul(head_slope, lm_head(vocab)), None
        if w2_RU is not None:
            code_gradient = matmul(slope, w2_RU.T)
            code_XR, slope_XU = (x.reshape(-1, x.shape[-1]) for x in (code, slope))
            w2_gradient += jnp.matmul(code_XR.T, slope_XU, preferred_element_type=jnp.float32)
        return (*carry[:4], w2_gradient), (l1, (hidden_gradient, code_gradient))

    zero = jnp.zeros(())
    w2_zero = jnp.zeros(w2_RU.shape) if with_gradient and w2_RU is not None else None
    carry = zero, zero, zero, (zero,) * len(others), w2_zero
    (loss, ce, soft, more, w2_gradient), (l1, rest) = jax.lax.scan(step, carry, parts)
    l1, rest = jax.tree.map(lambda x: join_chunks(x, anchors), (l1, rest))
    if not with_gradient:
        return loss, LossTerms(ce, soft, more, l1), None
    w2_gradient = jax.tree.map(lambda x: x.astype(w2_RU.dtype), w2_gradient)
    return loss, LossTerms(ce, soft, more, l1), (w2_gradient, *rest)


def _chunk_loss(
    logits_XU: jax.Array, vocab: Vocab, law_TU: Any, slots: _Slots, others: WeightedTerms
) -> tuple[tuple[jax.Array, jax.Array, jax.Array, Any], jax.Array, jax.Array]:
    """Sums of the loss, of both cross-entropies and of the other terms, l1 of every slot, and the
    loss's gradient by the logits.

    With p the draft's law, t the target's, y the label and s = sign(p - t),

        d CE / d logits = p - onehot(y),    d |p - t|_1 / d logits = p (s - sum(p s)),

    and in the place of the one-hot label t, whose sum may be below 1, for the other cross-entropy.
    """
    # In few passes over [X, U], which cost as much as the products: no array of one-hot labels,
    # and one exponential.
    peak_X = jnp.max(logits_XU, axis=-1, keepdims=True)
    power_XU = jnp.exp(logits_XU - peak_X)
    total_X = power_XU.sum(-1, keepdims=True)
    prob_XU = power_XU / total_X
    law_XU = _target_law(vocab, law_TU, slots)
    outside_X = jnp.zeros(())
    if vocab.d2t_U is not None:
        outside_X = jnp.maximum(1.0 - law_XU.sum(-1), 0.0)
    l1_X = jnp.abs(prob_XU - law_XU).sum(-1) + outside_X
    known_X = slots.label_BAG >= 0
    place_X1 = jnp.where(known_X, slots.label_BAG, 0)[..., None]
    logit_X = jnp.take_along_axis(logits_XU, place_X1, axis=-1)
    ce_X = jnp.where(known_X, (peak_X + jnp.log(total_X) - logit_X)[..., 0], 0.0)
    ce = (slots.ce_weight_BAG * ce_X).sum()
    loss = ce + (slots.l1_weight_BAG * l1_X).sum()

    sign_XU = jnp.sign(prob_XU - law_XU)
    mean_X = (prob_XU * sign_XU).sum(-1, keepdims=True)
    l1_weight_X, ce_weight_X = slots.l1_weight_BAG[..., None], slots.ce_weight_BAG[..., None]
    gradient_XU = prob_XU * (l1_weight_X * (sign_XU - mean_X) + ce_weight_X)
    at_label = jnp.indices(known_X.shape, sparse=True)
    label_X = jnp.where(known_X, slots.label_BAG, logits_XU.shape[-1])
    gradient_XU = gradient_XU.at[(*at_label, label_X)].add(-slots.ce_weight_BAG, mode="drop")
    soft = jnp.zeros(())
    if slots.soft_weight_BAG is not None:
        mass_X, log_norm_X = law_XU.sum(-1), (peak_X + jnp.log(total_X))[..., 0]
        soft_X = mass_X * log_norm_X - (law_XU * logits_XU).sum(-1)
        soft = (slots.soft_weight_BAG * soft_X).sum()
        slope_XU = prob_XU * mass_X[..., None] - law_XU
        gradient_XU += slots.soft_weight_BAG[..., None] * slope_XU
    sums: tuple[jax.Array, ...] = ()
    if others:

        def value(logits_XU: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            each = [term(logits_XU, law_XU, slots.label_BAG) for term, _ in others]
            sums = tuple((slots.other_weight_BAG * values_X).sum() for values_X in each)
            weighted = [weight * part for (_, weight), part in zip(others, sums, strict=True)]
            return jnp.stack(weighted).sum(), sums

        (more, sums), slope_XU = jax.value_and_grad(value, has_aux=True)(logits_XU)
        loss, gradient_XU = loss + more, gradient_XU + slope_XU
    return (loss + soft, ce, soft, sums), l1_X, gradient_XU


def _target_law(vocab: Vocab, law_TU: Any, slots: _Slots) -> jax.Array:
    """The target's probabilities [X, U] of the slots of a chunk."""
    if law_TU is not None:
        return law_TU[slots.row_BAG]
    logits_XU = unembed(vocab, slots.hidden_BAGD)
    if slots.log_norm_BAG is None:
        return jax.nn.softmax(logits_XU, axis=-1)
    return jnp.exp(logits_XU - slots.log_norm_BAG[..., None])


def ce_slot_weights(weight_BAG: jax.Array, labels: BlockLabels, t2d_V: Any) -> jax.Array:
    """The weights of the cross-entropy, which skips labels outside the draft vocabulary."""
    return weight_BAG if t2d_V is None else weight_BAG * (t2d_V[labels.label_BAG] >= 0)


@struct.dataclass
class LossTotals:
    """Sums over a whole batch that the terms and metrics are divided by.

    They come from the masks alone. A micro-batch has slots of its own and the totals of the whole
    batch, so that losses, metrics and gradients of the micro-batches add up to the batch's.

    Attributes:
        ce: float32 sum of the slots' weights in the cross-entropy.
        slot: in the other terms.
        blocks: int32 blocks whose first slot is supervised.
        supervised_G: int32 supervised slots at each place of a block.
    """

    ce: jax.Array
    slot: jax.Array
    blocks: jax.Array
    supervised_G: jax.Array


def loss_totals(
    labels: BlockLabels, t2d_V: Any, slot_weights: SlotWeights, lessons: Lessons = "blocks"
) -> LossTotals:
    """The totals of a batch; arguments as in :func:`dspark_loss`. The terms of chains are divided
    by the number of anchors, dummies included, as the reference does."""
    weight_BAG = slot_weights(labels.supervised_BAG)
    ce, slot = ce_slot_weights(weight_BAG, labels, t2d_V).sum(), weight_BAG.sum()
    if lessons == "chains":
        ce = slot = jnp.float32(labels.supervised_BAG[..., 0].size)
    return LossTotals(
        ce=ce,
        slot=slot,
        blocks=labels.supervised_BAG[..., 0].sum(),
        supervised_G=labels.supervised_BAG.sum((0, 1)),
    )


@jax.named_scope("loss")
def dspark_loss(
    drafter: Any,
    vocab: Vocab,
    outputs: BlockOutputs,
    teacher: Teacher,
    labels: BlockLabels,
    totals: LossTotals,
    t2d_V: jax.Array | None,
    *,
    loss: Loss = DSPARK,
    law_TU: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics of a batch, or a micro-batch's share of them.

    Args:
        drafter: of which the sequential head is read.
        vocab: the drafter's vocabulary.
        outputs: of the drafter.
        teacher: of the target.
        labels: of the blocks.
        totals: of the whole batch.
        t2d_V: int32 place of every token in the draft vocabulary, -1 outside it; None where the
            draft vocabulary is all of V.
        loss: what is summed.
        law_TU: of :func:`spell_out`, with its teacher.

    Returns:
        The loss (float32 scalar) and its parts and metrics; those ending in ``_G`` are per slot.
        All of them add up over micro-batches.
    """
    # Weights that make every weighted sum a share of the batch's weighted mean.
    weight_BAG = loss.slot_weights(labels.supervised_BAG)
    ce_BAG = ce_slot_weights(weight_BAG, labels, t2d_V) / (totals.ce + EPSILON)
    weight_BAG = weight_BAG / (totals.slot + EPSILON)
    ce_weight, soft_weight = loss.weight(cross_entropy), loss.weight(soft_cross_entropy)
    at_slots = jax.vmap(lambda x_SX, position_AG: x_SX[position_AG])  # of its own sequence
    seen = jax.tree.map(lambda x: at_slots(x, labels.position_BAG), teacher)
    slots = _Slots(
        row_BAG=seen.row_BS,
        hidden_BAGD=seen.hidden_BSD,
        log_norm_BAG=seen.log_norm_BS,
        label_BAG=labels.label_BAG if t2d_V is None else t2d_V[labels.label_BAG],
        ce_weight_BAG=ce_weight * ce_BAG,
        l1_weight_BAG=loss.weight(l1_distance) * weight_BAG,
        soft_weight_BAG=soft_weight * weight_BAG if soft_weight else None,
        other_weight_BAG=weight_BAG if loss.differentiated else None,
    )
    batch, anchors, block = labels.label_BAG.shape
    limit = CPU_CHUNK_ELEMENTS if jax.default_backend() == "cpu" else None
    chunks = chunk_sizes(anchors, batch * block * lm_head(vocab).shape[0], limit)
    w2_RU = None if drafter.head is None else drafter.head.w2_RU
    others, given = loss.differentiated, (outputs.hidden_BAGD, outputs.code_BAGR)
    value, terms = head_loss(chunks, others, w2_RU, *given, vocab, law_TU, slots)
    metrics = {"l1": (weight_BAG * terms.l1_BAG).sum()}
    if ce_weight:
        metrics["ce"] = terms.ce / ce_weight
    if soft_weight:
        metrics["soft_ce"] = terms.soft / soft_weight
    for (term, _), each in zip(others, terms.others, strict=True):
        metrics[metric_name(term)] = each

    accept_BAG = jax.lax.stop_gradient(jnp.clip(1.0 - 0.5 * terms.l1_BAG, 0.0, 1.0))
    if loss.confidence and outputs.confidence_logit_BAG is not None:
        metrics |= confidence_metrics(outputs.confidence_logit_BAG, accept_BAG, weight_BAG)
        value += loss.confidence * metrics["confidence"]

    supervised = labels.supervised_BAG.astype(jnp.float32)
    survival_BAG = jnp.cumprod(accept_BAG * supervised, axis=-1)
    count_G = jnp.maximum(totals.supervised_G, 1)
    metrics["accept_rate_G"] = (accept_BAG * supervised).sum((0, 1)) / count_G
    blocks = labels.supervised_BAG[..., 0].sum()
    metrics["accepted_length"] = (blocks + survival_BAG.sum()) / jnp.maximum(totals.blocks, 1)
    metrics["blocks"] = blocks
    metrics["loss"] = value
    return value, metrics
