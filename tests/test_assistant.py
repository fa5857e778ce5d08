"""Gemma 4's assistants: the numbers of transformers, and what they do not fit."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.checkpoints.assistant import is_assistant, read_assistant
from dspark_jax.checkpoints.hf import load_hf_target
from dspark_jax.engine import generate as offline
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.request import Request
from dspark_jax.models.cache import Room, Rows
from dspark_jax.models.drafters import assistant
from dspark_jax.models.drafters.family import Borrowed
from dspark_jax.models.targets.table import family_of
from tests.tiny_model import TARGET

DATA = Path(__file__).parent / "data" / "gemma4_variants"


@pytest.fixture(scope="module")
def target():
    return load_hf_target(DATA / "ple_shared_kv" / "checkpoint", jnp.float32)


@pytest.fixture(scope="module")
def drafter(target):
    return read_assistant(DATA / "assistant" / "checkpoint", target[0], jnp.float32)[:3]


def test_steps_are_those_of_transformers(target, drafter):
    (cfg, params), (small, weights, vocab) = target, drafter
    small = dataclasses.replace(small, block_size=3)
    family, golden = family_of(cfg), np.load(DATA / "assistant" / "io.npz")
    texts = jnp.asarray(golden["input_ids"], jnp.int32)
    room = Room(2, 64, 36, jnp.float32)

    @jax.jit
    def run(anchor, hidden_BD, cache):
        position_B = jnp.full(2, anchor)
        token_B = texts[:, anchor]
        own = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), assistant.declare_context(small, room)
        )
        own = own.replace(hidden_LBD=hidden_BD[None])
        context = Borrowed(own, params, cache, cfg)
        return assistant.draft(
            weights, vocab, context, token_B, position_B,
            lambda logits, _: jnp.argmax(logits, -1), lambda logits, _: logits, small,
            kernels="xla",
        )  # fmt: skip

    @jax.jit
    def read(end):
        """All positions, those from the anchor on as garbage that nobody may see."""
        token_T = jnp.where(jnp.arange(36) < end, texts, 5).reshape(-1)
        rows = Rows(token_T, jnp.repeat(jnp.arange(2), 36), jnp.tile(jnp.arange(36), 2))
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), family.declare_cache(cfg, room))
        hidden_TD, _, cache = family.extend(params, empty, rows, cfg, rows_per_slot=36)
        return hidden_TD.reshape(2, 36, -1)[:, end - 1], cache

    for anchor in golden["anchors"]:
        block = run(anchor, *read(anchor))
        np.testing.assert_array_equal(block.token_BG, golden[f"p{anchor}/drafts"])
        want = golden[f"p{anchor}/logits"]
        np.testing.assert_allclose(block.logits_BGU, want, rtol=0, atol=2e-4)


@pytest.mark.full
@pytest.mark.parametrize("acceptance", ["rejection", "coupled"])
def test_the_text_is_the_targets_own(target, drafter, acceptance):
    asked = {"temperature": 0.0 if acceptance == "rejection" else 0.8}
    keys = np.arange(6, dtype=np.uint32).reshape(3, 2)
    prompts = [2, 9, 4], list(range(20, 60)), [2]
    requests = [
        Request(prompt, 20, key=key, **asked) for prompt, key in zip(prompts, keys, strict=True)
    ]
    generate = functools.partial(offline.generate, acceptance=acceptance)
    plain = generate(make_decoder(target), requests, policy="none")
    found = generate(make_decoder(target, drafter), requests, policy="block")
    assert [r.token_ids for r in found] == [r.token_ids for r in plain]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_ordered_embeddings": True}, "use_ordered_embeddings is true"),
        ({"backbone_hidden_size": 40}, "its backbone_hidden_size is 40, the target has 48"),
        ({"backbone_hidden_size": None}, "backbone_hidden_size is missing"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers is 2"),
        ({"vocab_size": 99}, "its vocab_size is 99, the target has 131"),
        ({"num_key_value_heads": 1}, "its num_key_value_heads of full_attention is 1"),
        ({"final_logit_softcapping": 30.0}, "must be off"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(target, tmp_path, changes, message):
    shutil.copytree(DATA / "assistant" / "checkpoint", tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        (config["text_config"] if key in config["text_config"] else config)[key] = value
    path.write_text(json.dumps(config))
    assert is_assistant(tmp_path / "other")
    with pytest.raises(ValueError, match=message):
        read_assistant(tmp_path / "other", target[0], jnp.float32)


def test_other_targets_are_refused():
    with pytest.raises(ValueError, match="an assistant reads what a Gemma 4 target caches"):
        read_assistant(DATA / "assistant" / "checkpoint", TARGET, jnp.float32)
