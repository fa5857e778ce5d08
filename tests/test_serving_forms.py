"""Texts that arrive in pieces: thoughts and calls are taken out of them wherever the cuts are."""

import itertools
import json

import pytest

from dspark_jax.serving.marks import token_bytes
from dspark_jax.serving.reasoning import THINK, ThoughtReader, thought_of
from dspark_jax.serving.tools import TAGS, Call, CallForm, CallReader, call_form, parse_calls

WEATHER = Call("weather", '{"city": "Ulm"}')
TIME = Call("time", "{}")
JSON = CallForm("", "", "parameters")


def cuts(text):
    """The text in pieces: letters, the whole, and in two at every place."""
    yield list(text)
    for at in range(len(text)):
        yield [text[:at], text[at:]]


def read_thought(pieces, opened=False):
    reader = ThoughtReader(THINK, opened)
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


def test_hostile_calls_are_text():
    for text in ("[" * 100_000, '{"name": 1}', '{"name": "time", "arguments": [1]}', "1", "null"):
        assert parse_calls(text, TAGS, ()) == []


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
