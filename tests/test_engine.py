"""The engine end to end on tiny models: requests arrive and leave, their texts are their own."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.generate import generate
from dspark_jax.engine.plan import Shape, Sizes
from dspark_jax.engine.profile import make_profile, setting_of
from dspark_jax.engine.state import Request
from dspark_jax.models.deepspec import bind_vocab
from dspark_jax.models.drafter import declare_drafter
from dspark_jax.models.target import declare_target
from pallas_kernels import random
from tests.tiny_model import DRAFTER, TARGET, random_params

CONFIG = EngineConfig(
    slots=4,
    positions=60,
    queue=100,
    acceptance="coupled",
    chunk_rows=8,
    chunk_buckets=(2,),
    slot_buckets=(4,),
    row_buckets=(2, 4),
    position_buckets=(64,),
)
SAMPLED = {"temperature": 0.8, "top_k": 60, "top_p": 0.97, "min_p": 0.01}
POISON = TARGET.vocab_size - 2  # no other request has it in its prompt


class Letters:
    """A tokenizer of ids as letters."""

    def decode(self, ids, **_):
        return "".join(chr(ord("A") + i) for i in ids)


@functools.cache
def models(seed=20, poisoned=False):
    target = random_params(seed, declare_target(TARGET))
    if poisoned:
        embed = target.vocab.embed_VD.copy()
        embed[POISON] = np.nan
        # The head is the embedding: it gets one of its own, or every logit would be poisoned.
        vocab = target.vocab.replace(embed_VD=embed, unembed_VD=target.vocab.embed_VD)
        target = target.replace(vocab=vocab)
    drafter = random_params(seed + 1, declare_drafter(DRAFTER))
    target, drafter = jax.tree.map(jnp.asarray, (target, drafter))
    vocab = bind_vocab(DRAFTER, None, TARGET, target.vocab)
    return (TARGET, target), (DRAFTER, drafter, vocab)


@functools.cache
def decoder(**which):
    return make_decoder(*models(**which), tokenizer=Letters())


@functools.cache
def engine(poisoned=False, smooth=None, **changes):
    """One engine for all tests that want the same."""
    models = decoder(poisoned=True) if poisoned else decoder()
    profile = None if smooth is None else costs(smooth)
    return Engine(models, dataclasses.replace(CONFIG, **changes), profile)


def requests(count=10, max_new_tokens=12, **fields):
    """Prompts of 1 to 40 tokens; some sampled, some greedy."""
    rng = np.random.default_rng(3)
    keys = np.asarray(random.fold_in(random.seed_key(5), jnp.arange(count)))
    made = []
    for number in range(count):
        prompt = rng.integers(0, POISON, [1, 3, 40, 9, 17][number % 5]).tolist()
        limits = SAMPLED if number % 3 else {}
        limits = limits | {"max_new_tokens": max_new_tokens - number % 3} | fields
        made.append(Request(prompt, key=keys[number], **limits))
    return made


def texts(results):
    return [result.token_ids for result in results]


@functools.cache
def expected(acceptance="coupled"):
    fields = {"temperature": 0.0} if acceptance == "rejection" else {}
    return texts(generate(decoder(), requests(**fields), acceptance=acceptance, num_draft=0))


def costs(smooth):
    """Seconds of the rounds of CONFIG, as if larger ones were hardly dearer, or much."""
    sizes = Sizes(4, 64)
    seconds = {
        Shape(sizes, num_draft, rows, chunks): 1 + chunks + num_draft / 10 + rows / smooth
        for chunks in (0, 2)
        for num_draft, rows in ((0, 4), (3, 8), (3, 16))
    }
    return make_profile(setting_of(decoder(), CONFIG.chunk_rows), seconds, {sizes: 0.3})


@pytest.mark.parametrize(
    ("policy", "smooth"),
    [
        ("block", None),
        ("threshold:0.4", None),
        ("fixed:1", None),
        ("none", None),
        ("causal", 100),
        ("delayed", 100),
        ("delayed", 8),
    ],
)
def test_text_is_that_of_offline_generation(policy, smooth):
    """In any slot, beside anybody, however late it came, under any policy."""
    served = engine(policy=policy, smooth=smooth)
    streams = [served.submit(request) for request in requests()]
    served.run()
    assert texts(stream.result for stream in streams) == expected()
    assert all(stream.result.finish_reason == "length" for stream in streams)

    backwards = []
    for request in requests()[::-1]:
        backwards.append(served.submit(request))
        served.step()
    served.run()
    assert texts(stream.result for stream in backwards)[::-1] == expected()
    assert texts([served.submit(requests()[3]).wait()]) == expected()[3:4]


def test_greedy_text_under_rejection_is_that_of_offline_generation():
    served = engine(acceptance="rejection")
    streams = [served.submit(request) for request in requests(temperature=0.0)]
    served.run()
    assert texts(stream.result for stream in streams) == expected("rejection")
    drafted = sum(sum(stream.result.accepted_drafts) for stream in streams)
    assert drafted > 0
