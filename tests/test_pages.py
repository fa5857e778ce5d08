"""Caches in pages: the same texts, in memory that follows them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.axes import make_mesh
from dspark_jax.engine import memory
from dspark_jax.engine.config import EngineConfig, make_ladder
from dspark_jax.engine.decoder import make_decoder, state_config
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.generate import serve
from dspark_jax.engine.request import Request
from dspark_jax.engine.state import declare_state, without_pages
from dspark_jax.engine.timing import measure_profile
from dspark_jax.models import cache as kv
from dspark_jax.scheduler.policy import make_policy
from pallas_kernels.ragged_attention.pages import gather_pages
from tests.test_engine import (
    CONFIG,
    POISON,
    Letters,
    decoder,
    expected,
    guarded,
    models,
    requests,
    texts,
)

LONG = dataclasses.replace(
    CONFIG, positions=200, position_buckets=(256,), slots=3, slot_buckets=(3,), chunk_rows=64
)


def long_requests(count=4):
    """Prompts and texts that cross the borders of pages."""
    rng = np.random.default_rng(8)
    return [
        Request(rng.integers(0, POISON, 40 + 12 * number).tolist(), max_new_tokens=100)
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def long_texts():
    with Engine(decoder(), LONG) as engine:
        return texts(serve(engine, long_requests()))


@pytest.mark.parametrize(
    "changes",
    [{"slot_buckets": (1, 4)}, pytest.param({"policy": "none"}, marks=pytest.mark.full)],
)
def test_texts_do_not_know_where_their_caches_lie(changes):
    with Engine(decoder(), dataclasses.replace(CONFIG, paged=True, **changes)) as engine:
        assert engine.config.pages == 4
        assert texts(serve(engine, requests())) == expected()


@pytest.mark.parametrize("pages", [4, pytest.param(6, marks=pytest.mark.full)])
def test_where_pages_are_used_up_the_last_to_come_wait_and_go_on(pages, long_texts, monkeypatch):
    from dspark_jax.engine.seats import Tenant

    left, leave = [], Tenant.leave
    monkeypatch.setattr(Tenant, "leave", lambda self: (left.append(self.arrival), leave(self)))
    with Engine(decoder(), dataclasses.replace(LONG, pages=pages)) as engine:
        assert texts(serve(engine, long_requests())) == long_texts
    assert left
    assert 0 not in left  # who came first is never sent back


def test_a_longer_text_takes_more_pages_and_gives_them_back(long_texts):
    with Engine(decoder(), dataclasses.replace(LONG, pages=4)) as engine:
        stream, held = engine.submit(long_requests(1)[0]), []
        while engine.step():
            held += [len(tenant.pages) for tenant in engine._loop._tenants]
        assert stream.result.token_ids == long_texts[0]
        assert sorted(set(held)) == [1, 2, 3]
        assert texts(serve(engine, long_requests()[:1])) == long_texts[:1]


@pytest.mark.full
@pytest.mark.parametrize("pages", [0, 8])
def test_every_data_shard_has_pages_of_its_own(emulated_devices, pages, long_texts):
    sharded = make_decoder(*models(), tokenizer=Letters(), mesh=make_mesh(2, 2))
    config = dataclasses.replace(LONG, slots=4, slot_buckets=(2,), pages=pages, paged=True)
    with Engine(sharded, config) as engine:
        assert texts(serve(engine, long_requests())) == long_texts


def test_what_is_not_finite_stays_in_the_page_of_its_request():
    """The pages of a poisoned request go to others, keys that are not numbers in them."""
    wanted = requests(5, temperature=0.0)
    with Engine(decoder(poisoned=True), dataclasses.replace(CONFIG, pages=2)) as engine:
        clean = texts(serve(engine, wanted))
        poisoned = Request([3, POISON, 4], max_new_tokens=8)
        mixed = list(serve(engine, [poisoned, *wanted, poisoned, *wanted]))
    assert [result.finish_reason for result in mixed].count("error") == 2
    rest = [result for result in mixed if result.finish_reason != "error"]
    assert texts(rest) == clean + clean


def test_rows_without_a_page_are_dropped():
    room = kv.Room(2, 128, 4, jnp.float32, pages=3)
    declared = kv.declare_kv(1, 1, 8, 0, room)
    cache = jax.tree.map(lambda buffer: jnp.zeros(buffer.shape), declared)
    page_BX = jnp.array([[2, 0], [3, 3]])
    held = kv.with_pages((cache, None), page_BX)[0]
    slot_T, position_T = jnp.array([0, 0, 1, 2, 0]), jnp.array([63, 64, 5, 0, 128])
    new = jnp.ones((5, 1, 8))
    written = kv.write(held, 0, slot_T, position_T, new, new)
    expected = np.zeros((3, 64))
    expected[2, 63] = expected[0, 0] = 1
    np.testing.assert_array_equal(written.k[0, :, 0, :, 0], expected)
    in_order = gather_pages(written.k[0], page_BX, jnp.array([0]))
    assert np.flatnonzero(in_order[0, 0, :, 0]).tolist() == [63, 64]
    assert kv.with_pages(written, None).page_BX is None


def test_memory_follows_the_pages():
    def state_bytes(pages):
        config = memory.complete(decoder(), dataclasses.replace(LONG, pages=pages))
        form = state_config(decoder(), 3, 256, config)
        declared = declare_state(form)
        return [
            sum(buffer.nbytes for buffer in jax.tree.leaves(tree))
            for tree in (declared, without_pages(declared))
        ]

    (four, bare), (twelve, also_bare) = state_bytes(4), state_bytes(12)
    assert bare == also_bare
    assert twelve - bare == 3 * (four - bare)


def test_pages_are_as_many_as_fit():
    policy = make_policy("block", decoder().drafter)

    def pages(**changes):
        config = dataclasses.replace(LONG, paged=True, **changes)
        return memory.complete(decoder(), config).pages

    assert pages() == 12
    ladder = make_ladder(dataclasses.replace(LONG, pages=1), policy, 1)
    form = dataclasses.replace(LONG, chunk_rows=64, pages=7)
    exactly = memory.engine_bytes(decoder(), form, ladder)
    assert pages(memory_bytes=exactly) == 7
    assert pages(memory_bytes=exactly - 1) == 6
    with pytest.raises(ValueError, match="holds the longest request, at least 4"):
        pages(memory_bytes=exactly // 2)
    with pytest.raises(ValueError, match="there are 3 pages of 64 positions"):
        pages(pages=3)


def test_a_state_in_pages_has_one_size_and_few_programs():
    policy = make_policy("block", decoder().drafter)
    config = EngineConfig(slots=64, positions=400)
    dense = make_ladder(config, policy, 1)
    paged = make_ladder(dataclasses.replace(config, pages=64 * 7), policy, 1)
    assert (dense.positions, paged.positions) == ((256, 448), (448,))
    assert (dense.slots, paged.slots) == ((1, 4, 16, 64), (1, 8, 64))
    assert [paged.drafted_rows(slots, 0) for slots in paged.slots] == [(4,), (32,), (128, 192, 256)]
    with pytest.raises(ValueError, match="pages have 64 positions"):
        Engine(decoder(), dataclasses.replace(CONFIG, paged=True, position_buckets=(80,)))
    with pytest.raises(ValueError, match="leave one of them out"):
        EngineConfig(paged=False, pages=3)


@pytest.mark.full
def test_rounds_of_a_state_in_pages_are_timed():
    config = dataclasses.replace(CONFIG, pages=2, row_buckets=(4,))
    profile = measure_profile(decoder(), config, replays=1)
    assert min(profile.round_s.values()) > 0


@pytest.mark.full
def test_a_round_moves_no_pages_and_compiles_nothing(caplog, monkeypatch):
    """Pages stay where they are when the number of slots changes; tables are small."""
    config = dataclasses.replace(CONFIG, paged=True, slot_buckets=(1, 4))
    with Engine(decoder(), config) as engine:
        engine.compile()
        assert texts(serve(engine, requests()[:1])) == expected()[:1]
        monkeypatch.setattr(engine._loop, "step", guarded(engine._loop.step))
        assert texts(serve(engine, requests())) == expected()
    of_jax = [record for record in caplog.records if record.name.startswith("jax")]
    assert not [record for record in of_jax if "ompil" in record.getMessage()]
