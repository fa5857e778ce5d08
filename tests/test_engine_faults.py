"""Faults stay with whom they belong to: whatever raises, wherever, everybody else's text is what it
would have been, and the engine goes on."""

import dataclasses
import functools
import itertools
import os
import random
import signal
import threading

import jax
import pytest

from dspark_jax.engine import launch, loop
from dspark_jax.engine.compiled import Programs
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.launch import Launcher
from dspark_jax.engine.loop import Loop
from dspark_jax.engine.prefix import Prefixes
from dspark_jax.engine.request import Request
from dspark_jax.engine.store import Store
from tests.marks import rest_full
from tests.test_engine import CONFIG, Letters, decoder, expected, requests, texts

CONFIG = dataclasses.replace(CONFIG, policy="delayed", slots=4, prefix_bytes=1 << 20)
# Whatever is called while a round is planned, launched and read.
STEPS = [
    *((Loop, name) for name in ("_join", "_seat", "_outlook", "_make_plan", "_launch")),
    *((Loop, name) for name in ("_read_oldest", "_next_round_is_needed")),
    *((loop, name) for name in ("plan_chunks", "plan_moves", "spread", "room", "temperatures_of")),
    (launch, "slot_values"),
    *((loop, name) for name in ("choose_rows", "advance", "record", "HostPlan", "InFlight")),
    *((Programs, name) for name in ("admit", "round", "round_input", "put", "form")),
    *((Launcher, name) for name in ("begin", "admit", "run")),
    *((Prefixes, name) for name in ("find", "keep")),
    *((Programs, name) for name in ("keep", "restore", "copies")),
    (Store, "take"),
    (jax, "device_get"),
]


class Fault(Exception):
    """What is raised on purpose."""


@functools.cache
def engine():
    """One for all tests: none of them may harm it."""
    return Engine(decoder(), CONFIG)


def failing(function, turns, kind=Fault):
    """The function, raising before or after it has done its work in these of its calls."""
    calls = itertools.count()

    def call(*args, **kwargs):
        number = next(calls)
        if number in turns and number % 2:
            raise kind(f"call {number}")
        result = function(*args, **kwargs)
        if number in turns:
            raise kind(f"call {number}")
        return result

    return call


def check(streams, most_errors):
    """All texts as they would have been, but for those that ended with the fault."""
    found = zip(streams, expected(), strict=True)
    errors = [stream.result for stream, _ in found if stream.result.finish_reason == "error"]
    assert len(errors) <= most_errors
    assert all(isinstance(result.error, Fault) for result in errors)
    for stream, text in zip(streams, expected(), strict=True):
        ids = stream.result.token_ids
        assert ids == (text[: len(ids)] if stream.result.error else text)
    assert not engine().stats().running


@pytest.mark.parametrize(("owner", "name"), STEPS, ids=[name for _, name in STEPS])
@pytest.mark.parametrize("turn", rest_full([0, 1, 7, 12], (1,)))
def test_a_step_that_raises_ends_one_request_at_most(monkeypatch, owner, name, turn):
    expected(), engine().submit(requests()[0]).wait()
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), {turn}))
    streams = [engine().submit(request) for request in requests()]
    engine().run()
    monkeypatch.undo()
    check(streams, most_errors=1)
    assert engine().submit(requests()[4]).wait().token_ids == expected()[4]


def test_a_request_that_cannot_be_admitted_fails_alone_and_says_why(monkeypatch):
    """Every time that it is tried, wherever it stands among the others."""
    values, bad = launch.slot_values, [1, 2, 3]

    def refuse(request, *args):
        if list(request.prompt_ids) == bad:
            raise Fault("not this one")
        return values(request, *args)

    monkeypatch.setattr(launch, "slot_values", refuse)
    mixed = requests()
    streams = [engine().submit(request) for request in mixed[:3]]
    guilty = engine().submit(Request(bad, 8))
    streams += [engine().submit(request) for request in mixed[3:]]
    engine().run()
    check(streams, most_errors=0)
    assert guilty.result.finish_reason == "error"
    assert str(guilty.result.error) == "not this one"
    (*_, last) = guilty
    assert last.finish_reason == "error"


@pytest.mark.parametrize(("owner", "name"), [(Programs, "round"), (Loop, "_make_plan")])
def test_rounds_that_never_work_end_all_requests_one_by_one(monkeypatch, owner, name):
    """Also where nobody ever gets a slot."""
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), range(10**6)))
    streams = [engine().submit(request) for request in requests()]
    engine().run()
    assert {stream.result.finish_reason for stream in streams} == {"error"}
    monkeypatch.undo()
    assert engine().submit(requests()[4]).wait().token_ids == expected()[4]


def test_a_state_that_is_gone_is_built_again():
    """As when a program dies that was given it to keep."""
    streams = [engine().submit(request) for request in requests()]
    for _ in range(4):
        engine().step()
    jax.tree.map(lambda leaf: leaf.delete(), engine()._loop.launcher.state)
    engine().run()
    check(streams, most_errors=0)


def test_a_tokenizer_that_raises_ends_its_request_alone():
    rare = expected()[3][5]

    class Fragile(Letters):
        def decode(self, ids, **_):
            if rare in ids:
                raise Fault("no such letter")
            return super().decode(ids)

    served = Engine(dataclasses.replace(decoder(), tokenizer=Fragile()), CONFIG)
    streams = [served.submit(request) for request in requests()]
    served.run()
    for stream, text in zip(streams, expected(), strict=True):
        assert (stream.result.finish_reason == "error") == (rare in text)
        if rare not in text:
            assert stream.result.token_ids == text
    assert streams[3].result.error is not None
    assert any(rare not in text for text in expected())


def test_an_interrupt_inside_a_round_reaches_whoever_waits_and_harms_nobody(monkeypatch):
    monkeypatch.setattr(loop, "HostPlan", failing(loop.HostPlan, {3, 4}, KeyboardInterrupt))
    streams = [engine().submit(request) for request in requests()]
    interrupts = 0
    while True:
        try:
            engine().run()
            break
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 2
    check(streams, most_errors=0)


# Python lets nobody see what is raised in the callback of a weak reference, and says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.full)])
def test_interrupts_at_random_times_change_no_text(count):
    """Ctrl-C while requests are made and streams are read, again and again; whoever was interrupted
    goes on with what comes next."""
    draw, served, over = random.Random(count), engine(), threading.Event()
    armed, seen, finished = False, 0, 0

    def interrupted(*_):
        nonlocal armed
        if armed:  # the test itself is not to be interrupted
            armed = False
            raise KeyboardInterrupt

    def send():
        while not over.wait(draw.random() * 0.02):
            os.kill(os.getpid(), signal.SIGINT)

    def patiently(work):
        nonlocal armed, seen
        while True:
            try:
                armed = True
                result = work()
                armed = False
                return result
            except KeyboardInterrupt:
                seen += 1

    before, thread = signal.signal(signal.SIGINT, interrupted), threading.Thread(target=send)
    thread.start()
    try:
        while seen < count:
            streams = [patiently(lambda one=one: served.submit(one)) for one in requests()]
            for stream in streams:
                patiently(stream.wait)
            assert texts(stream.result for stream in streams) == expected()
            finished += len(streams)
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert finished
    assert served.submit(requests()[4]).wait().token_ids == expected()[4]
