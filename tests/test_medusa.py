"""Medusa heads: two layouts of files, one meaning; trained on the target's own LM head."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from dspark_jax.checkpoints import deepspec
from dspark_jax.checkpoints.export import save_layout
from dspark_jax.checkpoints.load import load_drafter_for, load_target
from dspark_jax.config import TrainConfig
from dspark_jax.models.drafters import medusa
from dspark_jax.models.vocab import Vocab
from dspark_jax.training import fit
from tests.tiny_model import SIZES, TARGET, write_letters, write_target

V, D = SIZES["vocab_size"], SIZES["hidden_size"]
HEADS, BLOCKS = 3, 2
IDS = np.array([7, 2, 50, 31], np.int64)  # in no order


def arrays(rows):
    """Weights and biases of all blocks, and the LM heads."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return draw(HEADS, BLOCKS, D, D), draw(HEADS, BLOCKS, D), draw(HEADS, rows, D)


def published(rows):
    weight, bias, head = arrays(rows)
    tensors = {f"{k}.{BLOCKS}.weight": head[k] for k in range(HEADS)}
    for k in range(HEADS):
        for j in range(BLOCKS):
            tensors[f"{k}.{j}.linear.weight"] = weight[k, j]
            tensors[f"{k}.{j}.linear.bias"] = bias[k, j]
    return tensors


def vllms(rows):
    renamed = {}
    for name, value in published(rows).items():
        k, j, *rest = name.split(".")
        part = f"blocks.{k}.layers.{j}.{rest[-1]}" if len(rest) == 2 else f"lm_heads.{k}.weight"
        renamed[part] = value
    return renamed


FILES = {
    "published": (published(V), {"medusa_num_heads": 2, "medusa_num_layers": BLOCKS}),
    "vllm": (vllms(V), {"model_type": "medusa", "num_heads": HEADS, "num_hidden_layers": BLOCKS}),
    "token map": (
        vllms(len(IDS)) | {"token_map": IDS},
        {"model_type": "medusa", "num_heads": HEADS, "vocab_size": V, "truncated_vocab_size": 4},
    ),
}


def read(folder, tensors, config):
    folder.mkdir()
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return deepspec.load_drafter(folder, num_target_layers=TARGET.num_layers)


@pytest.mark.parametrize("layout", FILES)
def test_both_layouts_are_the_same_heads(tmp_path, layout):
    cfg, params, own = read(tmp_path / "heads", *FILES[layout])
    assert (cfg.block_size, cfg.num_layers, cfg.vocab_size) == (HEADS, BLOCKS, V)
    target = Vocab(np.random.default_rng(1).normal(size=(V, D)).astype(np.float32))
    vocab = deepspec.bind_vocab(cfg, own, TARGET, target)
    ids = np.sort(IDS) if layout == "token map" else np.arange(V)
    hidden_BD = np.random.default_rng(2).normal(size=(2, D)).astype(np.float32)
    context = medusa.Context(jnp.asarray(hidden_BD)[None])
    nobody = jnp.zeros(2, jnp.int32)
    block = medusa.draft(
        params, vocab, context, nobody, nobody, lambda logits, _: jnp.argmax(logits, -1),
        lambda logits, _: logits, cfg, kernels="xla",
    )  # fmt: skip
    weight, bias, head = arrays(len(ids))
    if layout == "token map":
        head = head[:, np.argsort(IDS)]
    for k in range(HEADS):
        x_BD = hidden_BD.astype(np.float64)
        for j in range(BLOCKS):
            mixed = x_BD @ weight[k, j].T + bias[k, j]
            x_BD = x_BD + mixed / (1 + np.exp(-mixed))
        expected = x_BD @ head[k].T
        np.testing.assert_allclose(block.logits_BGU[:, k], expected, rtol=2e-4, atol=2e-4)
        np.testing.assert_array_equal(block.token_BG[:, k], ids[expected.argmax(-1)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"medusa_num_layers": 1}, "medusa_num_layers is 1, but 2 are stored"),
        ({"vocab_size": 3}, "has shape"),
        ({"vocab_size": "x"}, "vocab_size is 'x'"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, change, message):
    tensors, config = FILES["published"]
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "heads", tensors, config | change)


def test_a_file_without_heads_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the first head's, is missing"):
        read(tmp_path / "heads", {"x": np.zeros(3, np.float32)}, {"medusa_num_heads": 3})


def test_heads_of_their_own_are_neither_trained_nor_written_elsewhere(tmp_path):
    cfg, params, own = read(tmp_path / "heads", *FILES["published"])
    target = Vocab(np.zeros((V, D), np.float32))
    vocab = deepspec.bind_vocab(cfg, own, TARGET, target)
    with pytest.raises(ValueError, match="neither trained nor exported"):
        medusa.train_blocks(params, vocab, None, None, None, None, None, cfg, kernels="xla")
    with pytest.raises(ValueError, match="has no Medusa heads"):
        save_layout(tmp_path / "out", "speculators", (cfg, params, vocab), ("t", TARGET))
    save_layout(tmp_path / "out", "dspark", (cfg, params, vocab), ("t", TARGET))
    found, again, _ = deepspec.load_drafter(tmp_path / "out")
    assert found == cfg
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_training(tmp_path):
    """Heads that begin as the target's law of the token before learn to look ahead."""
    recipe = TrainConfig(
        method="medusa",
        target=str(write_target(tmp_path / "target")),
        data=str(write_letters(tmp_path / "data.jsonl", 24)),
        out=str(tmp_path / "out"),
        num_layers=1,
        block_size=3,
        markov_rank=0,
        confidence=False,
        max_length=40,
        length_buckets=(40,),
        tokens_per_batch=160,
        num_anchors=20,
        steps=20,
        learning_rate=1e-2,
        ce_weight=1.0,
        l1_weight=0.0,
        loss_decay=-1 / np.log(0.8),
        eval_sequences=4,
        eval_every=10,
        log_every=1,
    )
    out = fit.fit(recipe)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines if "split" not in line]
    assert log[-1]["ce"] < 0.8 * log[0]["ce"]
    drafter = load_drafter_for(load_target(recipe.target), out)
    assert (drafter.cfg.block_size, drafter.cfg.num_layers) == (3, 1)
    with pytest.raises(ValueError, match="set markov_rank=0"):
        dataclasses.replace(recipe, markov_rank=2)
