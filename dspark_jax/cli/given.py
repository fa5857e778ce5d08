"""What the arguments of a command stand for: prompts, limits, models."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from dspark_jax.engine.request import Request
    from dspark_jax.evaluation.prompts import Prompt
    from dspark_jax.model import Model


def prompts_of(args: argparse.Namespace) -> list[Prompt]:
    """The prompts of the file, of the command line or of stdin."""
    from dspark_jax.evaluation.prompts import Prompt, read_prompts

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


def load_model(args: argparse.Namespace) -> Model:
    """The models that are asked for."""
    from dspark_jax.model import load

    given: dict[str, Any] = {"kernels": args.kernels} if hasattr(args, "kernels") else {}
    given |= {"dtype": args.dtype, "mesh": mesh_of(args), "own_vocab": args.own_vocab}
    return load(args.target, drafter_of(args), **given)


def mesh_of(args: argparse.Namespace) -> Mesh | None:
    """The mesh that is asked for, over this process's devices; None for one device.

    Raises:
        ValueError: there are fewer devices.
    """
    from dspark_jax.axes import make_mesh

    return make_mesh(**args.mesh) if args.mesh else None


def names_of(model: Model) -> dict[str, str]:
    """The models' names, for reports."""
    return {"target": model.target, "drafter": model.drafter}
