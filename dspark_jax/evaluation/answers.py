"""Answers to many prompts until a time is up: for big devices that are lent for a while.

The lines and their randomness are those of ``prepare.py``; but each prompt has a temperature of its
own, and the device goes on alone: prompts of about one length are read together, then one program
decodes dozens of tokens of each before the host looks again. While a batch decodes, the host asks
the next and writes the last.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.checkpoints.conversations import Conversation
from dspark_jax.checkpoints.load import Target
from dspark_jax.checkpoints.tokenizer import chat_prompt_ids
from dspark_jax.engine.config import POSITION_STEP, EngineConfig, round_up
from dspark_jax.engine.decoder import Decoder, make_decoder, state_config
from dspark_jax.engine.inputs import Chunks, RoundConfig, RoundInput
from dspark_jax.engine.kernels import choose_kernels
from dspark_jax.engine.plan import asked_by
from dspark_jax.engine.programs import round_program
from dspark_jax.engine.reader import Generation
from dspark_jax.engine.request import Request
from dspark_jax.engine.round import decode_round
from dspark_jax.engine.state import DecodeState, StateConfig, make_state
from dspark_jax.evaluation.prepare import Ask, Dialogue, begin, close_answer, line_of, make_asker
from dspark_jax.evaluation.prompts import Prompt
from dspark_jax.progress import progress
from pallas_kernels.dispatch import Kernels, program_options

logger = logging.getLogger(__name__)

TEMPERATURES = (0.0, 0.6, 1.0)
ROUNDS = 32  # of one program, after which the host asks whether anybody is left
WAVE = 8  # batches that are sorted by length together: what was answered is a fair sample of all


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


@dataclass(frozen=True)
class Sizes:
    """How much is answered together.

    Attributes:
        slots: prompts of a batch.
        positions: of a prompt with its answer.
        chunk_rows: positions of each prompt that are read at a time.
        kernels: see ``EngineConfig``.
    """

    slots: int
    positions: int
    chunk_rows: int = 128
    kernels: Kernels = "auto"


@dataclass(frozen=True)
class Programs:
    """What runs on the device, all of it for a batch of one form.

    Attributes:
        form: of the state.
        read: ``(weights, state, given)`` -> the state after a round that reads pieces of prompts,
            and its report.
        decode: ``(weights, state, given)`` -> the state after ``ROUNDS`` rounds, whether all logits
            were finite, and whether a slot is left that decodes; both bool scalars.
    """

    form: StateConfig
    read: Callable[..., Any]
    decode: Callable[..., Any]


def make_programs(decoder: Decoder, sizes: Sizes, limits: Request) -> Programs:
    """The programs for a target without a drafter and for requests like ``limits``, sampled."""
    config = EngineConfig(chunk_rows=sizes.chunk_rows, chunk_buckets=(1,))
    positions = round_up(sizes.positions + 1, POSITION_STEP)
    form = state_config(decoder, sizes.slots, positions, config)
    kernels = choose_kernels(decoder, sizes.kernels, (positions,))
    asks = asked_by([replace(limits, temperature=max(TEMPERATURES))])
    cfg = RoundConfig(decoder.target, None, 0, kernels=kernels, asks=asks)

    def decode(weights: Any, state: DecodeState, given: RoundInput) -> Any:
        def one(state: DecodeState, _: None) -> tuple[DecodeState, jax.Array]:
            state, report = decode_round(weights, state, given, cfg, num_rows=sizes.slots)
            return state, report.finite_B.all()

        state, finite_X = jax.lax.scan(one, state, length=ROUNDS)
        return state, finite_X.all(), state.active_B.any()

    read = round_program(cfg, form, sizes.slots, sizes.chunk_rows, None)
    many = jax.jit(decode, donate_argnums=1, compiler_options=program_options())
    return Programs(form, read, many)


def pieces(lengths: Sequence[int], turn: int, sizes: Sizes) -> Chunks:
    """Piece number ``turn`` of every prompt; the anchor, its last token, is not read."""
    slot_P: Any = np.arange(sizes.slots, dtype=np.int32)
    length_P: Any = np.zeros(sizes.slots, np.int32)
    length_P[: len(lengths)] = lengths
    start_P: Any = np.full(sizes.slots, turn * sizes.chunk_rows, np.int32)
    left_P = length_P - 1 - start_P
    # The piece that ends a prompt may be empty: a prompt of one token has nothing but its anchor.
    there_P = (left_P > 0) | ((length_P > 0) & (left_P == 0) & (turn == 0))
    slot_P = np.where(there_P, slot_P, np.int32(sizes.slots))
    return Chunks(
        slot_P=slot_P,
        start_P=start_P,
        count_P=np.clip(left_P, 0, sizes.chunk_rows).astype(np.int32) * there_P,
        last_P=there_P & (left_P <= sizes.chunk_rows),
    )


def answer_together(
    decoder: Decoder, programs: Programs, sizes: Sizes, requests: Sequence[Request], end: float
) -> list[Generation] | None:
    """The answers to at most ``sizes.slots`` requests, in their order.

    Args:
        decoder: of the target.
        programs: of :func:`make_programs`.
        sizes: of the programs.
        requests: resolved, each with a key.
        end: of the time, by ``time.time()``; None is returned then.

    Raises:
        FloatingPointError: the target's logits are not finite.
    """
    weights, keep_B = decoder.weights, jnp.ones(sizes.slots, bool)
    state = make_state(requests, programs.form)
    # Active is who has been read, which no one is yet.
    state = state.replace(active_B=jnp.zeros_like(state.active_B))  # type: ignore[attr-defined]
    lengths = [len(request.prompt_ids) for request in requests]
    finite: Any = True
    for turn in range(max(1, -(-(max(lengths) - 1) // sizes.chunk_rows))):
        given = RoundInput(keep_B, pieces(lengths, turn, sizes))
        state, report = programs.read(weights, state, given)
        finite &= report.finite_B.all()
    given, active = RoundInput(keep_B), True
    while active:
        state, fine, active = programs.decode(weights, state, given)
        if time.time() >= end:
            return None
        if not (finite and fine):
            raise FloatingPointError("the target's logits are not finite")
    token_BS, length_B = np.asarray(state.token_BS), np.asarray(state.length_B)
    return [
        _answer(request, token_BS[slot, : length_B[slot]]) for slot, request in enumerate(requests)
    ]


def _answer(request: Request, token_S: np.ndarray) -> Generation:
    start = len(request.prompt_ids)
    token_ids = token_S[start : start + request.max_new_tokens].tolist()
    if token_ids and token_ids[-1] in request.stop_ids:
        *token_ids, end_id = token_ids
        return Generation(start, token_ids, finish_reason="stop", end_id=end_id)
    return Generation(start, token_ids, finish_reason="length")


def answer_until(
    end: float,
    target: Target,
    sizes: Sizes,
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
        sizes: of a batch.
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
        decoder, lambda text: limits_of[temperature_of(text)], seed, sizes.positions, least
    )
    programs, batches = make_programs(decoder, sizes, limits), _batches(dialogues, sizes.slots)
    with (
        ThreadPoolExecutor(1) as host,
        progress(total=len(dialogues), unit="answer") as bar,
    ):
        coming = host.submit(_ask_all, ask, next(batches, []))
        written: Any = host.submit(list)
        while time.time() < end and (asked := coming.result()) is not None:
            following = next(batches, None)
            coming = host.submit(_ask_all, ask, following)
            results = None
            if asked:
                requests = [one.request for one in asked if one.request is not None]
                results = answer_together(decoder, programs, sizes, requests, end)
            yield from written.result()
            written = host.submit(_lines, asked, results or [], target.tokenizer)
            bar.update(len(results or []))
        yield from written.result()


def _batches(dialogues: Sequence[Dialogue], slots: int) -> Iterator[Sequence[Dialogue]]:
    """Batches, shorter questions first within a wave of some."""
    for start in range(0, len(dialogues), WAVE * slots):
        wave = sorted(
            dialogues[start : start + WAVE * slots],
            key=lambda one: len(one.questions[0]["content"]),
        )
        for first in range(0, len(wave), slots):
            yield wave[first : first + slots]


def _ask_all(ask: Ask, dialogues: Sequence[Dialogue] | None) -> list[Dialogue] | None:
    """Those that can be asked; None behind the last batch."""
    if dialogues is None:
        return None
    problems = [(one, ask(one)) for one in dialogues]
    for one, problem in itertools.islice((pair for pair in problems if pair[1]), 1):
        logger.warning("left out, and perhaps others: %s: %s", one.origin, problem)
    return [one for one, problem in problems if problem is None]


def _lines(asked: Sequence[Dialogue], results: Sequence[Generation], tokenizer: Any) -> list[bytes]:
    for dialogue, result in zip(asked, results, strict=bool(results)):
        close_answer(dialogue, result, tokenizer)
    return [line_of(dialogue) for dialogue in asked if dialogue.answer is not None]
