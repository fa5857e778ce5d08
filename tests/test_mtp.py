"""MTP layers: what they compute, where they lie, and that they learn; blockwise drafters beside."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dspark_jax import load
from dspark_jax.checkpoints import deepspec
from dspark_jax.checkpoints.export import save_layout
from dspark_jax.checkpoints.load import load_drafter_for, load_target
from dspark_jax.checkpoints.tensors import write_params
from dspark_jax.config import TrainConfig
from dspark_jax.evaluation.export import write_drafter
from dspark_jax.models.cache import Room, Rows
from dspark_jax.models.drafters import blockwise, early_exit, mtp
from dspark_jax.models.drafters.table import drafter_of
from dspark_jax.models.vocab import Vocab
from dspark_jax.training import fit
from tests.marks import rest_full
from tests.tiny_model import SIZES, TARGET, random_params, write_letters, write_target

V, D, LAYERS = SIZES["vocab_size"], SIZES["hidden_size"], TARGET.num_layers
CFG = mtp.Config(**SIZES, num_layers=1, block_size=3, num_target_layers=LAYERS, owns_vocab=False)
SMALL = {
    **SIZES,
    "num_layers": 1,
    "block_size": 3,
    "num_target_layers": LAYERS,
    "owns_vocab": False,
    "rms_norm_eps": 1e-6,
}
WIDE, EXIT = blockwise.of_recipe(SMALL), early_exit.of_recipe(SMALL)


def rms(x, weight):
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + CFG.rms_norm_eps)


def rotated(x_XH, position):
    """RoPE in halves, in float64."""
    half = x_XH.shape[-1] // 2
    angle = position * CFG.rope.theta ** (-np.arange(half) / half)
    low, high = x_XH[..., :half], x_XH[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], -1)


def reference(tensors, embed_VD, token_S, hidden_SD, norm_output):
    """Greedy drafts behind a text, and their logits: every entry from the beginning, in float64."""
    prefix = f"model.layers.{LAYERS}."
    w = {name.removeprefix(prefix): value.astype(np.float64) for name, value in tensors.items()}
    groups, dim = CFG.num_heads // CFG.num_kv_heads, CFG.head_dim
    states, tokens = list(hidden_SD[: len(token_S) - 1].astype(np.float64)), list(token_S[1:])
    keys, values, logits = [], [], []
    for i in range(len(token_S) - 2 + CFG.block_size):
        e = embed_VD[tokens[i]] * (i > 0)
        both = np.concatenate([rms(e, w["enorm.weight"]), rms(states[i], w["hnorm.weight"])])
        m = w["eh_proj.weight"] @ both
        x = rms(m, w["input_layernorm.weight"])
        q, k, v = ((w[f"self_attn.{p}_proj.weight"] @ x).reshape(-1, dim) for p in "qkv")
        q = rotated(rms(q, w["self_attn.q_norm.weight"]), i)
        keys.append(rotated(rms(k, w["self_attn.k_norm.weight"]), i))
        values.append(v)
        scores = np.stack([q[n] @ np.stack(keys)[:, n // groups].T for n in range(len(q))])
        law = np.exp(scores / dim**0.5)
        law /= law.sum(-1, keepdims=True)
        seen = [law[n] @ np.stack(values)[:, n // groups] for n in range(len(q))]
        m = m + w["self_attn.o_proj.weight"] @ np.concatenate(seen)
        x = rms(m, w["post_attention_layernorm.weight"])
        gate = w["mlp.gate_proj.weight"] @ x
        m = m + w["mlp.down_proj.weight"] @ (
            gate / (1 + np.exp(-gate)) * (w["mlp.up_proj.weight"] @ x)
        )
        out = rms(m, w["shared_head.norm.weight"])
        if i >= len(token_S) - 2:
            logits.append(embed_VD @ out)
            tokens.append(int(np.argmax(logits[-1])))
            states.append(out if norm_output else m)
    return np.array(tokens[len(token_S) - 1 :]), np.array(logits)


@pytest.mark.parametrize("norm_output", rest_full([False, True], (True,)))
def test_a_chain_is_what_the_paper_says(norm_output):
    """Entries observed in pieces, a rejected draft among them, then a chain."""
    cfg = dataclasses.replace(CFG, norm_output=norm_output)
    params = random_params(3, mtp.declare_drafter(cfg))
    rng = np.random.default_rng(0)
    vocab = Vocab(rng.normal(size=(V, D)).astype(np.float32))
    token_S = rng.integers(0, V, 9).astype(np.int32)
    hidden_SD = rng.normal(size=(9, D)).astype(np.float32)
    context = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        mtp.declare_context(cfg, Room(1, 32, 8, jnp.float32)),
    )
    padded_BS = jnp.zeros((1, 32), jnp.int32).at[0, :9].set(token_S)
    observe = jax.jit(functools.partial(mtp.observe, cfg=cfg))
    for start, count, length in ((0, 4, 4), (3, 3, 5), (4, 4, 9)):
        rows = Rows(
            padded_BS[0, start : start + count], jnp.zeros(count, jnp.int32),
            jnp.arange(start, start + count, dtype=jnp.int32),
        )  # fmt: skip
        known_BS = jnp.where(jnp.arange(32) < length, padded_BS, 0)
        features = jnp.asarray(hidden_SD[start : start + count, None])
        features = jnp.where((rows.position_T < length - 1)[:, None, None], features, 7.0)
        given = vocab, context, rows, features, known_BS, jnp.array([length])
        context = observe(params, *given)
    draw = functools.partial(
        mtp.draft,
        choose=lambda logits, _: jnp.argmax(logits, -1),
        law=lambda logits, _: logits,
        cfg=cfg,
        kernels="xla",
    )
    last = jnp.asarray(token_S[8:]), jnp.array([8])
    block = jax.jit(draw)(params, vocab, context, *last)
    tensors = write_params(mtp.declare_drafter(cfg), params)
    token_G, logits_GV = reference(tensors, vocab.embed_VD, token_S, hidden_SD, norm_output)
    np.testing.assert_array_equal(block.token_BG[0], token_G)
    np.testing.assert_allclose(block.logits_BGU[0], logits_GV, rtol=1e-3, atol=1e-4)


IDS = np.array([0, 3, 4, 9, 20, 21, 50], np.int32)


@pytest.mark.parametrize("cfg", [CFG, dataclasses.replace(CFG, qk_norm=False), WIDE, EXIT])
@pytest.mark.parametrize("reduced", [False, True])
def test_what_is_written_is_read_back(tmp_path, cfg, reduced):
    if reduced:
        cfg = dataclasses.replace(cfg, draft_vocab_size=len(IDS))
    params = random_params(4, drafter_of(cfg).declare_drafter(cfg))
    vocab = Vocab(np.zeros((V, D), np.float32), None, jnp.asarray(IDS) if reduced else None)
    save_layout(tmp_path / "out", "dspark", (cfg, params, vocab), ("t", TARGET))
    found, again, own = deepspec.load_drafter(tmp_path / "out")
    assert found == cfg
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert (own is not None) == reduced
    with pytest.raises(ValueError, match="the format speculators has no"):
        save_layout(tmp_path / "other", "speculators", (cfg, params, vocab), ("t", TARGET))


def ours(tensors):
    """As DeepSeek-V3's files have them, with copies of the target's embedding and head."""
    copies = {"shared_head.head.weight": (V, D), "embed_tokens.weight": (V, D)}
    copied = {name: np.zeros(shape, np.float32) for name, shape in copies.items()}
    return tensors | {f"model.layers.{LAYERS}.{name}": x for name, x in copied.items()}


def qwens(tensors):
    """As Qwen3-Next's files have them."""
    names = {
        "enorm": "pre_fc_norm_embedding",
        "hnorm": "pre_fc_norm_hidden",
        "eh_proj": "fc",
        "shared_head.norm": "norm",
    }
    found = {}
    for name, value in tensors.items():
        own = name.removeprefix(f"model.layers.{LAYERS}.")
        other = names.get(own.removesuffix(".weight"))
        own = f"layers.0.{own}" if other is None else f"{other}.weight"
        found[f"mtp.{own}"] = value - 1 if value.ndim == 1 else value
    return found


