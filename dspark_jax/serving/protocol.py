"""What bodies ask for: OpenAI's fields, checked one by one, as requests to the engine.

A field that is not known is an error that names it; so is a known one whose value would change the
answer in a way that is not supported. Values that change nothing are taken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dspark_jax.engine.grammar import Grammar
from dspark_jax.engine.request import ROLES, Request
from dspark_jax.serving import body
from dspark_jax.serving.body import Fields
from dspark_jax.serving.errors import ApiError, refused
from dspark_jax.serving.served import Served
from dspark_jax.serving.tools import Tool, ToolChoice, forced_grammar, read_choice, read_tools

MOST_SAMPLES = 16  # of a prompt
MOST_PROMPTS = 64  # of a body
DEFAULT_TOKENS = 16  # of a completion, OpenAI's default
# Labels, which change nothing of an answer.
LABELS = ("user", "safety_identifier", "prompt_cache_key")
# Of OpenAI's interface: null is as good as leaving them out.
UNSUPPORTED = (
    "audio", "function_call", "functions", "modalities", "moderation", "prediction",
    "prompt_cache_retention", "reasoning_effort", "verbosity", "web_search_options",
)  # fmt: skip


@dataclass(frozen=True)
class Asked:
    """A body.

    Attributes:
        chat: whether messages are asked for, or else plain text.
        prompts: a request for each prompt.
        num_samples: of each.
        seed: of the first sample; None for fresh ones.
        limit: most new tokens; None for as many as there is room for.
        priority: higher ones get a slot first.
        stream: whether pieces are sent as they come.
        usage: whether a last piece says what it took.
        logprobs: whether log-probabilities are wanted.
        echo: whether answers begin with their prompts.
        tools: that may be called.
        choice: whether they are.
        rounds: whether the pieces say what the rounds were like: the page asks.
        fields: of the body.
    """

    chat: bool
    prompts: tuple[Request, ...]
    num_samples: int = 1
    seed: int | None = None
    limit: int | None = None
    priority: int = 0
    stream: bool = False
    usage: bool = False
    logprobs: bool = False
    echo: bool = False
    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = field(default_factory=ToolChoice)
    rounds: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)

    def requests(self, served: Served) -> list[Request]:
        """For the engine, in ids: the samples of a prompt one behind the other.

        Raises:
            ApiError: a prompt cannot be encoded, or leaves no room.
        """
        made = []
        for prompt in self.prompts:
            try:
                request = prompt.resolve(served.encode, served.stop_ids)
                room = max(1, served.positions - len(request.prompt_ids))
                limit = room if self.limit is None else self.limit
                for sample in range(self.num_samples):
                    made.append(replace(request, max_new_tokens=limit, **self._key(sample)))
            except ValueError as error:
                raise refused(error, self.fields) from None
        return made

    def _key(self, sample: int) -> dict[str, Any]:
        """The first sample has the seed itself, others what a hash makes of it."""
        if self.seed is None or not sample:
            return {"key": None, "seed": self.seed}
        digest = hashlib.sha256(f"{self.seed} {sample}".encode()).digest()
        return {"key": None, "seed": int.from_bytes(digest[:8])}


def read_chat(value: dict[str, Any], served: Served) -> Asked:
    """A body of ``/v1/chat/completions``.

    Raises:
        ApiError: a field is wrong, missing or not supported.
    """
    fields = Fields(value)
    shared = _shared(fields, served)
    messages = [_message(one, i) for i, one in enumerate(fields.need("messages", body.some_list))]
    names = "max_completion_tokens", "max_tokens"
    limits = [fields.take(name, body.integer, None) for name in names]
    if None not in limits and limits[0] != limits[1]:
        raise fields.error("max_tokens", "contradicts max_completion_tokens: give one of them")
    logprobs = fields.take("logprobs", body.boolean, False)
    top = fields.take("top_logprobs", body.integer, 0)
    if top and not logprobs:
        raise fields.error("top_logprobs", 'needs "logprobs": true')
    tools: tuple[Tool, ...] = fields.take("tools", read_tools, ())
    choice = fields.take("tool_choice", lambda one: read_choice(one, tools), ToolChoice())
    one_call = (False,) if choice.forced else ()  # a grammar has room for one
    fields.only("parallel_tool_calls", True, *one_call)
    grammar = fields.take("response_format", _response_format, None)
    if choice.forced and grammar is not None:
        raise fields.error("response_format", "contradicts tool_choice: leave one of them out")
    kwargs: dict[str, Any] = fields.take("chat_template_kwargs", body.some_object, {})
    shown = tools if choice.kind != "none" else ()
    _check_template(fields, served, kwargs, shown)
    if choice.forced:
        grammar = forced_grammar(served.call_form.forced, tools, choice)
    elif any(tool.strict for tool in shown):
        raise fields.error(
            "tools", 'has a strict function: give "tool_choice": "required", or the function'
        )
    given = {
        "messages": messages,
        "template_kwargs": kwargs,
        "tools": [tool.told for tool in shown],
        "logprobs": logprobs,
        "top_logprobs": top,
        "grammar": grammar,
        "shown_ids": () if grammar is not None else served.marks(calls=bool(shown)),
    }
    fields.only("modalities", ["text"])
    request = _request(shared.pop("law") | given, fields, value)
    limit = next((one for one in limits if one is not None), None)
    if limit is not None and limit < 1:
        raise fields.error("max_tokens", f"is {limit}: ask for at least 1 new token")
    return Asked(True, (request,), limit=limit, logprobs=logprobs, tools=shown, choice=choice,
                 fields=value, **shared)  # fmt: skip


def read_completion(value: dict[str, Any], served: Served) -> Asked:
    """A body of ``/v1/completions``.

    Raises:
        ApiError: a field is wrong, missing or not supported.
    """
    fields = Fields(value)
    shared = _shared(fields, served)
    prompts = fields.need("prompt", _prompts)
    fields.only("suffix")
    fields.only("best_of", 1)
    top = fields.take("logprobs", body.between(0, 20), None)
    echo = fields.take("echo", body.boolean, False)
    if echo and top is not None:
        raise fields.error("echo", "cannot have logprobs of the prompt: leave one of them out")
    grammar = fields.take("response_format", _response_format, None)
    limit = fields.take("max_tokens", body.integer, DEFAULT_TOKENS)
    if limit < 1:
        raise fields.error("max_tokens", f"is {limit}: ask for at least 1 new token")
    given = {"logprobs": top is not None, "top_logprobs": top or 0, "grammar": grammar}
    law = shared.pop("law") | given
    made = []
    for prompt in prompts:
        if isinstance(prompt, str):
            encoded = served.tokenizer.encode(prompt)
            if not encoded:
                raise fields.error("prompt", "is empty: write some text")
            prompt = list(encoded)
        made.append(_request(law | {"prompt_ids": prompt}, fields, value))
    return Asked(False, tuple(made), limit=limit, logprobs=top is not None, echo=echo, fields=value,
                 **shared)  # fmt: skip


def read_tokenize(value: dict[str, Any], served: Served) -> list[int]:
    """A body of ``/tokenize``: the ids of a text, or of a conversation by the chat template.

    Raises:
        ApiError: a field is wrong, missing or not supported.
    """
    fields = Fields(value)
    _check_model(fields, served)
    prompt = fields.take("prompt", body.text, None)
    given = fields.take("messages", body.some_list, None)
    kwargs: dict[str, Any] = fields.take("chat_template_kwargs", body.some_object, {})
    tools: tuple[Tool, ...] = fields.take("tools", read_tools, ())
    fields.end()
    if (prompt is None) == (given is None):
        raise ApiError(400, "give either prompt or messages")
    if prompt is not None:
        return [int(index) for index in served.tokenizer.encode(prompt)]
    _check_template(fields, served, kwargs, tools)
    messages = [_message(one, i) for i, one in enumerate(given or ())]
    told = {"messages": messages, "template_kwargs": kwargs, "tools": [tool.told for tool in tools]}
    try:
        return list(Request(**told).resolve(served.encode, ()).prompt_ids)  # type: ignore[arg-type]
    except ValueError as error:
        raise refused(error, value) from None


def _shared(fields: Fields, served: Served) -> dict[str, Any]:
    """What all bodies have: arguments of ``Asked``, with those of ``Request`` as ``law``."""
    _check_model(fields, served)
    for name in LABELS:
        fields.take(name, body.text, None)
    fields.take("metadata", body.some_object, None)
    fields.only("store", False)
    fields.only("service_tier", "auto", "default")
    stream = fields.take("stream", body.boolean, False)
    options = fields.take("stream_options", body.some_object, None)
    usage = False
    if options is not None:
        if not stream:
            raise fields.error("stream_options", 'needs "stream": true')
        inner = Fields(options, "stream_options")
        usage = inner.take("include_usage", body.boolean, False)
        inner.only("include_obfuscation", False)
        inner.end()
    rounds = fields.take("dspark", body.boolean, False)
    if rounds and not stream:
        raise fields.error("dspark", 'needs "stream": true')
    numbers = {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "presence_penalty": 0.0,
               "frequency_penalty": 0.0, "repetition_penalty": 1.0}  # fmt: skip
    law: dict[str, Any] = {
        name: fields.take(name, body.number, default) for name, default in numbers.items()
    }
    biases: dict[int, float] = fields.take("logit_bias", _biases, {})
    stops: tuple[str, ...] = fields.take("stop", _stops, ())
    law |= {
        "top_k": fields.take("top_k", body.integer, 0),
        "logit_bias": biases,
        "stop_strings": stops,
        "trace": rounds,
    }
    return {
        "law": law,
        "num_samples": fields.take("n", body.between(1, MOST_SAMPLES), 1),
        "seed": fields.take("seed", body.between(0, 2**64 - 1), None),
        "priority": fields.take("priority", body.between(-(2**31), 2**31), 0),
        "stream": stream,
        "usage": usage,
        "rounds": rounds,
    }


def _check_model(fields: Fields, served: Served) -> None:
    name = fields.take("model", body.text, served.name)
    if name != served.name:
        raise ApiError(
            404,
            f"there is no model {name[:100]!r}: this server has {served.name!r}",
            param="model",
            code="model_not_found",
        )


def _check_template(
    fields: Fields, served: Served, kwargs: Mapping[str, Any], tools: Sequence[Tool]
) -> None:
    """What the template does not look at would be dropped without a word."""
    for name in kwargs:
        if name not in served.variables:
            known = ", ".join(sorted(served.variables)) or "none"
            raise fields.error(
                "chat_template_kwargs",
                f"has {name[:60]!r}, which the chat template does not know (known: {known})",
            )
    if tools and "tools" not in served.variables:
        raise fields.error("tools", "are left out by the model's chat template: leave them out")


def _request(given: dict[str, Any], fields: Fields, value: Mapping[str, Any]) -> Request:
    """A request; all fields of the body have been taken."""
    fields.end(UNSUPPORTED)
    try:
        return Request(**given)
    except ValueError as error:
        raise refused(error, value) from None


def _prompts(value: Any) -> list[str | list[int]]:
    """A text, several, ids, or several lists of them."""
    if isinstance(value, str):
        return [value]
    found = body.some_list(value)
    if all(type(one) is int for one in found):
        return [found]
    if len(found) > MOST_PROMPTS:
        raise ValueError(f"has {len(found)} prompts: give at most {MOST_PROMPTS}")
    for one in found:
        ids = isinstance(one, list) and one and all(type(index) is int for index in one)
        if not (isinstance(one, str) or ids):
            raise ValueError(f"has {one!r:.40}: give texts, or lists of ids")
    return found


def _stops(value: Any) -> tuple[str, ...]:
    """A text, or several."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or len(found) > 16:
        raise ValueError(f"is {value!r:.40}: give a text, or a list of at most 16")
    return tuple(map(body.text, found))


