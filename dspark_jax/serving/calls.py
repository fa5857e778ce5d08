"""Calls of tools within texts: how models write them, and what takes them out.

How calls are written is the chat template's to say, by the marks that it knows: JSON between tags,
as Hermes and Qwen do, or behind a name, as Mistral does; Gemma's and DeepSeek's own notations; or
JSON that is all of the answer, as Llama does. Marks may be special tokens, which texts show only
where they are asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dspark_jax.serving.reasoning import longest_end


def _json_values(text: str) -> list[Any]:
    """One object, several in a list, or several with ``;`` between them."""
    values = [json.loads(part) for part in re.split(r";\s*(?=\{)", text)]
    return [one for value in values for one in (value if isinstance(value, list) else [value])]


def _named_json(text: str) -> list[Any]:
    """``name{...}`` with ``[ARGS]`` in between, and before it perhaps ``[CALL_ID]`` and an id; of
    older models a list of objects."""
    found = re.fullmatch(
        r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(\{.*\})\s*", text, re.DOTALL
    )
    if found is None:
        return _json_values(text)
    return [{"name": found[1], "arguments": json.loads(found[2])}]


def _bare_keys(text: str) -> list[Any]:
    """``call:name{key:<|"|>text<|"|>,other:[1,true]}``: JSON but for quotes and keys."""
    found = re.fullmatch(r"\s*call:\s*([\w.-]+)\s*(\{.*\})\s*", text, re.DOTALL)
    if found is None:
        raise ValueError("no call")
    parts = found[2].split('<|"|>')  # every second one is a text
    parts[::2] = [re.sub(r"([{,]\s*)([\w.$-]+)\s*:", r'\1"\2":', part) for part in parts[::2]]
    parts[1::2] = map(json.dumps, parts[1::2])
    return [{"name": found[1], "arguments": json.loads("".join(parts))}]


def _invocations(text: str) -> list[Any]:
    """``<｜DSML｜invoke name="...">`` around ``<｜DSML｜parameter name="..." string="true">``."""
    invoke = r'<｜DSML｜invoke name="([^"]*)">(.*?)</｜DSML｜invoke>'
    parameter = r'<｜DSML｜parameter name="([^"]*)" string="(true|false)">(.*?)</｜DSML｜parameter>'
    calls = []
    for name, inner in re.findall(invoke, text, re.DOTALL):
        arguments = {
            key: value if kind == "true" else json.loads(value)
            for key, kind, value in re.findall(parameter, inner, re.DOTALL)
        }
        if re.sub(parameter, "", inner, flags=re.DOTALL).strip():
            raise ValueError("something else within a call")
        calls.append({"name": name, "arguments": arguments})
    if re.sub(invoke, "", text, flags=re.DOTALL).strip():
        raise ValueError("something else beside the calls")
    return calls


@dataclass(frozen=True)
class CallForm:
    """How calls are written.

    Attributes:
        opening: before calls; empty where a call is all of the answer.
        closing: behind them; empty there, too, and where a call ends with the answer or before the
            next one.
        arguments: the name of the arguments in JSON that a grammar makes.
        values: the calls of the text in between, objects with ``name`` and ``arguments``; raises
            ValueError where there are none.
        special: names of tokens within calls that may be special ones.
    """

    opening: str
    closing: str
    arguments: str = "arguments"
    values: Callable[[str], list[Any]] = _json_values
    special: tuple[str, ...] = ()

    @property
    def forced(self) -> CallForm:
        """The form of a call that a grammar makes: JSON, all of the answer in other notations."""
        return self if self.values is _json_values else PLAIN


@dataclass(frozen=True)
class Call:
    """A call of a tool.

    Attributes:
        name: of the tool.
        arguments: a JSON object.
    """

    name: str
    arguments: str


PLAIN = CallForm("", "")
TAGS = CallForm("<tool_call>", "</tool_call>", special=("<tool_call>", "</tool_call>"))
BARE = CallForm(
    "<|tool_call>", "<tool_call|>", values=_bare_keys,
    special=("<|tool_call>", "<tool_call|>", '<|"|>'),
)  # fmt: skip
NAMED = CallForm(
    "[TOOL_CALLS]", "", values=_named_json, special=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
)
DSML, DSML_BEFORE = (
    CallForm(f"<｜DSML｜{name}>", f"</｜DSML｜{name}>", values=_invocations, special=("｜DSML｜",))
    for name in ("tool_calls", "function_calls")
)

# What templates have that teach a form; they may put marks together.
FORMS: tuple[tuple[tuple[str, ...], CallForm], ...] = (
    ((TAGS.opening,), TAGS),
    ((BARE.opening,), BARE),
    ((NAMED.opening,), NAMED),
    (("｜DSML｜", "tool_calls>"), DSML),
    (("｜DSML｜", "function_calls>"), DSML_BEFORE),
)


def call_form(template: str) -> CallForm:
    """The form that a chat template teaches."""
    for marks, form in FORMS:
        if all(mark in template for mark in marks):
            return form
    return CallForm("", "", "parameters" if '"parameters"' in template else "arguments")


def parse_calls(text: str, form: CallForm, names: Sequence[str]) -> list[Call]:
    """The calls that a text is; none where it is something else.

    Args:
        text: between the marks, or all of an answer.
        form: of calls.
        names: of the tools: without marks, any other object is an answer in JSON.
    """
    try:
        values = form.values(text)
    except (ValueError, RecursionError):
        return []
    calls = [_call(value) for value in values]
    known = [one for one in calls if one is not None and (form.opening or one.name in names)]
    return known if len(known) == len(calls) else []


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
        self._plain = False  # an answer without marks that is no JSON

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Further text, and the calls that are complete."""
        self._held += text
        return self._marked() if self._form.opening else self._unmarked()

    def finish(self) -> tuple[str, list[Call]]:
        """What was held back, since more might have followed."""
        held, self._held = self._held, ""
        calls = []
        if self._inside or (not self._form.opening and not self._plain):
            calls = parse_calls(held, self._form, self._names)
        if calls or (self._called and not held.strip() and not self._inside):
            return "", calls
        return (self._form.opening if self._inside else "") + held, []

    def _unmarked(self) -> tuple[str, list[Call]]:
        start = self._held.lstrip()[:1]
        self._plain = self._plain or start not in ("", "{", "[")
        shown, self._held = (self._held, "") if self._plain else ("", self._held)
        return shown, []

    def _marked(self) -> tuple[str, list[Call]]:
        shown, calls = "", []
        closing = self._form.closing or self._form.opening
        while True:
            mark = closing if self._inside else self._form.opening
            before, found, rest = self._held.partition(mark)
            if not found:
                break
            if self._inside:
                parsed = parse_calls(before, self._form, self._names)
                if not parsed:
                    shown += self._form.opening + before + self._form.closing
                calls += parsed
                self._called = self._called or bool(parsed)
            else:
                shown += before.rstrip()
            self._inside, self._held = not self._inside or not self._form.closing, rest
        if not self._inside:
            kept = longest_end(self._held, self._form.opening)
            free = self._held[: len(self._held) - kept].rstrip()
            shown, self._held = shown + free, self._held[len(free) :]
            if self._called and not shown:
                self._held = self._held.lstrip()
        return shown, calls
