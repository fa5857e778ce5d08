"""Answers to many prompts until a time is up: for big devices that are lent for a while.

The lines and their randomness are those of ``prepare.py``; but each prompt has a temperature of its
own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial

from dspark_jax.checkpoints.conversations import Conversation
from dspark_jax.checkpoints.load import Target
from dspark_jax.checkpoints.tokenizer import chat_prompt_ids
from dspark_jax.engine.config import POSITION_STEP, EngineConfig, round_up
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.request import Request
from dspark_jax.evaluation.prepare import Dialogue, answer_all, begin, line_of, make_asker
from dspark_jax.evaluation.prompts import Prompt
from dspark_jax.progress import progress

TEMPERATURES = (0.0, 0.6, 1.0)


def temperature_of(prompt: str) -> float:
    """By a hash of the prompt: alike on all machines, whatever else the file has."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return TEMPERATURES[int.from_bytes(digest[:8], "big") % len(TEMPERATURES)]


def questions(
    prompts: Sequence[Prompt], answered: Collection[int], elsewhere: Sequence[Conversation]
) -> list[Dialogue]:
    """The prompts without an answer, numbered by their places.

    Args:
        prompts: all of them.
        answered: places of those that have an answer.
        elsewhere: answered conversations; a prompt that begins one of them is left out.
    """
    known = {
        next(turn["content"] for turn in conversation.turns if turn["role"] == "user")
        for conversation in elsewhere
    }
    return [
        begin(number, Conversation(({"role": "user", "content": prompt.text},), prompt.origin))
        for number, prompt in enumerate(prompts)
        if number not in answered and prompt.text not in known
    ]


def plain_engine(slots: int, positions: int, kernels: str) -> EngineConfig:
    """Plain decoding in one state of one size, so that few programs are compiled."""
    return EngineConfig(
        slots=slots,
        positions=positions,
        queue=2 * slots,
        policy="none",
        chunk_buckets=tuple(sorted({max(1, slots // 32), max(1, slots // 4)})),
        slot_buckets=(slots,),
        position_buckets=(round_up(positions + 1, POSITION_STEP),),
        kernels=kernels,  # type: ignore[arg-type]  # the engine checks it
    )


def answer_until(
    end: float,
    target: Target,
    config: EngineConfig,
    dialogues: Sequence[Dialogue],
    limits: Request,
    *,
    seed: int,
    least: int,
) -> Iterator[bytes]:
    """Lines of answered questions, as they come; those under way when the time is up are lost.

    Args:
        end: of the time, by ``time.time()``.
        target: with its weights.
        config: of :func:`plain_engine`.
        dialogues: of :func:`questions`.
        limits: all of a request but prompt, key and temperature.
        seed: of the keys, as for ``prepare``.
        least: tokens that must have room behind a prompt; others are left out.

    Raises:
        FloatingPointError: the target's logits are not finite.
    """
    decoder = make_decoder((target.cfg, target.params), tokenizer=target.tokenizer)
    decoder = replace(decoder, encode=partial(chat_prompt_ids, target.tokenizer))
    limits_of = {value: replace(limits, temperature=value) for value in TEMPERATURES}
    ask = make_asker(
        decoder, lambda text: limits_of[temperature_of(text)], seed, config.positions, least
    )
    with (
        Engine(replace(decoder, tokenizer=None), config) as engine,
        progress(total=len(dialogues), unit="answer") as bar,
    ):
        for dialogue in answer_all(engine, target.tokenizer, ask, dialogues, bar, end):
            yield line_of(dialogue)
