"""Penalties, biases and likeliest tokens: the law of every text is the shaped one, whatever is
drafted; what is reported is the target's own."""

import dataclasses
import itertools
import re

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dspark_jax.axes import make_mesh
from dspark_jax.engine import executables, tokens
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.generate import config_for
from dspark_jax.engine.grammar import Grammar
from dspark_jax.engine.request import Request
from dspark_jax.engine.shaping import shape_logits
from dspark_jax.models.targets.llama import encode
from dspark_jax.models.vocab import unembed
from pallas_kernels import random
from tests.test_generate import (
    TARGET,
    Letters,
    drafter_of,
    generate,
    requests,
    target_of,
    texts,
)

SIZE, LENGTH, PROMPT, TEMPERATURE = 4, 4, (1, 2), 0.9
SHAPED = {
    "presence_penalty": 0.7,
    "frequency_penalty": -0.9,
    "repetition_penalty": 1.6,
    "logit_bias": {3: 0.8, 0: -0.6},
}


@pytest.fixture(scope="module")
def world():
    """A target whose texts of a few tokens can be enumerated, with a drafter; and the logits of
    every place of every text."""
    cfg = dataclasses.replace(TARGET, vocab_size=SIZE)
    target = target_of(cfg, seed=4, scale=12.0)
    drafter = drafter_of(target, seed=2, vocab_size=SIZE, mask_token_id=3, block_size=2)
    words = np.array(list(itertools.product(range(SIZE), repeat=LENGTH)))
    prompt = np.tile(PROMPT, (len(words), 1))
    hidden, _ = encode(target[1], jnp.array(np.concatenate([prompt, words], axis=1)), cfg)
    logits = np.asarray(unembed(target[1].vocab, hidden), np.float64)[:, len(PROMPT) - 1 : -1]
    return make_decoder(target, drafter), words, logits


def shaped(logits, text, presence_penalty, frequency_penalty, repetition_penalty, logit_bias):
    """Of one place, said plainly."""
    logits = logits.copy()
    for token in {*PROMPT, *text}:
        factor = 1 / repetition_penalty if logits[token] > 0 else repetition_penalty
        logits[token] *= factor
    for token in text:
        logits[token] -= frequency_penalty
    for token in set(text):
        logits[token] -= presence_penalty
    for token, bias in logit_bias.items():
        logits[token] += bias
    return logits


def exact_law(words, logits):
    """Of all texts, under SHAPED."""
    chance = np.ones(len(words))
    for number, word in enumerate(words.tolist()):
        for place, token in enumerate(word):
            law = shaped(logits[number, place], word[:place], **SHAPED) / TEMPERATURE
            chance[number] *= np.exp(law[token] - np.logaddexp.reduce(law))
    return chance


def fit_of_the_text(world, count=1500, **rules):
    """The p-value of the joint law of the tokens of a text, over several rounds."""
    decoder, words, logits = world
    exact = exact_law(words, logits)
    assert exact.sum() == pytest.approx(1.0, abs=1e-6)
    keys = np.asarray(random.fold_in(random.seed_key(9), jnp.arange(count)))
    limits = Request(PROMPT, LENGTH, temperature=TEMPERATURE, **SHAPED)
    batch = [dataclasses.replace(limits, key=key) for key in keys]
    results = generate(decoder, batch, slots=250, **rules)
    place = [np.ravel_multi_index(r.token_ids, (SIZE,) * LENGTH) for r in results]
    seen, often = np.bincount(place, minlength=len(words)), exact * count >= 5
    observed = np.array([*seen[often], seen[~often].sum()])
    expected = np.array([*exact[often], exact[~often].sum()])
    return stats.chisquare(observed, expected / expected.sum() * count).pvalue, results


@pytest.mark.full
def test_distribution_of_the_text(world):
    pvalue, results = fit_of_the_text(world)
    assert pvalue > 1e-4
    rounds = sum(result.rounds for result in results)
    assert sum(sum(result.accepted_drafts) for result in results) > 0.2 * rounds


@pytest.mark.full
def test_a_penalty_that_forgets_the_drafts_of_its_block_is_seen(world, monkeypatch):
    def forget(logits_TV, token_BS, length_B, token_BC, *others, **options):
        committed_BC = jnp.broadcast_to(token_BC[:, :1], token_BC.shape)
        nothing_BC = jnp.full_like(committed_BC, -1)
        return shape_logits(logits_TV, token_BS, length_B, nothing_BC, *others, **options)

    monkeypatch.setattr(tokens, "shape_logits", forget)
    monkeypatch.setattr(executables, "_PROGRAMS", {})
    assert fit_of_the_text(world)[0] < 1e-12


