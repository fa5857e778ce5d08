"""The commands of the trainer: ``dspark train``, its questions, and ``dspark cache``, one function
each."""

from __future__ import annotations

import argparse
import runpy
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from dspark_jax.cli.recipes import recipe_file, recipe_list

if TYPE_CHECKING:
    from dspark_jax.config import TrainConfig


def train(args: argparse.Namespace) -> int:
    """Train a drafter from a recipe."""
    recipe = _recipe(args)
    from dspark_jax.cli.processes import join_processes

    join_processes(args.coordinator, args.processes, args.process, args.distributed)
    from dspark_jax.training.fit import fit
    from dspark_jax.training.trackers import TRACKERS

    with ExitStack() as stack:
        given: dict[str, Any] = {}
        given["callbacks"] = [stack.enter_context(TRACKERS[name]()) for name in args.track]
        if args.profile is not None:
            from dspark_jax.tracing import Trace

            given["trace"] = stack.enter_context(Trace(args.profile, args.profile_count))
        if args.prompts:
            from dspark_jax.evaluation.decoded import decoding

            options = {"limit": args.limit, "max_new_tokens": args.max_new_tokens}
            given["decode"] = decoding(args.prompts, **options)
        print(fit(recipe, **given))
    return 0


def list_recipes(_: argparse.Namespace) -> int:
    """Print the recipes that there are."""
    print(recipe_list())
    return 0


def show_recipe(args: argparse.Namespace) -> int:
    """Print a recipe, which is a Python file."""
    print(recipe_file(_named(args)).read_text(encoding="utf-8"), end="")
    return 0


def dry_run(args: argparse.Namespace) -> int:
    """Print what a training takes, and refuse one that does not fit on its disk."""
    recipe = _recipe(args)
    from dspark_jax.training.needs import check_room, format_needs, needs_of

    needs = needs_of(recipe)
    print(format_needs(needs, recipe))
    check_room(recipe, needs.checkpoint_bytes, needs.disk_bytes)
    return 0


def cache_estimate(args: argparse.Namespace) -> int:
    """Print the bytes of a cache before it is written."""
    recipe = _recipe(args)
    from dspark_jax.training.write_cache import cache_size

    size = cache_size(recipe)
    print(
        f"{size.size_bytes} bytes ({size.size_bytes / 1e9:.3f} GB) for {size.num_samples} "
        f"sequences, {size.num_tokens} tokens"
    )
    return 0


def cache_write(args: argparse.Namespace) -> int:
    """Write the target's features of a configuration's data."""
    recipe = _recipe(args)
    from pathlib import Path

    from dspark_jax.training.write_cache import write_cache

    whole = write_cache(recipe, Path(args.out), args.process, args.processes)
    print(args.out if whole else f"{args.out}: this part is complete, others are still missing")
    return 0


def cache_check(args: argparse.Namespace) -> int:
    """Read all of a cache."""
    from dspark_jax.progress import progress
    from dspark_jax.training.cache import CacheReader, check_values

    reader = CacheReader(args.directory)
    for _ in progress(check_values(reader), total=len(reader), unit="sample", desc="check"):
        pass
    layers = ",".join(map(str, reader.spec.layer_ids))
    print(
        f"{args.directory}: {len(reader)} samples, {reader.record_N['seq_len'].sum()} tokens, "
        f"{reader.size_bytes} bytes, layers {layers} of {reader.spec.target}"
    )
    return 0


def _named(args: argparse.Namespace) -> str:
    """The recipe that is asked for."""
    if args.config is None:
        raise ValueError(
            "no recipe: give the name of one (dspark train --list) or a Python file of your own"
        )
    return str(args.config)


def _recipe(args: argparse.Namespace) -> TrainConfig:
    """``config`` of a Python file, which is executed: it is the user's own program. With the
    settings of the command line."""
    from dspark_jax.config import TrainConfig
    from dspark_jax.overrides import override

    path = recipe_file(_named(args))
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from None
    if not isinstance(config, TrainConfig):
        found = "nothing" if config is None else f"a {type(config).__name__}"
        raise ValueError(f"{path}: must define config = TrainConfig(...), found {found}")
    return override(config, args.set)
