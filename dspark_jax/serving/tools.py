"""Tools: what bodies say of them, and the calls that a text has.

How calls are written is the chat template's to say: between tags, as Hermes and Qwen do, or as JSON
that is all of the answer, as Llama does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspark_jax.engine.grammar import Grammar
from dspark_jax.serving import body
from dspark_jax.serving.body import Fields
from dspark_jax.serving.errors import ApiError
from dspark_jax.serving.reasoning import longest_end

MOST_TOOLS = 128
# Of JSON in a call: as models were trained to write it, and nowhere without end.
SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Tool:
    """A function that may be called.

    Attributes:
        name: of it.
        told: the object that the chat template gets.
        parameters: the schema of its arguments.
        strict: whether arguments must follow the schema.
    """

    name: str
    told: Mapping[str, Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False


@dataclass(frozen=True)
class ToolChoice:
    """Whether tools are called.

    Attributes:
        kind: ``auto``, ``none``, ``required`` (some tool) or ``function`` (that of ``name``).
        name: of the tool.
    """

    kind: str = "auto"
    name: str = ""

    @property
    def forced(self) -> bool:
        """Whether the answer is a call."""
        return self.kind in ("required", "function")


@dataclass(frozen=True)
class CallForm:
    """How a call is written: JSON between tags, or, where these are empty, all of the answer.

    Attributes:
        opening: the tag before.
        closing: the tag behind.
        arguments: the name of the arguments in the JSON.
    """

    opening: str
    closing: str
    arguments: str = "arguments"


@dataclass(frozen=True)
class Call:
    """A call of a tool.

    Attributes:
        name: of the tool.
        arguments: a JSON object.
    """

    name: str
    arguments: str


TAGS = CallForm("<tool_call>", "</tool_call>")


def call_form(template: str) -> CallForm:
    """The form that a chat template teaches."""
    if TAGS.opening in template:
        return TAGS
    return CallForm("", "", "parameters" if '"parameters"' in template else "arguments")


def read_tools(value: Any) -> tuple[Tool, ...]:
    """The field ``tools``."""
    found = tuple(_tool(one, i) for i, one in enumerate(body.some_list(value)))
    if len(found) > MOST_TOOLS:
        raise ValueError(f"has {len(found)} tools: give at most {MOST_TOOLS}")
    names = [tool.name for tool in found]
    if len(set(names)) < len(names):
        raise ValueError("has two functions of one name")
    return found


def _tool(value: Any, place: int) -> Tool:
    where = f"tools[{place}]"
    fields = Fields(value, where)
    kind = fields.need("type", body.text)
    if kind != "function":
        raise fields.error("type", f'is {kind!r:.40}: give "function"')
    inner = Fields(fields.need("function", body.some_object), f"{where}.function")
    fields.end()
    name = inner.need("name", body.text)
    if not re.fullmatch(r"[\w.-]{1,64}", name, re.ASCII):
        raise inner.error("name", f"is {name!r:.80}: use letters, digits, _, . and -, at most 64")
    inner.take("description", body.text, "")
    parameters: dict[str, Any] = inner.take("parameters", body.some_object, {})
    strict = inner.take("strict", body.boolean, False)
    inner.end()
    told = {key: one for key, one in value["function"].items() if key != "strict"}
    return Tool(name, {"type": "function", "function": told}, parameters, strict)


def read_choice(value: Any, tools: Sequence[Tool]) -> ToolChoice:
    """The field ``tool_choice``."""
    if value in ("auto", "none"):
        return ToolChoice(value)
    if not tools:
        raise ValueError("needs tools: give some")
    if value == "required":
        return ToolChoice(value)
    if isinstance(value, str):
        raise ValueError(f'is {value!r:.40}: give "auto", "none", "required" or a function')
    fields = Fields(value, "tool_choice")
    fields.only("type", "function")
    inner = Fields(fields.need("function", body.some_object), "tool_choice.function")
    name = inner.need("name", body.text)
    inner.end()
    fields.end()
    if name not in [tool.name for tool in tools]:
        raise ValueError(f"names {name!r:.80}, which is none of the tools")
    return ToolChoice("function", name)


def forced_grammar(form: CallForm, tools: Sequence[Tool], choice: ToolChoice) -> Grammar:
    """What a text follows that is one call.

    Raises:
        ApiError: two tools define something else under one name.
    """
    shapes: list[dict[str, Any]] = []
    shared: dict[str, Any] = {}
    for tool in tools:
        if choice.kind == "function" and tool.name != choice.name:
            continue
        parameters = {"type": "object"} | dict(tool.parameters)
        for name, definition in parameters.pop("$defs", {}).items():
            if shared.setdefault(name, definition) != definition:
                raise ApiError(400, f"two tools define {name!r:.60} in $defs: rename one of them",
                               param="tools")  # fmt: skip
        properties = {"name": {"enum": [tool.name]}, form.arguments: parameters}
        shapes.append(
            {
                "type": "object",
                "properties": properties,
                "required": [*properties],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = shapes[0] if len(shapes) == 1 else {"anyOf": shapes}
    if shared:
        schema = {**schema, "$defs": shared}
    if not form.opening:
        return Grammar("json_schema", json.dumps(schema))
    schema = {**schema, "x-guidance": SPACES}
    start = f'"{form.opening}" "\\n"? call "\\n"? "{form.closing}"'
    return Grammar("lark", f"start: {start}\ncall: %json {json.dumps(schema)}\n")


def parse_calls(text: str, form: CallForm, names: Sequence[str]) -> list[Call]:
    """The calls that a text is; none where it is something else.

    Args:
        text: between tags, or all of an answer.
        form: of calls.
        names: of the tools: without tags, any other object is an answer in JSON.
    """
    parts = [text] if form.opening else re.split(r";\s*(?=\{)", text)
    calls: list[Call] = []
    for part in parts:
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            return []
        for one in value if isinstance(value, list) else [value]:
            call = _call(one)
            if call is None or (not form.opening and call.name not in names):
                return []
            calls.append(call)
    return calls


def _call(value: Any) -> Call | None:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):  # some models write them as a text
        return Call(value["name"], arguments)
    if not isinstance(arguments, dict):
        return None
    return Call(value["name"], json.dumps(arguments, ensure_ascii=False))


class CallReader:
    """Takes the calls out of a text that arrives in pieces.

    White space around calls is dropped.
    """

    def __init__(self, form: CallForm, names: Sequence[str]) -> None:
        self._form, self._names = form, names
        self._held = ""
        self._inside = self._called = False
        self._plain = False  # an answer without tags that is no JSON

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Further text, and the calls that are complete."""
        self._held += text
        return self._tagged() if self._form.opening else self._untagged()

    def finish(self) -> tuple[str, list[Call]]:
        """What was held back, since more might have followed."""
        held, self._held = self._held, ""
        calls = []
        if self._inside or (not self._form.opening and not self._plain):
            calls = parse_calls(held, self._form, self._names)
        if calls or (self._called and not held.strip() and not self._inside):
            return "", calls
        return (self._form.opening if self._inside else "") + held, []

    def _untagged(self) -> tuple[str, list[Call]]:
        start = self._held.lstrip()[:1]
        self._plain = self._plain or start not in ("", "{", "[")
        shown, self._held = (self._held, "") if self._plain else ("", self._held)
        return shown, []

    def _tagged(self) -> tuple[str, list[Call]]:
        shown, calls = "", []
        while True:
            mark = self._form.closing if self._inside else self._form.opening
            before, found, rest = self._held.partition(mark)
            if not found:
                break
            if self._inside:
                parsed = parse_calls(before, self._form, self._names)
                if not parsed:
                    shown += self._form.opening + before + mark
                calls += parsed
                self._called = self._called or bool(parsed)
            else:
                shown += before.rstrip()
            self._inside, self._held = not self._inside, rest
        if not self._inside:
            kept = longest_end(self._held, self._form.opening)
            free = self._held[: len(self._held) - kept].rstrip()
            shown, self._held = shown + free, self._held[len(free) :]
            if self._called and not shown:
                self._held = self._held.lstrip()
        return shown, calls