# Penalties, a bias, a grammar, one who asks for nothing, and likeliest tokens; of sixteen letters.
LETTERS, STOP = 16, 15
WAYS = (
    {"frequency_penalty": 1.5, "presence_penalty": 0.5},
    {"repetition_penalty": 1.8, "logit_bias": {7: 4.0, 3: -100.0}},
    {"grammar": Grammar("regex", "[A-E]{1,20}(O[A-N]+)*")},
    {},
    {"top_logprobs": 3},
)


def mixed(**fields):
    """One request of each way; all of the same programs."""
    own = {"max_new_tokens": 16, "stop_ids": (STOP,), **fields}
    return [
        dataclasses.replace(
            request, prompt_ids=[token % STOP for token in request.prompt_ids], **way
        )
        for request, way in zip(requests(**own), WAYS, strict=True)
    ]


def decoder_of(with_drafter, mesh=None):
    cfg = dataclasses.replace(TARGET, vocab_size=LETTERS)
    target = target_of(cfg)
    drafter = drafter_of(target, vocab_size=LETTERS, mask_token_id=STOP) if with_drafter else None
    return make_decoder(target, drafter, tokenizer=Letters(), mesh=mesh)


@pytest.fixture(scope="module")
def decoders():
    """Plainly, and with a drafter."""
    return decoder_of(False), decoder_of(True)


@pytest.fixture(scope="module")
def plain(decoders):
    """The greedy texts, decoded plainly."""
    return texts(generate(decoders[0], mixed()))


@pytest.mark.parametrize(
    "rules",
    [
        (0.0, "block", "rejection"),
        pytest.param((0.0, "causal", "rejection"), marks=pytest.mark.full),
        pytest.param((0.8, "block", "coupled"), marks=pytest.mark.full),
    ],
)
def test_text_is_that_of_plain_decoding(decoders, plain, rules):
    """Greedy and coupled; nobody is harmed by what others ask for."""
    temperature, policy, acceptance = rules
    batch = mixed(temperature=temperature)
    if temperature:
        plain = texts(generate(decoders[0], batch, acceptance=acceptance))
    spec = generate(decoders[1], batch, acceptance=acceptance, policy=policy)
    assert texts(spec) == plain
    if policy != "causal":  # which drafts nothing before it knows what rounds cost
        assert sum(sum(result.accepted_drafts) for result in spec) > 0
    free = [dataclasses.replace(one, top_logprobs=0) for one in batch[3:]]
    assert plain[3:] == texts(generate(decoders[0], free, acceptance=acceptance))
    assert re.fullmatch(WAYS[2]["grammar"].text, spec[2].text)
    best = spec[4].top_logprobs
    assert [len(tops) for tops in best] == [3] * len(spec[4].token_ids)
    if not temperature:
        assert [tops[0][0] for tops in best] == spec[4].token_ids
        np.testing.assert_allclose([tops[0][1] for tops in best], spec[4].logprobs, rtol=1e-6)
    assert all(a[1] >= b[1] >= c[1] for a, b, c in best)


def test_what_starts_over_counts_what_is_new(decoders, plain):
    """The prompt that it goes on from has grown, its penalties still see all new tokens."""
    batch = mixed()
    with Engine(decoders[1], config_for(decoders[1], batch, policy="block")) as engine:
        streams = [engine.submit(request) for request in batch]
        for _ in range(4):
            engine.step()
        engine._loop.start_over()
        engine.run()
    assert texts(stream.result for stream in streams) == plain


def test_a_grammar_that_does_not_go_on_ends_its_request_alone(decoders, plain):
    """No letter is a digit."""
    batch = mixed()
    batch[2] = dataclasses.replace(batch[2], grammar=Grammar("regex", "A[0-9]"))
    found = generate(decoders[1], batch)
    assert [*texts(found)[:2], *texts(found)[3:]] == [*plain[:2], *plain[3:]]
    assert (found[2].text, found[2].finish_reason) == ("A", "error")
    assert "the grammar does not go on" in str(found[2].error)


@pytest.mark.full
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_vocabulary_in_shards_gives_the_text_of_one(decoders, temperature, emulated_devices):
    batch = mixed(temperature=temperature)
    got = generate(decoder_of(True, make_mesh(2, 4)), batch)
    expected = generate(decoders[1], batch)
    assert texts(got) == texts(expected)
    for one, other in zip(got[4].top_logprobs, expected[4].top_logprobs, strict=True):
        assert [token for token, _ in one] == [token for token, _ in other]
        np.testing.assert_allclose(*([value for _, value in tops] for tops in (one, other)), 1e-4)
