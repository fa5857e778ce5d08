"""Those who talk to a server of OpenAI's interface: the chat and the measurement of one."""

import asyncio
import io
import json
import re
import types

import httpx
import pytest

from dspark_jax.cli import clients
from dspark_jax.cli import command as cli
from dspark_jax.client import Client, Events, Piece, ServerError
from dspark_jax.engine.request import Request
from dspark_jax.engine.stream import Event
from dspark_jax.evaluation import load_server
from dspark_jax.evaluation.prompts import Prompt

URL = "http://tiny.example"
WORDS = ["Hello", " \u2028there", "\x1b[2J"]  # raw line separators are no line ends here


class FakeServer:
    """Says WORDS to everybody, or what is wrong; keeps what it was asked."""

    def __init__(self, fault=""):
        self.fault, self.asked, self.keys = fault, [], []

    async def __call__(self, request):
        self.keys.append(request.headers.get("authorization"))
        if self.fault == "gone":
            raise httpx.ConnectError("all attempts failed", request=request)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "tiny"}]})
        self.asked.append(json.loads(request.content))
        if self.fault == "busy" or (self.fault == "sometimes" and len(self.asked) % 3 == 0):
            return httpx.Response(429, json={"error": {"message": "try\nlater"}})
        slow = self.fault == "one hangs" and len(self.asked) == 2
        return httpx.Response(200, stream=Pieces("hang" if slow else self.fault))


class Pieces(httpx.AsyncByteStream):
    """Events, cut where nobody would expect it."""

    def __init__(self, fault):
        self.fault = fault

    async def __aiter__(self):
        yield b": a comment\nevent: message\nda"
        for word in WORDS:
            event = {"choices": [{"delta": {"content": word}}]}
            raw = f"ta: {json.dumps(event, ensure_ascii=False)}\r\n\r\nda".encode()
            yield raw[:31]
            yield raw[31:]
            await asyncio.sleep(60 if self.fault == "hang" else 0.02)
        if self.fault == "cut":
            return
        if self.fault == "middle":
            yield b'ta: {"error": {"message": "the engine stops"}}\n\n'
        yield b'ta: {"choices": [], "usage": {"completion_tokens": 6}}\n\ndata: [DONE]\n\n'


@pytest.fixture
def server(monkeypatch):
    """Stands behind every address."""
    found = FakeServer()
    original = Client.__init__
    monkeypatch.setattr(
        Client,
        "__init__",
        lambda self, url, api_key="": original(self, url, api_key, httpx.MockTransport(found)),
    )
    return found


def talk(monkeypatch, text, *words):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    return cli.main(["chat", *words])


def test_a_chat_with_a_server_has_a_history(server, monkeypatch, capsys, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    words = [
        "--url",
        f"{URL}/v1/",
        "--api-key-file",
        str(tmp_path / "key"),
        "--system",
        "Be brief.",
    ]
    words += ["--top-p", "0.5", "--template-arg", "enable_thinking=false"]
    assert talk(monkeypatch, "one\n\ntwo\n/reset\nthree\n/exit\nfour\n", *words) == 0
    first, second, third = server.asked
    system, answer = {"role": "system", "content": "Be brief."}, "".join(WORDS)
    assert first["messages"] == [system, {"role": "user", "content": "one"}]
    assert second["messages"] == [
        *first["messages"],
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "two"},
    ]
    assert third["messages"] == [system, {"role": "user", "content": "three"}]
    assert (first["model"], first["stream"], first["top_p"]) == ("tiny", True, 0.5)
    assert first["chat_template_kwargs"] == {"enable_thinking": False}
    assert "top_k" not in first
    assert set(server.keys) == {"Bearer secret"}
    shown = answer.replace("\x1b", "\ufffd")  # a text moves no cursor
    assert capsys.readouterr().out == f"{shown}\n" * 3


