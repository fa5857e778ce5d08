"""Penalties, biases and likeliest tokens: the law of every text is the shaped one, whatever is
drafted; what is reported is the target's own."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dspark_jax.engine import executables, tokens
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.request import Request
from dspark_jax.engine.shaping import shape_logits
from dspark_jax.models.targets.llama import encode
from dspark_jax.models.vocab import unembed
from pallas_kernels import random
from tests.test_generate import TARGET, drafter_of, generate, target_of

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
    drafter = drafter_of(target, seed=2, vocab_size=SIZE, mask_token_id=3, block_size=3)
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


def test_distribution_of_the_text(world):
    pvalue, results = fit_of_the_text(world)
    assert pvalue > 1e-4
    rounds = sum(result.rounds for result in results)
    assert sum(sum(result.accepted_drafts) for result in results) > 0.2 * rounds


def test_a_penalty_that_forgets_the_drafts_of_its_block_is_seen(world, monkeypatch):
    def forget(logits_TV, token_BS, length_B, token_BC, *others, **options):
        committed_BC = jnp.broadcast_to(token_BC[:, :1], token_BC.shape)
        nothing_BC = jnp.full_like(committed_BC, -1)
        return shape_logits(logits_TV, token_BS, length_B, nothing_BC, *others, **options)

    monkeypatch.setattr(tokens, "shape_logits", forget)
    monkeypatch.setattr(executables, "_PROGRAMS", {})
    assert fit_of_the_text(world)[0] < 1e-12
