"""Several engines under Ray Serve: where requests go, and what becomes of those of a replica that
dies."""

import asyncio
import json
import threading
import time

import httpx
import pytest
from starlette.requests import Request as StarletteRequest

from dspark_jax.cli import command as cli
from tests.served_process import CHAT, SAY, free_port

ray = pytest.importorskip("ray")
ray_app = pytest.importorskip("dspark_jax.serving.ray_app")
# Ray starts its processes by forking this one; they do nothing with jax.
pytestmark = pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")


def test_pages_stay_with_their_replicas():
    """Each replica has its share, and one that goes changes nothing for the others."""
    ids = ["a", "b", "c"]
    pages = [bytes([n, n + 1]) for n in range(200)]
    firsts = [ids[ray_app.ranked(page, ids)[0]] for page in pages]
    assert all(firsts.count(one) > 40 for one in ids)
    assert firsts == [ids[ray_app.ranked(page, ids)[0]] for page in pages]
    left = ["c", "a"]
    now = [left[ray_app.ranked(page, left)[0]] for page in pages]
    assert all(new == old for new, old in zip(now, firsts, strict=True) if old != "b")


def test_pages_are_what_conversations_begin_with():
    def page(*turns, **more):
        return ray_app.first_page(json.dumps({"messages": [*turns], **more}).encode())

    long = {"role": "system", "content": "You are helpful. " * 20}
    one, two = {"role": "user", "content": "one"}, {"role": "user", "content": "two"}
    assert page(long, one) == page(long, two, temperature=1)
    assert page(one) != page(two)
    assert page(long, one) != page(long, one, tools=[{"type": "function"}])
    for raw in (b"", b"[]", b"3", b"{", b"[" * 100_000, b"{}", b'{"model": "a"}'):
        assert ray_app.first_page(raw) == b""


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"colour": 1}, "colour is no option: known are target, .*slots"),
        ({"slots": "many"}, "slots is 'many': give int"),
        ({"replicas": 0}, "replicas is 0: give 1 or more"),
    ],
)
def test_options_that_are_not_meant_are_refused(given, told):
    with pytest.raises(ValueError, match=told):
        ray_app.build(given)
    assert ray_app.read_options({"slots": "4", "num_cpus": "0.5"}).slots == 4


class Handle:
    """Replicas of which the first few die, before they say anything or in the middle."""

    def __init__(self, *faults):
        self.faults, self.asked, self.answer = [*faults], [], self

    def options(self, stream):
        assert stream
        return self

    def remote(self, scope, raw, page):
        self.asked.append((scope["path"], raw, page))
        return Pieces(self.faults.pop(0) if self.faults else None)


