"""The server as its users see it: OpenAI's client, streams, errors."""

import asyncio
import json

import httpx
import openai
import pytest

from dspark_jax import Request
from dspark_jax.serving.app import Settings
from tests.small_server import NAME, SAY, client_of, listening, load_tiny, made_service

CHAT = "/v1/chat/completions"
SHORT = {"max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def service(model):
    with made_service(model) as made:
        yield made


@pytest.fixture(scope="module")
def address(service):
    with listening(service) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0) as client:
        yield client


def ask(service, method, path, **given):
    """One request in an event loop of its own."""

    async def send():
        async with client_of(service) as client:
            return await client.request(method, path, **given)

    return asyncio.run(send())


def refused(service, fields, path=CHAT):
    answer = ask(service, "POST", path, json=fields)
    assert answer.status_code == 400, answer.text
    return answer.json()["error"]


def test_the_openai_client_chats(client, service):
    answer = client.chat.completions.create(model=NAME, messages=SAY, **SHORT, logprobs=True)
    (choice,) = answer.choices
    request = Request(messages=SAY, max_new_tokens=12, logprobs=True)
    expected = service.served.engine.submit(request).wait()
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == expected.finish_reason == "length"
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == 12 + expected.prompt_tokens
    assert answer.usage.accepted_length >= 1
    assert answer.usage.verified == answer.usage.drafted > 0
    tokens = choice.logprobs.content
    assert "".join(one.token for one in tokens) == expected.text
    assert bytes(tokens[0].bytes).decode() == tokens[0].token
    assert [one.logprob for one in tokens] == pytest.approx(expected.logprobs, abs=1e-4)


def test_the_openai_client_streams(client):
    given = {"model": NAME, "messages": SAY} | SHORT
    whole = client.chat.completions.create(**given)
    options = {"include_usage": True}
    pieces = list(client.chat.completions.create(**given, stream=True, stream_options=options))
    assert pieces[0].choices[0].delta.role == "assistant"
    text = "".join(one.choices[0].delta.content or "" for one in pieces if one.choices)
    assert text == whole.choices[0].message.content
    assert len(pieces) > 4
    reasons = [one.choices[0].finish_reason for one in pieces if one.choices]
    assert reasons[-1] == "length"
    assert set(reasons[:-1]) == {None}
    assert pieces[-1].choices == []
    assert pieces[-1].usage.model_dump(exclude={"id"}) == whole.usage.model_dump()


def test_the_openai_client_completes_several_prompts(client):
    given = {"model": NAME, "prompt": ["hello", "other"], "n": 2, "seed": 3, "max_tokens": 6}
    answer = client.completions.create(**given, logprobs=2, temperature=2.0)
    assert [one.index for one in answer.choices] == [0, 1, 2, 3]
    assert len({one.text for one in answer.choices}) == 4
    again = client.completions.create(**given, logprobs=2, temperature=2.0)
    assert [one.text for one in again.choices] == [one.text for one in answer.choices]
    for one in answer.choices:
        assert "".join(one.logprobs.tokens) == one.text
        assert one.logprobs.text_offset[:3] == [0, 1, 2]
    assert answer.usage.prompt_tokens == 10
    pieces = list(client.completions.create(**given, temperature=2.0, stream=True))
    for index, one in enumerate(answer.choices):
        mine = [piece.choices[0].text for piece in pieces if piece.choices[0].index == index]
        assert "".join(mine) == one.text
    echoed = client.completions.create(model=NAME, prompt="hello", max_tokens=1, echo=True)
    assert echoed.choices[0].text.startswith("hello")


def test_what_a_server_is_can_be_asked(service, client):
    assert [one.id for one in client.models.list()] == [NAME]
    for path in ("/health", "/ready", "/metrics", "/openapi.json", "/v1/models"):
        assert httpx.get(f"{str(client.base_url)[:-4]}{path}").status_code == 200, path
    told = ask(service, "POST", "/tokenize", json={"messages": SAY}).json()
    assert told["count"] == len(told["tokens"]) == len("say it > ")
    told = ask(service, "POST", "/tokenize", json={"prompt": "say"}).json()
    assert told["count"] == 3


def test_the_page_is_told_of_rounds(client, service):
    given = {"model": NAME, "messages": SAY, "stream": True} | SHORT
    pieces = list(client.chat.completions.create(**given, extra_body={"dspark": True}))
    told = [piece.dspark for piece in pieces if hasattr(piece, "dspark")]
    rounds = [one for piece in told for one in piece["rounds"]]
    assert told[0]["running"] == 1
    text = "".join("".join(one["tokens"]) for one in rounds)
    assert text.startswith("".join(piece.choices[0].delta.content or "" for piece in pieces))
    for one in rounds[1:]:
        assert len(one["drafts"]) == len(one["confidences"]) == 3
        assert 0 <= one["accepted"] <= one["verified"] <= 3
        assert all(0 <= value <= 1 for value in one["confidences"])
        assert one["drafts"][: one["accepted"]] == one["tokens"][: one["accepted"]]