class FakeModel:
    """Answers with how much was said to it."""

    def __init__(self, template=""):
        self.options, self.decoder = [], types.SimpleNamespace(encode=self.encode, tokenizer=self)
        self.chat_template = template

    def encode(self, turns):
        return [1, 2]

    def decode(self, ids):
        return "<think>\n"

    def stream(self, turns, **options):
        self.options.append(options)
        yield Event(f"{len(turns)} ", (1,), (), "")
        yield Event("turns", (2,), (), "error" if turns[-1]["content"] == "fail" else "stop")


def test_a_chat_with_a_model_has_a_history(monkeypatch, capsys):
    model = FakeModel()
    monkeypatch.setattr(clients, "load_model", lambda args: model)
    monkeypatch.setattr("dspark_jax.model.use_compilation_cache", lambda: None)
    words = ["--temperature", "0.5", "--policy", "block", "--stop", "end", "--seed", "3"]
    assert talk(monkeypatch, "one\ntwo\nthree\n/reset\nfour", *words) == 0
    assert capsys.readouterr().out == "1 turns\n3 turns\n5 turns\n1 turns\n"
    asked = {"temperature": 0.5, "policy": "block", "stop_strings": ("end",), "seed": 3}
    assert asked.items() <= model.options[0].items()
    assert talk(monkeypatch, "fail\n") == 2
    assert capsys.readouterr().err == "dspark: the model could not go on with this text\n"


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("gone", "http://tiny.example: all attempts failed"),
        ("busy", "http://tiny.example: 429: try later"),
        ("cut", "http://tiny.example: it stopped in the middle of an answer"),
        ("middle", "http://tiny.example: the engine stops"),
    ],
)
def test_what_is_wrong_with_a_server_takes_one_line(server, monkeypatch, capsys, fault, told):
    server.fault = fault
    assert talk(monkeypatch, "one\n", "--url", URL) == 2
    assert capsys.readouterr().err == f"dspark: {told}\n"


def test_thoughts_are_no_part_of_an_answer_but_seen(monkeypatch, capsys):
    """Of a model, and of a server."""
    model, piece = FakeModel("</think>"), Piece("42.", "Hm\x1b.")
    events = ["H", "m\x1b.</thi", "nk>\n\n42."]
    stream = [Event(text, (1,), (), "" if n < 2 else "stop") for n, text in enumerate(events)]
    said = []

    def answer(turns, **options):
        said.append([turn["content"] for turn in turns])
        return (event for event in stream)

    async def answers(self, body):
        said.append([turn["content"] for turn in body["messages"]])
        yield piece

    async def name(self):
        return "tiny"

    monkeypatch.setattr(model, "stream", answer)
    monkeypatch.setattr(Client, "answer", answers)
    monkeypatch.setattr(Client, "model", name)
    monkeypatch.setattr(clients, "load_model", lambda args: model)
    monkeypatch.setattr("dspark_jax.model.use_compilation_cache", lambda: None)
    for words in ([], ["--url", URL]):
        assert talk(monkeypatch, "one\ntwo\n", *words) == 0
        assert capsys.readouterr().out == "42.\n42.\n"
        assert said == [["one"], ["one", "42.", "two"]]
        said.clear()
        with monkeypatch.context() as patch:
            patch.setattr("sys.stdout.isatty", lambda: True)
            assert talk(patch, "one\n", *words) == 0
        shown = re.sub("\x1b\\[0m\x1b\\[2m", "", capsys.readouterr().out)
        assert shown == "\x1b[2mHm\ufffd.\x1b[0m\n\n42.\n"
        said.clear()


class Terminal:
    """Types for somebody: messages, and Ctrl-C, which comes as KeyboardInterrupt."""

    def __init__(self, monkeypatch, *typed):
        self.typed = iter(typed)
        monkeypatch.setattr("builtins.input", self.next)
        monkeypatch.setattr("sys.stdin", self)

    def isatty(self):
        return True

    def next(self, _prompt):
        typed = next(self.typed, EOFError)
        if typed in (EOFError, KeyboardInterrupt):
            raise typed
        return typed


