"""Whole caches of target features: how large one becomes, and writing it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dspark_jax.checkpoints.load import ReadWeights, Target, open_target
from dspark_jax.config import DrafterConfig, TrainConfig
from dspark_jax.training import data
from dspark_jax.training.cache import MANIFEST, CacheReader, CacheSpec, estimate
from dspark_jax.training.cache_writer import CacheWriter, finish, is_complete
from dspark_jax.training.features import cache_spec, store, target_reader
from dspark_jax.training.programs import mesh_of
from dspark_jax.training.records import sha256
from dspark_jax.training.run import (
    check_kernels,
    drafter_config,
    load_sequences,
    open_source,
)


@dataclasses.dataclass(frozen=True)
class CacheSize:
    """What a cache would hold, and the bytes of its shards and its index."""

    num_samples: int
    num_tokens: int
    size_bytes: int


def cache_size(recipe: TrainConfig) -> CacheSize:
    """The size of a recipe's cache, before anything is written.

    Raises:
        ValueError: bad data or configuration.
    """
    _, sequences, spec, *_ = _contents(recipe)
    num_tokens = sum(len(sequence.token_S) for sequence in sequences)
    return CacheSize(len(sequences), num_tokens, estimate(num_tokens, len(sequences), spec))


def write_cache(recipe: TrainConfig, out: Path, process: int = 0, processes: int = 1) -> bool:
    """Write one process's part of a recipe's cache, held-out sequences included, or go on with it.

    Args:
        recipe: of the training; its ``cache`` plays no part.
        out: the directory, the same for all processes.
        process: which one this is, from 0.
        processes: how many there are, each with an equal stretch of the sequences.

    Returns:
        Whether the cache is whole now; False where other parts are still missing.

    Raises:
        ValueError: bad data or configuration, or ``out`` holds another cache.
    """
    if not 0 <= process < processes:
        raise ValueError(f"process {process} must lie in 0..{processes - 1}")
    check_kernels(recipe)
    recipe, sequences, spec, cfg, target, read_weights = _contents(recipe)
    if (out / MANIFEST).exists():
        found = CacheReader(out)
        found.require(spec)
        if len(found) != len(sequences):
            raise ValueError(
                f"{out} holds a cache of {len(found)} samples, but the data has {len(sequences)}: "
                "name another directory"
            )
    elif not is_complete(out, process, processes):
        first, end = (len(sequences) * i // processes for i in (process, process + 1))
        plans = data.bucket_batches(sequences, range(first, end), recipe)
        mesh = mesh_of(recipe)
        params = read_weights(jnp.dtype(recipe.dtype), mesh)
        split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        read = target_reader(params, target.cfg, cfg, recipe, split)
        with CacheWriter(out, spec, process, processes) as writer:
            store(writer, sequences, plans, {i: i for i in range(first, end)}, recipe, read)
    return finish(out, spec, processes)


def _contents(
    recipe: TrainConfig,
) -> tuple[TrainConfig, list[data.TokenSequence], CacheSpec, DrafterConfig, Target, ReadWeights]:
    """The recipe with its buckets and without a cache, all sequences of its data, what a cache of
    them says of itself, the drafter's sizes, and the target without its weights."""
    recipe = dataclasses.replace(recipe, cache="", cache_gb=0.0)
    source = open_source(recipe)
    target, read_weights = open_target(recipe.target)
    cfg = drafter_config(recipe, target)
    train_set, held_out = load_sequences(source, target, cfg, recipe)
    recipe = data.with_buckets(recipe, train_set)  # those of the training
    spec = cache_spec(recipe, cfg)
    notes = {**spec.notes, "data_sha256": sha256(Path(recipe.data))}
    spec = dataclasses.replace(spec, notes=notes)
    return recipe, [*train_set, *held_out], spec, cfg, target, read_weights