def _biases(value: Any) -> dict[int, float]:
    """Ids, which JSON spells as texts, and numbers."""
    found = {}
    for name, bias in body.some_object(value).items():
        if not (name.isascii() and name.isdecimal() and len(name) < 11):
            raise ValueError(f"has {name!r:.40}: give ids of tokens")
        if int(name) in found:
            raise ValueError(f"has the id {int(name)} twice")
        found[int(name)] = body.number(bias)
    return found


def _response_format(value: Any) -> Grammar | None:
    """``text``, ``json_object`` or ``json_schema``."""
    fields = Fields(value, "response_format")
    kind = fields.need("type", body.text)
    schema = fields.take("json_schema", body.some_object, None)
    fields.end()
    if kind == "json_schema" and schema is not None:
        inner = Fields(schema, "response_format.json_schema")
        inner.need("name", body.text)
        inner.take("description", body.text, "")
        inner.take("strict", body.boolean, False)
        shape: dict[str, Any] = inner.take("schema", body.some_object, {})
        inner.end()
        return Grammar("json_schema", json.dumps(shape))
    if kind not in ("text", "json_object") or schema is not None:
        raise ValueError(
            f'has the type {kind!r:.40}: give "text", "json_object", or "json_schema" with a '
            '"json_schema"'
        )
    return Grammar("json_object") if kind == "json_object" else None


