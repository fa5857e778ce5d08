"""A server around the tiny model, for tests: in the event loop, and behind a socket."""

import asyncio
import contextlib
import threading
import time

import httpx
import pytest

import dspark_jax
from dspark_jax import Engine, EngineConfig
from dspark_jax.serving.app import Service, Settings
from dspark_jax.serving.served import serve_model
from dspark_jax.serving.server import Server, listen
from tests.tiny_model import BLOCK, write_drafter, write_target

NAME = "tiny"
# Knows tools, between tags, and thoughts.
TEMPLATE = (
    "{# <tool_call></tool_call> <think></think> #}"
    "{% for tool in tools or [] %}{{ tool.function.name }}; {% endfor %}"
    "{% for turn in messages %}"
    "{% for call in turn.tool_calls or [] %}{{ call.function.arguments | tojson }}{% endfor %}"
    "{{ turn.content }}{{ '<end>' if turn.role == 'assistant' else ' > ' }}"
    "{% endfor %}"
    "{% if enable_thinking %}<think>{% endif %}"
)
CONFIG = {
    "slots": 4,
    "positions": 250,
    "queue": 8,
    "policy": "block",
    "chunk_rows": 16,
    "chunk_buckets": (1,),
    "slot_buckets": (4,),
    "row_buckets": (BLOCK + 1,),
    "position_buckets": (256,),
}
SAY = [{"role": "user", "content": "say it"}]


def load_tiny(folder):
    """The tiny model with a template for chats."""
    target = write_target(folder / "target")
    (target / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspark_jax.model.use_compilation_cache", lambda: None)
        return dspark_jax.load(target, write_drafter(folder / "drafter"))


@contextlib.contextmanager
def made_service(model, settings=None, **sizes):
    """A service of an engine that works by itself."""
    with Engine(model, EngineConfig(**CONFIG | sizes)) as engine:
        engine.start()
        yield Service(serve_model(model, engine, NAME), settings or Settings())


@contextlib.contextmanager
def listening(service, drain_s=5.0):
    """The server behind a port of its own, in a thread; gives its address."""
    socket = listen("127.0.0.1", 0)
    server = Server(service, drain_s)
    loop = asyncio.new_event_loop()

    def run():
        asyncio.set_event_loop(loop)
        loop.run_until_complete(server.serve([socket]))
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while not server.started:  # or nobody would answer those whom the socket lets in
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(server.stop)
        thread.join(30)
        assert not thread.is_alive()


def client_of(service):
    """A client within the event loop."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(service.app), base_url="http://test")
