"""Files of conversations: every accepted form of a line, read into one.

A line is a JSON object with one of

    "conversations"   turns with "role" and "content", or with "from" and "value" as in ShareGPT
    "messages"        the same, and so is "conversation"
    "turns"           the user's messages alone, in their order, or turns
    "prompt"          one message of the user, or turns; "instruction" (behind which come "input"
                      or "context") and "question" are the same

(the first of these that is there, and not empty, counts), where the message has an answer in
"completion", "response", "output" or "answer" if exactly one of them is there; and perhaps with
"system", a string, and "tools", as chat templates take them. Where the last turn is the target's
own answer, the line may also have ``response_ids``, the answer's own token ids without the token
that ends it, and ``finish``: ``"stop"`` (the default) where the answer ended by itself, anything
else where it was cut; and ``end_id``, the id that ended it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required, TypedDict

from dspark_jax.characters import is_text
from dspark_jax.checkpoints.lines import account_for, every_line, places_of

logger = logging.getLogger(__name__)


class Turn(TypedDict, total=False):
    """One turn, as chat templates take it.

    Attributes:
        role: system, user, assistant or tool.
        content: what was said; empty where an answer consists of calls.
        reasoning_content: the thought before an answer.
        tool_calls: objects with "type" and "function", which has "name" and "arguments", an object.
        tool_call_id: of the call that a tool's turn answers.
        name: of that tool.
    """

    role: Required[str]
    content: Required[str]
    reasoning_content: str
    tool_calls: list[dict[str, Any]]
    tool_call_id: str
    name: str


LISTS = ("conversations", "messages", "conversation", "turns")
QUESTIONS, CONTEXTS = ("prompt", "instruction", "question"), ("input", "context")
ANSWERS = ("completion", "response", "output", "answer")
FORMS = '"conversations" or "messages" (turns), "turns" (strings) or "prompt" (a string)'
SPEAKERS = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"),
    "tool": ("tool", "function", "observation", "tool_response", "ipython"),
}
ROLES = {name: role for role, names in SPEAKERS.items() for name in names}
CALLERS = ("function_call", "tool_call")  # an assistant's turns that are JSON
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class Conversation:
    """One line of a file.

    Attributes:
        turns: at least one; a system turn comes first or not at all.
        origin: where it was read (``FILE:LINE``), for error messages.
        response_ids: token ids of the last turn, an answer, without the token that ends it; None
            where only the text is known.
        finished: whether that answer ended by itself.
        tools: that the assistant might call, as chat templates take them.
        place: among the lines of its file, from 0, whichever of them can be used.
        end_id: the id at which the answer ended, where that is known.
    """

    turns: tuple[Turn, ...]
    origin: str
    response_ids: tuple[int, ...] | None = None
    finished: bool = True
    tools: tuple[Any, ...] = ()
    place: int = 0
    end_id: int | None = None

    @property
    def uses_tools(self) -> bool:
        """Whether anybody calls tools, or could."""
        called = any("tool_calls" in turn or turn["role"] == "tool" for turn in self.turns)
        return called or bool(self.tools)


Use = Callable[[Conversation], Conversation]


def read_conversations(
    path: str | Path, limit: int | None = None, use: Use = lambda conversation: conversation
) -> list[Conversation]:
    """The conversations of a file in their order, answered or not. Lines that are none are left
    out, counted and said.

    Args:
        path: the file.
        limit: read no more lines than this; None reads all.
        use: what is wanted of a conversation; raises ValueError where it cannot be used.

    Raises:
        ValueError: the file is not readable or holds no line, or more than a tenth of its lines
            (and more than one) cannot be used, or all of them; the message names lines and reasons.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: read at least 1 line of {path}")
    found, bad, place = [], list[tuple[str, str]](), -1
    for place, line in enumerate(itertools.islice(every_line(path), limit)):
        try:
            if line.problem:
                raise ValueError(line.problem)
            found.append(use(_conversation(line.value, line.origin, place)))
        except ValueError as error:
            bad.append((line.origin, str(error)))
    if place < 0:
        raise ValueError(f"{path}: no conversations in it; write one JSON object a line")
    account_for(bad, place + 1)
    return found


