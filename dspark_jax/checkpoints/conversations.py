"""Files of conversations: every accepted form of a line, read into one.

A line is a JSON object with one of

    "conversations"   turns with "role" and "content", or with "from" and "value" as in ShareGPT
    "messages"        the same
    "turns"           the user's messages alone, in their order
    "prompt"          one message of the user

(the first of these that is there counts). Where the last turn is the target's own answer, the
line may also have ``response_ids``, the answer's own token ids without the token that ends it, and
``finish``: ``"stop"`` (the default) where the answer ended by itself, anything else where it was
cut; and ``end_id``, the id that ended it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

# One turn: "role" (system, user or assistant) and "content".
Turn = dict[str, str]

SPEAKERS = {"human": "user", "gpt": "assistant"}
FORMS = '"conversations" or "messages" (turns), "turns" (strings) or "prompt" (a string)'
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Conversation:
    """One line of a file.

    Attributes:
        turns: at least one; a system turn comes first or not at all.
        origin: where it was read (``FILE:LINE``), for error messages.
        response_ids: token ids of the last turn, an answer, without the token that ends it; None
            where only the text is known.
        finished: whether that answer ended by itself.
        end_id: the id at which it did, where that is known.
    """

    turns: tuple[Turn, ...]
    origin: str
    response_ids: tuple[int, ...] | None = None
    finished: bool = True
    end_id: int | None = None


def json_lines(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Where it was read (``FILE:LINE``) and value of every line of a file; blank ones are skipped.

    Raises:
        ValueError: the file cannot be read, or a line is not JSON.
    """
    try:
        # Not splitlines: it also cuts at separators that JSON allows inside a string.
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; name a JSON-lines file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not readable as text ({error})") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            origin = f"{path}:{number}"
            try:
                yield origin, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{origin}: not JSON ({error})") from None


def read_conversations(path: str | Path, limit: int | None = None) -> list[Conversation]:
    """The conversations of a file in their order, answered or not.

    Args:
        path: the file.
        limit: read no more of them than this; None reads all.

    Raises:
        ValueError: the file is not readable, holds none, or a line is not a conversation; the
            message names file and line.
    """
    found = []
    for origin, row in itertools.islice(json_lines(path), limit):
        try:
            found.append(_conversation(row, origin))
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None
    if not found:
        raise ValueError(f"{path}: no conversations in it; write one JSON object a line")
    return found


def read_answered(path: str | Path) -> list[Conversation]:
    """The conversations of a file to train on: the user begins, and somebody answers.

    Raises:
        ValueError: as :func:`read_conversations`, or a conversation has no answer.
    """
    found = read_conversations(path)
    for conversation in found:
        roles = [turn["role"] for turn in conversation.turns]
        if "assistant" not in roles:
            raise ValueError(
                f"{conversation.origin}: has no answer: dspark prepare has the target write one"
            )
        if roles[roles[0] == "system"] != "user":
            raise ValueError(f"{conversation.origin}: the first turn must be the user's")
    return found


def read_questions(path: str | Path, limit: int | None = None) -> list[Conversation]:
    """The conversations of a file without the answers: a system turn or none, then the user's.

    Raises:
        ValueError: as :func:`read_conversations`, or there is nothing to answer.
    """
    found = []
    for conversation in read_conversations(path, limit):
        turns = tuple(turn for turn in conversation.turns if turn["role"] != "assistant")
        questions = [turn["content"] for turn in turns if turn["role"] == "user"]
        if not questions or not all(map(str.strip, questions)):
            raise ValueError(f"{conversation.origin}: the prompt is empty: write some text")
        found.append(Conversation(turns, conversation.origin))
    return found


def _conversation(row: Any, origin: str) -> Conversation:
    """One line in the one form."""
    if not isinstance(row, dict):
        raise ValueError(
            'must be a JSON object with "conversations", "messages", "turns" or "prompt"'
        )
    turns = _turns(row)
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
    if not (end_id is None or type(end_id) is int):
        raise ValueError(
            f'"end_id" is {end_id!r:.40}: it must be the token id that ended the answer'
        )
    known = None if ids is None else tuple(ids)
    return Conversation(turns, origin, known, finish == "stop", end_id)


def _turns(row: dict[str, Any]) -> tuple[Turn, ...]:
    """The turns of a line, whatever its form."""
    for key in ("conversations", "messages"):
        if key in row:
            if not isinstance(row[key], list) or not row[key]:
                raise ValueError(f'"{key}" must be a list of turns, with at least one')
            return tuple(_turn(turn) for turn in row[key])
    texts = row["turns"] if "turns" in row else [row.get("prompt")]
    if not isinstance(texts, list) or not texts or not all(map(_is_text, texts)):
        raise ValueError(f"needs {FORMS}")
    return tuple({"role": "user", "content": text} for text in texts)


def _turn(turn: Any) -> Turn:
    """One turn under our names."""
    if not isinstance(turn, dict):
        raise ValueError('every turn must be an object with "role" and "content"')
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if not isinstance(role, str) or not _is_text(content):
        raise ValueError('every turn needs the strings "role" and "content", or "from" and "value"')
    role = SPEAKERS.get(role, role)
    if role not in ROLES:
        known = ", ".join((*ROLES, *SPEAKERS))
        raise ValueError(f"the role of a turn is {role!r}: it must be one of {known}")
    return {"role": role, "content": content}


def _is_text(value: Any) -> TypeGuard[str]:
    """Whether it is a string that can be written as UTF-8: JSON can spell half a character."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
