"""The engine end to end on tiny models: requests arrive and leave, their texts are their own."""

import asyncio
import dataclasses
import functools
import itertools
import queue
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dspark_jax.axes import make_mesh
from dspark_jax.checkpoints.deepspec import bind_vocab
from dspark_jax.engine import executables, loop
from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.generate import generate
from dspark_jax.engine.inputs import Weights
from dspark_jax.engine.memory import plan_slots
from dspark_jax.engine.request import Request
from dspark_jax.engine.setting import setting_of
from dspark_jax.models.drafters.dspark import declare_drafter
from dspark_jax.models.targets.llama import declare as declare_target
from dspark_jax.models.targets.llama import encode
from dspark_jax.models.vocab import unembed
from dspark_jax.scheduler import temperatures
from dspark_jax.scheduler.budget import DraftSwitch
from dspark_jax.scheduler.profile import make_profile
from dspark_jax.scheduler.seconds import Seconds
from dspark_jax.scheduler.shape import Shape, Sizes
from pallas_kernels import random
from tests import test_generate
from tests.tiny_model import DRAFTER, TARGET, random_params

CONFIG = EngineConfig(
    policy="block",
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
    made = Engine(models, dataclasses.replace(CONFIG, **changes), profile)
    if smooth is not None:  # what rounds really take is not to replace it
        made._loop.seconds.read = lambda *_: None
    return made


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
    return texts(generate(decoder(), requests(**fields), acceptance=acceptance, policy="none"))


def costs(smooth):
    """Seconds of the rounds of CONFIG, as if larger ones were hardly dearer, or much."""
    sizes = Sizes(4, 64)
    seconds = {
        Shape(sizes, num_draft, rows, chunks): 1 + chunks + num_draft / 10 + rows / smooth
        for chunks in (0, 2)
        for num_draft, rows in ((0, 4), (3, 8), (3, 16))
    }
    return make_profile(setting_of(decoder(), CONFIG), seconds, {sizes: 0.3})


@pytest.mark.parametrize(
    ("policy", "smooth"),
    [
        ("block", None),
        ("delayed", 100),
        ("delayed", 8),
        ("delayed", None),
        pytest.param("causal", 8, marks=pytest.mark.full),
        pytest.param("causal", 100, marks=pytest.mark.full),
        pytest.param("threshold:0.4", None, marks=pytest.mark.full),
        pytest.param("gate:0.5", None, marks=pytest.mark.full),
        pytest.param("fixed:1", None, marks=pytest.mark.full),
        pytest.param("none", None, marks=pytest.mark.full),
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


def test_ids_that_the_target_does_not_have_are_refused_alone():
    served = engine()
    stream = served.submit(requests()[3])
    for fields in ({"prompt_ids": [1, TARGET.vocab_size]}, {"stop_ids": (2**31 - 1,)}):
        with pytest.raises(ValueError, match="use the target's own tokenizer"):
            served.submit(dataclasses.replace(requests()[0], **fields))
    assert stream.wait().token_ids == expected()[3]


@pytest.mark.parametrize(("drafted_s", "drafts"), [(1.1, True), (9.0, False)])
def test_an_engine_learns_whether_drafts_pay(monkeypatch, drafted_s, drafts):
    """It starts without a compilation, tries drafts, and keeps to what it saw that they cost."""
    read = Seconds.read

    def read_by_an_abacus(self, number, shape, steady, now_s):
        took_s = drafted_s if shape.num_draft else 1.0
        read(self, number, shape, True, self._last_s + took_s)

    monkeypatch.setattr(Seconds, "read", read_by_an_abacus)
    served = Engine(decoder(), dataclasses.replace(CONFIG, policy="delayed"))
    assert not served._programs._known
    streams = [served.submit(request) for request in requests()]
    served.run()
    assert texts(stream.result for stream in streams) == expected()
    verified = [n for stream in streams for n in stream.result.verified_lengths]
    assert any(verified)
    streams = [served.submit(request) for request in requests()]
    served.run()
    verified = np.array([n for stream in streams for n in stream.result.verified_lengths])
    assert (np.mean(verified > 0) > 0.5) == drafts


def test_what_one_text_taught_about_drafts_decides_nothing_about_the_next(monkeypatch):
    switches, choose = [], loop.choose_rows
    monkeypatch.setattr(
        loop,
        "choose_rows",
        lambda policy, *about: switches.append(about[0]) or choose(policy, *about),
    )
    served = engine(smooth=100, policy="delayed")
    for count in (3, 5):
        switches.clear()
        streams = [served.submit(request) for request in requests(count)]
        served.run()
        assert all(stream.result.finish_reason for stream in streams)
        assert switches[0] == DraftSwitch()
        assert all(switch.seen for switch in switches[4:])  # who joins others changes nothing


@pytest.mark.full
def test_bfloat16_is_served():
    """Its text depends on the sizes of rounds; that of one request in one engine does not."""
    (_, target), (_, drafter, _) = models()
    target, drafter = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (target, drafter))
    vocab = bind_vocab(DRAFTER, None, TARGET, target.vocab)
    half = make_decoder((TARGET, target), (DRAFTER, drafter, vocab), tokenizer=Letters())
    served = Engine(half, CONFIG)
    for _ in range(2):
        streams = [served.submit(request) for request in requests(5)]
        served.run()
        results = [stream.result for stream in streams]
        assert [len(result.token_ids) for result in results] == [12, 11, 10, 12, 11]
        assert all(result.finish_reason == "length" for result in results)
    alone = [served.submit(requests()[3]).wait() for _ in range(2)]
    assert alone[0].token_ids == alone[1].token_ids


def test_confidences_are_recalibrated_while_texts_stay_the_same(monkeypatch):
    monkeypatch.setattr(temperatures, "ENOUGH", 8.0)
    served = engine(policy="block", recalibrate=True)
    for _ in range(3):
        streams = [served.submit(request) for request in requests()]
        served.run()
        assert texts(stream.result for stream in streams) == expected()
    kinds = [((greedy, False), (1.0,) * DRAFTER.block_size) for greedy in (True, False)]
    for kind in kinds:
        assert served._loop._history.online[kind].weight_G[0] >= 8
        assert (served._loop._history.temperature_G(kind) != 1).any()


@pytest.mark.full
def test_greedy_text_under_rejection_is_that_of_offline_generation():
    served = engine(acceptance="rejection")
    streams = [served.submit(request) for request in requests(temperature=0.0)]
    served.run()
    assert texts(stream.result for stream in streams) == expected("rejection")
    drafted = sum(sum(stream.result.accepted_drafts) for stream in streams)
    assert drafted > 0


def guarded(step):
    def run():
        with jax.transfer_guard("disallow"), jax.log_compiles():
            step()

    return run


def test_rounds_move_nothing_but_what_they_say_and_compile_nothing(caplog, monkeypatch):
    """Reports, plans and new requests go between host and device explicitly; a mixed load finds
    every program ready."""
    served = engine()
    served.compile()
    ready = set(executables._PROGRAMS)
    mixed = requests(logprobs=True)
    # The engine has a thread of its own, which does not see the guards of this one.
    monkeypatch.setattr(served._loop, "step", guarded(served._loop.step))
    with jax.transfer_guard("disallow"):
        streams = [served.submit(request) for request in mixed]
        for _ in range(3):
            served.step()
        streams[4].cancel()
        served.run()
    assert all(stream.finished for stream in streams)
    assert set(executables._PROGRAMS) == ready
    of_jax = [record for record in caplog.records if record.name.startswith("jax")]
    assert not [record for record in of_jax if "ompil" in record.getMessage()]


def test_states_grow_and_shrink_with_the_load():
    served = engine(slot_buckets=(1, 4), position_buckets=(32, 64), policy="none", chunk_rows=32)
    short = [request for request in requests() if len(request.prompt_ids) < 10]
    own = {tuple(r.prompt_ids): text for r, text in zip(requests(), expected(), strict=True)}
    assert served.submit(short[0]).wait().token_ids == own[tuple(short[0].prompt_ids)]
    assert (served._loop._sizes.slots, served._loop._sizes.positions) == (1, 32)
    streams = [served.submit(request) for request in requests()]
    served.run()
    assert texts(stream.result for stream in streams) == expected()
    assert (served._loop._sizes.slots, served._loop._sizes.positions) == (4, 64)
    for _ in range(3):
        assert served.submit(short[1]).wait().token_ids == own[tuple(short[1].prompt_ids)]
    assert (served._loop._sizes.slots, served._loop._sizes.positions) == (1, 32)


def test_streams_give_the_text_piece_by_piece():
    served = engine()
    free = served.submit(requests()[6]).wait()
    stop = free.text[5:8]
    stream = served.submit(dataclasses.replace(requests()[6], stop_strings=(stop, "never")))
    events = list(stream)
    assert "".join(event.text for event in events) == free.text[: free.text.index(stop)]
    assert [event.finish_reason for event in events] == [""] * (len(events) - 1) + ["stop"]
    told = [token for event in events for token in event.token_ids]
    assert told == stream.result.token_ids == free.token_ids[: len(told)]
    assert stream.result.text == free.text[: free.text.index(stop)]
    assert len(events) > 1
    stop_id = free.token_ids[4]
    result = served.submit(dataclasses.replace(requests()[6], stop_ids=(stop_id,))).wait()
    assert result.token_ids == free.token_ids[: free.token_ids.index(stop_id)]
    assert result.finish_reason == "stop"


def test_asyncio_serves_many_at_once():
    served = engine()

    async def read(request):
        return [token async for event in served.submit(request) for token in event.token_ids]

    async def read_all():
        return await asyncio.gather(*map(read, requests()))

    assert asyncio.run(read_all()) == expected()


def test_threads_may_submit_and_read_at_once():
    served, results = engine(), {}

    def read(number, request):
        results[number] = served.submit(request).wait().token_ids

    threads = [threading.Thread(target=read, args=pair) for pair in enumerate(requests())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[number] for number in range(len(threads))] == expected()


def test_logprobs_are_those_of_the_target_before_filters():
    """Of raw logits, at temperature 1, whatever the request samples with."""
    request = dataclasses.replace(requests()[4], logprobs=True)
    result = engine().submit(request).wait()
    tokens = jnp.array([[*request.prompt_ids, *result.token_ids]])
    _, params = models()[0]
    hidden, _ = encode(params, tokens, TARGET)
    law = jax.nn.log_softmax(unembed(params.vocab, hidden)[0], axis=-1)
    places = len(request.prompt_ids) - 1 + np.arange(len(result.token_ids))
    expected = law[places, np.array(result.token_ids)]
    np.testing.assert_allclose(result.logprobs, expected, rtol=0, atol=2e-5)
    assert engine().submit(requests()[4]).wait().logprobs == []


def test_higher_priorities_come_first():
    served = engine()
    kinds = [served.submit(request, priority=rank) for rank, request in enumerate(requests(8))]
    order = []
    while served.step():
        order += [n for n, stream in enumerate(kinds) if stream.finished and n not in order]
    assert sorted(order[:4]) == [4, 5, 6, 7]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
def test_cancellation_at_every_stage(steps):
    """Queued, while its prompt is read, while it decodes, and once it is over."""
    served = engine()
    streams = [served.submit(request) for request in requests()]
    for _ in range(steps):
        served.step()
    gone = [0, 2, 9]
    for number in gone:
        streams[number].cancel()
    served.run()
    streams[1].cancel()
    for number, stream in enumerate(streams):
        text = stream.result.token_ids
        assert text == expected()[number][: len(text)]
        cancelled = stream.result.finish_reason == "cancelled"
        assert cancelled or len(text) == len(expected()[number])
        assert not cancelled or number in gone
        assert [token for event in stream for token in event.token_ids] == text
    assert not served.stats().running


def test_a_client_that_stops_reading_holds_nobody_up():
    served = engine()
    silent = served.submit(requests()[0])
    next(silent)
    assert texts([served.submit(request).wait() for request in requests()]) == expected()
    assert silent.result.token_ids == expected()[0]


def test_what_cannot_be_served_is_refused():
    served = engine()
    refusals = {
        "together more than the engine's 60 positions": {"max_new_tokens": 58},
        "9 stop ids and the engine takes 8": {"stop_ids": tuple(range(9))},
        "max_new_tokens is 0": {"max_new_tokens": 0},
        "prompt is empty": {"prompt_ids": []},
    }
    for message, fields in refusals.items():
        with pytest.raises(ValueError, match=message):
            served.submit(dataclasses.replace(Request([1, 2, 3], 4), **fields))


def test_a_thousand_requests_into_a_queue_of_a_hundred():
    served = engine()
    many = requests(1000, max_new_tokens=3)
    streams = [served.submit(request) for request in many[:100]]
    for request in many[100:]:
        with pytest.raises(queue.Full, match="100 requests wait already"):
            served.submit(request)
    served.run()
    assert all(stream.result.finish_reason == "length" for stream in streams)
    assert texts([served.submit(requests()[0]).wait()]) == expected()[:1]


@pytest.mark.parametrize("place", [0, 1, 3])
def test_logits_that_are_not_finite_end_their_request_alone(place):
    """Wherever the poisoned token stands; the next requests of the slot are as always."""
    served = engine(poisoned=True)
    prompt = [5, 6, 7, 8]
    prompt[place] = POISON
    bad = served.submit(Request(prompt, 8, **SAMPLED))
    streams = [served.submit(request) for request in requests()]
    served.run()
    assert bad.result.finish_reason == "error"
    assert bad.result.token_ids == []
    assert texts(stream.result for stream in streams) == expected()


def test_weights_may_change_without_another_compilation():
    served, other = Engine(decoder(), CONFIG), decoder(seed=30)
    new = texts(generate(other, requests(), acceptance="coupled", policy="none"))
    assert new != expected()
    served.submit(requests()[4]).wait()
    ready = set(executables._PROGRAMS)
    served.update_params(other.weights)
    streams = [served.submit(request) for request in requests()]
    served.run()
    assert texts(stream.result for stream in streams) == new
    assert set(executables._PROGRAMS) == ready
    norm_D = jnp.ones(TARGET.hidden_size + 1)
    target = dataclasses.replace(other.weights.target, norm_D=norm_D)
    with pytest.raises(ValueError, match=r"float32\[17\] in the place of float32\[16\]"):
        served.update_params(dataclasses.replace(other.weights, target=target))
    with pytest.raises(ValueError, match="another structure"):
        served.update_params(Weights(other.weights.target))


def test_closing_cancels_everything():
    with Engine(decoder(), CONFIG) as served:
        streams = [served.submit(request) for request in requests()]
        served.step()
    assert {stream.result.finish_reason for stream in streams} == {"cancelled"}
    with pytest.raises(ValueError, match="the engine is closed"):
        served.submit(requests()[0])


def test_clients_that_go_away_free_their_slots():
    """A stream that is dropped, a task that is cancelled, a wait that is too long: neighbours and
    those who wait for a slot see nothing of it."""
    served, long = engine(), Request([1, 2, 3], 40)
    stays = served.submit(requests()[3])
    dropped = served.submit(long)
    served.step()
    left = dropped.result
    del dropped

    async def client():
        stream = served.submit(long)
        result.append(stream.result)
        async for _ in stream:
            pass

    async def cancelled_client():
        task = asyncio.create_task(client())
        while not result or not result[0].token_ids:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    result = []
    asyncio.run(cancelled_client())
    late = served.submit(long)
    with pytest.raises(TimeoutError, match="is not over after"):
        late.wait(timeout_s=0.0)
    assert late.result.finish_reason == "cancelled"
    assert stays.wait().token_ids == expected()[3]
    assert {left.finish_reason, result[0].finish_reason} == {"cancelled"}
    assert max(len(left.token_ids), len(result[0].token_ids)) < 30
    assert not served.stats().running


def test_memory_is_planned_before_anything_is_allocated():
    small = dataclasses.replace(CONFIG, slot_buckets=(), memory_bytes=3_000_000)
    slots = plan_slots(decoder(), small)
    assert slots > 4
    Engine(decoder(), dataclasses.replace(small, slots=slots))
    with pytest.raises(ValueError, match=f"memory_bytes is 3000000: {slots} slots would fit"):
        Engine(decoder(), dataclasses.replace(small, slots=slots + 1))
    with pytest.raises(ValueError, match="give fewer positions, or more memory"):
        Engine(decoder(), dataclasses.replace(small, memory_bytes=1000))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "fixed:9"}, r"must lie in 1..3"),
        ({"policy": "clever"}, "choose none, block"),
        ({"positions": 600, "position_buckets": ()}, "the target's context ends at 512"),
        ({"slots": 0}, "slots is 0"),
        ({"slot_buckets": (1, 2)}, "the last must be 4"),
        ({"position_buckets": (32,)}, "the last must hold positions and a block, 64"),
        ({"chunk_buckets": (2, 1)}, "give positive sizes that increase"),
        ({"acceptance": "maybe"}, "choose 'rejection' or 'coupled'"),
        ({"kernels": "cuda"}, "xla, mosaic_gpu"),
        ({"kernels": "mosaic_gpu"}, "kernels is 'mosaic_gpu': mosaic_gpu needs"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Engine(decoder(), dataclasses.replace(CONFIG, **changes))


@pytest.mark.full
@pytest.mark.parametrize(
    ("sizes", "policy"), [((8, 1), "delayed"), ((4, 2), "block"), ((2, 2), "causal")]
)
@pytest.mark.parametrize("acceptance", ["coupled", "rejection"])
def test_eight_devices_give_the_text_of_one(sizes, policy, acceptance, emulated_devices):
    config = dataclasses.replace(
        CONFIG, slots=8, slot_buckets=(8 // sizes[0],), policy=policy, acceptance=acceptance
    )
    shape = Sizes(8 // sizes[0], 64)
    seconds = {
        Shape(shape, num_draft, shape.slots * rows, chunks): 1 + num_draft / 10 + rows / 20
        for chunks in (0, 2)
        for num_draft, rows in ((0, 1), (3, 2), (3, 4))
    }
    sharded = make_decoder(*models(), tokenizer=Letters(), mesh=make_mesh(*sizes))
    profile = make_profile(setting_of(sharded, config), seconds, {shape: 0.1})
    served = Engine(sharded, config, profile)
    fields = {"temperature": 0.0} if acceptance == "rejection" else {}
    streams = [served.submit(request) for request in requests(**fields)]
    served.run()
    assert texts(stream.result for stream in streams) == expected(acceptance)


@pytest.mark.full
@pytest.mark.parametrize("policy", ["delayed", "causal"])
def test_distribution_of_the_text_where_drafts_compete(policy):
    """The joint law of three tokens, enumerated; 64 requests have rows for half of their drafts."""
    size, length, slots = 5, 3, 64
    cfg = dataclasses.replace(test_generate.TARGET, vocab_size=size)
    target = test_generate.target_of(cfg, seed=4, scale=30.0)
    drafter = test_generate.drafter_of(
        target, seed=2, vocab_size=size, mask_token_id=4, block_size=2
    )
    words = np.array(list(itertools.product(range(size), repeat=length)))
    tokens = jnp.concatenate([jnp.full((len(words), 2), 1), jnp.array(words)], axis=1)
    hidden, _ = encode(target[1], tokens, cfg)
    law = jax.nn.log_softmax(unembed(target[1].vocab, hidden)[:, 1:-1] / 0.9, axis=-1)
    exact = np.exp(np.take_along_axis(law, words[..., None], axis=-1)[..., 0].sum(-1), dtype=float)

    config = EngineConfig(
        slots=slots,
        positions=32,
        queue=4096,
        policy=policy,
        chunk_rows=1,
        chunk_buckets=(slots,),
        slot_buckets=(slots,),
        row_buckets=(2,),
    )
    served = make_decoder(target, drafter)
    sizes = Sizes(slots, 64)
    seconds = {  # a staircase: half of the drafts cost nothing, the rest more than they bring
        Shape(sizes, num_draft, slots * rows, chunks): 1 + (rows > 2)
        for chunks in (0, slots)
        for num_draft, rows in ((0, 1), (2, 2), (2, 3))
    }
    profile = make_profile(setting_of(served, config), seconds, {sizes: 0.1})
    engine = Engine(served, config, profile)
    count = 4000
    keys = np.asarray(random.fold_in(random.seed_key(9), jnp.arange(count)))
    limits = Request([1, 1], length + 3, temperature=0.9)  # later tokens keep the rounds full
    streams = [engine.submit(dataclasses.replace(limits, key=key)) for key in keys]
    engine.run()
    texts = np.array([stream.result.token_ids[:length] for stream in streams])
    seen = np.bincount(np.ravel_multi_index(texts.T, (size,) * length), minlength=len(words))
    often = exact * count >= 5
    observed = np.array([*seen[often], seen[~often].sum()])
    wanted = np.array([*exact[often], exact[~often].sum()])
    assert stats.chisquare(observed, wanted / wanted.sum() * count).pvalue > 1e-4
    lengths = [n for stream in streams for n in stream.result.verified_lengths]
    assert set(lengths) == {0, 1, 2}


@pytest.mark.full
def test_two_thousand_requests_with_random_arrivals():
    """No slot is lost, no text is another's, and memory stays what it was."""
    served = engine(slot_buckets=(1, 4))
    served.compile()
    rng = np.random.default_rng(0)
    own = {tuple(r.prompt_ids): text for r, text in zip(requests(), expected(), strict=True)}
    waiting = [requests()[i] for i in rng.integers(0, 10, 2000)]
    streams, arrays = [], None
    while waiting or served.step():
        for _ in range(min(rng.poisson(0.4), len(waiting), 100 - len(served._queue))):
            streams.append((served.submit(waiting[-1]), own[tuple(waiting.pop().prompt_ids)]))
        served.step()
        if rng.random() < 0.02 and streams:
            streams[-1][0].cancel()
        if len(streams) == 200 and arrays is None:
            arrays = len(jax.live_arrays())
    cancelled = 0
    for stream, text in streams:
        result = stream.result
        cancelled += result.finish_reason == "cancelled"
        assert result.finish_reason in ("cancelled", "length")
        assert result.token_ids == text[: len(result.token_ids)]
        assert result.finish_reason == "cancelled" or result.token_ids == text
    assert len(streams) == 2000
    assert cancelled < 200
    assert not served.stats().running
    assert not served._queue
    assert len(jax.live_arrays()) <= arrays + 50
