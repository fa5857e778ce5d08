"""What the arguments of a command stand for: prompts, limits, models."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_jax.rendering import PLAIN, Rendering, parse_arguments

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from dspark_jax.engine.engine import Engine
    from dspark_jax.engine.grammar import Grammar
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
    piped = sys.stdin is not None and not sys.stdin.isatty()
    if text == "-" or (text is None and piped):
        text, origin = _stdin(), "stdin"
    if text is None:
        raise ValueError("no prompt: give PROMPT or --prompts FILE.jsonl, or pipe text in")
    if not text.strip():
        raise ValueError(f"{origin}: the prompt is empty: write some text")
    return [Prompt(text, origin)]


def _stdin() -> str:
    """All that is piped in, without a byte-order mark.

    Raises:
        ValueError: it is closed, or not UTF-8.
    """
    if sys.stdin is None:
        raise ValueError("stdin: closed: pipe a prompt in, or give PROMPT")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"stdin: not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}): convert it"
        ) from None


def limits_of(args: argparse.Namespace, **changes: float) -> Request:
    """All of a request that needs no model, checked before one is loaded."""
    from pallas_kernels import random

    random.seed_key(args.seed)
    return request_of(args, **changes)


def request_of(args: argparse.Namespace, **changes: float) -> Request:
    """The same but for the seed; leaves accelerators alone, for those who talk to a server."""
    from dspark_jax.engine.request import Request

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p")
    given = {name: getattr(args, name) for name in names if hasattr(args, name)} | changes
    stops, grammar = tuple(getattr(args, "stop", ())), grammar_of(args)
    return Request((0,), **given, stop_strings=stops, grammar=grammar)


def grammar_of(args: argparse.Namespace) -> Grammar | None:
    """That of a schema in a file, by the commands that take one."""
    from dspark_jax.engine.grammar import Grammar

    path = getattr(args, "json_schema", None)
    if path is None:
        return None
    try:
        return Grammar("json_schema", Path(path).read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def drafter_of(args: argparse.Namespace) -> str:
    """The drafter asked for; where nobody asks, what the target has."""
    if args.drafter is not None:
        return str(args.drafter)
    from dspark_jax.checkpoints.load import default_drafter

    return default_drafter(args.target)


def load_model(args: argparse.Namespace) -> Model:
    """The models that are asked for."""
    return load_models(args, {"": drafter_of(args)})[""]


def load_models(args: argparse.Namespace, drafters: Mapping[str, str]) -> dict[str, Model]:
    """The target that is asked for with each of several drafters, by their names."""
    from jax.numpy import dtype

    from dspark_jax.model import load_each

    given: dict[str, Any] = {"own_vocab": args.own_vocab}
    if hasattr(args, "kernels"):
        given["kernels"] = args.kernels
    how = rendering_of(args), dtype(args.dtype), args.weights, mesh_of(args)
    models = load_each(args.target, list(drafters.values()), *how, **given)
    return dict(zip(drafters, models, strict=True))


def rendering_of(args: argparse.Namespace) -> Rendering:
    """How prompts are rendered, by the commands that have any."""
    if not hasattr(args, "template_args"):
        return PLAIN
    return Rendering(args.system, args.chat_template, parse_arguments(args.template_args))


def mesh_of(args: argparse.Namespace) -> Mesh | None:
    """The mesh that is asked for, over this process's devices; None for one device.

    Raises:
        ValueError: there are fewer devices.
    """
    from dspark_jax.axes import make_mesh

    return make_mesh(**args.mesh) if args.mesh else None


def kind_of(args: argparse.Namespace) -> dict[str, str]:
    """What recipes say of weights that are not plain; nothing of plain ones, so that outputs of
    earlier versions can be gone on with."""
    return {} if args.weights == "plain" else {"weights": args.weights}


def names_of(model: Model) -> dict[str, str]:
    """The models' names, for reports."""
    return {"target": model.target, "drafter": model.drafter}


def trace_of(args: argparse.Namespace, engine: Engine) -> AbstractContextManager[object]:
    """Have an engine record the rounds that are asked for."""
    if args.profile is None:
        return nullcontext()
    from dspark_jax.tracing import Trace

    engine.trace = Trace(args.profile, args.profile_count)
    return engine.trace


def key_in(path: Path) -> str:
    """The first line of a file, which must say something."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines or not lines[0].strip():
        raise ValueError(f"{path}: the first line is empty: write the API key there")
    return lines[0].strip()
