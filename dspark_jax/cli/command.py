"""The ``dspark`` command: one function a subcommand, jax and the models loaded when needed.

Exit codes: 0 success; 1 numbers that are not finite, or a device that fails; 2 wrong input, said in
one line on stderr; 3 a checkpoint of a training that could not be written; 130 interrupted; 141
nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dspark_jax
from dspark_jax.cli import clients, measuring, serving, spreading, training
from dspark_jax.cli.arguments import make_parser
from dspark_jax.cli.given import (
    drafter_of,
    kind_of,
    limits_of,
    load_model,
    mesh_of,
    names_of,
    prompts_of,
    rendering_of,
    trace_of,
)
from dspark_jax.files import SaveError

if TYPE_CHECKING:
    from dspark_jax.engine.reader import Generation


UNCOMPILED = (
    "plan",
    "replay",
    "cache estimate",
    "cache check",
    "train list",
    "train show",
)  # commands that run no model


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code (wrong usage and ``--help`` raise SystemExit)."""
    args = make_parser(dspark_jax.__version__).parse_args(argv)
    if args.command == "prepare":
        args.words = list(sys.argv[1:] if argv is None else argv)  # for others, with --ray
    run = {
        "generate": generate,
        "serve": serving.serve,
        "chat": clients.chat,
        "bench speed": measuring.speed,
        "bench compare": measuring.compare,
        "bench load": measuring.load,
        "bench quality": measuring.quality,
        "profile": profile,
        "plan": plan,
        "doctor": doctor,
        "calibrate": calibrate,
        "replay": replay,
        "bench acceptance": measuring.acceptance,
        "prepare": prepare,
        "train": training.train,
        "train list": training.list_recipes,
        "train show": training.show_recipe,
        "train dry-run": training.dry_run,
        "cache estimate": training.cache_estimate,
        "cache write": training.cache_write,
        "cache check": training.cache_check,
        "export": export,
        "convert": convert,
    }[args.command]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a text may not fit the terminal's encoding
    logging.basicConfig(format="dspark: %(message)s", level=logging.ERROR)
    logging.getLogger("dspark_jax").setLevel(logging.INFO)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            here = getattr(args, "url", None) is None  # or the models are elsewhere
            if here and args.command not in UNCOMPILED:
                from dspark_jax.model import use_compilation_cache

                use_compilation_cache()
            if here and hasattr(args, "distributed") and "train" not in args.command:
                from dspark_jax.cli.processes import find_share

                find_share(args)
            code = run(args)
            sys.stdout.flush()
        except BrokenPipeError:
            _discard_output()
            return 141
        except KeyboardInterrupt as stop:
            return _fail(130, str(stop) or "interrupted")
        except (FloatingPointError, RuntimeError) as error:  # of numbers, of a device
            from dspark_jax.cli.processes import end_at_once

            return end_at_once(args, _fail(1, str(error)))
        except SaveError as error:
            return _fail(3, str(error))
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            return _fail(2, f"{where}{error.strerror or error}")
        except (ValueError, OverflowError) as error:
            return _fail(2, str(error))
    return code


def _fail(code: int, message: str) -> int:
    """Say in one line what is wrong."""
    print(f"dspark: {' '.join(message.split())}", file=sys.stderr)
    return code


