"""The commands of the trainer: ``dspark train`` and ``dspark cache``, one function each."""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path

from dspark_jax.config import TrainConfig
from dspark_jax.overrides import override


def train(args: argparse.Namespace) -> int:
    """Train a drafter from a configuration file."""
    recipe = override(_recipe(args.config), args.set)
    from dspark_jax.cli.processes import join_processes

    join_processes(args.coordinator, args.processes, args.process, args.distributed)
    from dspark_jax.training.fit import fit

    print(fit(recipe))
    return 0


def cache_estimate(args: argparse.Namespace) -> int:
    """Print the bytes of a cache before it is written."""
    recipe = override(_recipe(args.config), args.set)
    from dspark_jax.training.write_cache import cache_size

    size = cache_size(recipe)
    print(
        f"{size.size_bytes} bytes ({size.size_bytes / 1e9:.3f} GB) for {size.num_samples} "
        f"sequences, {size.num_tokens} tokens"
    )
    return 0


def cache_write(args: argparse.Namespace) -> int:
    """Write the target's features of a configuration's data."""
    recipe = override(_recipe(args.config), args.set)
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


def _recipe(path: str) -> TrainConfig:
    """``config`` of a Python file, which is executed: it is the user's own program."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file; name a configuration such as those in configs/")
    try:
        config = runpy.run_path(path).get("config")
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from None
    if not isinstance(config, TrainConfig):
        found = "nothing" if config is None else f"a {type(config).__name__}"
        raise ValueError(f"{path}: must define config = TrainConfig(...), found {found}")
    return config
