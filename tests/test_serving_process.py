"""Servers as processes: killed in the middle of answers, started again."""

import time

import httpx
import pytest

from tests.served_process import CHAT, SAY, free_port, pieces_of, serving, serving_together

pytestmark = pytest.mark.full

SIZES = ("--slots", "4", "--positions", "500", "--policy", "block")
LONG = {"messages": SAY, "max_tokens": 450, "temperature": 0, "stream": True}


def test_a_server_that_is_killed_breaks_its_streams_and_starts_again(models, record_property):
    """Nobody takes half an answer for a whole one."""
    port, words = free_port(), (*models, *SIZES)
    with serving(*words, port=port) as first, httpx.Client(timeout=60) as client:
        said = first.text()
        with client.stream("POST", f"{first.url}{CHAT}", json=LONG) as answer:
            assert answer.status_code == 200
            lines = answer.iter_lines()
            heard = [next(lines) for _ in range(6)]
            first.process.kill()
            with pytest.raises(httpx.TransportError):
                heard.extend(lines)
        assert "".join(pieces_of(heard))
        assert "data: [DONE]" not in heard
    began_s = time.monotonic()
    with serving(*words, port=port) as second:
        record_property("restart_s", f"{time.monotonic() - began_s:.1f}")
        assert second.text() == said


@pytest.fixture(scope="module")
def alone(models):
    """What one process says: a question, and the next one, whose beginning is known by then."""
    with serving(*models, *SIZES, port=free_port()) as served:
        return [ask(served, turns)[0] for turns in talk()]


def talk():
    """Two requests, the second of which begins like the first."""
    long = [{"role": "user", "content": "tell me all of it " * 8}]
    return [long, [*long, {"role": "assistant", "content": "no"}, *SAY]]


def ask(served, turns):
    """A greedy answer and how many tokens of its prompt were stored."""
    body = {"messages": turns, "max_tokens": 24, "temperature": 0}
    answer = httpx.post(f"{served.url}{CHAT}", json=body, timeout=240).json()
    return answer["choices"][0]["message"]["content"], answer["usage"]["cached_tokens"]


@pytest.mark.parametrize("mesh", ["data=2,tensor=4", "tensor=8"])
def test_two_processes_say_what_one_says(models, alone, mesh):
    words = (*models, *SIZES, "--mesh", mesh)
    with serving_together(*words, port=free_port()) as (first, second):
        texts, cached = zip(*(ask(first, turns) for turns in talk()), strict=True)
        assert [*texts] == alone
        assert cached[0] == 0
        assert cached[1] >= 64
        first.process.terminate()  # all of them end well
        assert (first.process.wait(60), second.process.wait(60)) == (0, 0)


@pytest.mark.parametrize("lost", [0, 1])
def test_no_process_serves_without_the_other(models, lost):
    words = (*models, *SIZES, "--mesh", "tensor=8")
    with serving_together(*words, port=free_port()) as both, httpx.Client(timeout=120) as client:
        url = f"{both[0].url}{CHAT}"
        with client.stream("POST", url, json=LONG) as answer:
            lines = answer.iter_lines()
            heard = [next(lines) for _ in range(6)]
            both[lost].process.kill()
            try:
                heard.extend(lines)
            except httpx.TransportError:
                assert lost == 0
        assert lost == 0 or "error" in "".join(heard)
        said = both[1 - lost].ended()
    assert both[1 - lost].process.returncode not in (0, None)
    # What fails first depends on the moment: its own connection, a round, or JAX's heartbeats.
    assert "start all of them again" in said or "another task died" in said, said[-2000:]