def read_answered(path: str | Path) -> list[Conversation]:
    """The conversations of a file to train on, from the user's first turn to the last answer.

    Raises:
        ValueError: as :func:`read_conversations`; a line without an answer is a bad one.
    """
    cut = []

    def use(conversation: Conversation) -> Conversation:
        turns = list(conversation.turns)
        start = turns[0]["role"] == "system"
        roles = [turn["role"] for turn in turns]
        while roles[start:] and roles[-1] != "assistant":
            del turns[-1], roles[-1]
        if not roles[start:]:
            raise ValueError("has no answer: dspark prepare has the target write one")
        asked = next((i for i, role in enumerate(roles) if i >= start and role != "assistant"), -1)
        if asked < 0 or roles[asked] != "user":
            raise ValueError("nobody asks: the first turn must be the user's")
        said = (turn["content"].strip() or "tool_calls" in turn for turn in turns[asked:]
                if turn["role"] == "assistant")  # fmt: skip
        if conversation.response_ids is None and not any(said):
            raise ValueError("its answers are empty")
        if asked > start:
            cut.append(conversation.origin.rpartition(":")[2])
        return dataclasses.replace(conversation, turns=tuple(turns[:start] + turns[asked:]))

    found = read_conversations(path, use=use)
    if cut:
        told = "%s: %d begin with an answer to nothing, which is cut off (%s)"
        logger.warning(told, path, len(cut), places_of(cut))
    return found


def read_questions(path: str | Path, limit: int | None = None) -> list[Conversation]:
    """The conversations of a file without the answers: a system turn or none, then the user's.

    Raises:
        ValueError: as :func:`read_conversations`; a line with nothing to answer, or with tools,
            is a bad one.
    """

    def use(conversation: Conversation) -> Conversation:
        if conversation.uses_tools:
            raise ValueError("has tools, and nobody is here to run them")
        turns = tuple(turn for turn in conversation.turns if turn["role"] != "assistant")
        questions = [turn["content"] for turn in turns if turn["role"] == "user"]
        if not questions or not all(map(str.strip, questions)):
            raise ValueError("the prompt is empty: write some text")
        return Conversation(turns, conversation.origin, place=conversation.place)

    return read_conversations(path, limit, use)


def _conversation(row: Any, origin: str, place: int) -> Conversation:
    """One line in the one form."""
    if not isinstance(row, dict):
        raise ValueError(f"must be a JSON object with {FORMS}")
    turns = _turns(row)
    if turns[0]["role"] != "system":
        turns = [*_system(row), *turns]
    if any(turn["role"] == "system" for turn in turns[1:]):
        raise ValueError("a system turn must be the first turn")
    ids, finish = row.get("response_ids"), row.get("finish", "stop")
    end_id = row.get("end_id")
    if ids is not None:
        if not (isinstance(ids, list) and all(type(id) is int for id in ids)):
            raise ValueError('"response_ids" must be a list of token ids')
        if turns[-1]["role"] != "assistant":
            raise ValueError(
                f'has "response_ids", but the last turn is the {turns[-1]["role"]}\'s: they are '
                "the token ids of an answer"
            )
    if not isinstance(finish, str):
        raise ValueError('"finish" must be a string, "stop" where the answer ended by itself')
    tools = _json(row.get("tools") or [], '"tools"')
    if not isinstance(tools, list):
        raise ValueError('"tools" must be a list')
    if not is_text(json.dumps([turns, tools], ensure_ascii=False)):
        raise ValueError("holds half of a surrogate pair, which is no character")
    if not (end_id is None or type(end_id) is int):
        raise ValueError('"end_id" must be the token id that ended the answer')
    known = None if ids is None else tuple(ids)
    finished = finish == "stop"
    return Conversation(tuple(turns), origin, known, finished, tuple(tools), place, end_id)


