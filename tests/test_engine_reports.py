"""What an engine and its results say of themselves: seeds, traces, statistics."""

import time

import numpy as np
import pytest

import dspark_jax
from dspark_jax import Engine, EngineConfig, Request
from dspark_jax.evaluation.results import accept_rates, mean_accepted_length
from tests.tiny_model import BLOCK, write_drafter, write_target

CONFIG = EngineConfig(
    slots=2,
    positions=60,
    policy="block",
    chunk_rows=16,
    chunk_buckets=(1,),
    slot_buckets=(2,),
    row_buckets=(BLOCK + 1,),
    position_buckets=(64,),
)
SAMPLED = {"max_new_tokens": 20, "temperature": 2.0}
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspark_jax.model.use_compilation_cache", lambda: None)
        return dspark_jax.load(write_target(folder / "target"), write_drafter(folder / "drafter"))


@pytest.fixture
def engine(model):
    """Its programs are compiled once, whoever asks."""
    with Engine(model, CONFIG) as made:
        yield made


def test_a_prompt_may_be_a_text_a_conversation_or_ids(model, engine):
    forms = {"prompt": "hello"}, {"messages": CHAT}, {"prompt_ids": model.decoder.encode("hello")}
    requests = [Request(**form, max_new_tokens=8) for form in forms]
    results = [engine.submit(request).wait() for request in requests]
    assert len({result.text for result in results}) == 1
    assert {result.prompt_tokens for result in results} == {len("hello > ")}


def test_a_seed_repeats_a_text(engine):
    requests = [Request(prompt="hello", **SAMPLED) for _ in range(3)]
    results = [engine.submit(request).wait() for request in requests]
    assert len({result.seed for result in results}) == 3
    assert len({result.text for result in results}) == 3
    for result in results:
        again = engine.submit(Request(prompt="hello", seed=result.seed, **SAMPLED)).wait()
        assert (again.text, again.seed) == (result.text, result.seed)
    largest = Request(prompt="hello", seed=2**64 - 1, max_new_tokens=1)
    assert engine.submit(largest).wait().seed == 2**64 - 1


def test_a_trace_has_every_round(engine):
    stop = engine.submit(Request(prompt="hello", seed=1, **SAMPLED)).wait().token_ids[9]
    fields = {}, {"stop_ids": (stop,)}, {"temperature": 0.0}
    asked = [Request(prompt="hello", seed=1, trace=True, **SAMPLED | own) for own in fields]
    streams = [engine.submit(request) for request in asked]
    for result in (stream.wait() for stream in streams):
        first, *rounds = result.trace
        assert first.draft_G is first.confidence_G is None
        assert (first.verified, first.accepted, len(first.token_ids)) == (0, 0, 1)
        assert [len(one.token_ids) for one in rounds] == result.accepted_lengths
        assert [one.verified for one in rounds] == result.verified_lengths
        assert [one.accepted for one in rounds] == result.accepted_drafts
        told = [token for one in result.trace for token in one.token_ids]
        assert told[: len(result.token_ids)] == result.token_ids
        assert (told[len(result.token_ids) :][:1] == [stop]) == (result.finish_reason == "stop")
        for one, logit_G in zip(rounds, result.confidence_logits, strict=True):
            assert one.draft_G.shape == one.confidence_G.shape == (BLOCK,)
            assert one.draft_G.dtype == np.int32
            np.testing.assert_array_equal(one.confidence_G, logit_G)
            kept = min(one.accepted, len(one.token_ids))
            assert one.token_ids[:kept] == tuple(one.draft_G[:kept].tolist())
            assert one.accepted <= one.verified <= BLOCK
            assert one.num_rows == CONFIG.slots * (BLOCK + 1)
        assert all(one.seconds > 0 for one in result.trace)
        assert sum(one.seconds for one in rounds) <= result.seconds
    assert {stream.result.finish_reason for stream in streams} == {"length", "stop"}


def test_nothing_is_traced_unless_it_is_asked_for(engine):
    assert engine.submit(Request(prompt="hello", **SAMPLED)).wait().trace == []


def test_statistics_are_those_of_the_results(engine):
    idle = engine.stats()
    assert (idle.running, idle.waiting, idle.tokens_per_s, idle.accepted_length) == (0, 0, 0, 0)
    assert idle.accept_rate_by_position == ()
    streams = [engine.submit(Request(prompt="hello", seed=i, **SAMPLED)) for i in range(5)]
    assert (engine.stats().running, engine.stats().waiting) == (0, 5)
    engine.step()
    assert (engine.stats().running, engine.stats().waiting) == (2, 3)
    streams[-1].cancel()
    assert (engine.stats().running, engine.stats().waiting) == (2, 2)
    engine.run()
    results, found = [stream.result for stream in streams], engine.stats()
    assert (found.running, found.waiting) == (0, 0)
    assert found.tokens_per_s > 0
    assert found.accepted_length == mean_accepted_length(results)
    assert list(found.accept_rate_by_position) == accept_rates(results, BLOCK)


def test_a_started_engine_works_by_itself(engine):
    expected = engine.submit(Request(prompt="hello", max_new_tokens=20)).wait().text
    early = engine.submit(Request(prompt="hello", max_new_tokens=20))
    assert engine.start() is engine
    late = engine.submit(Request(prompt="hello", max_new_tokens=20))
    deadline = time.monotonic() + 60
    while not (early.finished and late.finished) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert early.result.text == late.result.text == expected
    assert list(early)[-1].finish_reason == "length"
    assert "".join(event.text for event in late) == expected
