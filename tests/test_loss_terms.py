"""Terms of the loss: what they are, how they are put together, and what stays of the default."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.config import TrainConfig
from dspark_jax.models.vocab import Vocab
from dspark_jax.training import anchors, losses
from dspark_jax.training.loss_terms import (
    BY_HAND,
    DSPARK,
    Decay,
    Loss,
    cross_entropy,
    forward_kl,
    l1_distance,
    loss_of,
    reverse_kl,
    soft_cross_entropy,
)
from dspark_jax.training.run import draft_places
from dspark_jax.training.teacher import make_teacher
from tests.tiny_model import DRAFTER, random_params

V, D, LENGTH = 12, 6, 16
REDUCED = np.array([0, 2, 3, 7, 8, 11], np.int32)
RANDOM = np.random.default_rng(0)
EMBED_VD = RANDOM.normal(size=(V, D)).astype(np.float32)
TOKEN_BS = RANDOM.integers(0, V, (2, LENGTH))
HIDDEN_BSD = RANDOM.normal(size=(2, LENGTH, D)).astype(np.float32)
HIDDEN_BAGD = RANDOM.normal(size=(2, 2, 3, D)).astype(np.float32)
HEADLESS = dataclasses.replace(DRAFTER, markov_rank=0)


def drafter():
    from dspark_jax.models.drafters.dspark import declare_drafter

    return random_params(21, declare_drafter(HEADLESS))


def value_and_gradient(loss, reduced=False):
    """Loss and metrics of fixed blocks, and the gradient of the drafter's hidden states."""
    labels = anchors.block_labels(
        jnp.asarray(TOKEN_BS), jnp.ones((2, LENGTH), bool),
        jnp.array([[4, 11], [6, 0]]), jnp.array([[True, True], [True, False]]), 3,
    )  # fmt: skip
    whole = Vocab(EMBED_VD, EMBED_VD)
    vocab = Vocab(EMBED_VD, EMBED_VD[REDUCED], jnp.asarray(REDUCED)) if reduced else whole
    t2d_V = draft_places(V, REDUCED) if reduced else None

    def of_hidden(hidden_BAGD):
        outputs = losses.BlockOutputs(hidden_BAGD, None, None)
        teacher = make_teacher(whole, jnp.asarray(HIDDEN_BSD), reduced)
        totals = losses.loss_totals(labels, t2d_V, loss.slot_weights)
        given = outputs, teacher, labels, totals, t2d_V
        return losses.dspark_loss(drafter(), vocab, *given, loss=loss)

    (value, metrics), gradient = jax.jit(jax.value_and_grad(of_hidden, has_aux=True))(HIDDEN_BAGD)
    return float(value), metrics, np.asarray(gradient)


@pytest.mark.parametrize("reduced", [False, True])
def test_what_is_stated_by_hand_is_what_jax_makes_of_the_definitions(reduced):
    weights = (0.1, 0.9, 0.3) if not reduced else (0.0, 0.9, 0.3)  # labels outside weigh nothing
    terms = tuple(zip(BY_HAND, weights, strict=True))

    def renamed(term, place):
        def other(logits, law, label):
            return term(logits, law, label)

        other.__name__ = f"other_{place}"
        return other

    others = tuple((renamed(term, k), weight) for k, (term, weight) in enumerate(terms))
    by_hand = value_and_gradient(Loss(terms), reduced)
    by_jax = value_and_gradient(Loss(others), reduced)
    assert by_hand[0] == pytest.approx(by_jax[0], rel=1e-5)
    np.testing.assert_allclose(by_hand[2], by_jax[2], rtol=1e-3, atol=1e-6)
    assert float(by_jax[1]["other_1"]) == pytest.approx(float(by_hand[1]["l1"]), rel=1e-5)


def test_the_divergences_are_those_of_their_formulas():
    logits = RANDOM.normal(size=(5, V))
    law = np.exp(RANDOM.normal(size=(5, V)))
    law /= law.sum(-1, keepdims=True)
    draft = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    given = jnp.asarray(logits), jnp.asarray(law), jnp.array([0, 1, 2, -1, 4])
    expected = {
        forward_kl: (law * np.log(law / draft)).sum(-1),
        reverse_kl: (draft * np.log(draft / law)).sum(-1),
        l1_distance: np.abs(draft - law).sum(-1),
        soft_cross_entropy: -(law * np.log(draft)).sum(-1),
        cross_entropy: [-np.log(draft[i, i]) if i != 3 else 0 for i in range(5)],
    }
    for term, values in expected.items():
        np.testing.assert_allclose(term(*given), values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("term", [forward_kl, reverse_kl])
def test_divergences_are_finite_where_a_law_has_no_mass(term):
    law = jnp.zeros((1, V)).at[0, 3].set(1.0)
    value, slope = jax.value_and_grad(lambda x: term(x, law, jnp.array([3])).sum())(
        jnp.full((1, V), -80.0).at[0, 1].set(80.0)
    )
    assert np.isfinite(value)
    assert np.isfinite(slope).all()
    assert value > 50


def test_the_forward_divergence_has_the_gradient_of_the_soft_cross_entropy():
    forward = value_and_gradient(Loss(((forward_kl, 1.0),)), reduced=True)
    soft = value_and_gradient(Loss(((soft_cross_entropy, 1.0),)), reduced=True)
    np.testing.assert_allclose(forward[2], soft[2], rtol=1e-3, atol=1e-6)
    assert forward[0] < soft[0]


def test_the_weights_of_slots_are_any_function():
    """Of the first slots alone, nothing reaches the others."""

    def first(supervised_BAG):
        return supervised_BAG * (jnp.arange(3) == 0).astype(jnp.float32)

    _, _, gradient = value_and_gradient(Loss(((reverse_kl, 1.0),), slot_weights=first))
    assert np.abs(gradient[0, :, 0]).min() > 0
    assert not gradient[:, :, 1:].any()


def test_a_recipe_describes_the_papers_loss():
    assert loss_of(TrainConfig()) == DSPARK
    assert str(DSPARK) == "0.1 ce + 0.9 l1 + 0 soft_ce + 1 confidence, Decay(constant=4.0)"
    recipe = TrainConfig(ce_weight=1.0, l1_weight=0.0, confidence_weight=0.0, loss_decay=0.0)
    terms = ((cross_entropy, 1.0), (l1_distance, 0.0), (soft_cross_entropy, 0.0))
    assert loss_of(recipe) == Loss(terms, 0.0, Decay(0.0))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"terms": ((l1_distance, -1.0),)}, "the weight of l1 is -1.0"),
        ({"terms": ((l1_distance, 1.0), (l1_distance, 2.0))}, "a name of its own"),
        ({"terms": ((l1_distance, 0.0),), "confidence": 0.0}, "all weights are 0"),
        ({"terms": ((l1_distance, 1.0),), "confidence": float("nan")}, "confidence is nan"),
    ],
)
def test_a_loss_that_makes_no_sense_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Loss(**given)
