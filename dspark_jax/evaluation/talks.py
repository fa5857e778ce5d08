"""Conversations that are played turn by turn, each turn behind the model's own earlier answers."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dspark_jax.checkpoints.lines import json_lines
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.reader import Generation
from dspark_jax.engine.request import Prompt as Messages
from dspark_jax.engine.request import Request
from dspark_jax.engine.stream import Stream
from dspark_jax.evaluation.latency import Watch
from dspark_jax.evaluation.prompts import user_turns
from dspark_jax.evaluation.results import sound
from pallas_kernels import random

logger = logging.getLogger(__name__)

# Spec-Bench (Xia et al., ACL Findings 2024) counts the categories of MT-Bench as one task.
MT_BENCH = frozenset(
    ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
)
TURN_TOKENS = 32  # that a template may put around a turn, at most


@dataclass(frozen=True)
class Talk:
    """What a user says, turn by turn.

    Attributes:
        turns: messages.
        origin: where it was read (``FILE:LINE``).
    """

    turns: tuple[str, ...]
    origin: str


@dataclass
class Played:
    """A talk that was played.

    Attributes:
        results: of its turns; fewer than it has where the context had no room for more.
        watches: how the tokens of each turn came.
    """

    results: list[Generation] = field(default_factory=list)
    watches: list[Watch] = field(default_factory=list)


def read_talks(paths: Sequence[str], limit: int | None = None) -> dict[str, list[Talk]]:
    """The talks of JSON-lines files by category: the field ``category`` of Spec-Bench's format, or
    the name of the file.

    Args:
        paths: each line has ``prompt``, or ``turns``, all of which count.
        limit: read no more talks of a category than this; None reads all.

    Raises:
        ValueError: a file cannot be read or holds no talk, or a line is none; names both.
    """
    found: dict[str, list[Talk]] = {}
    for path in paths:
        before = sum(map(len, found.values()))
        for origin, row in json_lines(path):
            talk = Talk(user_turns(row, origin), origin)
            found.setdefault(_category(row, origin, Path(path).stem), []).append(talk)
        if sum(map(len, found.values())) == before:
            raise ValueError(f"{path}: no prompts in it; write one JSON object a line")
    return {name: talks[:limit] for name, talks in found.items()}


def _category(row: Mapping[str, Any], origin: str, default: str) -> str:
    category = row.get("category", default)
    if not isinstance(category, str) or not category:
        raise ValueError(f"{origin}: category is {category!r:.40}: give a name, or leave it out")
    return "mt_bench" if category in MT_BENCH and "question_id" in row else category


def longest_request(
    talks: Sequence[Talk], encode: Callable[[Messages], Sequence[int]], limits: Request
) -> Request:
    """A request that needs as many positions as the longest of the talks may.

    Raises:
        ValueError: a talk cannot be encoded; says which.
    """
    needs = []
    for talk in talks:
        try:
            turns = [{"role": "user", "content": text} for text in talk.turns]
            prompt = Request(messages=turns[:1]).resolve(encode, ())
            later = sum(len(encode([turn])) for turn in turns[1:])
        except ValueError as error:
            raise ValueError(f"{talk.origin}: {error}") from None
        answers = len(talk.turns) * (limits.max_new_tokens + TURN_TOKENS)
        needs.append((len(prompt.prompt_ids) + later + answers, prompt, answers + later))
    _, prompt, rest = max(needs, key=lambda need: need[0])
    return dataclasses.replace(limits, prompt_ids=prompt.prompt_ids, max_new_tokens=rest)


def play(
    engine: Engine, talks: Sequence[Talk], limits: Request, seed: int, number: int
) -> tuple[list[Played], float]:
    """Play talks at the same time, each turn as soon as the one before it is answered.

    Args:
        engine: with a slot for each talk; nobody else uses it.
        talks: to be played.
        limits: all of a request but prompt and key.
        seed: turn t of talk i has the key ``fold_in(seed_key(seed), number + i, t)``.
        number: of the first talk.

    Returns:
        The talks, and the seconds until all were over.

    Raises:
        ValueError: the first turn of a talk has no room.
        FloatingPointError: the target's logits are not finite.
    """
    turns = jnp.arange(max(len(talk.turns) for talk in talks))
    numbers = number + jnp.arange(len(talks))[:, None]
    key_XN2 = np.asarray(random.fold_in(random.seed_key(seed), numbers, turns))
    began = time.perf_counter()
    parts = [_Part(engine, talk, limits, key_XN2[i]) for i, talk in enumerate(talks)]
    under_way = parts
    while under_way := [part for part in under_way if part.go_on()]:
        engine.step()
    seconds = time.perf_counter() - began
    engine.settle()
    return [part.played for part in parts], seconds


class _Part:
    """One talk that is being played."""

    def __init__(self, engine: Engine, talk: Talk, limits: Request, key_N2: np.ndarray) -> None:
        self.played = Played()
        self._engine, self._talk, self._limits, self._key_N2 = engine, talk, limits, key_N2
        self._messages: list[dict[str, Any]] = []
        self._turns = iter(talk.turns)
        self._stream: Stream | None = None
        self._ask()

    def go_on(self) -> bool:
        """Note what has come, and ask the next turn; returns whether there is anything to do."""
        if self._stream is None:
            return False
        result = self._stream.result
        self.played.watches[-1].news(time.perf_counter(), len(result.token_ids))
        if self._stream.finished:
            self.played.results.append(sound(result))
            self._messages.append({"role": "assistant", "content": result.text})
            self._ask()
        return self._stream is not None

    def _ask(self) -> None:
        """The next turn, if there is one and room for it."""
        self._stream, text = None, next(self._turns, None)
        if text is None:
            return
        self._messages.append({"role": "user", "content": text})
        turn = len(self.played.results)
        asked = dataclasses.replace(
            self._limits, prompt_ids=(), messages=self._messages, key=self._key_N2[turn]
        )
        try:
            watch = Watch(time.perf_counter())
            self._stream = self._engine.submit(asked)
            self.played.watches.append(watch)
        except ValueError as error:
            if not turn:
                raise ValueError(f"{self._talk.origin}: {error}") from None
            logger.warning("%s: ends before turn %d: %s", self._talk.origin, turn + 1, error)


def groups(talks: Mapping[str, Sequence[Talk]], size: int) -> Iterator[tuple[str, int, list[Talk]]]:
    """Talks of a category that are played together, with the number of the first."""
    for name, of_category in talks.items():
        for start in range(0, len(of_category), size):
            yield name, start, list(of_category[start : start + size])
