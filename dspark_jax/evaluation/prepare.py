"""Training data out of prompts: the target answers every conversation of a file, turn by turn.

The drafter learns to predict the target and nobody else, so whatever answers a file brings are
dropped and written anew: the user's first message is answered, then the second one after that
answer, and so on. An answer that does not end by itself ends its conversation.

The output is only ever appended to, one whole line a conversation, so a run that was killed goes
on where it stopped. Line i of the input has its own randomness: what becomes of it depends neither
on the lines around it nor on how the work is split. With N processes, process I answers every
N-th line into ``OUT.part-I-of-N``; the same command without processes then takes over their lines,
answers what is missing and puts everything in order.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dspark_jax.checkpoints.conversations import Conversation, Turn
from dspark_jax.engine.config import POSITION_STEP, round_up
from dspark_jax.engine.decoder import Decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.generate import config_for
from dspark_jax.engine.reader import Generation
from dspark_jax.engine.request import Request, within_context
from dspark_jax.engine.stream import Stream
from dspark_jax.engine.text import TextStream
from dspark_jax.evaluation.output import check_recipe, open_lines, read_lines, take_over_parts
from dspark_jax.evaluation.results import sound
from dspark_jax.files import write_atomically
from dspark_jax.progress import progress
from pallas_kernels import random

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """Which conversations a process answers: every ``processes``-th, from ``process`` on."""

    process: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.process < self.processes:
            raise ValueError(
                f"process is {self.process}: of {self.processes} processes, it must lie in "
                f"0..{self.processes - 1}"
            )

    def path(self, out: Path) -> Path:
        """The file that this process writes."""
        if self.processes == 1:
            return out
        return out.with_name(f"{out.name}.part-{self.process}-of-{self.processes}")


@dataclass(eq=False)
class Dialogue:
    """A conversation that is being answered.

    Attributes:
        number: its place in the input, counted from 0.
        origin: where it was read, for error messages.
        turns: those asked and answered so far, behind a system turn if there is one.
        questions: those to come.
        request: the question that is open.
        answer: the last one.
    """

    number: int
    origin: str
    turns: list[Turn]
    questions: deque[Turn]
    request: Request | None = None
    answer: Generation | None = None


def prepare(
    engine: Engine,
    decoder: Decoder,
    conversations: Sequence[Conversation],
    limits: Request,
    out: Path,
    recipe: dict[str, Any],
    *,
    seed: int = 0,
    share: Share = Share(),
) -> Path:
    """Have the target answer conversations, or go on where an interrupted run stopped.

    Args:
        engine: of :func:`engine_for`.
        decoder: whose tokenizer and context length are used.
        conversations: of :func:`~dspark_jax.checkpoints.conversations.read_questions`, all of them.
        limits: all of a request but prompt and key.
        out: the JSON-lines file of answered conversations; ``id`` is the place in the input.
        recipe: what the answers depend on besides ``limits`` and ``seed``, as JSON values; it lies
            in ``OUT.recipe.json``, and another one is refused.
        seed: answer number t of conversation i has the key ``fold_in(seed_key(seed), i, t)``, so
            the first one that of line i of ``dspark generate --prompts``.
        share: of this process.

    Returns:
        The file that was written: ``out``, or this process's part of it.

    Raises:
        ValueError: the output belongs to something else, or another process is writing it, or
            nothing could be answered.
        FloatingPointError: the target's logits are not finite; what was finished stays.
    """
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
    settings = {name: getattr(limits, name) for name in names}
    check_recipe(out, recipe | settings | {"seed": seed})
    mine = [one for one in conversations if one.place % share.processes == share.process]
    path = share.path(out)
    with open_lines(path) as (file, lines):
        if path == out:
            take_over_parts(out, file, lines)
        elsewhere = read_lines(out)[0] if path != out and out.exists() else {}
        todo = [one for one in mine if one.place not in lines and one.place not in elsewhere]
        dialogues = [begin(one.place, one) for one in todo]
        ask = make_asker(decoder, lambda _: limits, seed, engine.config.positions)
        before = len(mine) - len(todo)
        with progress(total=len(mine), initial=before, unit="line", desc="prepare") as bar:
            for dialogue in answer_all(engine, decoder.tokenizer, ask, dialogues, bar):
                lines[dialogue.number] = line_of(dialogue)
                file.write(lines[dialogue.number])
                file.flush()
        if mine and not any(one.place in lines or one.place in elsewhere for one in mine):
            raise ValueError(f"{path}: none of the {len(mine)} conversations could be answered")
        if list(lines) != sorted(lines):
            write_atomically(path, b"".join(lines[number] for number in sorted(lines)).decode())
    return path


def begin(number: int, conversation: Conversation) -> Dialogue:
    """A conversation of which nothing has been asked yet."""
    turns = deque(conversation.turns)
    system = [turns.popleft()] if turns[0]["role"] == "system" else []
    return Dialogue(number, conversation.origin, system, turns)


# Opens a dialogue's next question, or says why that cannot be.
Ask = Callable[[Dialogue], str | None]


def make_asker(
    decoder: Decoder,
    limits_of: Callable[[str], Request],
    seed: int,
    positions: int,
    least: int = 1,
) -> Ask:
    """The function that asks the questions of dialogues.

    Args:
        decoder: whose template and tokenizer are used.
        limits_of: a question -> all of its request but prompt and key.
        seed: root of the keys.
        positions: of the longest request; an answer is cut there.
        least: tokens of an answer that must have room.
    """
    root, fold_in = random.seed_key(seed), jax.jit(random.fold_in)
    host = jax.local_devices(backend="cpu")[0]  # keys must not wait for the rounds in flight

    def ask(dialogue: Dialogue) -> str | None:
        turns = [*dialogue.turns, dialogue.questions[0]]
        number = sum(turn["role"] == "assistant" for turn in turns)
        with jax.default_device(host):
            key_2 = np.asarray(fold_in(root, np.uint32(dialogue.number), np.uint32(number)))
        limits = limits_of(turns[-1]["content"])
        try:
            request = dataclasses.replace(limits, prompt_ids=(), messages=turns, key=key_2)
            request = request.resolve(decoder.encode, ())
            request.check(decoder.target.max_positions, decoder.target.vocab_size)
        except ValueError as error:
            return str(error)
        room = positions - len(request.prompt_ids)
        if room < least:
            return (
                f"the prompt has {len(request.prompt_ids)} tokens, which leaves no room for an "
                "answer"
            )
        most = min(room, request.max_new_tokens)
        dialogue.request = dataclasses.replace(request, max_new_tokens=most)
        dialogue.turns.append(dialogue.questions.popleft())
        return None

    return ask


def engine_for(decoder: Decoder, limits: Request, slots: int, **options: Any) -> Engine:
    """An engine for conversations of any length, which makes no text while it decodes.

    Args:
        decoder: models.
        limits: of the requests.
        slots: conversations decoded together, rounded up to a multiple of the data shards.
        **options: of ``EngineConfig``.
    """
    within_context([limits], decoder.target.max_positions)  # says so before anything is compiled
    config = config_for(decoder, [limits] * slots, slots=slots, **options)
    positions, rounds = decoder.target.max_positions, config.position_buckets[0]
    buckets = [rounds * 2**i for i in range(32) if rounds * 2**i < positions + rounds]
    config = dataclasses.replace(
        config,
        positions=positions,
        position_buckets=(*buckets[:-1], round_up(positions + POSITION_STEP, POSITION_STEP)),
        queue=2 * config.slots,
    )
    return Engine(dataclasses.replace(decoder, tokenizer=None), config)


def answer_all(
    engine: Engine,
    tokenizer: Any,
    ask: Ask,
    dialogues: Sequence[Dialogue],
    bar: tqdm,
    end: float = math.inf,
) -> Iterator[Dialogue]:
    """The dialogues, each as soon as it is over; one that cannot even begin is left out.

    Whoever is over makes room for the next at once, so that all slots stay taken.

    Args:
        engine: of :func:`engine_for`.
        tokenizer: of the answers.
        ask: of :func:`make_asker`.
        dialogues: in the order in which they begin.
        bar: that counts them.
        end: of the time, by ``time.time()``; what is under way then is lost.

    Raises:
        FloatingPointError: the target's logits are not finite.
    """
    waiting, left_out = deque(dialogues), list[str]()
    running: list[tuple[Dialogue, Stream]] = []
    tokens, start = 0, time.monotonic()
    while (waiting or running) and time.time() < end:
        while waiting and len(running) < 2 * engine.config.slots:
            dialogue = waiting.popleft()
            problem = ask(dialogue)
            if problem is None:
                running.append((dialogue, engine.submit(_request(dialogue))))
            else:
                left_out.append(f"{dialogue.origin}: {problem}")
                bar.update()
        engine.step()
        over = [pair for pair in running if pair[1].finished]
        running = [pair for pair in running if not pair[1].finished]
        for dialogue, stream in over:
            close_answer(dialogue, stream.result, tokenizer)
            tokens += len(stream.result.token_ids)
            # An answer that was cut is nothing to go on from.
            goes_on = stream.result.finish_reason == "stop" and dialogue.questions
            if goes_on and ask(dialogue) is None:
                running.append((dialogue, engine.submit(_request(dialogue), priority=1)))
                continue
            bar.set_postfix_str(f"{tokens / (time.monotonic() - start):.1f} tokens/s")
            bar.update()
            yield dialogue
    if left_out:
        logger.warning("%d left out; the first: %s", len(left_out), left_out[0])


def _request(dialogue: Dialogue) -> Request:
    assert dialogue.request is not None
    return dialogue.request


def close_answer(dialogue: Dialogue, result: Generation, tokenizer: Any) -> None:
    """The answer to the open question; raises what :func:`sound` does, with the origin."""
    try:
        sound(result)
    except (FloatingPointError, RuntimeError) as error:
        raise type(error)(f"{dialogue.origin}: {error}") from error
    text = TextStream(tokenizer)
    content = text.push(result.token_ids) + text.finish()
    dialogue.answer = result
    dialogue.turns.append({"role": "assistant", "content": content})


def line_of(dialogue: Dialogue) -> bytes:
    """A dialogue that is over, as a line of the output."""
    assert dialogue.answer is not None
    row = {
        "id": dialogue.number,
        "conversations": dialogue.turns,
        "response_ids": dialogue.answer.token_ids,
        "finish": dialogue.answer.finish_reason,
        "end_id": dialogue.answer.end_id,
        "temperature": _request(dialogue).temperature,
    }
    return json.dumps(row).encode() + b"\n"
