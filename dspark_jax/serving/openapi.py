"""The OpenAPI document: what the server takes."""

from __future__ import annotations

from typing import Any

from dspark_jax import __version__
from dspark_jax.engine.request import ROLES
from dspark_jax.sampling import HOTTEST
from dspark_jax.serving.protocol import (
    DEFAULT_TOKENS,
    LABELS,
    MOST_PROMPTS,
    MOST_SAMPLES,
)
from dspark_jax.serving.tools import MOST_TOOLS

TEXT: dict[str, Any] = {"type": "string"}
FLAG: dict[str, Any] = {"type": "boolean", "default": False}
ANY_OBJECT: dict[str, Any] = {"type": "object"}


def _whole(low: int, high: int | None = None, **more: Any) -> dict[str, Any]:
    upper = {} if high is None else {"maximum": high}
    return {"type": "integer", "minimum": low, **upper, **more}


def _number(low: float, high: float, default: float) -> dict[str, Any]:
    return {"type": "number", "minimum": low, "maximum": high, "default": default}


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _list(items: dict[str, Any], most: int | None = None) -> dict[str, Any]:
    upper = {} if most is None else {"maxItems": most}
    return {"type": "array", "items": items, "minItems": 1, **upper}


def document(name: str) -> dict[str, Any]:
    """The document, as JSON values.

    Args:
        name: of the model that is served.
    """
    one_of_two = [{"required": ["prompt"]}, {"required": ["messages"]}]
    tokens = {"type": "array", "items": _whole(0)}
    told = _object([], tokens=tokens, count=_whole(0), max_model_len=_whole(1))
    tokenize = _object(
        [],
        model={"const": name},
        prompt=TEXT,
        messages=_list(_message()),
        tools=_list(_tool(), MOST_TOOLS),
        chat_template_kwargs=ANY_OBJECT,
    ) | {"oneOf": one_of_two}
    streamed = {"text/event-stream": {"schema": TEXT}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "dspark", "version": __version__},
        "paths": {
            "/v1/chat/completions": _post(_chat(name), ANY_OBJECT, streamed),
            "/v1/completions": _post(_completion(name), ANY_OBJECT, streamed),
            "/tokenize": _post(tokenize, told, {}),
            "/v1/models": _get(ANY_OBJECT),
            "/health": _get(ANY_OBJECT),
            "/ready": _get(ANY_OBJECT, unready=True),
            "/metrics": {"get": {"responses": {"200": _texts("text/plain")}}},
            "/": {"get": {"responses": {"200": _texts("text/html")}}},
        },
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _texts(kind: str) -> dict[str, Any]:
    return {"description": "as it is", "content": {kind: {"schema": TEXT}}}


def _answer(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _get(schema: dict[str, Any], unready: bool = False) -> dict[str, Any]:
    responses = {"200": _answer("as it is", schema)}
    if unready:
        responses["503"] = _answer("not yet, or no more", schema)
    return {"get": {"responses": responses}}


def _post(body: dict[str, Any], answer: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    fields = ("message", "type", "param", "code")
    error = _object(["error"], error=_object([*fields], **{key: {} for key in fields}))
    good = _answer("the answer", answer)
    good["content"] |= more
    statuses = {
        "400": "a field is wrong or not supported",
        "401": "the API key is missing or wrong",
        "404": "there is no such model",
        "408": "the body took too long",
        "413": "the body is too large",
        "415": "the body is not JSON",
        "429": "too many requests wait",
        "503": "the server stops",
        "504": "the answer took too long",
    }
    errors = {status: _answer(told, error) for status, told in statuses.items()}
    taken = {"required": True, "content": {"application/json": {"schema": body}}}
    return {"post": {"requestBody": taken, "responses": {"200": good, **errors}}}


def _law(name: str) -> dict[str, Any]:
    """What chats and completions share."""
    options = _object([], include_usage=FLAG, include_obfuscation={"const": False})
    return {
        "model": {"const": name},
        "stream": FLAG,
        "stream_options": options,
        "n": _whole(1, MOST_SAMPLES, default=1),
        "stop": {"oneOf": [TEXT, {"type": "array", "items": TEXT, "maxItems": 16}]},
        "temperature": _number(0, HOTTEST, 1),
        "top_p": _number(0, 1, 1),
        "top_k": _whole(0, default=0),
        "min_p": _number(0, 1, 0),
        "seed": _whole(0, 2**64 - 1),
        "presence_penalty": _number(-2, 2, 0),
        "frequency_penalty": _number(-2, 2, 0),
        "repetition_penalty": _number(0.01, 100, 1),
        "logit_bias": {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]+$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": 300,
        },
        "response_format": _response_format(),
        "priority": _whole(-(2**31), 2**31, default=0),
        "dspark": FLAG | {"description": "whether pieces say what the rounds were like"},
        "metadata": ANY_OBJECT,
        "store": {"const": False},
        "service_tier": {"enum": ["auto", "default"]},
        **dict.fromkeys(LABELS, TEXT),
    }


def _chat(name: str) -> dict[str, Any]:
    function = _object(["name"], name=TEXT)
    forced = _object(["function"], type={"const": "function"}, function=function)
    return _object(
        ["messages"],
        messages=_list(_message()),
        max_tokens=_whole(1),
        max_completion_tokens=_whole(1),
        logprobs=FLAG,
        top_logprobs=_whole(0, 20),
        tools=_list(_tool(), MOST_TOOLS),
        tool_choice={"oneOf": [{"enum": ["auto", "none", "required"]}, forced]},
        parallel_tool_calls={"type": "boolean", "default": True},
        chat_template_kwargs=ANY_OBJECT,
        **_law(name),
    )


def _completion(name: str) -> dict[str, Any]:
    ids = _list(_whole(0))
    texts = [TEXT, ids, _list(TEXT, MOST_PROMPTS), _list(ids, MOST_PROMPTS)]
    return _object(
        ["prompt"],
        prompt={"oneOf": texts},
        max_tokens=_whole(1, default=DEFAULT_TOKENS),
        logprobs=_whole(0, 20),
        echo=FLAG,
        best_of={"const": 1},
        **_law(name),
    )


def _message() -> dict[str, Any]:
    part = _object(["type", "text"], type={"const": "text"}, text=TEXT)
    function = _object(["name"], name=TEXT, arguments=TEXT)
    call = _object(["function"], id=TEXT, type={"const": "function"}, function=function)
    return _object(
        ["role"],
        role={"enum": [*ROLES]},
        content={"oneOf": [TEXT, _list(part), {"type": "null"}]},
        name=TEXT,
        reasoning_content=TEXT,
        tool_calls=_list(call),
        tool_call_id=TEXT,
    )


def _tool() -> dict[str, Any]:
    function = _object(
        ["name"],
        name={"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
        description=TEXT,
        parameters=ANY_OBJECT,
        strict=FLAG,
    )
    return _object(["type", "function"], type={"const": "function"}, function=function)


def _response_format() -> dict[str, Any]:
    schema = _object(["name"], name=TEXT, description=TEXT, strict=FLAG, schema=ANY_OBJECT)
    plain = _object(["type"], type={"enum": ["text", "json_object"]})
    shaped = _object(["type", "json_schema"], type={"const": "json_schema"}, json_schema=schema)
    return {"oneOf": [plain, shaped]}
