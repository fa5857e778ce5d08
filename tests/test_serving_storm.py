"""The server under hostile requests, and under many clients that come and go."""

import asyncio
import random
import resource
import socket
import time
from collections import Counter
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from dspark_jax.serving.app import Settings
from dspark_jax.serving.openapi import document
from tests.marks import rest_full
from tests.small_server import NAME, SAY, listening, load_tiny, made_service

CHAT, TEXT, TOKENS = "/v1/chat/completions", "/v1/completions", "/tokenize"
GREEDY = {"messages": SAY, "max_tokens": 16, "temperature": 0}
MODES = schemathesis.GenerationMode
LIMITS = Settings(max_body_bytes=100_000, body_s=0.5, timeout_s=30.0)


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with made_service(load_tiny(tmp_path_factory.mktemp("model")), LIMITS) as made:
        yield made


@pytest.fixture(scope="module")
def address(service):
    with listening(service) as address:
        yield address


@pytest.fixture
def said(address):
    """What a quiet client hears, before and after whatever else happens."""

    def text():
        answer = httpx.post(f"{address}{CHAT}", json=GREEDY, timeout=60)
        return answer.json()["choices"][0]["message"]["content"]

    before = text()
    yield before
    assert text() == before


@pytest.mark.parametrize("examples", rest_full([25, 500], (25,)))
@pytest.mark.parametrize("path", [CHAT, TEXT, TOKENS])
@pytest.mark.parametrize("mode", [MODES.POSITIVE, MODES.NEGATIVE])
def test_hostile_bodies_are_errors_of_their_senders(service, address, said, mode, path, examples):
    operation = schemathesis.openapi.from_dict(document(NAME))[path]["POST"]

    @settings(
        max_examples=examples if mode == MODES.NEGATIVE else examples // 2,
        database=None,
        deadline=None,
        derandomize=True,
        suppress_health_check=[*HealthCheck],
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case):
        answer = case.call(base_url=address, timeout=60)
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
        if answer.status_code != 200:
            error = answer.json()["error"]
            assert {"message", "type", "param", "code"} == set(error)

    send()
    assert not service.running


def send_raw(address, *pieces, wait_s=0.0):
    """Bytes as they are, and what comes back until the server closes or is silent."""
    place = urlsplit(address)
    with socket.create_connection((place.hostname, place.port), timeout=5) as connection:
        answer = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(wait_s)
            while piece := connection.recv(65536):
                answer += piece
        except (TimeoutError, ConnectionError):
            pass
    return answer


HEAD = b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("pieces", "status"),
    [
        ((HEAD + b"Content-Length: 100\r\n\r\n", b"{"), b"408"),
        ((HEAD + b"Content-Length: 200000\r\n\r\n" + b" " * 1000,), b"413"),
        ((HEAD + b"Content-Length: 99999999999999999999999999\r\n\r\n",), b"400"),
        ((HEAD + b"Content-Length: -5\r\n\r\n",), b"400"),
        ((HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",), b"400"),
        ((HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"4000\r\n" + b" " * 0x4000 + b"\r\n",)
         + (b"4000\r\n" + b" " * 0x4000 + b"\r\n",) * 6, b"413"),
        ((b"\x16\x03\x01 hello \x00\r\n\r\n",), b"400"),
    ],
    ids=lambda value: repr(value[-1][:60]) if isinstance(value, tuple) else None,
)  # fmt: skip
def test_hostile_bytes_end_a_connection_alone(address, said, pieces, status):
    answer = send_raw(address, *pieces)
    assert answer.split(b" ", 2)[1] == status, answer


class Storm:
    """Clients of all kinds, each with one request after another.

    Attributes:
        told: how often each kind of request ended how.
        first_s: seconds to first tokens.
    """

    def __init__(self, client, end_s, seed):
        self._client, self._end_s, self._seed = client, end_s, seed
        self.told, self.first_s = Counter(), []

    async def run(self, clients):
        await asyncio.gather(*(self._one(random.Random(self._seed + i)) for i in range(clients)))

    async def _one(self, dice):
        kinds = [self._whole, self._stream, self._stream, self._drop, self._give_up, self._bad]
        while time.monotonic() < self._end_s:
            kind = dice.choice(kinds)
            try:
                outcome = await kind(dice)
            except httpx.ReadTimeout:
                outcome = "gave up"
            self.told[kind.__name__.strip("_"), outcome] += 1

    def _body(self, dice, **more):
        return {
            "messages": [{"role": "user", "content": "x" * dice.randrange(1, 60)}],
            "max_tokens": dice.randrange(1, 80),
            "temperature": dice.choice([0, 1, 2.0]),
            "priority": dice.randrange(3),
        } | more

    async def _whole(self, dice):
        body = self._body(dice, n=dice.choice([1, 1, 2]), logprobs=dice.random() < 0.3)
        answer = await self._client.post(CHAT, json=body, timeout=60)
        if answer.status_code == 200:
            assert all(one["finish_reason"] for one in answer.json()["choices"])
        return answer.status_code

    async def _stream(self, dice, most=10_000):
        began_s, lines = time.monotonic(), 0
        body = self._body(dice, stream=True)
        async with self._client.stream("POST", CHAT, json=body, timeout=60) as answer:
            last = ""
            async for line in answer.aiter_lines():
                if line:
                    lines, last = lines + 1, line
                if lines == 2 and answer.status_code == 200:
                    self.first_s.append(time.monotonic() - began_s)
                if lines == most:
                    return "dropped"
        if answer.status_code == 200:
            assert last == "data: [DONE]"
        return answer.status_code

    async def _drop(self, dice):
        return await self._stream(dice, most=dice.randrange(1, 4))

    async def _give_up(self, dice):
        body = self._body(dice, max_tokens=150)
        answer = await self._client.post(CHAT, json=body, timeout=dice.choice([0.01, 0.1]))
        return answer.status_code

    async def _bad(self, dice):
        body = self._body(dice, **dice.choice([{"n": 0}, {"colour": 1}, {"messages": 5}]))
        answer = await self._client.post(CHAT, json=body, timeout=60)
        assert answer.status_code == 400
        return answer.status_code


def most_memory():
    """Bytes that the process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(("clients", "seconds"), rest_full([(12, 2.0), (64, 180.0)], ((12, 2.0),)))
def test_no_slot_is_lost_under_load(service, address, said, record_property, clients, seconds):
    async def storm(seconds, seed):
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=address, limits=limits) as client:
            made = Storm(client, time.monotonic() + seconds, seed)
            await made.run(clients)
            return made

    asyncio.run(storm(seconds / 4, 0))
    before = most_memory()
    found = asyncio.run(storm(seconds, 1000))
    grown = most_memory() - before
    p99_s = float(np.quantile(found.first_s, 0.99))
    for name, value in (("told", found.told), ("p99_s", p99_s), ("grown", grown)):
        record_property(name, str(value))
    assert sum(found.told.values()) >= clients
    assert {kind for kind, _ in found.told} == {"whole", "stream", "drop", "give_up", "bad"}
    ends = {outcome for _, outcome in found.told}
    assert ends <= {200, 400, 429, "dropped", "gave up"}
    engine = service.served.engine
    end_s = time.monotonic() + 10
    while service.running or engine._loop.running or engine._loop.busy:
        assert time.monotonic() < end_s
        time.sleep(0.01)
    assert engine.stats().running == engine.stats().waiting == len(engine._loop._tenants) == 0
    assert grown < 64e6
