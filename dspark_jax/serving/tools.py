"""Tools: what bodies say of them, and the grammar of a call that must be."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspark_jax.engine.grammar import Grammar
from dspark_jax.serving import body
from dspark_jax.serving.body import Fields
from dspark_jax.serving.calls import CallForm
from dspark_jax.serving.errors import ApiError

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

    Args:
        form: in JSON.
        tools: that may be called.
        choice: of them.

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
