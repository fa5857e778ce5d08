"""``dspark bench``: one function a measurement, jax and the models loaded when needed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark_jax.cli import clients
from dspark_jax.cli.given import (
    drafter_of,
    limits_of,
    load_model,
    load_models,
    names_of,
)

if TYPE_CHECKING:
    from dspark_jax.engine.request import Request


def speed(args: argparse.Namespace) -> int:
    """Measure decoding with drafts against plain decoding."""
    if drafter_of(args) == "none":
        raise ValueError("bench speed compares decoding with and without drafts: give --drafter")
    from dspark_jax.evaluation.prompts import read_prompt_sets
    from dspark_jax.evaluation.speed import bench_speed, format_report

    sets, limits = read_prompt_sets(args.prompts, args.limit), limits_of(args)
    model = load_model(args)
    given = ("seed", "repeats", "acceptance", "kernels", "policy")
    options = {name: getattr(args, name) for name in given}
    report = bench_speed(model.decoder, sets, limits, **options) | names_of(model)
    print(json.dumps(report) if args.json else format_report(report))
    return 0


def acceptance(args: argparse.Namespace) -> int:
    """Measure how many drafts the target keeps."""
    if drafter_of(args) == "none":
        raise ValueError("bench acceptance measures a drafter: give --drafter")
    from dspark_jax.evaluation.acceptance import bench_acceptance, format_report
    from dspark_jax.evaluation.prompts import read_prompt_sets

    temperatures = list(dict.fromkeys(args.temperature or (0.0, 1.0)))
    limits = [limits_of(args, temperature=temperature) for temperature in temperatures]
    if args.by:
        return _acceptance_by(args, limits[0], temperatures)
    sets = read_prompt_sets(args.prompts, args.limit)
    model = load_model(args)
    report = names_of(model) | bench_acceptance(
        model.decoder,
        sets,
        limits[0],
        temperatures,
        seed=args.seed,
        batch=args.batch,
        acceptance=args.acceptance,
        kernels=args.kernels,
    )
    print(json.dumps(report) if args.json else format_report(report))
    return 0


def _acceptance_by(args: argparse.Namespace, limits: Request, temperatures: list[float]) -> int:
    """The same, by where the drafts stand in whole conversations."""
    from dspark_jax.evaluation.acceptance_by import bench_acceptance_by, format_by
    from dspark_jax.evaluation.talks import read_talks

    talks = read_talks(args.prompts, args.limit)
    model = load_model(args)
    options = {name: getattr(args, name) for name in ("seed", "batch", "acceptance")}
    report = names_of(model) | bench_acceptance_by(
        model.decoder, talks, limits, temperatures, args.by, kernels=model.kernels, **options
    )
    print(json.dumps(report) if args.json else format_by(report))
    return 0


def load(args: argparse.Namespace) -> int:
    """Measure policies under load, or a server."""
    if clients.at_server(args):
        return clients.bench_server(args)
    if drafter_of(args) == "none":
        raise ValueError("bench load compares policies of drafting: give --drafter")
    from dspark_jax.evaluation import pictures
    from dspark_jax.evaluation.load import bench_load, format_load
    from dspark_jax.evaluation.prompts import read_prompt_sets
    from dspark_jax.training.curves import write_picture

    sets, limits = read_prompt_sets(args.prompts, args.limit), limits_of(args)
    model = load_model(args)
    given = ("concurrency", "policies", "seed", "repeats", "requests_per_client")
    options = {name: getattr(args, name) for name in (*given, "acceptance", "kernels")}
    report = bench_load(model.decoder, sets, limits, **options) | names_of(model)
    if args.plot is not None:
        write_picture(pictures.draw_load(report), Path(args.plot))
    print(json.dumps(report) if args.json else format_load(report))
    return 0


def quality(args: argparse.Namespace) -> int:
    """Measure how far quantised weights are from plain ones."""
    if args.weights == "plain":
        raise ValueError("bench quality compares weights with plain ones: give --weights int8")
    from dspark_jax.evaluation.prompts import read_prompt_sets
    from dspark_jax.evaluation.quality import bench_quality, format_quality

    sets, limits = read_prompt_sets(args.prompts, args.limit), limits_of(args)
    model = load_model(args)
    plain = load_model(argparse.Namespace(**{**vars(args), "weights": "plain"}))
    options = {name: getattr(args, name) for name in ("seed", "batch", "acceptance", "kernels")}
    report = bench_quality(plain.decoder, model.decoder, sets, limits, **options)
    report |= names_of(model) | {"weights": args.weights}
    print(json.dumps(report) if args.json else format_quality(report))
    return 0


def compare(args: argparse.Namespace) -> int:
    """Measure drafters against each other."""
    from dspark_jax.evaluation.compare import bench_compare, check_synthetic, format_compare
    from dspark_jax.evaluation.talks import read_talks

    check_synthetic(args.synthetic_acceptance)
    temperatures = list(dict.fromkeys(args.temperature or (0.0,)))
    limits = [limits_of(args, temperature=temperature) for temperature in temperatures]
    talks = read_talks(args.prompts, args.limit)
    models = load_models(args, args.drafters)
    given = ("concurrency", "seed", "repeats", "policy", "acceptance", "synthetic_acceptance")
    options = {name: getattr(args, name) for name in given}
    some = next(iter(models.values()))
    decoders = {name: model.decoder for name, model in models.items()}
    report = {"target": some.target} | bench_compare(
        decoders, talks, limits[0], temperatures, kernels=some.kernels, **options
    )
    for name, model in models.items():
        report["drafters"][name]["source"] = model.drafter
    _write_pictures(args, report)
    print(json.dumps(report) if args.json else format_compare(report))
    return 0


def _write_pictures(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """A comparison as a picture and as a page, where they are asked for."""
    from dspark_jax.evaluation.pictures import compare_page, draw_compare
    from dspark_jax.files import write_atomically
    from dspark_jax.training.curves import write_picture

    if args.plot is not None:
        write_picture(draw_compare(report), Path(args.plot))
    if args.html is not None:
        write_atomically(Path(args.html), compare_page(report))