def with_layer(folder, form, cfg):
    """A target with a layer inside, and the layer's weights."""
    write_target(folder)
    params = random_params(5, mtp.declare_drafter(cfg))
    tensors = load_file(folder / "model.safetensors")
    inside = form(write_params(mtp.declare_drafter(cfg), params))
    save_file(tensors | inside, folder / "model.safetensors")
    return params


@pytest.mark.parametrize("form", [ours, qwens])
def test_a_layer_inside_its_targets_checkpoint_drafts(tmp_path, form):
    cfg = dataclasses.replace(CFG, qk_norm=False, norm_output=form is qwens, block_size=mtp.CHAIN)
    params = with_layer(tmp_path / "target", form, cfg)
    target = load_target(tmp_path / "target")
    drafter = load_drafter_for(target, "default")
    assert dataclasses.replace(drafter.cfg, rope=cfg.rope) == cfg
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, atol=1e-6),
        drafter.params,
        params,
    )
    shutil.rmtree(tmp_path / "target")
    write_target(tmp_path / "target")  # the same without it
    plain = load_target(tmp_path / "target")
    jax.tree.map(np.testing.assert_array_equal, target.params, plain.params)


def test_layers_with_gates_are_refused(tmp_path):
    cfg = dataclasses.replace(CFG, qk_norm=False)
    with_layer(tmp_path / "target", qwens, cfg)
    path = tmp_path / "target" / "model.safetensors"
    tensors = load_file(path)
    name = "mtp.layers.0.self_attn.q_proj.weight"
    tensors[name] = np.concatenate([tensors[name]] * 2)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="come with gates"):
        load_drafter_for(load_target(tmp_path / "target"), "default")


def recipe(folder, method):
    return TrainConfig(
        method=method,
        target=str(write_target(folder / "target")),
        data=str(write_letters(folder / "data.jsonl", 24)),
        out=str(folder / "out"),
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
        loss_decay=-1 / np.log(0.6),
        eval_sequences=4,
        eval_every=10,
        log_every=1,
    )


@pytest.mark.parametrize("method", rest_full(["mtp", "blockwise"], ("blockwise",)))
def test_training(tmp_path, method):
    """It learns, its drafter is read again, and the text is the target's own."""
    config = recipe(tmp_path, method)
    out = fit.fit(config)
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines if "split" not in line]
    assert log[-1]["ce"] < 0.8 * log[0]["ce"]
    given = {"max_new_tokens": 12, "temperature": 0, "seed": 0}
    (plain,) = load(config.target, "none").generate("abc", **given)
    model = load(config.target, str(out))
    (result,) = model.generate("abc", policy="block", **given)
    assert result.token_ids == plain.token_ids
    write_drafter(config.target, out, "dspark", tmp_path / "again")
    for name, value in load_file(out / "model.safetensors").items():
        again = load_file(tmp_path / "again" / "model.safetensors")[name]
        np.testing.assert_array_equal(again, value)
    with pytest.raises(ValueError, match="set num_layers=1, markov_rank=0"):
        dataclasses.replace(config, markov_rank=2, num_layers=2)
