"""Files of conversations as people have them: forms, encodings, and what becomes of bad lines."""

import codecs
import gzip
import json
import re

import pytest

from dspark_jax.checkpoints.conversations import (
    read_answered,
    read_conversations,
    read_questions,
)
from dspark_jax.checkpoints.lines import account_for, every_line, json_lines
from dspark_jax.evaluation.prompts import read_prompts

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b\u2028c\x85d"}
GOOD = {"messages": [USER, ANSWER]}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"at": "sea"}}}


@pytest.fixture
def write(tmp_path):
    def write_file(*rows):
        path = tmp_path / "data.jsonl"
        texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return path

    return write_file


def turns_of(write, row):
    """The turns of one line."""
    (found,) = read_conversations(write(row))
    return list(found.turns)


# Forms of a line.


def test_every_form_is_read_into_one(write):
    turns = [{"role": "system", "content": "s"}, USER, ANSWER]
    share = [
        {"from": "system", "value": "s", "weight": 1},
        {"from": "human", "value": "a"},
        {"from": "gpt", "value": ANSWER["content"]},
    ]
    path = write(
        {"prompt": "a"},
        {"turns": ["a", "b"], "domain": "chat"},
        "",
        {"conversations": turns, "response_ids": [3, 4], "finish": "length"},
        {"conversations": share},
        {"messages": turns, "prompt": "ignored"},
    )
    read = read_conversations(path)
    plain = [[USER], [USER, USER | {"content": "b"}], turns, turns, turns]
    assert [list(one.turns) for one in read] == plain
    assert [one.origin for one in read] == [f"{path}:{line}" for line in (1, 2, 4, 5, 6)]
    assert [one.place for one in read] == list(range(5))
    assert [one.response_ids for one in read] == [None, None, (3, 4), None, None]
    assert [one.finished for one in read] == [True, True, False, True, True]
    assert read_conversations(path, limit=2) == read[:2]


@pytest.mark.parametrize(
    "row",
    [
        {"conversation": [USER, {"role": "assistant", "content": "b"}]},
        {"turns": [USER, {"from": "gpt", "value": "b"}]},
        {"conversations": [], "messages": [USER, {"role": "gpt", "content": "b"}]},
        {"conversations": None, "messages": [USER, {"from": "chatgpt", "value": "b"}]},
        {"messages": [{"from": "Human", "content": "a"}, {"role": "Bard", "value": "b"}]},
        {"messages": [USER, {"role": "assistant", "content": "b", "value": None, "from": None}]},
        {"messages": [USER, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]},
        {"messages": [USER, ANSWER | {"content": "b", "tool_calls": []}], "tools": "[]"},
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "response": "b", "system": " "},
        {"question": "a", "answer": "b", "id": 3},
        {"instruction": "a", "input": "", "output": "b"},
        {"prompt": [USER], "completion": [{"role": "assistant", "content": "b"}]},
    ],
)
def test_other_spellings_are_read_too(write, row):
    assert turns_of(write, row) == [USER, {"role": "assistant", "content": "b"}]


def test_what_goes_with_a_message_is_read(write):
    system = {"role": "system", "content": "s"}
    assert turns_of(write, {"system": "s", "prompt": "a"}) == [system, USER]
    assert turns_of(write, {"system": "t", "messages": [system, USER]}) == [system, USER]
    assert turns_of(write, {"messages": [system | {"role": "developer"}, USER]}) == [system, USER]
    (turn,) = turns_of(write, {"instruction": "sum up", "input": "a text"})
    assert turn["content"] == "sum up\n\na text"
    parts = [{"type": "text", "text": "a"}, "b"]
    assert turns_of(write, {"messages": [USER | {"content": parts}]})[0]["content"] == "ab"
    for several in ({"output": "b", "response": "c"}, {"answer": 42}):
        assert turns_of(write, {"prompt": "a"} | several) == [USER]
    for key in ("reasoning_content", "thinking"):
        thought = turns_of(write, {"messages": [USER, ANSWER | {key: "hm"}]})[1]
        assert thought == ANSWER | {"reasoning_content": "hm"}


@pytest.mark.parametrize(
    "asked",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {
            "role": "assistant",
            "tool_calls": [
                {"function": {"name": "weather", "arguments": '{"at": "sea"}'}, "id": None}
            ],
        },
        {"role": "assistant", "function_call": CALL["function"]},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "tool_call", "value": json.dumps([CALL["function"]])},
    ],
)
def test_calls_of_tools_are_read_in_every_form(write, asked):
    told = {"role": "tool", "content": "sunny"}
    for name in ("tool", "function", "observation"):
        row = {"messages": [USER, asked, {"from": name, "value": "sunny"}, ANSWER]}
        (found,) = read_conversations(write(row | {"tools": json.dumps([{"name": "weather"}])}))
        call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
        assert list(found.turns) == [USER, call, told, ANSWER]
        assert (found.tools, found.uses_tools) == (({"name": "weather"},), True)
    named = told | {"tool_call_id": "7", "name": "weather"}
    assert turns_of(write, {"messages": [USER, named]})[1] == named