def test_ctrl_c_stops_the_answer_and_not_the_chat(monkeypatch, capsys):
    said = []

    def say(turns, show):
        said.append([turn["content"] for turn in turns])
        if turns[-1]["content"] == "fail":
            raise ServerError("it is\nbroken")
        if turns[-1]["content"] == "nothing":
            raise KeyboardInterrupt
        show("", "An answer")
        if turns[-1]["content"] == "long":
            raise KeyboardInterrupt

    Terminal(monkeypatch, "long", KeyboardInterrupt, "nothing", "fail", "again")
    assert clients._talk(say) == 0
    heard = ["long", "An answer"]
    assert said == [["long"], [*heard, "nothing"], [*heard, "fail"], [*heard, "again"]]
    captured = capsys.readouterr()
    assert captured.err.count("[stopped]") == 2
    assert "dspark: it is broken" in captured.err
    assert captured.out.count("An answer") == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--url", "tiny.example"], "url is 'tiny.example': give one like http://127.0.0.1:8000"),
        (["--url", URL, "--drafter", "none"], "drafter is 'none', which has no effect"),
        (["--url", URL, "--no-chat-template"], "chat template is False, which has no effect"),
        (["--api-key-file", "key"], "--api-key-file is for a server: give its --url"),
        (["--url", URL, "--temperature", "-1"], "temperature is -1"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(server, monkeypatch, capsys, words, told):
    assert talk(monkeypatch, "one\n", *words) == 2
    assert re.match(f"dspark: {re.escape(told)}", error := capsys.readouterr().err), error
    assert not server.asked


@pytest.mark.parametrize(
    "data",
    [b"{", b"[]", b"[" * 100_000, b'{"choices": 3}', b'{"choices": [{"delta": {"content": 1}}]}',
     b'{"choices": [], "usage": {"completion_tokens": "6"}}', b'{"error": 3}'],
)  # fmt: skip
def test_events_that_are_none_are_told(data):
    with pytest.raises(ServerError, match="http://x: no chat completion"):
        list(Events("http://x").feed(b"data: " + data + b"\n"))


def test_bench_load_measures_a_server(server, capsys, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(3)))
    server.fault = "sometimes"
    words = ["--url", URL, "--prompts", str(prompts), "--concurrency", "1,2", "--repeats", "2"]
    words += ["--requests", "3", "--max-new-tokens", "10", "--seed", "5"]
    assert cli.main(["bench", "load", *words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["prompts"]) == ("tiny", 3)
    assert [row["concurrency"] for row in report["rows"]] == [1, 2]
    for row in report["rows"]:
        assert 0 < row["tokens_per_s_low"] <= row["tokens_per_s"] <= row["tokens_per_s_high"]
        for name in ("first_token_s", "between_tokens_s"):
            assert 0 < row[name]["p50"] <= row[name]["p95"] <= row[name]["p99"]
        assert 1 <= row["failed"] < 12
    assert {body["seed"] for body in server.asked} == {5, 6, 7}
    assert {body["max_tokens"] for body in server.asked} == {10}
    assert len(load_server.format_server(report).splitlines()) == 6
    server.fault = "busy"
    assert cli.main(["bench", "load", *words]) == 2
    assert cli.main(["bench", "load", *words, "--policies", "none"]) == 2
    assert "policies" in capsys.readouterr().err


def test_a_piece_of_a_text_that_is_not_over_counts_as_much_as_others(server):
    server.fault = "one hangs"

    async def measure():
        async with Client(URL) as client:
            sets, limits = {"": [Prompt("one", "")]}, Request((0,))
            bodies = load_server.make_bodies("tiny", sets, limits, 0, load_server.PLAIN)
            return await load_server.serve(client, iter(bodies * 2), 2, 1)

    run = asyncio.run(measure())
    assert sorted(watch.tokens for watch in run.watches) == [1, len(WORDS)]
    assert run.failed == 0
    # Six tokens of three pieces, and two of one.
    assert run.tokens_per_s / run.tokens_per_s_user == pytest.approx(8 / 6, rel=0.2)
