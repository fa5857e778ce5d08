"""Texts that arrive in pieces: thoughts and calls are taken out of them wherever the cuts are."""

import itertools
import json
from typing import ClassVar

import pytest

from dspark_jax.engine.text import TextStream, special_ids
from dspark_jax.serving import calls as forms
from dspark_jax.serving import reasoning
from dspark_jax.serving.calls import TAGS, Call, CallForm, CallReader, call_form, parse_calls
from dspark_jax.serving.marks import token_bytes
from dspark_jax.serving.reasoning import THINK, ThoughtReader, thought_of

WEATHER = Call("weather", '{"city": "Ulm"}')
TIME = Call("time", "{}")
JSON = CallForm("", "", "parameters")


def cuts(text):
    """The text in pieces: letters, the whole, and in two at every place."""
    yield list(text)
    for at in range(len(text)):
        yield [text[:at], text[at:]]


def read_thought(pieces, opened=False, thought=THINK):
    reader = ThoughtReader(thought, f"a {thought.opening}\n" if opened else "a")
    found = [reader.push(piece) for piece in pieces] + [reader.finish()]
    return tuple("".join(part) for part in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("text", "opened", "thought", "answer"),
    [
        ("<think>\na < b\n</think>\n\nyes\n", False, "a < b", "yes\n"),
        ("hm </thi </think> no", True, "hm </thi", "no"),
        (" <thin air", False, "", " <thin air"),
        ("<think>without an end ", False, "without an end", ""),
        ("<think>\n\n</think>\n\nyes", False, "", "yes"),
        ("yes <think>no</think>", False, "", "yes <think>no</think>"),
        ("<thi", False, "", "<thi"),
    ],
)
def test_thoughts_are_split_off(text, opened, thought, answer):
    for pieces in cuts(text):
        assert read_thought(pieces, opened) == (thought, answer), pieces


@pytest.mark.parametrize(
    ("thought", "text"),
    [
        (reasoning.CHANNEL, "<|channel>thought\nIt is 2 + 2.\n<channel|>Four."),
        (reasoning.BRACKETS, "[THINK]It is 2 + 2.[/THINK]Four."),
    ],
)
def test_thoughts_between_other_marks(thought, text):
    for pieces in cuts(text):
        assert read_thought(pieces, thought=thought) == ("It is 2 + 2.", "Four."), pieces
    rest = text.removeprefix(thought.opening)
    assert read_thought([rest], True, thought) == ("It is 2 + 2.", "Four.")
    assert thought_of(f"{{% if {thought.closing!r} in text %}}") is thought


def read_calls(pieces, form=TAGS, names=("weather", "time")):
    reader = CallReader(form, names)
    found = [reader.push(piece) for piece in pieces] + [reader.finish()]
    texts, calls = zip(*found, strict=True)
    return "".join(texts), [*itertools.chain(*calls)]


def tagged(name, arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "answer", "calls"),
    [
        (tagged("weather", {"city": "Ulm"}), "", [WEATHER]),
        (f"I look.\n{tagged('weather', {'city': 'Ulm'})}\n{tagged('time', {})}\n", "I look.",
         [WEATHER, TIME]),
        ("a <tool box", "a <tool box", []),
        ("<tool_call>not json</tool_call>", "<tool_call>not json</tool_call>", []),
        ("<tool_call>{\"name\": \"time\"}", "", [TIME]),
        ("<tool_call>{\"name\"", "<tool_call>{\"name\"", []),
        ("plain\n", "plain\n", []),
    ],
)  # fmt: skip
def test_calls_between_tags_are_taken_out(text, answer, calls):
    for pieces in cuts(text):
        assert read_calls(pieces) == (answer, calls), pieces


@pytest.mark.parametrize(
    ("text", "answer", "calls"),
    [
        ('{"name": "weather", "parameters": {"city": "Ulm"}}', "", [WEATHER]),
        ('[{"name": "weather", "arguments": {"city": "Ulm"}}, {"name": "time"}]', "",
         [WEATHER, TIME]),
        ('{"name": "weather", "parameters": {"city": "Ulm"}}; {"name": "time"}', "",
         [WEATHER, TIME]),
        ('{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}', []),
        ("{half", "{half", []),
        ("It is late.", "It is late.", []),
    ],
)  # fmt: skip
def test_answers_that_are_calls(text, answer, calls):
    for pieces in cuts(text):
        assert read_calls(pieces, JSON) == (answer, calls), pieces


