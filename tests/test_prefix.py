"""Stored prefixes: what is found is what was read, and no text knows that it was not read again."""

import dataclasses
import itertools

import numpy as np
import pytest

from dspark_jax.axes import make_mesh
from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.plan import HostPlan
from dspark_jax.engine.prefix import Prefixes
from dspark_jax.engine.request import Request
from dspark_jax.models import cache as kv
from dspark_jax.scheduler.seconds import Seconds
from dspark_jax.scheduler.shape import Shape, Sizes
from pallas_kernels import random
from pallas_kernels.ragged_attention.pages import PAGE
from tests.test_deepseek_v4_inside import tiny
from tests.test_engine import Letters, decoder, models
from tests.test_families import CONFIGS
from tests.test_families_decoding import drafter_of, target_of
from tests.test_lookup import lookup_of

CONFIG = EngineConfig(
    policy="block",
    slots=2,
    positions=240,
    acceptance="coupled",
    chunk_rows=32,
    chunk_buckets=(1, 2),
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


def chat(model, config, turns=4, first=70, vocab=40, **options):
    """Two conversations in which each turn sends all that was said.

    Returns:
        The texts with the accepted lengths of their rounds, and how much was stored of each prompt.
    """
    rng, said, cached = np.random.default_rng(1), [], []
    with Engine(model, config) as engine:
        histories = [rng.integers(0, vocab, first + 9 * talk).tolist() for talk in range(2)]
        for turn in range(turns):
            key = np.asarray(random.seed_key(turn))
            streams = [
                engine.submit(Request(history, 14, key=key, **options)) for history in histories
            ]
            for history, stream in zip(histories, streams, strict=True):
                result = stream.wait()
                said.append((result.token_ids, result.accepted_lengths))
                cached.append(result.cached_tokens)
                history += [*result.token_ids, *rng.integers(0, vocab, 5).tolist()]
        stats = engine.stats()
    if config.prefix_bytes:
        assert stats.prefix_queries == len(said)
        assert stats.prefix_tokens == sum(cached)
        assert stats.prefix_hits == sum(count > 0 for count in cached)
    return said, cached


def without(config):
    return dataclasses.replace(config, prefix_bytes=0)


def assert_next_turns_hit(cached, first=70, short=0):
    """All was stored of what was read in the turn before, but for the last tokens.

    Args:
        cached: of :func:`chat`.
        first: tokens of the first prompt.
        short: tokens that a text may have gone on beyond its limit.
    """
    assert cached[:2] == [0, 0]
    for at, count in enumerate(cached[2:]):
        read = first + 9 * (at % 2) + 19 * (at // 2) + 14
        assert read - 2 - short <= count <= read


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 20}])
def test_texts_do_not_know_what_was_stored(options):
    said, cached = chat(decoder(), CONFIG, **options)
    assert said == chat(decoder(), without(CONFIG), **options)[0]
    assert_next_turns_hit(cached)


def test_other_weights_and_faults_empty_the_store(monkeypatch):
    prompt = list(range(40)) * 2
    with Engine(decoder(), CONFIG) as engine:

        def cached(count=4, ids=prompt):
            return engine.submit(Request(ids, count)).wait().cached_tokens

        assert (cached(), cached(), cached(4, prompt[:50])) == (0, len(prompt) - 1, 49)
        slow = engine.submit(Request([7, *prompt], 40))
        while not slow.result.token_ids:
            engine.step()
        engine.update_params(decoder().weights)
        slow.wait()
        assert cached(4, [7, *prompt]) == 0  # the old weights have read some of it
        assert (cached(), cached()) == (0, len(prompt) - 1)
        launcher, run = engine._loop.launcher, engine._loop.launcher.run
        monkeypatch.setattr(launcher, "run", lambda *_: 1 / 0)
        broken = engine.submit(Request([9], 4))
        engine.step()
        monkeypatch.setattr(launcher, "run", run)
        assert broken.wait().finish_reason == "error"
        assert (cached(), cached()) == (0, len(prompt) - 1)


def test_a_text_that_nobody_wants_any_more_has_still_been_read():
    prompt = list(range(40)) * 4
    with Engine(decoder(), CONFIG) as engine:
        for steps, least in ((1, 31), (4, 128)):
            stream = engine.submit(Request([steps, *prompt], 40))
            for _ in range(steps):
                engine.step()
            stream.cancel()
            again = engine.submit(Request([steps, *prompt], 2)).wait()
            assert again.cached_tokens >= least
            assert again.token_ids == engine.submit(Request([steps, *prompt], 2)).wait().token_ids


