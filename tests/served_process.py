"""``dspark serve`` in processes of its own, for tests of what becomes of them."""

import contextlib
import json
import re
import socket
import threading
import time

import httpx

from tests.test_mesh_commands import start, start_two

CHAT = "/v1/chat/completions"
SAY = [{"role": "user", "content": "say it"}]
START_S = 240  # until it is ready, on a machine that has other things to do


class Served:
    """A process that serves.

    Attributes:
        url: of it; empty where it serves nobody.
        process: itself.
    """

    def __init__(self, process, url=""):
        self.process, self.url, self._said = process, url, []
        # Nobody may block it by not reading what it says.
        self._reader = threading.Thread(target=lambda: self._said.extend(process.stderr))
        self._reader.start()

    def wait_ready(self):
        """Until the first programs are there."""
        end_s = time.monotonic() + START_S
        while time.monotonic() < end_s:
            assert self.process.poll() is None, self.ended()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/ready", timeout=30).status_code == 200:
                    return
            time.sleep(0.05)
        raise AssertionError("it was not ready in time")

    def ended(self, timeout_s=100):
        """What it wrote to stderr until its end."""
        self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return "".join(self._said)

    def text(self, **fields):
        """A greedy answer of 16 tokens."""
        body = {"messages": SAY, "max_tokens": 16, "temperature": 0} | fields
        answer = httpx.post(f"{self.url}{CHAT}", json=body, timeout=START_S)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    def kill(self):
        """End it, whatever it does."""
        self.process.kill()
        self.ended()
        self.process.stdout.close()
        self.process.stderr.close()


def free_port():
    """A port that nobody has now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def serving(*words, port, devices=1):
    """``dspark serve`` with these words, ready; killed afterwards."""
    process = start("serve", *words, "--port", port, devices=devices)
    with _ready(Served(process, f"http://127.0.0.1:{port}")) as (served,):
        yield served


@contextlib.contextmanager
def serving_together(*words, port):
    """Likewise, over two processes of four devices each; the first one answers."""
    first, second = start_two("serve", *words, "--port", port)
    with _ready(Served(first, f"http://127.0.0.1:{port}"), Served(second)) as both:
        yield both


@contextlib.contextmanager
def _ready(*all_served):
    try:
        all_served[0].wait_ready()
        yield all_served
    finally:
        for served in all_served:
            served.kill()


def pieces_of(lines):
    """The texts of a stream's events, until ``[DONE]``."""
    for line in lines:
        found = re.fullmatch(r"data: (\{.*\})", line)
        if found:
            for choice in json.loads(found[1])["choices"]:
                yield choice["delta"].get("content") or ""
