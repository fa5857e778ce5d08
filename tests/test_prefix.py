"""Stored prefixes: what is found is what was read, and no text knows that it was not read again."""

import dataclasses
import itertools

import numpy as np
import pytest

from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.prefix import Prefixes
from dspark_jax.engine.request import Request
from dspark_jax.models import cache as kv
from dspark_jax.models.drafters import lookup
from dspark_jax.models.targets.table import family_of
from pallas_kernels import random
from pallas_kernels.ragged_attention.pages import PAGE
from tests.test_engine import POISON, decoder, models
from tests.test_families import CONFIGS, MOST
from tests.test_families_decoding import drafter_of, target_of

CONFIG = EngineConfig(
    policy="block",
    slots=2,
    positions=240,
    acceptance="coupled",
    chunk_rows=32,
    chunk_buckets=(1,),
    slot_buckets=(2,),
    row_buckets=(4,),
    position_buckets=(256,),
    prefix_bytes=1 << 22,
)


def grown_texts(rng, count=60):
    """Texts that go on from one another, at any place."""
    texts = [()]
    for _ in range(count):
        old = texts[rng.integers(len(texts))]
        at = len(old) if rng.random() < 0.5 else rng.integers(len(old) + 1)
        new = rng.integers(0, 3, rng.integers(1, 2 * PAGE)).tolist()
        texts.append((*old[:at], *new)[: 5 * PAGE])
    return texts[1:]


def longest(text, kept, to_the_end):
    """Positions of a text that any of those that were kept, read -> text, has to offer."""
    if to_the_end:
        ends = (len(read) for read, old in kept.items() if text[: len(old)] == old)
    else:
        ends = (common(text, read) - 1 for read in kept)
    return max([0, *ends])


def common(one, other):
    same = (a == b for a, b in zip(one, other, strict=False))
    return len(list(itertools.takewhile(bool, same)))


@pytest.mark.parametrize(("pages", "snapshots"), [(1000, 0), (1000, 100), (9, 0), (9, 4), (1, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_found_is_what_was_kept(pages, snapshots, seed):
    """Against the memory that a device would have; with room for everything, it is the longest."""
    rng = np.random.default_rng(seed)
    prefixes, held, shot, kept_texts = Prefixes(pages, snapshots), {}, {}, {}
    for text in grown_texts(rng):
        found = prefixes.find(text)
        assert found.count <= max(0, len(text) - 1)
        together = tuple(itertools.chain.from_iterable(held[page] for page in found.pages))
        assert together[: found.count] == text[: found.count]
        if snapshots and found.count:
            assert shot[found.snapshot] == text[: found.count + 1]
        if pages == 1000:
            assert found.count == longest(text, kept_texts, bool(snapshots))
        read = text[:-1]
        kept = prefixes.keep(read, text[-1])
        for number, page in enumerate(kept.pages, kept.first):
            held[page] = read[PAGE * number :][:PAGE]
        if kept.snapshot >= 0:
            shot[kept.snapshot] = text
        kept_texts[read] = text
        assert len(prefixes) <= pages


def test_the_oldest_goes_first_and_a_beginning_after_what_goes_on_from_it():
    prefixes = Prefixes(3)
    first, second = (1,) * PAGE, (2,) * PAGE
    prefixes.keep((*first, *second))
    prefixes.keep((3,) * PAGE)
    prefixes.find((*first, 5, 5))
    prefixes.keep((4,) * PAGE)
    assert prefixes.find((*first, *second, 5)).count == PAGE - 1
    assert prefixes.find((*(3,) * PAGE, 5)).count == PAGE - 1
    prefixes.keep((*(5,) * (2 * PAGE), 5))
    assert len(prefixes) == 3
    assert prefixes.keep((6,) * (9 * PAGE)).pages.__len__() == 3
    prefixes.clear()
    assert prefixes.find((6,) * PAGE).count == len(prefixes) == 0


def chat(model, config, turns=4, first=70, **options):
    """The texts of conversations in which each turn sends all that was said, and what was cached."""
    rng, said, cached = np.random.default_rng(1), [], []
    with Engine(model, config) as engine:
        histories = [rng.integers(0, 40, first + 9 * talk).tolist() for talk in range(2)]
        for turn in range(turns):
            streams = [
                engine.submit(
                    Request(history, 14, key=np.asarray(random.seed_key(turn)), **options)
                )
                for history in histories
            ]
            for history, stream in zip(histories, streams, strict=True):
                said.append(stream.wait().token_ids)
                cached.append(stream.result.cached_tokens)
                history += [*said[-1], *rng.integers(0, 40, 5).tolist()]
        stats = engine.stats()
    if config.prefix_bytes:
        assert stats.prefix_queries == len(said)
        assert stats.prefix_tokens == sum(cached)
        assert stats.prefix_hits == sum(count > 0 for count in cached)
    return said, cached


def without(config):
    return dataclasses.replace(config, prefix_bytes=0)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 20}])
def test_texts_do_not_know_what_was_stored(options):
    said, cached = chat(decoder(), CONFIG, **options)
    assert said == chat(decoder(), without(CONFIG), **options)[0]
    assert cached[:2] == [0, 0]
    for at, count in enumerate(cached[2:]):  # all but the last token of what was read before
        assert count >= 70 + 9 * (at % 2) + 19 * (at // 2) + 14 - 2
