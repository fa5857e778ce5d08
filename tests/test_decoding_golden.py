"""Greedy speculative decoding against recorded runs of the reference, round by round."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.axes import empty_buffers, make_mesh
from dspark_jax.checkpoints import deepspec, hf
from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.request import Request
from dspark_jax.models import cache as kv
from dspark_jax.models.cache import Rows
from dspark_jax.models.drafters.dspark import block_hidden, declare_context, observe
from dspark_jax.models.drafters.heads import (
    MarkovHead,
    bias_logits,
    block_codes,
    head_step,
    sample_block,
    start_state,
)
from dspark_jax.models.targets.table import family_of
from dspark_jax.models.vocab import unembed
from pallas_kernels.accept_block.xla import first_argmax

RUNS = Path(__file__).parent / "data" / "spec_decode_greedy"
HEADS = Path(__file__).parent / "data" / "markov_heads"
# Compilation makes these slow, so that by default each head takes one of the proofs in this file.
DRAFTERS = (
    "qwen3/dspark",
    "qwen3/dspark_rnn",
    "qwen3/dspark_gated",
    "qwen3/dflash",
    "gemma4/dspark",
)
MAX_NEW_TOKENS = 48


@pytest.fixture(scope="module")
def models(request):
    """Folder, target and drafter."""
    folder = RUNS / request.param
    target = hf.load_hf_target(folder.parent / "target", jnp.float32)
    cfg, params, own = deepspec.load_drafter(folder / "checkpoint")
    vocab = deepspec.bind_vocab(cfg, own, target[0], target[1].vocab)
    return folder, target, (cfg, params, vocab)


@pytest.mark.parametrize(
    ("models", "every", "mesh"),
    [
        ("qwen3/dspark", False, False),
        ("qwen3/eagle3", True, False),
        *(
            pytest.param(name, True, mesh, marks=pytest.mark.full)
            for name in (*DRAFTERS, "qwen3/eagle3")
            for mesh in (False, True)
        ),
    ],
    indirect=["models"],
)
def test_runs(models, every, mesh, emulated_devices):
    """By default whole blocks and one threshold: every threshold is a program of its own. On a
    mesh, if of one device, products are merged."""
    folder, target, drafter = models
    mesh = make_mesh(devices=emulated_devices) if mesh else None
    decoder, engines = make_decoder(target, drafter, mesh=mesh), {}
    # Rows for whole blocks: with fewer an engine may verify less than its threshold admits.
    config = EngineConfig(
        slots=1,
        positions=128,
        chunk_buckets=(1,),
        row_buckets=(decoder.drafter.block_size + 1,),
        position_buckets=(192,),
    )
    runs = json.loads((folder / "runs.json").read_text())["runs"]
    assert len(runs) >= 6
    thresholds = sorted({run["confidence_threshold"] for run in runs})
    if not every:
        runs = [run for run in runs if run["confidence_threshold"] in (0, thresholds[3])]
        assert len(runs) == 9
    for run in runs:
        prompt = run["output_ids"][: run["num_input_tokens"]]
        stops = tuple(run["stop_token_ids"] or ())
        # The reference looks at the position of the anchor, so that it runs until one token more.
        request = Request(prompt, MAX_NEW_TOKENS + 1, stop_ids=stops)
        threshold = run["confidence_threshold"]
        policy = f"threshold:{threshold}" if threshold else "block"
        if policy not in engines:
            engines[policy] = Engine(decoder, dataclasses.replace(config, policy=policy))
        got = engines[policy].submit(request).wait()
        want = [token for token in run["output_ids"][len(prompt) :] if token not in stops]
        note = f"{folder.name}, prompt {run['prompt_index']}: {run['note']}"
        assert got.token_ids[:MAX_NEW_TOKENS] == want, note
        assert got.accepted_lengths == run["acceptance_lengths"], note
        assert got.accepted_drafts == run["accepted_draft_lengths"], note
        proposed = list(got.verified_lengths)
        if got.accepted_lengths and got.accepted_lengths[-1] == got.accepted_drafts[-1]:
            proposed[-1] = got.accepted_drafts[-1]  # the record cuts the proposal at its stop token
        assert proposed == run["proposal_lengths"], note


@pytest.mark.parametrize(
    ("models", "most"),
    [
        pytest.param("gemma4/dspark", 4, marks=pytest.mark.full),
        *(pytest.param(name, 100, marks=pytest.mark.full) for name in DRAFTERS),
    ],
    indirect=["models"],
)
def test_rounds(models, most):
    """By default the first rounds: their operations are compiled for every number of rows."""
    folder, (target_cfg, target_params), (cfg, params, vocab) = models
    extend = family_of(target_cfg).extend
    record = np.load(folder / "rounds_prompt0.npz")
    count = min(most, len({key.split("/")[0] for key in record}))
    run = json.loads((folder / "runs.json").read_text())["runs"][0]
    tokens = jnp.asarray(run["output_ids"], jnp.int32)
    room = kv.Room(1, 64, 64, jnp.float32)
    context = empty_buffers(declare_context(cfg, room))
    cache = empty_buffers(family_of(target_cfg).declare_cache(target_cfg, room))
    seen = 0
    close = {"rtol": 0, "atol": 5e-5}
    for index in range(count):

        def of(part, prefix=f"round_{index}/"):
            return record[prefix + part]

        start = int(of("start"))
        rows = Rows(tokens[seen:start], jnp.zeros(start - seen, int), jnp.arange(seen, start))
        _, feature, cache = extend(
            target_params,
            cache,
            rows,
            target_cfg,
            cfg.target_layer_ids,
            rows_per_slot=start - seen,
        )
        want = of("context_features")
        np.testing.assert_allclose(feature.reshape(want.shape), want, **close)
        text = tokens[None], jnp.array([start + 1])
        context = observe(params, vocab, context, rows, feature, *text, cfg)
        seen = start

        anchor = tokens[start : start + 1]
        hidden = block_hidden(params, vocab, anchor[:, None], jnp.array([[start]]), context, cfg)
        block = sample_block(
            params,
            vocab,
            hidden[:, 0],
            anchor,
            lambda logits, slot: first_argmax(logits),
            cfg,
        )
        np.testing.assert_allclose(hidden[0, 0], of("block_hidden"), **close)
        np.testing.assert_allclose(unembed(vocab, hidden)[0, 0], of("base_logits"), **close)
        np.testing.assert_allclose(block.logits_BGU[0], of("corrected_logits"), **close)
        np.testing.assert_array_equal(block.token_BG[0], of("draft_tokens"))
        if cfg.confidence:
            np.testing.assert_allclose(
                block.confidence_logit_BG[0], of("confidence_logits"), **close
            )

        verify = jnp.asarray(of("verify_input_ids"), jnp.int32)
        position = start + jnp.arange(len(verify))
        rows = Rows(verify, jnp.zeros(len(verify), int), position)
        hidden, _, _ = extend(target_params, cache, rows, target_cfg, rows_per_slot=len(verify))
        np.testing.assert_allclose(
            unembed(target_params.vocab, hidden), of("target_logits"), **close
        )


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_sequential_heads(kind):
    data = np.load(HEADS / f"{kind}.npz")
    weight = {key.removeprefix("weights/"): data[key] for key in data if "weights/" in key}
    mix = {"vanilla": None, "gated": "gate_proj", "rnn": "joint_proj"}[kind]

    def head_of(w):
        return MarkovHead(
            w["markov_w1.weight"],
            w["markov_w2.weight"].T,
            None if mix is None else w[f"{mix}.weight"].T,
            None if mix is None else w[f"{mix}.bias"],
        )

    def block_logits(weights, hidden):
        head = head_of(weights)
        code, _ = block_codes(head, jnp.asarray(data["block_token_ids"]), hidden, kind)
        return data["block_base_logits"] + bias_logits(head, code)

    hidden = jnp.asarray(data["block_hidden_states"])
    weights = {name: jnp.asarray(value) for name, value in weight.items()}
    logits, pull = jax.vjp(block_logits, weights, hidden)
    np.testing.assert_allclose(logits, data["block_logits"], rtol=0, atol=1e-5)
    gradient, hidden_gradient = pull(jnp.asarray(data["block_cotangent"]))
    for name, value in gradient.items():
        np.testing.assert_allclose(value, data[f"grads/{name}"], rtol=1e-4, atol=1e-5)
    if kind != "vanilla":
        np.testing.assert_allclose(
            hidden_gradient, data["grads/block_hidden_states"], rtol=1e-4, atol=1e-5
        )

    head = head_of(weights)
    previous = jnp.asarray(data["sample_first_prev_token_ids"])
    state = start_state(head, previous.shape)
    for slot in range(data["sample_tokens"].shape[1]):
        state, code, _ = head_step(
            head, state, previous, jnp.asarray(data["sample_hidden_states"][:, slot]), kind
        )
        step = data["sample_base_logits"][:, slot] + bias_logits(head, code)
        np.testing.assert_allclose(
            step, data["sample_corrected_logits"][:, slot], rtol=0, atol=1e-5
        )
        previous = first_argmax(step)
        np.testing.assert_array_equal(previous, data["sample_tokens"][:, slot])
