"""Servers as processes: killed in the middle of answers, started again."""

import time

import httpx
import pytest

from tests.served_process import CHAT, SAY, free_port, pieces_of, serving

pytestmark = pytest.mark.full

SIZES = ("--slots", "4", "--positions", "500", "--policy", "block")
LONG = {"messages": SAY, "max_tokens": 450, "temperature": 2.0, "stream": True}


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
