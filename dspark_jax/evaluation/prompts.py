"""Prompt files: one JSON object a line, with ``prompt``, or ``turns`` of which the first counts."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dspark_jax.characters import is_text
from dspark_jax.checkpoints.lines import json_lines
from dspark_jax.engine.decoder import Decoder
from dspark_jax.engine.request import Request, within_context
from pallas_kernels import random


@dataclass(frozen=True)
class Prompt:
    """A user's message, and where it was read (``FILE:LINE``) for error messages."""

    text: str
    origin: str


def read_prompts(path: str | Path, limit: int | None = None) -> list[Prompt]:
    """The prompts of a JSON-lines file in their order; blank lines are skipped.

    Args:
        path: the file.
        limit: read no more prompts than this; None reads all.

    Raises:
        ValueError: the file cannot be read or holds no prompt, or a line is not a prompt; the
            message names file and line.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: read at least 1 line of {path}")
    prompts = [
        Prompt(user_turns(row, origin)[0], origin)
        for origin, row in itertools.islice(json_lines(path), limit)
    ]
    if not prompts:
        raise ValueError(f"{path}: no prompts in it; write one JSON object a line")
    return prompts


def read_prompt_sets(paths: Sequence[str], limit: int | None = None) -> dict[str, list[Prompt]]:
    """The prompts of several files by the files' names without suffix, or by their paths where
    two names are alike; see :func:`read_prompts`."""
    stems = [Path(path).stem for path in paths]
    names = stems if len(set(stems)) == len(stems) else paths
    return {name: read_prompts(path, limit) for name, path in zip(names, paths, strict=True)}


def make_requests(
    prompts: Sequence[Prompt], decoder: Decoder, limits: Request, seed: int
) -> list[Request]:
    """A request for every prompt: those of a single set of :func:`make_request_sets`."""
    return make_request_sets({"": prompts}, decoder, limits, seed)[""]


def make_request_sets(
    sets: Mapping[str, Sequence[Prompt]], decoder: Decoder, limits: Request, seed: int
) -> dict[str, list[Request]]:
    """A request for every prompt; number i of a set has the key ``fold_in(seed_key(seed), i)``.

    Args:
        sets: the user's messages by the names of their sets.
        decoder: whose template, tokenizer and context length are used.
        limits: all but prompt and key; where the context leaves less room, it is cut and said.
        seed: root of the keys.

    Raises:
        ValueError: a prompt is empty or too long; the message says where it was read.
    """
    most = max(map(len, sets.values()))
    keys_B2 = np.asarray(random.fold_in(random.seed_key(seed), jnp.arange(most)))
    requests = []
    for place, prompt in ((i, one) for prompts in sets.values() for i, one in enumerate(prompts)):
        try:
            key_2 = keys_B2[place]
            request = dataclasses.replace(limits, prompt_ids=(), prompt=prompt.text, key=key_2)
            request = request.resolve(decoder.encode, ())
            request.check(decoder.target.max_positions, decoder.target.vocab_size)
        except ValueError as error:
            raise ValueError(f"{prompt.origin}: {error}") from None
        requests.append(request)
    fitted = iter(within_context(requests, decoder.target.max_positions))
    return {name: list(itertools.islice(fitted, len(sets[name]))) for name in sets}


def user_turns(row: Any, origin: str) -> tuple[str, ...]:
    """The messages of one line: its ``prompt``, or all of its ``turns``.

    Raises:
        ValueError: it has neither, or a message is no text; names the line.
    """
    known = isinstance(row, dict) and row.get("prompt") is not None
    turns = [row["prompt"]] if known else None
    if turns is None and isinstance(row, dict):
        turns = row.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) for t in turns):
        raise ValueError(f'{origin}: needs a string "prompt", or a list of strings "turns"')
    for text in turns:
        if not text.strip():
            raise ValueError(f"{origin}: the prompt is empty: write some text")
        if not is_text(text):
            raise ValueError(
                f"{origin}: the prompt holds half of a surrogate pair, which is no character: "
                "mend it"
            )
    return tuple(turns)
