"""Eagle3 drafters: the reference's numbers, their files, and what they are not allowed to do."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dspark_jax.checkpoints import deepspec
from dspark_jax.checkpoints.export import save_layout
from dspark_jax.checkpoints.load import load_drafter_for, load_target
from dspark_jax.checkpoints.tensors import LoadError, write_params
from dspark_jax.config import DrafterConfig, TrainConfig
from dspark_jax.models.drafters.eagle3 import Config, declare_drafter
from dspark_jax.models.vocab import Vocab, unembed
from dspark_jax.training import fit, losses
from dspark_jax.training.anchors import sample_lessons
from dspark_jax.training.growth import check_same_sizes
from dspark_jax.training.loss_terms import Decay, Loss, soft_cross_entropy
from dspark_jax.training.teacher import make_teacher
from tests.tiny_model import SIZES, TARGET, random_params, write_target

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
        loss = Loss(((soft_cross_entropy, 1.0),), slot_weights=Decay(DECAY))
        totals = losses.loss_totals(self.labels, None, loss.slot_weights, "chains")
        value, metrics = losses.dspark_loss(
            params, self.vocab, outputs, self.teacher, self.labels, totals, None, loss=loss
        )
        return value, (metrics, outputs.hidden_BAGD)


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
    recorded = case.record["metrics"]
    for slot, rate in enumerate(case.metrics["accept_rate_G"]):
        want = recorded[f"train/accept_rate@{slot}"]["value"]
        assert float(rate) == pytest.approx(want, abs=1e-5)
    want = recorded["train/tau_probabilistic"]["value"]
    assert float(case.metrics["accepted_length"]) == pytest.approx(want, abs=1e-5)


def test_every_gradient(case):
    named = write_params(declare_drafter(case.cfg), case.found)
    fixed = {name for name in named if name.endswith("layer_scalar")}
    assert not any(named.pop(name).any() for name in fixed)
    assert set(named) == set(case.gradient)
    for name, value in named.items():
        np.testing.assert_allclose(value, case.gradient[name], rtol=1e-4, atol=1e-6, err_msg=name)


LAYERS = 6
CFG = Config(
    **SIZES, num_layers=1, block_size=3, target_layer_ids=(1, 2), num_target_layers=LAYERS,
    owns_vocab=False,
)  # fmt: skip
PLAIN = dataclasses.replace(CFG, qk_norm=False)
IDS = np.array([0, 3, 4, 9, 20, 21, 50], np.int32)


def written(folder, cfg, config, *, ids=None, head=False, prefix="layers.0."):
    """A checkpoint as others write it, and the drafter in it."""
    params = random_params(3, declare_drafter(cfg))
    tensors = write_params(declare_drafter(cfg), params)
    tensors = {name.replace("layers.0.", prefix): value for name, value in tensors.items()}
    rng = np.random.default_rng(5)
    if head:
        rows = cfg.vocab_size if ids is None else len(ids)
        tensors["lm_head.weight"] = rng.normal(size=(rows, cfg.hidden_size)).astype(np.float32)
    if ids is not None:
        tensors["d2t"] = ids.astype(np.int64) - np.arange(len(ids))
        tensors["t2d"] = np.isin(np.arange(cfg.vocab_size), ids)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return params, tensors


def layer_of(cfg, kind):
    """The settings of a layer that all layouts share."""
    return {
        "model_type": kind,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_positions,
        "rms_norm_eps": cfg.rms_norm_eps,
        "hidden_act": "silu",
        "rope_theta": cfg.rope.theta,
    }


SAFE = layer_of(PLAIN, "llama") | {
    "architectures": ["LlamaForCausalLMEagle3"],
    "draft_vocab_size": len(IDS),
    "tie_word_embeddings": False,
}
SPECULATORS = {
    "architectures": ["Eagle3DraftModel"],
    "speculators_model_type": "eagle3",
    "transformer_layer_config": layer_of(PLAIN, "llama"),
    "draft_vocab_size": len(IDS),
    "norm_before_residual": True,
    "eagle_aux_hidden_state_layer_ids": [2, 3],
    "speculators_config": {"proposal_methods": [{"speculative_tokens": 3}]},
}


def test_the_layout_of_those_who_published_it(tmp_path):
    """``midlayer``, offsets and a mask, a head of its own, streams that enter layers."""
    cfg = dataclasses.replace(PLAIN, target_layer_ids=(1, 2, 3), num_target_layers=7)
    params, tensors = written(tmp_path / "safe", cfg, SAFE, ids=IDS, head=True, prefix="midlayer.")
    found, weights, own = deepspec.load_drafter(tmp_path / "safe", num_target_layers=7)
    assert found == dataclasses.replace(
        cfg, draft_vocab_size=len(IDS), block_size=7, owns_head=True, target_layer_ids=(1, 2, 3)
    )
    jax.tree.map(np.testing.assert_array_equal, weights, params)
    np.testing.assert_array_equal(own.d2t_U, IDS)
    target = Vocab(np.zeros((cfg.vocab_size, cfg.hidden_size), np.float32))
    sizes = dataclasses.replace(TARGET, num_layers=7)
    bound = deepspec.bind_vocab(found, own, sizes, target)
    np.testing.assert_array_equal(bound.unembed_VD, tensors["lm_head.weight"])
    assert bound.embed_VD is target.embed_VD


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (SAFE | {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 2]}}, (0, 2)),
        (SAFE | {"eagle_aux_hidden_state_layer_ids": [1, 3]}, (0, 2)),
        (SPECULATORS, (1, 2)),
        (SPECULATORS | {"architectures": ["Eagle3Speculator"]}, (1, 2)),
    ],
)
def test_features_are_counted_by_outputs(config, layers):
    flat = config | {"num_target_layers": LAYERS}
    found = deepspec.drafter_config(flat)
    assert found.target_layer_ids == layers
    assert found.norm_residual == ("norm_before_residual" in config)
    assert found.block_size == (3 if config is SPECULATORS else found.block_size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_before_fc": True}, "norm_before_fc True is not supported"),
        ({"fc_norm": True}, "fc_norm True is not supported"),
        ({"target_hidden_size": 5}, "target_hidden_size 5 is not supported"),
        ({"norm_before_residual": None}, "norm_before_residual is missing"),
        ({"eagle_config": 3}, "eagle_config is 3: it must be of type dict"),
        (
            {"eagle_aux_hidden_state_layer_ids": None, "num_target_layers": None},
            "number of the target's layers",
        ),
        ({"eagle_aux_hidden_state_layer_ids": [3, "x"]}, "must be a list of integers"),
        ({"transformer_layer_config": layer_of(PLAIN, "mixtral")}, "model_type 'mixtral'"),
        ({"draft_vocab_size": "many"}, "draft_vocab_size is 'many'"),
        ({"speculators_config": []}, "speculators_config is"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        deepspec.drafter_config(SPECULATORS | {"num_target_layers": LAYERS} | changes)


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("dspark", {"qk_norm": False, "norm_residual": True}),
        ("speculators", {"qk_norm": False, "norm_residual": True, "norm_output": True}),
        ("speculators", {}),
        ("deepspec", {}),
    ],
)
@pytest.mark.parametrize("kind", ["whole", "reduced", "own head"])
def test_what_is_written_is_read_back(tmp_path, layout, changes, kind):
    rng = np.random.default_rng(0)
    ids = None if kind == "whole" or layout == "deepspec" else IDS
    cfg = dataclasses.replace(
        CFG, **changes, owns_head=kind == "own head",
        draft_vocab_size=None if ids is None else len(ids),
    )  # fmt: skip
    params = random_params(4, declare_drafter(cfg))
    embed_VD = rng.normal(size=(cfg.vocab_size, cfg.hidden_size)).astype(np.float32)
    target = Vocab(embed_VD)
    head = embed_VD if ids is None else embed_VD[ids]
    head = head + (kind == "own head")
    vocab = Vocab(embed_VD, head, None if ids is None else jnp.asarray(ids))
    sizes = dataclasses.replace(TARGET, num_layers=LAYERS)
    save_layout(tmp_path / "out", layout, (cfg, params, vocab), ("a/target", sizes))
    found, weights, own = deepspec.load_drafter(tmp_path / "out")
    wrote_head = kind == "own head" or layout == "deepspec" or (layout, kind) == (
        "speculators", "reduced",
    )  # fmt: skip
    owns = layout == "deepspec"
    assert found == dataclasses.replace(cfg, owns_head=wrote_head, owns_vocab=owns)
    jax.tree.map(np.testing.assert_array_equal, weights, params)
    bound = deepspec.bind_vocab(found, own, sizes, target)
    rows = bound.embed_VD if bound.unembed_VD is None else bound.unembed_VD
    np.testing.assert_array_equal(rows, head)


def test_the_reference_layout_has_no_other_drafters(tmp_path):
    cfg = dataclasses.replace(CFG, norm_output=True)
    params, sizes = random_params(4, declare_drafter(cfg)), TARGET
    vocab = Vocab(np.zeros((cfg.vocab_size, cfg.hidden_size), np.float32))
    with pytest.raises(ValueError, match="has norm_output, and the reference layout"):
        save_layout(tmp_path / "out", "deepspec", (cfg, params, vocab), ("a/target", sizes))


def test_a_file_of_another_shape_is_refused(tmp_path):
    written(tmp_path / "wrong", PLAIN, SPECULATORS | {"num_target_layers": LAYERS}, ids=IDS)
    tensors = load_file(tmp_path / "wrong" / "model.safetensors")
    narrow = tensors["layers.0.self_attn.q_proj.weight"][:, : PLAIN.hidden_size].copy()
    tensors["layers.0.self_attn.q_proj.weight"] = narrow
    save_file(tensors, tmp_path / "wrong" / "model.safetensors")
    with pytest.raises(LoadError, match=r"q_proj\.weight has shape"):
        deepspec.load_drafter(tmp_path / "wrong")


ANSWERS = ("one two three four", "abcabcabcabcabc", "yes yes yes yes yes")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eagle3")
    write_target(folder / "target")
    rows = [
        {
            "conversations": [
                {"role": "user", "content": f"say it {i}"},
                {"role": "assistant", "content": ANSWERS[i % 3]},
            ]
        }
        for i in range(20)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig(
        method="eagle3",
        target=str(folder / "target"),
        data=str(folder / "data.jsonl"),
        out=str(folder / "out"),
        num_layers=1,
        block_size=2,
        markov_rank=0,
        confidence=False,
        draft_vocab_size=40,
        target_layer_ids=(-1, 0),
        max_length=40,
        length_buckets=(40,),
        tokens_per_batch=80,
        num_anchors=20,
        updates_per_batch=2,
        steps=20,
        learning_rate=3e-3,
        ce_weight=0.0,
        l1_weight=0.0,
        soft_weight=1.0,
        loss_decay=DECAY,
        eval_sequences=2,
        eval_every=10,
        checkpoint_every=10,
        log_every=1,
    )


@pytest.mark.full
def test_training_resumes_and_its_drafter_is_read(recipe):
    """A run that goes on from half its way is the same run; drafts stand more often after it."""
    out = fit.fit(recipe)
    first = load_file(out / "model.safetensors")
    shutil.rmtree(out.parent / "checkpoints" / "20")
    shutil.rmtree(out)
    again = load_file(fit.fit(recipe) / "model.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again, first)
    log = [json.loads(line) for line in (out.parent / "metrics.jsonl").read_text().splitlines()]
    held_out = [row for row in log if row.get("split") == "held-out"]
    assert held_out[-1]["soft_ce"] < held_out[0]["soft_ce"]
    assert log[-1]["accepted_length"] > log[0]["accepted_length"]

    drafter = load_drafter_for(load_target(recipe.target), out)
    assert (type(drafter.cfg), len(drafter.vocab.d2t_U)) == (Config, 40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"markov_rank": 4, "confidence": True}, "set markov_rank=0, confidence=False"),
        ({"num_layers": 2}, "method is 'eagle3': set num_layers=1"),
        ({"method": "eagle"}, "method is 'eagle': choose one of dspark, eagle3"),
        ({"soft_weight": 0.0}, "ce_weight, l1_weight and soft_weight are all 0"),
        ({"soft_weight": -1.0}, "soft_weight is -1.0"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(recipe, **changes)


def test_a_drafter_of_another_method_is_no_beginning():
    with pytest.raises(ValueError, match="of another method"):
        check_same_sizes("there", CFG, DrafterConfig(**SIZES, num_layers=1))