def _system(row: dict[str, Any]) -> list[Turn]:
    """The system turn that a line has beside its turns; at most one."""
    text = row.get("system")
    if not isinstance(text, str | None):
        raise ValueError('"system" must be a string')
    return [{"role": "system", "content": text}] if text and text.strip() else []


def _turns(row: dict[str, Any]) -> list[Turn]:
    """The turns of a line, whatever its form; at least one."""
    for key in LISTS:
        if row.get(key):
            texts = row[key] if key == "turns" and isinstance(row[key], list) else []
            if texts and all(isinstance(text, str) for text in texts):
                return [{"role": "user", "content": text} for text in texts]
            return _listed(row[key], key)
    key = next((key for key in QUESTIONS if row.get(key)), "")
    if not key:
        empty = [key for key in (*LISTS, *QUESTIONS) if key in row]
        raise ValueError(f'"{empty[0]}" is empty' if empty else f"needs {FORMS}")
    asked = _said(row[key], key, "user")
    for context in CONTEXTS:
        text = row.get(context)
        if key == "instruction" and isinstance(text, str) and text.strip():
            asked[-1]["content"] += f"\n\n{text}"
    answers = [key for key in ANSWERS if isinstance(row.get(key), str) or _has_turns(row.get(key))]
    return asked + (_said(row[answers[0]], answers[0], "assistant") if len(answers) == 1 else [])


def _said(value: Any, key: str, role: str) -> list[Turn]:
    """A message alone, or turns."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return _listed(value, key)


def _has_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _listed(turns: Any, key: str) -> list[Turn]:
    """Turns under our names."""
    if not isinstance(turns, list):
        raise ValueError(f'"{key}" must be a list of turns, with at least one')
    return [_turn(turn) for turn in turns]


def _turn(turn: Any) -> Turn:
    """One turn under our names."""
    if not isinstance(turn, dict):
        raise ValueError('every turn must be an object with "role" and "content"')
    # Rows of tables have every column that any of them has.
    turn = {key: value for key, value in turn.items() if value is not None and value != []}
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    name = role.strip().lower() if isinstance(role, str) else ""
    calls = turn.get("tool_calls", turn.get("function_call", []))
    if name in CALLERS:
        name, calls, content = "assistant", content, ""
    if not name or name not in ROLES:
        known = ", ".join((*ROLES, *CALLERS))
        raise ValueError(f"the role of a turn is {role!r:.40}: it must be one of {known}")
    role = ROLES[name]
    text = _text("" if content is None and (calls or role == "tool") else content)
    found: Turn = {"role": role, "content": text}
    thought = next((turn[key] for key in THOUGHTS if key in turn), "")
    if role == "assistant":
        if calls:
            calls = _json(calls, "a call")
            found["tool_calls"] = [_call(one) for one in (calls if _has_turns(calls) else [calls])]
        if isinstance(thought, str) and thought.strip():
            found["reasoning_content"] = thought
    if role == "tool":
        if isinstance(turn.get("tool_call_id"), str):
            found["tool_call_id"] = turn["tool_call_id"]
        if isinstance(turn.get("name"), str):
            found["name"] = turn["name"]
    return found


def _text(content: Any) -> str:
    """The text of a turn, in one piece or in parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError('every turn needs the strings "role" and "content", or "from" and "value"')
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in TEXT_PARTS or not isinstance(text, str):
            raise ValueError(f"a part of a turn is of the type {kind!r:.40}, and not text")
        texts.append(text)
    return "".join(texts)


def _call(call: Any) -> dict[str, Any]:
    """A tool call as templates take it: arguments are an object, whatever text they came in."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError('a call must be an object with "name" and "arguments"')
    arguments = _json(function.get("arguments") or {}, "the arguments of a call")
    if not isinstance(arguments, dict):
        raise ValueError("the arguments of a call must be an object")
    found = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return found | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})


def _json(value: Any, what: str) -> Any:
    """A value that may come as the text of one."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError(f"{what} is not JSON") from None