BAD = [
    ("{", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("{" + f'"id": {"9" * 5000}' + "}", "not JSON"),
    ([], "must be a JSON object"),
    ({}, 'needs "conversations"'),
    ({"prompt": 3}, '"prompt" must be a list of turns'),
    ({"turns": []}, '"turns" is empty'),
    ({"turns": ["a", None]}, "must be an object"),
    ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
    ('{"messages": [{"role": "user", "content": "hi \\ude00"}]}', "half of a surrogate pair"),
    ({"conversations": []}, '"conversations" is empty'),
    ({"messages": "ab"}, "list of turns"),
    ({"conversations": [USER, {"role": "assistant"}]}, 'strings "role" and "content"'),
    ({"conversations": [USER | {"content": 3}, ANSWER]}, 'strings "role" and'),
    ({"conversations": [USER | {"content": None}, ANSWER]}, 'strings "role" and'),
    ({"conversations": [3, ANSWER]}, "must be an object"),
    ({"messages": [USER | {"role": "critic"}]}, "the role of a turn is 'critic'"),
    ({"messages": [USER | {"role": None}]}, "the role of a turn is None"),
    ({"messages": [USER, USER | {"role": "system"}]}, "system turn must be the first"),
    ({"messages": [USER | {"content": [{"type": "image"}]}]}, "of the type 'image', and not text"),
    ({"messages": [USER, {"from": "function_call", "value": "{"}]}, "a call is not JSON"),
    ({"messages": [USER, ANSWER | {"tool_calls": [{"id": "1"}]}]}, 'object with "name"'),
    ({"messages": [USER, ANSWER], "tools": {"name": "f"}}, '"tools" must be a list'),
    ({"messages": [USER, ANSWER], "system": 3}, '"system" must be a string'),
    ({"messages": [USER, ANSWER], "response_ids": "ab"}, "list of token ids"),
    ({"messages": [USER, ANSWER], "response_ids": [1, 2.5]}, "list of token ids"),
    ({"messages": [USER, ANSWER], "response_ids": [True]}, "list of token ids"),
    ({"messages": [USER, ANSWER, USER], "response_ids": [1]}, "the last turn is the user's"),
    ({"messages": [USER, ANSWER], "finish": 1}, '"finish" must be a string'),
]


@pytest.mark.parametrize(("row", "expected"), BAD, ids=range(len(BAD)))
def test_a_line_that_is_no_conversation_is_left_out_and_said(write, caplog, row, expected):
    path = write(GOOD, "", row, GOOD)
    found = read_conversations(path)
    assert [(one.origin, one.place) for one in found] == [(f"{path}:1", 0), (f"{path}:4", 2)]
    (said,) = caplog.messages
    assert re.fullmatch(
        rf"{re.escape(str(path))}: 1 of 3 lines left out: .*{re.escape(expected)}.* \(line 3\)",
        said,
    )
    with pytest.raises(ValueError, match=rf"2 of 2 lines cannot be .*{re.escape(expected)}"):
        read_conversations(write(row, row))


def test_more_than_a_tenth_is_an_error_and_one_line_never(write, caplog):
    assert len(read_conversations(write(*[GOOD] * 18, "{", {}))) == 18
    assert "2 of 20 lines left out: not JSON" in caplog.text
    with pytest.raises(ValueError, match="2 of 19 lines cannot be used") as refusal:
        read_conversations(write(*[GOOD] * 17, "{", {}))
    assert re.search(r"not JSON.* \(line 18\); needs .* \(line 19\)", str(refusal.value))
    bad = [(f"f:{place}", f"reason {place % 7}") for place in range(1, 15)]
    account_for([], 0)
    with pytest.raises(ValueError, match=r"14 of 20 .*; and other reasons$"):
        account_for(bad, 20)
    account_for([(f"f:{place}", "this") for place in range(1, 9)], 80)
    assert "f: 8 of 80 lines left out: this (lines 1, 2, 3, 4, 5 and 3 more)" in caplog.text


# What is used of a conversation.


def test_training_begins_with_a_question_and_ends_with_an_answer(write, caplog):
    system = {"role": "system", "content": "s"}
    first = {"messages": [system, ANSWER, USER, ANSWER, USER]}
    found = read_answered(write(GOOD, first, {"conversations": [ANSWER, USER, ANSWER]}))
    assert [list(one.turns) for one in found] == [
        [USER, ANSWER], [system, USER, ANSWER], [USER, ANSWER],
    ]  # fmt: skip
    assert "2 begin with an answer to nothing, which is cut off (lines 2, 3)" in caplog.text


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a"}, "has no answer: dspark prepare"),
        ({"messages": [ANSWER, USER]}, "nobody asks"),
        ({"messages": [USER | {"role": "system"}, ANSWER]}, "nobody asks"),
        ({"messages": [{"role": "tool", "content": "t"}, ANSWER]}, "nobody asks"),
        ({"messages": [USER | {"role": "system"}]}, "has no answer"),
        ({"prompt": "a", "completion": " "}, "its answers are empty"),
    ],
)
def test_training_needs_answers_to_questions(write, caplog, row, expected):
    assert len(read_answered(write(GOOD, row))) == 1
    assert re.search(rf"1 of 2 lines left out: {expected}.* \(line 2\)", caplog.text)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"turns": ["a", " "]}, "the prompt is empty"),
        ({"messages": [USER | {"role": "system"}]}, "the prompt is empty"),
        ({"messages": [USER, ANSWER | {"tool_calls": [CALL]}]}, "has tools"),
        ({"messages": [USER, ANSWER], "tools": [CALL]}, "has tools"),
    ],
)
def test_there_must_be_something_to_answer(write, caplog, row, expected):
    rows = {"prompt": "b"}, row, {"messages": [ANSWER, USER, ANSWER]}
    found = read_questions(write(*rows))
    assert [one.place for one in found] == [0, 2]
    assert list(found[1].turns) == [USER]
    assert re.search(rf"1 of 3 lines left out: {expected}.* \(line 2\)", caplog.text)


