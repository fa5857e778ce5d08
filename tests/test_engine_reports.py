"""What an engine and its results say of themselves: seeds, traces, statistics, metrics."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

import dspark_jax
from dspark_jax import Engine, EngineConfig, Request
from dspark_jax.engine import loop
from dspark_jax.evaluation.results import accept_rates, mean_accepted_length
from dspark_jax.serving.metrics import Metrics
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
NAME = "tiny"
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


def read(metrics):
    """Every sample but those of when something began: {(name, labels): value}."""
    found = [
        (sample.name, dict(sample.labels), sample.value)
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
        if not sample.name.endswith("_created")
    ]
    assert {labels.pop("model_name") for _, labels, _ in found} == {NAME}
    return {(name, *labels.values()): value for name, labels, value in found}


def test_metrics_are_those_of_the_generations(engine):
    metrics = Metrics(engine, NAME)
    Metrics(engine, NAME)  # a registry of its own: no name is taken twice
    empty = read(metrics)
    assert math.isnan(empty.pop(("dspark:confidence_calibration_error",)))
    assert set(empty.values()) == {0}
    asked = [Request(prompt="hi", max_new_tokens=20, temperature=2.0, seed=i) for i in range(5)]
    streams = [engine.submit(request) for request in asked]
    for _ in streams:
        metrics.queued()
    assert read(metrics)["vllm:num_requests_waiting",] == 5
    engine.step()
    streams[-1].cancel()
    assert read(metrics)["vllm:num_requests_running",] == 2
    engine.run()
    results = [stream.result for stream in streams]
    for result in results:
        metrics.finished(result)
    found, stats = read(metrics), engine.stats()
    rounds = sum(result.rounds for result in results)
    accepted = [drafts for result in results for drafts in result.accepted_drafts]
    verified = sum(sum(result.verified_lengths) for result in results)
    per_position = [
        found["vllm:spec_decode_num_accepted_tokens_per_pos_total", str(place)]
        for place in range(BLOCK)
    ]
    assert per_position == [sum(drafts > place for drafts in accepted) for place in range(BLOCK)]
    assert found["vllm:spec_decode_num_accepted_tokens_total",] == sum(accepted) > 0
    assert found["vllm:spec_decode_num_draft_tokens_total",] == verified
    assert found["vllm:spec_decode_num_drafts_total",] == found["dspark:rounds_total",] == rounds
    assert found["dspark:verification_length",] == verified / rounds == BLOCK
    assert found["dspark:undrafted_share",] == 0
    assert found["dspark:accepted_length",] == stats.accepted_length
    committed = sum(sum(result.accepted_lengths) for result in results)
    started = sum(bool(result.token_ids) for result in results)  # the first comes with the prompt
    assert found["vllm:generation_tokens_total",] == committed + started
    assert found["vllm:prompt_tokens_total",] == sum(result.prompt_tokens for result in results)
    ended = {word: found["vllm:request_success_total", word] for word in ("length", "abort")}
    assert ended == {"length": 4, "abort": 1}
    assert found["dspark:requests_total",] == 5
    assert found["vllm:prefix_cache_queries_total",] == 0
    survival = [
        (share, drafts > place)
        for result in results
        for logit_G, drafts in zip(result.confidence_logits, result.accepted_drafts, strict=True)
        for place, share in enumerate(np.cumprod(1 / (1 + np.exp(-np.float64(logit_G)))))
    ]
    gap = np.zeros(20)
    for share, kept in survival:
        gap[min(int(share * 20), 19)] += share - kept
    expected = abs(gap).sum() / len(survival)
    assert found["dspark:confidence_calibration_error",] == pytest.approx(expected, rel=1e-6)


def test_metrics_have_the_seconds_that_they_are_told(engine):
    metrics = Metrics(engine, NAME)
    metrics.first_token(0.03)
    metrics.token(0.002)
    metrics.token(3.0)
    found = read(metrics)
    assert found["vllm:time_to_first_token_seconds_count",] == 1
    assert found["vllm:time_to_first_token_seconds_bucket", "0.02"] == 0
    assert found["vllm:time_to_first_token_seconds_bucket", "0.04"] == 1
    assert found["vllm:inter_token_latency_seconds_sum",] == 3.002
    assert found["vllm:inter_token_latency_seconds_bucket", "0.0025"] == 1


@pytest.mark.full
def test_an_engine_that_weighs_seconds_says_what_it_predicted(model, monkeypatch):
    monkeypatch.setattr(loop, "SHORTEST_WAIT_S", -1.0)  # every round counts, however short
    with Engine(model, replace(CONFIG, policy="delayed")) as engine:
        engine.submit(Request(prompt="hi", max_new_tokens=40)).wait()
        found = engine.stats()
    assert 0 < found.taken_s < 60
    assert 0 < found.predicted_s < 60