def _message(value: Any, place: int) -> dict[str, Any]:
    """One turn, as the template takes it: the arguments of calls are objects."""
    fields = Fields(value, f"messages[{place}]")
    role = fields.need("role", body.text)
    if role not in ROLES:
        raise fields.error("role", f"is {role!r:.40}: give one of {', '.join(ROLES)}")
    turn: dict[str, Any] = {"role": role, "content": fields.take("content", _content, "")}
    texts = {"tool": ("name", "tool_call_id"), "assistant": ("name", "reasoning_content")}
    for name in texts.get(role, ("name",)):
        told = fields.take(name, body.text, None)
        if told is not None:
            turn[name] = told
    if role == "assistant":
        for name in ("refusal", "audio", "function_call", "annotations"):
            fields.only(name, [])
        calls = fields.take("tool_calls", lambda one: _calls(one, place), None)
        if calls:
            turn["tool_calls"] = calls
    fields.end()
    if value.get("content") is None and not turn.get("tool_calls"):
        raise fields.error("content", "is missing")
    return turn


def _content(value: Any) -> str:
    """A text, or parts of one."""
    parts = [{"type": "text", "text": value}] if isinstance(value, str) else body.some_list(value)
    for one in parts:
        if not isinstance(one, dict) or one.get("type") != "text" or len(one) != 2:
            raise ValueError(f'has {one!r:.60}: give parts {{"type": "text", "text": ...}}')
    return "".join(body.text(one.get("text")) for one in parts)


def _calls(value: Any, place: int) -> list[dict[str, Any]]:
    """Calls that were made, with arguments as objects."""
    found = []
    for i, one in enumerate(body.some_list(value)):
        where = f"messages[{place}].tool_calls[{i}]"
        fields = Fields(one, where)
        number = fields.take("id", body.text, "")
        fields.only("type", "function")
        inner = Fields(fields.need("function", body.some_object), f"{where}.function")
        name = inner.need("name", body.text)
        arguments = inner.take("arguments", body.text, "") or "{}"
        inner.end()
        fields.end()
        try:
            known = body.parse(arguments.encode())
        except ApiError as error:
            raise inner.error("arguments", f"are not understood: {error}") from None
        function = {"name": name, "arguments": known}
        found.append({"id": number, "type": "function", "function": function})
    return found