def test_a_file_of_nothing_is_an_error(write, tmp_path):
    for path in (tmp_path, tmp_path / "none.jsonl", write("", "[]")):
        with pytest.raises(ValueError, match=re.escape(str(path))):
            read_answered(path)
    for empty in ("", "[]"):
        with pytest.raises(ValueError, match="no conversations in it"):
            read_questions(write(empty))
    for read in (read_questions, read_prompts):
        with pytest.raises(ValueError, match="limit is 0: read at least 1 line"):
            read(write({"prompt": "a"}), limit=0)


# Files.


ROWS = [{"prompt": "a\u2028ä"}, {"prompt": "b"}]
TEXT = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        codecs.BOM_UTF8 + TEXT.encode(),
        codecs.BOM_UTF8 + b"\n\n" + TEXT.encode(),
        TEXT.encode("utf-16"),
        codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", ",\n").encode(),
        json.dumps(ROWS).encode(),
        codecs.BOM_UTF8 + json.dumps(ROWS, indent=2).encode(),
        b"[\n" + TEXT.replace("\n", ",\n").encode() + b"]\n",
    ],
    ids=range(11),
)
def test_text_is_read_however_it_is_kept(tmp_path, content):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    assert [value for _, value in json_lines(path)] == ROWS
    assert [prompt.text for prompt in read_prompts(path)] == ["a\u2028ä", "b"]


def test_one_object_over_several_lines_is_one_row(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(GOOD, indent=2))
    assert [line.value for line in every_line(path)] == [GOOD]
    path.write_text(json.dumps(GOOD, indent=2) * 2)
    with pytest.raises(ValueError, match=r"lines cannot be used, .*not JSON"):
        read_conversations(path)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (gzip.compress(TEXT.encode(), mtime=0), "a gzip file, and not JSON lines: unpack it"),
        (b"PK\x03\x04rest", "a zip file"),
        (b"PAR1\x00\x01", "a Parquet file, and not JSON lines: write its rows as JSON"),
        (codecs.BOM_UTF16_LE + b"\x00\xd8{", "begins as UTF-16 and goes on"),
    ],
)
def test_what_is_no_text_is_refused_in_words(tmp_path, content, expected):
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    for read in (read_conversations, read_prompts):
        with pytest.raises(ValueError, match=re.escape(f"{path}: {expected}")):
            read(path)


def test_bytes_that_are_no_text_are_one_bad_line(tmp_path, caplog):
    path = tmp_path / "p.jsonl"
    path.write_bytes(TEXT.encode() + b'{"prompt": "caf\xe9"}\n' + TEXT.encode())
    assert len(read_questions(path)) == 4
    assert "1 of 5 lines left out: not UTF-8 (byte 0xe9) (line 3)" in caplog.text
    with pytest.raises(ValueError, match=r"p\.jsonl:3: not UTF-8 \(byte 0xe9\)"):
        read_prompts(path)
    path.write_text('{"prompt": "hi \\ud83d"}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl:1: the prompt holds half of a surrogate pair"):
        read_prompts(path)
