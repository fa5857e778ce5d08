"""Eagle3 drafters: the reference's numbers, their files, and what they are not allowed to do."""

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
from dspark_jax.models.drafters.eagle3 import declare_drafter
from dspark_jax.models.vocab import unembed
from dspark_jax.training import losses
from dspark_jax.training.anchors import sample_lessons
from dspark_jax.training.teacher import make_teacher

DATA = Path(__file__).parent / "data"
CASES = ["qwen3_eagle3_train", "gemma4_eagle3_train"]
DECAY = -1 / np.log(0.8)  # exp(-k / DECAY) is 0.8^k


class Case:
    """One recorded training step, and the same computed here."""

    def __init__(self, name):
        folder = DATA / name
        self.cfg, self.params, self.vocab = deepspec.load_drafter(folder / "checkpoint")
        self.forward = np.load(folder / "forward.npz")
        self.record = json.loads((folder / "loss.json").read_text())
        self.gradient = load_file(folder / "grads.safetensors")
        batch = np.load(folder / "batch.npz")
        token_BS = jnp.asarray(batch["input_ids"], jnp.int32)
        mask_BS = jnp.asarray(batch["loss_mask"]).astype(bool)
        self.real_B = batch["attention_mask"].sum(1)
        sizes = token_BS.shape[1], self.cfg.block_size
        self.anchor_BA, self.keep_BA, self.labels = sample_lessons(
            token_BS, mask_BS, jax.random.key(0), 0.0, sizes, "chains"
        )
        feature = jnp.asarray(batch["target_hidden_states"])
        self.feature_BSFD = feature.reshape(*token_BS.shape, len(self.cfg.target_layer_ids), -1)
        hidden_BSD = jnp.asarray(batch["target_last_hidden_states"])
        self.teacher = make_teacher(self.vocab, hidden_BSD, False)
        results = jax.jit(jax.value_and_grad(self._loss, has_aux=True))(self.params)
        (self.loss, (self.metrics, hidden_BAGD)), self.found = results
        self.logits_BAGV = np.asarray(unembed(self.vocab, hidden_BAGD))

    def _loss(self, params):
        outputs = losses.draft_blocks(
            params, self.vocab, self.feature_BSFD, self.labels, self.anchor_BA, self.keep_BA,
            self.cfg,
        )  # fmt: skip
        totals = losses.loss_totals(self.labels, None, DECAY, "chains")
        loss, metrics = losses.dspark_loss(
            params, self.vocab, outputs, self.teacher, self.labels, totals, None,
            ce_weight=0.0, l1_weight=0.0, soft_weight=1.0, decay=DECAY,
        )  # fmt: skip
        return loss, (metrics, outputs.hidden_BAGD)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return Case(request.param)


def test_forward(case):
    seen = 0
    for b, places in enumerate(np.asarray(case.anchor_BA)):
        for a in np.flatnonzero(case.keep_BA[b]):
            entry = places[a] - 1
            for step in range(case.cfg.block_size):
                assert case.labels.supervised_BAG[b, a, step] == bool(
                    case.forward[f"step_{step}/position_mask"][b, entry]
                )
                if entry < case.real_B[b] - step - 1:
                    want = case.forward[f"step_{step}/draft_logits"][b, entry]
                    got = case.logits_BAGV[b, a, step]
                    np.testing.assert_allclose(got, want, rtol=0, atol=3e-5)
                    seen += 1
    taught = sum(
        case.forward[f"step_{step}/position_mask"].sum() for step in range(case.cfg.block_size)
    )
    assert case.labels.supervised_BAG.sum() == taught
    assert seen > 30


def test_loss(case):
    assert float(case.loss) == pytest.approx(case.record["loss"], abs=1e-5)


def test_every_gradient(case):
    named = write_params(declare_drafter(case.cfg), case.found)
    fixed = {name for name in named if name.endswith("layer_scalar")}
    assert not any(named.pop(name).any() for name in fixed)
    assert set(named) == set(case.gradient)
    for name, value in named.items():
        np.testing.assert_allclose(value, case.gradient[name], rtol=1e-4, atol=1e-6, err_msg=name)
