"""The server under hostile requests, and under many clients that come and go."""

import asyncio
import json
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
LIMITS = Settings(max_body_bytes=100_000, body_s=2.0, timeout_s=60.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def service(model):
    with made_service(model, LIMITS) as made:
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
            except httpx.TimeoutException:  # of _give_up: while it connects, sends or reads
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


@pytest.mark.parametrize(("clients", "seconds"), rest_full([(12, 2.0), (64, 600.0)], ((12, 2.0),)))
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


class Client:
    """Speaks ASGI itself, so that it can go away, or be slow, at any moment."""

    def __init__(self, service, fields, path=CHAT, body=None):
        self._service, self._path = service, path
        self._incoming, self.sent = asyncio.Queue(), []
        self.news = asyncio.Event()
        if body is None:
            body = json.dumps(fields).encode()
        self.give({"type": "http.request", "body": body, "more_body": fields is None})

    def give(self, message):
        self._incoming.put_nowait(message)

    def go_away(self):
        self.give({"type": "http.disconnect"})

    async def _send(self, message):
        self.sent.append(message)
        self.news.set()

    async def run(self):
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": self._path,
            "raw_path": self._path.encode(),
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        await self._service.app(scope, self._incoming.get, self._send)

    @property
    def status(self):
        return self.sent[0]["status"]

    @property
    def text(self):
        return b"".join(one.get("body", b"") for one in self.sent[1:]).decode()


# Greedy, since its text has no end: a sampled one may be over at once.
LONG = {"messages": SAY, "max_tokens": 200, "temperature": 0}


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("streams", [True, False])
def test_who_goes_away_frees_the_slots(service, streams):
    async def scenario():
        engine = service.served.engine
        await service._warm_up()
        clients = [Client(service, LONG | {"stream": streams, "n": 2}) for _ in range(3)]
        tasks = [asyncio.ensure_future(client.run()) for client in clients]
        await until(lambda: engine.stats().running + engine.stats().waiting == 6)
        tokens = engine._loop.tally.tokens
        for client in clients[:2]:
            client.go_away()
        tasks[2].cancel()  # the server itself may give up, too
        await until(lambda: not service.running)
        await until(lambda: engine.stats().running == engine.stats().waiting == 0)
        # Two rounds are in flight, of four slots with four tokens at most each.
        assert engine._loop.tally.tokens - tokens <= 3 * 16
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(scenario())


def test_a_full_queue_and_time_that_is_up_are_told(model):
    settings = Settings(timeout_s=1.0, body_s=0.5)
    with made_service(model, settings, slots=1, slot_buckets=(1,), queue=1) as service:

        async def scenario():
            engine = service.served.engine
            await service._warm_up()
            with pytest.MonkeyPatch.context() as patch:
                read = engine._loop._read_oldest
                patch.setattr(engine._loop, "_read_oldest", lambda: (time.sleep(0.05), read()))
                first = Client(service, LONG)
                second = Client(service, LONG | {"stream": True})
                tasks = [asyncio.ensure_future(first.run())]
                await until(lambda: engine.stats().running == 1)
                tasks.append(asyncio.ensure_future(second.run()))
                await until(lambda: engine.stats().waiting == 1)
                third = Client(service, LONG)
                await third.run()
                assert third.status == 429
                assert (b"retry-after", b"1") in third.sent[0]["headers"]
                await asyncio.gather(*tasks)
            assert first.status == 504
            assert json.loads(first.text)["error"]["code"] == "timeout"
            assert second.status == 200
            *_, told, done = second.text.strip().split("\n\n")
            assert json.loads(told.removeprefix("data: "))["error"]["code"] == "timeout"
            assert done == "data: [DONE]"
            slow = Client(service, None, body=b"{")
            await slow.run()
            assert slow.status == 408
            await until(lambda: not service.running)
            again = Client(service, GREEDY)
            await again.run()
            assert again.status == 200

        asyncio.run(scenario())


def test_a_server_that_stops_lets_answers_end(model):
    with (
        made_service(model) as service,
        listening(service) as address,
        httpx.Client(base_url=address, timeout=20) as client,
    ):
        assert client.post(CHAT, json=GREEDY).status_code == 200
        with client.stream("POST", CHAT, json=LONG | {"stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            service.draining = True
            refused = httpx.post(f"{address}{CHAT}", json={"messages": SAY})
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
            assert httpx.get(f"{address}/ready").status_code == 503
            assert httpx.get(f"{address}/health").status_code == 200
            assert [*lines][-2] == "data: [DONE]"