def _discard_output() -> None:
    """Let the interpreter's own flush at exit succeed where the reader of stdout has gone."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def generate(args: argparse.Namespace) -> int:
    """Continue one prompt or a file of prompts."""
    prompts, limits = prompts_of(args), limits_of(args)
    model = load_model(args)
    from dspark_jax.engine.generate import serve
    from dspark_jax.evaluation.prompts import make_requests
    from dspark_jax.evaluation.results import result_row, sound, summary

    requests = make_requests(prompts, model.decoder, limits, args.seed)
    options = {"acceptance": args.acceptance, "policy": args.policy, "slots": args.batch}
    streams = args.batch == 1 and not args.json
    done: list[Generation] = []
    began = time.perf_counter()
    with model.engine_for(requests, **options) as engine, trace_of(args, engine):
        for result in serve(engine, requests, _show if streams else None):
            done.append(result)
            if args.json:
                print(json.dumps(result_row(result)), flush=True)
            else:
                last = len(done) == len(requests)
                print("" if streams else result.text, end="\n" if last else "\n\n", flush=True)
    if done and not args.json:
        print(summary(done, time.perf_counter() - began), file=sys.stderr)
    for result in done:
        sound(result)
    return 0


def _show(_: int, text: str) -> None:
    print(text, end="", flush=True)


def profile(args: argparse.Namespace) -> int:
    """Measure what the rounds of an engine cost here."""
    model = load_model(args)
    from dspark_jax.engine import config, timing
    from dspark_jax.scheduler import profile as costs

    slots = config.round_up(args.slots, args.mesh.get("data", 1))
    sizes = config.EngineConfig(slots=slots, positions=args.positions)
    found = timing.measure_profile(model.decoder, sizes, args.replays, names_of(model))
    if args.out is not None:
        costs.write_profile(Path(args.out), found)
    print(json.dumps(costs.profile_json(found)) if args.json else costs.format_profile(found))
    return 0


def plan(args: argparse.Namespace) -> int:
    """Say what models take on each device, and what fits."""
    from dspark_jax.evaluation import footprint

    models = footprint.open_models(args.target, drafter_of(args), own_vocab=args.own_vocab)
    given = ("slots", "positions", "dtype", "weights")
    options = {name: getattr(args, name) for name in given} | {"memory_bytes": args.memory * 10**9}
    report = footprint.plan(models, args.mesh, **options)
    print(json.dumps(report) if args.json else footprint.format_plan(report))
    return 0


def doctor(args: argparse.Namespace) -> int:
    """Say whether drafts pay on this machine."""
    model = load_model(args)
    from dspark_jax.evaluation.doctor import diagnose, format_report

    report = diagnose(model.decoder, args.concurrency, args.max_new_tokens) | names_of(model)
    print(json.dumps(report) if args.json else format_report(report))
    return 0


def calibrate(args: argparse.Namespace) -> int:
    """Fit the temperatures of a drafter's confidences."""
    from dspark_jax.evaluation import confidence, pictures, rounds
    from dspark_jax.evaluation.confidence import path_beside
    from dspark_jax.evaluation.prompts import read_prompt_sets
    from dspark_jax.scheduler.calibration import write_calibration
    from dspark_jax.training.curves import write_picture
    from dspark_jax.training.records import sha256

    out = path_beside(drafter_of(args), args.target) if args.out is None else Path(args.out)
    requests = [request for path in args.records for request in rounds.read_record(path)]
    if not args.records:
        sets = read_prompt_sets(args.prompts, args.limit)
        temperatures = tuple(args.temperature or (0.0, 1.0))
        acceptances = tuple(args.acceptance or ("rejection",))
        limits = [limits_of(args, temperature=temperature) for temperature in temperatures]
        model = load_model(args)
        record = partial(
            rounds.record_rounds,
            model.decoder,
            sets,
            limits[0],
            acceptances,
            temperatures,
            seed=args.seed,
            slots=args.batch,
        )
        if args.record is None:
            requests = [request for _, request in record()]
        else:
            recipe = names_of(model) | {
                "prompts_sha256": [sha256(Path(path)) for path in args.prompts]
            }
            for name in ("dtype", "limit", "max_new_tokens", "seed"):
                recipe[name] = getattr(args, name)
            recipe |= {"acceptances": list(acceptances), "temperatures": list(temperatures)}
            recipe |= rendering_of(args).record() | kind_of(args)
            rounds.write_record(Path(args.record), recipe, record)
            requests = rounds.read_record(args.record)
    tables, report = confidence.fit_calibration(requests)
    write_calibration(out, tables)
    report["out"] = str(out)
    if args.plot is not None:
        write_picture(pictures.draw_reliability(report), Path(args.plot))
    print(json.dumps(report) if args.json else confidence.format_calibration(report))
    return 0


def replay(args: argparse.Namespace) -> int:
    """Compare policies on recorded rounds."""
    from dspark_jax.evaluation import imagined
    from dspark_jax.evaluation import replay as policies
    from dspark_jax.evaluation.rounds import read_record
    from dspark_jax.scheduler.calibration import read_calibration
    from dspark_jax.scheduler.profile import read_profile

    requests = read_record(args.record)
    costs = partial(imagined.imagined_costs, imagined.TILES[args.costs])
    if args.profile is not None:
        costs = partial(imagined.profile_costs, read_profile(Path(args.profile)))
    calibration, block_size = None, requests[0].logit_NG.shape[1]
    if args.calibration is not None:
        calibration = read_calibration(Path(args.calibration), block_size)
    rows = policies.replay_record(requests, args.concurrency, costs, calibration)
    print(json.dumps({"rows": rows}) if args.json else policies.format_replay(rows))
    return 0


def prepare(args: argparse.Namespace) -> int:
    """Have the target answer a file of prompts or conversations."""
    if args.ray:
        return spreading.prepare_spread(args)
    from dspark_jax.checkpoints.conversations import read_questions
    from dspark_jax.evaluation import prepare as data
    from dspark_jax.training.records import sha256

    limits, share = limits_of(args), data.Share(args.process, args.processes)
    rendering = rendering_of(args)
    conversations = [  # with their system turns, which the output is to have too
        replace(found, turns=tuple(rendering.turns(found.turns)))  # type: ignore[arg-type]
        for found in read_questions(args.input, args.limit)
    ]
    model = load_model(args)
    recipe = {"target": model.target, "dtype": args.dtype, "input_sha256": sha256(Path(args.input))}
    recipe |= rendering.record() | kind_of(args)
    given = ("acceptance", "policy", "kernels")
    options = {name: getattr(args, name) for name in given}
    with data.engine_for(model.decoder, limits, args.batch, **options) as engine:
        if engine.follows:
            engine.follow()
            return 0
        path = data.prepare(
            engine,
            model.decoder,
            conversations,
            limits,
            Path(args.out),
            recipe,
            seed=args.seed,
            share=share,
        )
    print(path)
    return 0


def export(args: argparse.Namespace) -> int:
    """Write a drafter in a layout that other programs read."""
    if drafter_of(args) == "none":
        raise ValueError("export writes a drafter: give --drafter")
    options = {"full_vocabulary": args.full_vocabulary, "own_vocab": args.own_vocab}
    return _write_drafter(args, drafter_of(args), args.format, **options)


def convert(args: argparse.Namespace) -> int:
    """Write a drafter in the layout of this package."""
    return _write_drafter(args, args.source, "dspark", own_vocab=args.own_vocab)


def _write_drafter(args: argparse.Namespace, drafter: str, layout: str, **options: bool) -> int:
    """Write a drafter's checkpoint and say where it lies."""
    from dspark_jax.evaluation.export import write_drafter

    given: dict[str, Any] = {"dtype": args.dtype, "mesh": mesh_of(args), **options}
    given["rendering"] = rendering_of(args)
    print(write_drafter(args.target, drafter, layout, args.out, **given))
    return 0
