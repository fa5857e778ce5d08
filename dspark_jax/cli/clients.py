"""The commands that talk: to a model, or to a server as its clients do."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_jax.characters import check_characters
from dspark_jax.cli.given import key_in, limits_of, load_model, rendering_of, request_of

if TYPE_CHECKING:
    from dspark_jax.client import Client

# Of a terminal; a text may hold them, and must not move its cursor about.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
RENDERED = {"system", "template_args"}
SHARED = {"command", "url", "api_key_file", "max_new_tokens", "temperature", "seed", "json"}
HELP = "/reset forgets what was said, /exit or the end of the input ends the chat"

Turn = dict[str, str]
Show = Callable[[str, str], None]  # further pieces of a thought and of the answer
Say = Callable[[Sequence[Turn], Show], None]
UNSHOWN = "\ufffd"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


def chat(args: argparse.Namespace) -> int:
    """Talk to a model, or to a server."""
    return _talk(_asking(args) if at_server(args) else _decoding(args))


def _decoding(args: argparse.Namespace) -> Say:
    """Answers of a model."""
    model, limits = load_model(args), limits_of(args)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "stop_strings")
    given = {name: getattr(limits, name) for name in names}
    rules = {"seed": args.seed, "policy": args.policy, "acceptance": args.acceptance}
    from dspark_jax.engine.text import special_ids
    from dspark_jax.serving.reasoning import ThoughtReader, thought_of
    from dspark_jax.serving.served import template_of

    decoder = model.decoder
    thought = thought_of(template_of(decoder.tokenizer)) if args.chat_template else None
    shown_ids = () if thought is None else special_ids(decoder.tokenizer, thought.special)

    def say(turns: Sequence[Turn], show: Show) -> None:
        reader = None
        if thought is not None and decoder.encode is not None:
            end = decoder.tokenizer.decode(list(decoder.encode(turns)[-16:]))
            reader = ThoughtReader(thought, str(end))
        stream = model.stream(turns, shown_ids=shown_ids, **rules, **given)
        # Closed at once where somebody stops it, so that its engine ends before the next.
        with contextlib.closing(stream) as events:
            for event in events:
                show(*(("", event.text) if reader is None else reader.push(event.text)))
                if event.finish_reason and reader is not None:
                    show(*reader.finish())
                if event.finish_reason == "error":
                    raise ValueError("the model could not go on with this text")

    return say


def _asking(args: argparse.Namespace) -> Say:
    """Answers of a server."""
    from dspark_jax.evaluation.load_server import chat_body

    check_unused(args, ["chat"], SHARED | RENDERED | {"top_k", "top_p", "min_p", "stop"})
    limits, rendering, name = request_of(args), rendering_of(args), ""
    client_of(args)  # what is wrong with the address is said before anything

    async def ask(turns: Sequence[Turn], show: Show) -> None:
        nonlocal name
        async with client_of(args) as client:
            name = name or await client.model()
            body = chat_body(name, turns, limits, args.seed, rendering)
            async with contextlib.aclosing(client.answer(body)) as pieces:
                async for piece in pieces:
                    show(piece.thought, piece.text)

    return lambda turns, show: asyncio.run(ask(turns, show))


def _talk(say: Say) -> int:
    """Messages in, answers out, until the input ends."""
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    turns: list[Turn] = []
    if at_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # lets people edit what they type
        print(HELP, file=sys.stderr)
    while (text := _message(at_terminal)) is not None:
        if text == "/exit":
            break
        if text == "/reset":
            turns = []
        if not text or text == "/reset":
            continue
        screen = Screen()

        turns.append({"role": "user", "content": text})
        try:
            check_characters("the message", text)
            say(turns, screen.show)
        except KeyboardInterrupt:
            print(" [stopped]", end="", file=sys.stderr)
        except ValueError as error:
            if not at_terminal:
                raise
            print(f"dspark: {' '.join(str(error).split())}", end="", file=sys.stderr)
        print(flush=True)
        if screen.answer:
            turns.append({"role": "assistant", "content": screen.answer})
        else:
            turns.pop()  # it has not been answered
    return 0


class Screen:
    """Shows an answer as it comes, and at a terminal what is thought beforehand, dimmed.

    Attributes:
        answer: so far, without the thoughts.
    """

    def __init__(self) -> None:
        self.answer, self._thinking = "", False

    def show(self, thought: str, text: str) -> None:
        """Further pieces of both."""
        if thought and sys.stdout.isatty():
            self._thinking = True
            self._print(f"{DIM}{CONTROLS.sub(UNSHOWN, thought)}{PLAIN}")
        if text:
            self._print("\n\n" * self._thinking + CONTROLS.sub(UNSHOWN, text))
            self._thinking = False
            self.answer += text

    def _print(self, text: str) -> None:
        print(text, end="", flush=True)


def _message(at_terminal: bool) -> str | None:
    """The next message; None at the end of the input."""
    while True:
        try:
            if at_terminal:
                return input("> ").strip()
            line = sys.stdin.readline() if sys.stdin is not None else ""
            return line.strip() if line else None
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:  # nothing is being said that could be stopped
            if not at_terminal:
                raise
            print(f"\n{HELP}", file=sys.stderr)


def bench_server(args: argparse.Namespace) -> int:
    """Measure a server under load."""
    from dspark_jax.evaluation import load_server
    from dspark_jax.evaluation.prompts import read_prompt_sets

    used = {"prompts", "limit", "concurrency", "repeats", "requests_per_client"}
    check_unused(args, ["bench", "load", "--prompts", ""], SHARED | RENDERED | used)
    options = {name: getattr(args, name) for name in ("concurrency", "seed", "repeats")}
    report = load_server.bench_server(
        client_of(args),
        read_prompt_sets(args.prompts, args.limit),
        request_of(args),
        requests_per_client=args.requests_per_client,
        rendering=rendering_of(args),
        **options,
    )
    print(json.dumps(report) if args.json else load_server.format_server(report))
    return 0


def at_server(args: argparse.Namespace) -> bool:
    """Whether a server is asked in place of a model."""
    if args.url is None and args.api_key_file is not None:
        raise ValueError("--api-key-file is for a server: give its --url, or leave the key out")
    return args.url is not None


def client_of(args: argparse.Namespace) -> Client:
    """A client of the server that is named."""
    from dspark_jax.client import Client

    return Client(args.url, "" if args.api_key_file is None else key_in(Path(args.api_key_file)))


def check_unused(args: argparse.Namespace, words: Sequence[str], used: Collection[str]) -> None:
    """Refuse what a server decides about, or what has no meaning for one.

    Args:
        args: with a server.
        words: the same command with nothing that need not be said.
        used: arguments that have an effect.
    """
    from dspark_jax.cli.arguments import make_parser

    plain: dict[str, Any] = vars(make_parser("").parse_args(words))
    for name, value in vars(args).items():
        if name not in used and value != plain[name]:
            raise ValueError(
                f"{name.replace('_', ' ')} is {value!r:.40}, which has no effect on the server at "
                "--url: leave it out"
            )
