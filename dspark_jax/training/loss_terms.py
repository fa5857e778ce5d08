"""What a drafter is trained for: terms of a loss, and how they are put together.

A term is a pure function of what one slot of a block predicts and what the target says there:

    term(logits_XU, law_XU, label_X) -> float32 [X]

``logits_XU`` are the draft's, float32; ``law_XU`` the target's probabilities of the same tokens,
whose sum is below 1 under a reduced draft vocabulary; ``label_X`` the place of the true token among
them, -1 where it has none. Any function of this form is a term; jax differentiates it. Those of
:data:`BY_HAND` have their derivatives stated in ``losses.py``, which takes fewer passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from dspark_jax.config import TrainConfig

Term = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
WeightedTerms = tuple[tuple[Term, float], ...]
# bool [B, A, G] of supervised slots -> float32 weights of the same form, 0 for all others.
SlotWeights = Callable[[jax.Array], jax.Array]

TINY = float(jnp.finfo(jnp.float32).tiny)


def cross_entropy(logits_XU: jax.Array, law_XU: jax.Array, label_X: jax.Array) -> jax.Array:
    """``-log p^d(label)``; 0 where the label is outside the draft vocabulary."""
    log_XU = jax.nn.log_softmax(logits_XU, axis=-1)
    known_X = label_X >= 0
    place_X1 = jnp.where(known_X, label_X, 0)[..., None]
    found_X = jnp.take_along_axis(log_XU, place_X1, axis=-1)[..., 0]
    return jnp.where(known_X, -found_X, 0.0)


def l1_distance(logits_XU: jax.Array, law_XU: jax.Array, label_X: jax.Array) -> jax.Array:
    """``|p^d - p^t|_1``, twice the total variation (paper, section 3.3); what the target gives to
    tokens outside the draft vocabulary counts."""
    outside_X = jnp.maximum(1.0 - law_XU.sum(-1), 0.0)
    return jnp.abs(jax.nn.softmax(logits_XU, axis=-1) - law_XU).sum(-1) + outside_X


def soft_cross_entropy(logits_XU: jax.Array, law_XU: jax.Array, label_X: jax.Array) -> jax.Array:
    """``-sum p^t log p^d``: the forward divergence with the target's entropy, which no gradient
    sees."""
    return -(law_XU * jax.nn.log_softmax(logits_XU, axis=-1)).sum(-1)


def forward_kl(logits_XU: jax.Array, law_XU: jax.Array, label_X: jax.Array) -> jax.Array:
    """``KL(p^t, p^d) = sum p^t log(p^t / p^d)``, over the draft vocabulary: covers all that the
    target may say."""
    log_law_XU = jnp.log(jnp.maximum(law_XU, TINY))
    return (law_XU * (log_law_XU - jax.nn.log_softmax(logits_XU, axis=-1))).sum(-1)


def reverse_kl(logits_XU: jax.Array, law_XU: jax.Array, label_X: jax.Array) -> jax.Array:
    """``KL(p^d, p^t) = sum p^d log(p^d / p^t)``: keeps to what the target is sure of."""
    log_XU = jax.nn.log_softmax(logits_XU, axis=-1)
    return (jnp.exp(log_XU) * (log_XU - jnp.log(jnp.maximum(law_XU, TINY)))).sum(-1)


# Terms whose derivatives are stated, and what metrics call them.
BY_HAND: dict[Term, str] = {cross_entropy: "ce", l1_distance: "l1", soft_cross_entropy: "soft_ce"}


@dataclass(frozen=True)
class Decay:
    """Slot weights ``exp(-(k-1)/constant)`` for k = 1, 2, ...; a constant of 0 is no decay."""

    constant: float

    def __call__(self, supervised_BAG: jax.Array) -> jax.Array:
        """float32, 0 for slots that are not supervised."""
        if not self.constant:
            return supervised_BAG.astype(jnp.float32)
        slot_G = jnp.arange(supervised_BAG.shape[-1], dtype=jnp.float32)
        return supervised_BAG * jnp.exp(-slot_G / self.constant)


@dataclass(frozen=True)
class Loss:
    """A weighted sum of terms, each a weighted mean over the supervised slots of a batch.

    Attributes:
        terms: functions with their weights.
        confidence: weight of the confidence head's loss, the cross-entropy of ``c_k`` with the
            acceptance rate of the slot.
        slot_weights: of the slots of a block, in the mean of every term; a pure function that
            looks at nothing else.

    Raises:
        ValueError: a term is there twice, a weight is negative, or all are 0.

    >>> from dspark_jax.training.loss_terms import Decay, Loss, l1_distance, reverse_kl
    >>> Loss(((l1_distance, 0.9), (reverse_kl, 0.1)), slot_weights=Decay(0.0)).confidence
    1.0
    """

    terms: WeightedTerms
    confidence: float = 1.0
    slot_weights: SlotWeights = Decay(4.0)

    def __post_init__(self) -> None:
        names = [metric_name(term) for term, _ in self.terms]
        if len(set(names)) < len(names):
            raise ValueError(f"terms are {', '.join(names)}: give each a name of its own, once")
        for name, weight in [*zip(names, self.weights, strict=True), ("all", self.confidence)]:
            if not 0 <= weight < math.inf:
                part = "confidence" if name == "all" else f"the weight of {name}"
                raise ValueError(f"{part} is {weight}: it must not be negative")
        if not any(self.weights) and not self.confidence:
            raise ValueError("all weights are 0: give one term some, such as (l1_distance, 0.9)")

    def __str__(self) -> str:
        parts = [f"{weight:g} {metric_name(term)}" for term, weight in self.terms]
        return f"{' + '.join(parts)} + {self.confidence:g} confidence, {self.slot_weights}"

    @property
    def weights(self) -> list[float]:
        """Those of the terms."""
        return [weight for _, weight in self.terms]

    def weight(self, term: Term) -> float:
        """That of a term; 0 where it is none of the loss's."""
        return next((weight for found, weight in self.terms if found is term), 0.0)

    @property
    def differentiated(self) -> WeightedTerms:
        """The terms that jax differentiates, without those of weight 0."""
        return tuple(
            (term, weight) for term, weight in self.terms if weight and term not in BY_HAND
        )


