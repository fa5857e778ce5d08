"""Training numerics against recorded forward passes, losses and gradients of the reference."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dspark_jax.checkpoints import deepspec
from dspark_jax.checkpoints.tensors import write_params
from dspark_jax.models.drafters.dspark import declare_drafter
from dspark_jax.models.vocab import unembed
from dspark_jax.training import anchors, losses
from dspark_jax.training.loss_terms import Decay, Loss, cross_entropy, l1_distance
from dspark_jax.training.teacher import make_teacher
from pallas_kernels import chunks
from tests.marks import rest_full

DATA = Path(__file__).parent / "data"
CASES = [
    "qwen3_dspark_train",
    "qwen3_dspark_train_gated",
    "qwen3_dspark_train_rnn",
    "qwen3_dflash_train",
    "gemma4_dspark_train/k_eq_v_true",
    "gemma4_dspark_train/k_eq_v_false",
]


class Case:
    """One recorded training step, and the same computed here."""

    def __init__(self, name: str) -> None:
        folder = DATA / name
        self.cfg, self.params, self.vocab = deepspec.load_drafter(folder / "checkpoint")
        self.batch, self.anchors, self.forward = (
            np.load(folder / f"{part}.npz") for part in ("batch", "anchors", "forward")
        )
        self.record = json.loads((folder / "loss.json").read_text())
        self.gradient = load_file(folder / "grads.safetensors")
        self.token_BS = jnp.asarray(self.batch["input_ids"], jnp.int32)
        self.mask_BS = jnp.asarray(self.batch["loss_mask"]).astype(bool)
        self.anchor_BA, self.keep_BA = anchors.choose_anchors(
            jnp.asarray(self.anchors["uniforms"]),
            anchors.anchor_candidates(self.mask_BS),
            self.anchors["anchor_positions"].shape[1],
        )
        self.labels = anchors.block_labels(
            self.token_BS, self.mask_BS, self.anchor_BA, self.keep_BA, self.cfg.block_size
        )
        feature = jnp.asarray(self.batch["target_hidden_states"])
        self.feature_BSFD = feature.reshape(
            *self.token_BS.shape, len(self.cfg.target_layer_ids), -1
        )
        self.teacher = make_teacher(
            self.vocab, jnp.asarray(self.batch["target_last_hidden_states"]), False
        )
        self.outputs = jax.jit(self._outputs)

    def _outputs(self, params):
        return losses.draft_blocks(
            params,
            self.vocab,
            self.feature_BSFD,
            self.labels,
            self.anchor_BA,
            self.keep_BA,
            self.cfg,
        )

    def loss(self, params, decay, **weights):
        terms = (cross_entropy, weights["ce_weight"]), (l1_distance, weights["l1_weight"])
        loss = Loss(terms, weights["confidence_weight"], Decay(decay))
        totals = losses.loss_totals(self.labels, None, loss.slot_weights)
        return losses.dspark_loss(
            params, self.vocab, self._outputs(params), self.teacher, self.labels,
            totals, None, loss=loss,
        )  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return Case(request.param)


def weights_of(record):
    return {
        "ce_weight": record["ce_loss_alpha"],
        "l1_weight": record["l1_loss_alpha"],
        "confidence_weight": record["confidence_head_alpha"],
        "decay": record["loss_decay_gamma"] or 0.0,
    }


def test_anchors_and_labels(case):
    np.testing.assert_array_equal(case.anchor_BA, case.anchors["anchor_positions"])
    np.testing.assert_array_equal(case.keep_BA, case.anchors["block_keep_mask"])
    np.testing.assert_array_equal(case.labels.supervised_BAG, case.forward["eval_mask"])
    keep = np.asarray(case.keep_BA)
    np.testing.assert_array_equal(
        np.asarray(case.labels.label_BAG)[keep], case.forward["target_ids"][keep]
    )


def test_forward(case):
    outputs = case.outputs(case.params)
    keep = np.asarray(case.keep_BA)
    w2_RU = None if case.params.head is None else case.params.head.w2_RU
    base = unembed(case.vocab, outputs.hidden_BAGD)
    logits = losses.draft_logits(base, w2_RU, outputs.code_BAGR)
    np.testing.assert_allclose(
        np.asarray(logits)[keep], case.forward["draft_logits"][keep], rtol=0, atol=3e-5
    )
    if case.cfg.confidence:
        np.testing.assert_allclose(
            np.asarray(outputs.confidence_logit_BAG)[keep],
            case.forward["confidence_pred"][keep],
            rtol=0,
            atol=3e-5,
        )


def test_loss_and_its_parts(case):
    weights = weights_of(case.record["hyperparameters"])
    loss, metrics = jax.jit(partial(case.loss, **weights))(case.params)
    assert float(loss) == pytest.approx(case.record["loss"], abs=1e-5)
    for name, part in case.record["components"].items():
        if part["den"]:
            assert float(metrics[name]) == pytest.approx(part["value"], abs=1e-5), name
    recorded = case.record["metrics"]
    assert float(metrics["accepted_length"]) == pytest.approx(
        recorded["train/tau_probabilistic"]["value"], abs=1e-5
    )
    for slot, rate in enumerate(metrics["accept_rate_G"]):
        assert float(rate) == pytest.approx(
            recorded[f"train/accept_rate@{slot}"]["value"], abs=1e-5
        )
    for name in ("confidence_abs_error", "confidence_bias"):
        if name in metrics:
            assert float(metrics[name]) == pytest.approx(
                recorded[f"train/{name}"]["value"], abs=1e-5
            )


@pytest.mark.parametrize(
    "case",
    [CASES[0], *(pytest.param(name, marks=pytest.mark.full) for name in CASES[1:])],
    indirect=True,
)
def test_loss_with_other_weights(case):
    for variant in case.record["loss_variants"]:
        loss, _ = jax.jit(partial(case.loss, **weights_of(variant)))(case.params)
        assert float(loss) == pytest.approx(variant["loss"], abs=1e-5), variant


@pytest.mark.parametrize(
    ("case", "elements"),
    [
        (CASES[0], 3000),
        *rest_full(
            ((name, chunks.CHUNK_ELEMENTS) for name in CASES),
            [(name, chunks.CHUNK_ELEMENTS) for name in CASES[1::2]],
        ),
        *(pytest.param(name, 3000, marks=pytest.mark.full) for name in CASES[1:]),
    ],
    indirect=["case"],
)
def test_every_gradient(case, monkeypatch, elements):
    """All blocks at once, and a few at a time with a last chunk that is not full."""
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", elements)
    weights = weights_of(case.record["hyperparameters"])
    gradient, _ = jax.jit(jax.grad(partial(case.loss, **weights), has_aux=True))(case.params)
    named = write_params(declare_drafter(case.cfg), gradient)
    # What the reference does not train has no gradient.
    fixed = {name for name in named if name.endswith("layer_scalar")}
    assert not any(named.pop(name).any() for name in fixed)
    assert set(named) == set(case.gradient)
    for name, value in named.items():
        np.testing.assert_allclose(value, case.gradient[name], rtol=1e-4, atol=1e-6, err_msg=name)