# As such models write them, two calls each.
DSML = """<｜DSML｜tool_calls>
<｜DSML｜invoke name="weather">
<｜DSML｜parameter name="city" string="true">Ulm</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="find">
<｜DSML｜parameter name="words" string="false">["a: b", {"c": -1.5}]</｜DSML｜parameter>
<｜DSML｜parameter name="all" string="false">true</｜DSML｜parameter>
</｜DSML｜invoke>
</｜DSML｜tool_calls>"""
OTHERS = {
    "gemma": (forms.BARE, '<|tool_call>call:weather{city:<|"|>Ulm<|"|>}<tool_call|>'
              '<|tool_call>call:find{words:[<|"|>a: b<|"|>,{c:-1.5}],all:true}<tool_call|>'),
    "mistral": (forms.NAMED, '[TOOL_CALLS]weather[ARGS]{"city": "Ulm"}'
                '[TOOL_CALLS]find[CALL_ID]a1b2[ARGS]{"words": ["a: b", {"c": -1.5}], "all": true}'),
    "mistral 0.3": (forms.NAMED, '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Ulm"}}'
                    ', {"name": "find", "arguments": {"words": ["a: b", {"c": -1.5}], '
                    '"all": true}, "id": "abcdefghi"}]'),
    "deepseek": (forms.DSML, DSML),
    "deepseek 3": (forms.DSML_BEFORE, DSML.replace("tool_calls", "function_calls")),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_calls_in_other_notations_are_taken_out(kind):
    form, text = OTHERS[kind]
    find = Call("find", '{"words": ["a: b", {"c": -1.5}], "all": true}')
    for pieces in cuts(text):
        assert read_calls(["I look. ", *pieces], form) == ("I look.", [WEATHER, find]), pieces
    assert read_calls([text, "\n"], form) == ("", [WEATHER, find])
    assert form.forced is forms.PLAIN
    used = {forms.BARE: "<|tool_call>", forms.NAMED: "[TOOL_CALLS]"}
    dsml = f"{{% set dsml = '｜DSML｜' %}} <{form.opening.split('｜')[-1]}"
    assert call_form(used.get(form, dsml)) is form


@pytest.mark.parametrize(
    "text",
    [
        '<|tool_call>call:weather{city:<|"|>Ulm}<tool_call|>',
        "<|tool_call>weather<tool_call|>",
        "[TOOL_CALLS]weather[ARGS]{city}",
        "<｜DSML｜tool_calls>no call</｜DSML｜tool_calls>",
        DSML.replace(' string="false"', ""),
    ],
)
def test_calls_that_are_none_are_text(text):
    form = next(form for form, _ in OTHERS.values() if text.startswith(form.opening))
    for pieces in cuts(text):
        assert read_calls(pieces, form) == (text, []), pieces


class Named:
    """Tokens of one letter, and special ones of more."""

    added_tokens_encoder: ClassVar = {"<|channel>": 1, "<channel|>": 2, "<turn|>": 3}

    def decode(self, ids, skip_special_tokens=False):
        names = {index: name for name, index in self.added_tokens_encoder.items()}
        return "".join(
            "" if skip_special_tokens and token in names else names.get(token, chr(token))
            for token in ids
        )


def test_texts_show_the_special_tokens_that_they_are_asked_for():
    ids = special_ids(Named(), (*reasoning.CHANNEL.special, "plain"))
    assert ids == (1, 2)
    tokens = [1, *b"thought\nhm", 2, *b"yes", 3]
    for stream, text in (
        (TextStream(Named(), frozenset(ids)), "<|channel>thought\nhm<channel|>yes"),
        (TextStream(Named()), "thought\nhmyes"),
    ):
        one_by_one = [stream.push([token]) for token in tokens[:5]]
        assert "".join([*one_by_one, stream.push(tokens[5:]), stream.finish()]) == text


def test_hostile_calls_are_text():
    for text in ("[" * 100_000, '{"name": 1}', '{"name": "time", "arguments": [1]}', "1", "null"):
        assert parse_calls(text, TAGS, ()) == []
    for form, text in OTHERS.values():
        deep = text.replace("true", "[" * 100_000)
        assert parse_calls(deep.removeprefix(form.opening), form, ()) == []


def test_templates_say_how():
    assert call_form("... <tool_call> ...") == TAGS
    assert call_form('respond with {"name": ..., "parameters": ...}') == JSON
    assert thought_of("{% if '</think>' in content %}") == THINK
    assert thought_of("plain") is None


class Bytes:
    """Tokens of which each is one byte, under the names of two kinds of vocabularies."""

    def __init__(self, names):
        self._names = names

    def decode(self, ids):
        return "�"

    def convert_ids_to_tokens(self, index):
        return self._names[index]


def test_half_characters_have_bytes():
    tokenizer = Bytes(["ä½", "Ġ", "<0xE4>"])
    assert [token_bytes(tokenizer, index) for index in range(3)] == [[0xE4, 0xBD], [0x20], [0xE4]]