def metric_name(term: Term) -> str:
    """What metrics call a term: its function's name, but for those of before."""
    return BY_HAND.get(term) or str(getattr(term, "__name__", repr(term)))


def loss_of(recipe: TrainConfig) -> Loss:
    """The loss that a recipe describes (paper, section 3.3)."""
    terms = (
        (cross_entropy, recipe.ce_weight),
        (l1_distance, recipe.l1_weight),
        (soft_cross_entropy, recipe.soft_weight),
    )
    return Loss(terms, recipe.confidence_weight, Decay(recipe.loss_decay))


# The paper's, and a recipe's where it says nothing else.
DSPARK = loss_of(TrainConfig())


def confidence_metrics(
    logit_BAG: jax.Array, accept_BAG: jax.Array, weight_BAG: jax.Array
) -> dict[str, jax.Array]:
    """The confidence head's loss, ``confidence``, and its errors.

    ``confidence_abs_error`` and ``confidence_bias`` are those of ``c_k`` against the acceptance
    rate, ``survival_abs_error`` and ``survival_bias`` those of their running products.

    Args:
        logit_BAG: of ``c_k``, float32.
        accept_BAG: acceptance rates, which carry no gradient.
        weight_BAG: of the slots, with a sum of 1 over the whole batch.
    """
    bce_BAG = optax.sigmoid_binary_cross_entropy(logit_BAG, accept_BAG)
    metrics = {"confidence": (weight_BAG * bce_BAG).sum()}
    confidence_BAG = jax.nn.sigmoid(logit_BAG)
    for name, error_BAG in (
        ("confidence", confidence_BAG - accept_BAG),
        ("survival", jnp.cumprod(confidence_BAG, -1) - jnp.cumprod(accept_BAG, -1)),
    ):
        metrics[f"{name}_abs_error"] = (weight_BAG * jnp.abs(error_BAG)).sum()
        metrics[f"{name}_bias"] = (weight_BAG * error_BAG).sum()
    return metrics
