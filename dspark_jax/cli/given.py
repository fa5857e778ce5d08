"""What the arguments of a command stand for: prompts, limits, models."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from dspark_jax.cli.arguments import DEFAULT_POLICY
from dspark_jax.evaluation.prompts import Prompt, read_prompts

if TYPE_CHECKING:
    from dspark_jax.engine.decoder import Decoder
    from dspark_jax.engine.request import Request


def prompts_of(args: argparse.Namespace) -> list[Prompt]:
    """The prompts of the file, of the command line or of stdin."""
    if args.prompts is not None:
        if args.prompt is not None:
            raise ValueError("PROMPT and --prompts exclude each other: give one of them")
        return read_prompts(args.prompts)
    text, origin = args.prompt, "PROMPT"
    if text == "-" or (text is None and not sys.stdin.isatty()):
        text, origin = sys.stdin.read(), "stdin"
    if text is None:
        raise ValueError("no prompt: give PROMPT or --prompts FILE.jsonl, or pipe text in")
    if not text.strip():
        raise ValueError(f"{origin}: the prompt is empty: write some text")
    return [Prompt(text, origin)]


def limits_of(args: argparse.Namespace, **changes: float) -> Request:
    """All of a request that needs no model, checked before one is loaded."""
    from dspark_jax.engine.request import Request
    from pallas_kernels import random

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
    given = {name: getattr(args, name) for name in names if hasattr(args, name)} | changes
    request = Request((0,), **given, stop_strings=tuple(getattr(args, "stop", ())))
    random.seed_key(args.seed)
    return request


def drafter_of(args: argparse.Namespace) -> str:
    """The drafter asked for: the packaged one fits the default target alone."""
    if args.drafter is not None:
        return str(args.drafter)
    return "default" if args.target == "default" else "none"


def load_models(args: argparse.Namespace) -> tuple[Decoder, tuple[int, ...], dict[str, str]]:
    """The models, the ids that end a text, and the models' names for reports."""
    from dspark_jax.model import load

    model = load(args.target, drafter_of(args), dtype=args.dtype)
    return model.decoder, model.stop_ids, {"target": model.target, "drafter": model.drafter}


def policy_of(args: argparse.Namespace) -> str:
    """The policy asked for; empty is the whole block."""
    default = DEFAULT_POLICY if drafter_of(args) == "default" else ""
    return default if args.policy is None else str(args.policy)
