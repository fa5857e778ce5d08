"""Answers to many prompts through the serving engine, until a time is up: for big devices.

Who is over makes room for the next at once. ``prepare.py`` decodes batches to their end instead,
and knows conversations of several turns. The lines are the same, and so is their randomness; but
each prompt has a temperature of its own.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax

from dspark_jax.checkpoints.conversations import Conversation
from dspark_jax.checkpoints.load import Target
from dspark_jax.engine.config import POSITION_STEP, EngineConfig, round_up
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.request import Request
from dspark_jax.engine.stream import Stream
from dspark_jax.engine.text import TextStream
from dspark_jax.evaluation.prepare import Dialogue, begin, line_of, make_asker
from dspark_jax.evaluation.prompts import Prompt

logger = logging.getLogger(__name__)

TEMPERATURES = (0.0, 0.6, 1.0)
LOG_S = 10.0  # between two lines that say how far it is


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
    host = jax.local_devices(backend="cpu")[0]  # keys must not wait for the rounds in flight
    with jax.default_device(host):
        asks = {
            value: make_asker(decoder, replace(limits, temperature=value), seed)
            for value in TEMPERATURES
        }

    def request_of(dialogue: Dialogue) -> Request | None:
        with jax.default_device(host):
            problem = asks[temperature_of(dialogue.questions[0]["content"])](dialogue)
        request = dialogue.request
        room = config.positions - len(request.prompt_ids) if request is not None else 0
        if problem is not None or request is None or room < least:
            return None
        return replace(request, max_new_tokens=min(room, request.max_new_tokens))

    # Without a tokenizer: the text is made once of an answer, not of each token.
    with Engine(replace(decoder, tokenizer=None), config) as engine:
        todo, running = deque(dialogues), list[tuple[Dialogue, Stream]]()
        done = tokens = left_out = 0
        began = noted = time.time()
        while (todo or running) and time.time() < end:
            while todo and len(running) < 2 * config.slots:
                dialogue = todo.popleft()
                request = request_of(dialogue)
                if request is None:
                    left_out += 1
                else:
                    running.append((dialogue, engine.submit(request)))
            engine.step()
            over = [pair for pair in running if pair[1].finished]
            running = [pair for pair in running if not pair[1].finished]
            for dialogue, stream in over:
                yield answered_line(dialogue, stream, target.tokenizer)
                done, tokens = done + 1, tokens + len(stream.result.token_ids)
            if time.time() > noted + LOG_S or not (todo or running):
                noted = time.time()
                logger.info(
                    "%d answers, %d left out for their length, %d to go, %.0f tokens/s",
                    done, left_out, len(todo) + len(running), tokens / (noted - began),
                )  # fmt: skip


def answered_line(dialogue: Dialogue, stream: Stream, tokenizer: Any) -> bytes:
    """A question whose stream is over, as a line of the output.

    Raises:
        FloatingPointError: the target's logits were not finite.
    """
    assert dialogue.request is not None
    if stream.result.finish_reason == "error":
        raise FloatingPointError(f"{dialogue.origin}: the target's logits are not finite")
    text = TextStream(tokenizer)
    content = text.push(stream.result.token_ids) + text.finish()
    dialogue.answer = stream.result
    dialogue.turns.append({"role": "assistant", "content": content})
    return line_of(dialogue, dialogue.request.temperature)