def test_errors_are_openais(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="other", messages=SAY)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=NAME, messages=SAY, temperature=-1)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"colour": 1}, "colour"),
        ({"colour": None}, "colour"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "a", "mood": 1}]}, "messages[0].mood"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
         "messages[0].content"),
        ({"messages": [{"role": "root", "content": "a"}]}, "messages[0].role"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": 2**64}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 500}, "max_tokens"),
        ({"max_completion_tokens": 500}, "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"stop": ["", "a"]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"5000": 1}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"chat_template_kwargs": {"mood": 1}}, "chat_template_kwargs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"store": True}, "store"),
        ({"service_tier": "flex"}, "service_tier"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_meant_is_named(service, change, param):
    error = refused(service, {"messages": SAY} | change)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert len(error["message"]) > 10


def test_what_changes_nothing_is_taken(service):
    nothing = {
        "user": "me", "n": 1, "store": False, "metadata": {"a": "b"}, "logprobs": None,
        "audio": None, "parallel_tool_calls": True, "service_tier": "auto", "modalities": ["text"],
        "tools": None, "stop": None, "response_format": {"type": "text"},
    }  # fmt: skip
    answer = ask(service, "POST", CHAT, json={"messages": SAY} | SHORT | nothing)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"[]", b"{", b'{"messages": 1, "messages": 2}', b'{"seed": NaN}', b'{"seed": 1e999}',
        b'{"seed": ' + b"9" * 5000 + b"}", b'{"user": "\\ud800"}', b'{"user": "\xff"}',
        b'{"a":' * 100_000, b"[" * 100_000, b'{"metadata": ' + b'{"a":' * 70 + b"1" + b"}" * 71,
    ],
    ids=lambda raw: repr(raw[:16]),
)  # fmt: skip
def test_bodies_that_are_no_json(service, raw):
    head = {"content-type": "application/json"}
    answer = ask(service, "POST", CHAT, content=raw, headers=head)
    assert answer.status_code == 400
    assert "error" in answer.json()


def test_routes_and_forms_that_are_not_there(service):
    assert ask(service, "GET", CHAT).status_code == 405
    assert ask(service, "POST", "/v1/embeddings", json={}).json()["error"]["message"]
    assert ask(service, "POST", CHAT, content=json.dumps({})).status_code == 415


def test_only_those_with_the_key_come_in_and_only_so_much(model):
    settings = Settings(api_key="secret", max_body_bytes=300)
    with made_service(model, settings) as service:
        body = {"messages": SAY} | SHORT
        for shown in ({}, {"authorization": "Bearer secre"}, {"authorization": "secret"}):
            answer = ask(service, "POST", CHAT, json=body, headers=shown)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        key = {"authorization": "Bearer secret"}
        assert ask(service, "POST", CHAT, json=body, headers=key).status_code == 200
        assert ask(service, "GET", "/health").status_code == 200
        assert ask(service, "GET", "/ready").status_code == 503  # nobody has warmed it up
        large = body | {"user": "x" * 300}
        assert ask(service, "POST", CHAT, json=large, headers=key).status_code == 413

        async def endless():
            while True:
                yield b" " * 100

        key["content-type"] = "application/json"
        answer = ask(service, "POST", CHAT, content=endless(), headers=key)
        assert answer.status_code == 413


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Ulm", "Bonn"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("stream", [False, True])
def test_the_openai_client_calls_tools(client, stream):
    pytest.importorskip("dspark_jax.engine.guided")
    answer = client.chat.completions.create(
        model=NAME, messages=SAY, tools=[WEATHER], tool_choice="required", stream=stream, n=2,
        max_tokens=120, seed=1,
    )  # fmt: skip
    if stream:
        pieces = [piece.choices[0] for piece in answer]
        calls = [call for piece in pieces for call in piece.delta.tool_calls or ()]
        texts = [piece.delta.content for piece in pieces if piece.delta.content]
        reasons = [piece.finish_reason for piece in pieces if piece.finish_reason]
    else:
        calls = [call for choice in answer.choices for call in choice.message.tool_calls]
        texts = [one.message.content for one in answer.choices if one.message.content]
        reasons = [choice.finish_reason for choice in answer.choices]
    assert len(calls) == 2
    for call in calls:
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments)["city"] in ("Ulm", "Bonn")
    assert reasons == ["tool_calls"] * 2
    assert texts == []
    said = {"role": "assistant", "content": None, "tool_calls": [calls[0].model_dump()]}
    said["tool_calls"][0].pop("index", None)
    result = {"role": "tool", "tool_call_id": calls[0].id, "content": "rain"}
    turns = [*SAY, said, result]
    given = {"model": NAME, "messages": turns, "tools": [WEATHER]} | SHORT
    assert client.chat.completions.create(**given).usage.prompt_tokens > 40


def test_the_openai_client_asks_for_json(client):
    pytest.importorskip("dspark_jax.engine.guided")
    schema = {"name": "city", "schema": WEATHER["function"]["parameters"], "strict": True}
    answer = client.chat.completions.create(
        model=NAME, messages=SAY, response_format={"type": "json_schema", "json_schema": schema},
        max_tokens=100,
    )  # fmt: skip
    assert json.loads(answer.choices[0].message.content)["city"] in ("Ulm", "Bonn")
    assert answer.choices[0].finish_reason == "stop"


def test_thoughts_and_tools_reach_the_template(service):
    def told(fields):
        return ask(service, "POST", "/tokenize", json={"messages": SAY} | fields).json()["count"]

    plain = told({})
    assert told({"tools": [WEATHER]}) == plain + len("weather; ")
    assert told({"chat_template_kwargs": {"enable_thinking": True}}) == plain + len("<think>")
    body = {"messages": SAY, "chat_template_kwargs": {"enable_thinking": True}} | SHORT
    message = ask(service, "POST", CHAT, json=body).json()["choices"][0]["message"]
    assert len(message["reasoning_content"]) == 12
    assert message["content"] is None
    strict = {**WEATHER, "function": WEATHER["function"] | {"strict": True}}
    assert refused(service, {"messages": SAY, "tools": [strict]})["param"] == "tools"