def test_a_store_that_holds_nothing_is_refused():
    with pytest.raises(ValueError, match=r"prefix_bytes is -1: give a positive integer, or 0 for"):
        EngineConfig(prefix_bytes=-1)
    with pytest.raises(ValueError, match=r"prefix_bytes is 5: a page of 64 positions takes \d+ by"):
        Engine(decoder(), dataclasses.replace(CONFIG, prefix_bytes=5))
    with pytest.raises(ValueError, match=r"pages have 64 positions, give multiples"):
        Engine(decoder(), dataclasses.replace(CONFIG, position_buckets=(250,)))


@pytest.mark.full
@pytest.mark.parametrize("paged", [False, True])
def test_every_data_shard_has_prefixes_of_its_own(emulated_devices, paged):
    sharded = make_decoder(*models(), tokenizer=Letters(), mesh=make_mesh(2, 2))
    config = dataclasses.replace(CONFIG, slots=4, prefix_bytes=1 << 23, paged=paged)
    said, cached = chat(sharded, config)
    assert said == chat(decoder(), without(CONFIG))[0]
    assert_next_turns_hit(cached)


@pytest.mark.full
@pytest.mark.parametrize("pages", [0, 8, 5])
def test_pages_of_slots_are_shared_and_given_back(pages):
    """8 pages hold the texts of both and little else, so that what is stored goes first."""
    config = dataclasses.replace(CONFIG, paged=True, pages=pages)
    said, cached = chat(decoder(), config)
    assert said == chat(decoder(), without(CONFIG))[0]
    if not pages:
        assert_next_turns_hit(cached)


@pytest.mark.full
@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_goes_on_from_what_was_stored(name, monkeypatch):
    """Rings go round several times between two turns. A text that went on beyond its limit is of no
    use to them, so that there are turns without a hit."""
    monkeypatch.setattr(kv, "RING_STEP", 1)
    target = target_of(CONFIGS[name])
    model = make_decoder(target, drafter_of(target))
    config = dataclasses.replace(CONFIG, position_buckets=(128, 256), prefix_bytes=1 << 24)
    said, cached = chat(model, config)
    assert said == chat(model, without(config))[0]
    assert sum(count > 0 for count in cached) >= 3
    in_pages = dataclasses.replace(config, position_buckets=(256,), paged=True)
    assert chat(model, in_pages) == (said, cached)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["lookup", "stages", "chain"])
def test_every_drafter_goes_on_from_what_was_stored(kind):
    """An index is made again; what lookup has learnt of its matches is, too, of the prompt."""
    target, drafter = tiny("chain" if kind == "lookup" else kind)
    if kind == "lookup":
        target = target_of(CONFIGS["llama"])
        drafter = lookup_of(target)
    model, block = make_decoder(target, drafter), drafter[0].block_size
    config = dataclasses.replace(CONFIG, row_buckets=(block + 1,), prefix_bytes=1 << 24)
    said, cached = chat(model, config, vocab=3)
    assert said == chat(model, without(config), vocab=3)[0]
    assert sum(count > 0 for count in cached) >= 3


@pytest.mark.parametrize(("limit_s", "pieces"), [(0.0, 1), (0.25, 1), (0.35, 2)])
def test_a_long_prompt_does_not_stall_who_decodes(limit_s, pieces):
    """A round takes 0.1 s, and as much longer for every piece of a prompt, as the engine thinks."""
    config, sizes = dataclasses.replace(CONFIG, max_stall_s=limit_s, prefix_bytes=0), Sizes(2, 256)
    known_s = {
        Shape(sizes, draft, rows, chunks): 0.1 * (1 + chunks)
        for chunks in (0, 1, 2)
        for draft, rows in ((0, 2), (3, 8))
    }
    with Engine(decoder(), config) as engine:
        engine._loop.seconds, plans = Seconds(known_s), []
        engine._loop.seconds.read = lambda *_: None
        engine._loop._tell = lambda *said: plans.append(said[0])
        engine.submit(Request(list(range(40)) * 4, 2)).wait()
        assert max(plan.shape.num_chunks for plan in plans if isinstance(plan, HostPlan)) == 2
        running = engine.submit(Request([1, 2], 60))
        while not running.result.token_ids:
            engine.step()
        plans.clear()
        engine.submit(Request(list(range(40)) * 4, 2)).wait()
        during = [plan.shape.num_chunks for plan in plans if isinstance(plan, HostPlan)]
        assert max(during) == pieces