class Pieces:
    """A status, headers and three pieces; an error in the place of one."""

    def __init__(self, fault):
        head = 200, [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-a", b"b")]
        self._left = [head, b"one ", b"two ", b"three"]
        if fault is not None:
            place, error = fault
            self._left[place] = error

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self._left:
            raise StopAsyncIteration
        piece = self._left.pop(0)
        if isinstance(piece, Exception):
            raise piece
        return piece

    def cancel(self):
        self._left = []


DEAD = ray.exceptions.ActorDiedError()


@pytest.mark.parametrize(
    ("faults", "status", "said", "asked"),
    [
        ([], 200, "one two three", 1),
        ([(0, DEAD)], 200, "one two three", 2),
        ([(0, DEAD), (0, DEAD)], 503, "replica_gone", 2),
        ([(2, DEAD)], 200, "replica_gone", 1),
        ([(0, ray_app.BackPressureError(3, 4))], 429, "queue_full", 1),
    ],
)
def test_the_door_tells_what_becomes_of_a_request(faults, status, said, asked):
    handle, body = Handle(*faults), {"messages": SAY}

    async def ask():
        door = ray_app.Door(handle)

        async def app(scope, receive, send):
            answer = await door(StarletteRequest(scope, receive))
            await answer(scope, receive, send)

        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post(CHAT, json=body)

    answer = asyncio.run(ask())
    assert answer.status_code == status
    assert said in answer.text
    assert len(handle.asked) == asked
    assert {one[2] for one in handle.asked} == {ray_app.first_page(json.dumps(body).encode())}
    if said == "one two three":
        assert answer.headers["x-a"] == "b"
    elif status == 200:
        assert answer.text.startswith("one data: {")
        assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.full
def test_prepare_on_a_cluster_writes_what_one_process_writes(models, tmp_path, own_cache):
    """And goes on with what a share has written before."""
    questions, one, spread = (tmp_path / f"{name}.jsonl" for name in ("in", "one", "spread"))
    rows = [{"turns": [f"number {i}", "and then"]} for i in range(7)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--max-new-tokens", "12", "--temperature", "0.8", "--acceptance", "coupled", *models]
    assert cli.main(["prepare", str(questions), "--out", str(one), *words]) == 0
    given = ["prepare", str(questions), "--out", str(spread), *words]
    assert cli.main([*given, "--processes", "2", "--process", "1"]) == 0
    assert not spread.exists()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        assert cli.main([*given, "--ray", "2"]) == 0
    finally:
        ray.shutdown()
    assert spread.read_bytes() == one.read_bytes()


def test_paths_that_a_cluster_does_not_see_are_refused(capsys):
    assert cli.main(["prepare", "a.jsonl", "--out", "b.jsonl", "--ray", "2"]) == 2
    assert "input is a.jsonl: with --ray give a whole path" in capsys.readouterr().err


@pytest.fixture
def deployed(models):
    """Two replicas behind a door; its address."""
    port = free_port()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        ray.serve.start(http_options={"host": "127.0.0.1", "port": port})
        words = dict(zip(("target", "drafter"), models[1::2], strict=True))
        sizes = {"slots": "4", "positions": "250", "policy": "block", "num_cpus": "0.5"}
        ray.serve.run(ray_app.build({**words, **sizes, "replicas": "2", "name": "tiny"}))
        yield f"http://127.0.0.1:{port}"
    finally:
        ray.serve.shutdown()
        ray.shutdown()


def replicas():
    """The names of the replicas that have engines."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return [one["name"] for one in named if "#Replica#" in one["name"]]


class Clients:
    """Clients that ask until they are stopped, and how their requests ended."""

    def __init__(self, url):
        self._url, self._over, self.ends = url, False, []
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()))

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over = True
        self._thread.join(120)
        assert not self._thread.is_alive()

    def wait(self, count):
        """Until so many requests are over; returns how many are."""
        end_s = time.monotonic() + 200
        while len(self.ends) < count:
            assert time.monotonic() < end_s
            time.sleep(0.02)
        return len(self.ends)

    async def _all(self):
        async with httpx.AsyncClient(timeout=100) as client:
            await asyncio.gather(*(self._one(client, number) for number in range(6)))

    async def _one(self, client, number):
        turns = [{"role": "user", "content": f"question of client {number}"}]
        body = {"messages": turns, "max_tokens": 150, "temperature": 1.0, "stream": number % 2 == 0}
        while not self._over:
            self.ends.append(await self._ask(client, body))

    async def _ask(self, client, body):
        """ "done", or the error that this client was told."""
        try:
            async with client.stream("POST", f"{self._url}{CHAT}", json=body) as answer:
                text = (await answer.aread()).decode()
        except httpx.TransportError:
            return "broken"
        if answer.status_code != 200:
            return json.loads(text)["error"]["code"]
        if not body["stream"]:
            return "done" if json.loads(text)["choices"][0]["finish_reason"] else "half"
        *_, last, done = text.strip().split("\n\n")
        assert done == "data: [DONE]"
        told = json.loads(last.removeprefix("data: "))
        if "error" in told:
            return told["error"]["code"]
        return "done" if told["choices"][0]["finish_reason"] else "half"


@pytest.mark.full
def test_a_replica_that_is_killed_under_load(deployed, record_property):
    """Whoever was being answered is told, or answered by the other one; nobody waits for ever."""
    body = {"messages": SAY, "max_tokens": 16, "temperature": 0}
    said = [httpx.post(f"{deployed}{CHAT}", json=body, timeout=100).json() for _ in range(2)]
    text = said[0]["choices"][0]["message"]["content"]
    assert said[1]["choices"][0]["message"]["content"] == text
    assert httpx.get(f"{deployed}/v1/models").json()["data"][0]["id"] == "tiny"
    wrong = httpx.post(f"{deployed}{CHAT}", json=body | {"colour": 1})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "colour")
    with Clients(deployed) as clients:
        before = clients.wait(12)
        first, second = replicas()
        ray.kill(ray.get_actor(first, "serve"))
        clients.wait(before + 24)
    assert set(clients.ends[:before]) == {"done"}
    assert set(clients.ends) <= {"done", "replica_gone"}
    record_property("ends", str({one: clients.ends.count(one) for one in set(clients.ends)}))
    assert clients.ends.count("replica_gone") <= 6
    assert second in replicas()
    again = httpx.post(f"{deployed}{CHAT}", json=body, timeout=100).json()
    assert again["choices"][0]["message"]["content"] == text
    end_s = time.monotonic() + 100
    while len(replicas()) < 2:  # Ray starts another one
        assert time.monotonic() < end_s
        time.sleep(0.2)
