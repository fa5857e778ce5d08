"""Sequences with cached features: out of a whole cache, or written and trained on in turns."""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from dspark_jax.axes import gather, place
from dspark_jax.config import DrafterConfig, TargetConfig, TrainConfig
from dspark_jax.models.targets.family import TargetParams
from dspark_jax.models.targets.table import family_of
from dspark_jax.progress import progress
from dspark_jax.training import data
from dspark_jax.training.cache import (
    BFLOAT16,
    RECORD,
    CacheReader,
    CacheSpec,
    estimate,
    manifest_text,
)
from dspark_jax.training.cache_writer import CacheWriter, finish
from dspark_jax.training.data import TokenSequence
from dspark_jax.training.state import Batch, on_mesh
from dspark_jax.training.step import parts_of

# int32 [B, S] -> hidden_BSD and feature_BSFD, bfloat16.
ReadTarget = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
# Of a cache in bounded mode: a folder of each process that is written, read and deleted.
PIECE = "piece"

BatchPlan = tuple[int, list[int]]  # of data.epoch_batches: bucket, indices of sequences


class CachedSequences(Sequence[TokenSequence]):
    """The sequences of a cache; each is made when asked for and holds views of the cache."""

    def __init__(self, reader: CacheReader, sample_N: np.ndarray, max_length: int) -> None:
        """Sequence i is sample ``sample_N[i]``, cut."""
        self._reader, self._sample_N, self._max_length = reader, sample_N, max_length

    def __len__(self) -> int:
        return len(self._sample_N)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return CachedSequences(self._reader, self._sample_N[index], self._max_length)
        number, kept = self._sample_N[index], slice(self._max_length)
        sample, origin = self._reader[number], f"{self._reader.directory}:{number}"
        return TokenSequence(sample.token_S[kept], sample.loss_mask_S[kept] > 0, sample, origin)


def cached_sequences(
    reader: CacheReader, vocab_size: int, recipe: TrainConfig
) -> tuple[CachedSequences, int]:
    """The samples of a cache as :func:`data.tokenize` gives conversations: cut, none too short.

    Returns:
        The sequences, and how many samples were dropped for too few supervised tokens.

    Raises:
        ValueError: a token is none of the target's.
    """
    kept = []
    for number in range(len(reader)):
        sample = reader[number]
        low, high = int(sample.token_S.min()), int(sample.token_S.max())
        if low < 0 or high >= vocab_size:
            raise ValueError(
                f"cache {reader.directory}: sample {number} has the token "
                f"{low if low < 0 else high}, but those of the target are 0..{vocab_size - 1}: "
                "write the cache again"
            )
        if sample.loss_mask_S[: recipe.max_length].sum() >= recipe.min_loss_tokens:
            kept.append(number)
    sequences = CachedSequences(reader, np.array(kept), recipe.max_length)
    return sequences, len(reader) - len(kept)


def cache_spec(recipe: TrainConfig, cfg: DrafterConfig) -> CacheSpec:
    """The cache that a recipe and its drafter need."""
    notes = {key: getattr(recipe, key) for key in ("dtype", "max_length", "min_loss_tokens")}
    notes["source_jsonl_paths"] = [recipe.data]
    if rendering := recipe.rendering().record():
        notes["rendering"] = rendering
    return CacheSpec(recipe.target, cfg.target_layer_ids, cfg.hidden_size, notes)


def target_reader(
    params: TargetParams,
    target_cfg: TargetConfig,
    cfg: DrafterConfig,
    recipe: TrainConfig,
    sequences: NamedSharding | None = None,
) -> ReadTarget:
    """The compiled forward pass whose results are stored, over parts of a batch where the recipe
    has micro-batches.

    Args:
        params: of the target.
        target_cfg: of the target.
        cfg: of the drafter, which names the feature layers.
        recipe: of the training.
        sequences: how a batch is split over the mesh of ``params``; None on a single device.
    """
    read = partial(
        _read,
        params,
        cfg=target_cfg,
        feature_layers=cfg.target_layer_ids,
        kernels=recipe.kernels,
        mesh=None if sequences is None else sequences.mesh,
    )

    def read_parts(token_BS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        count = parts_of(recipe, len(token_BS))
        parts = (token_BS[part::count] for part in range(count))
        placed = (part if sequences is None else place(part, sequences) for part in parts)
        each = zip(*(gather(read(part)) for part in placed), strict=True)
        hidden_BSD, feature_BSFD = (
            np.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:]) for arrays in each
        )
        return hidden_BSD, feature_BSFD

    return read_parts


@partial(jax.jit, static_argnames=("cfg", "feature_layers", "kernels", "mesh"))
def _read(
    params: TargetParams,
    token_BS: jax.Array,
    cfg: TargetConfig,
    feature_layers: tuple[int, ...],
    kernels: str,
    mesh: Any,
) -> tuple[jax.Array, jax.Array]:
    encode: Callable[..., Any] = partial(family_of(cfg).encode, kernels=kernels)
    if mesh is not None:
        encode = on_mesh(encode, mesh)
    hidden_BSD, feature_BSFD = encode(params, token_BS, cfg, feature_layers)
    return hidden_BSD.astype(BFLOAT16), feature_BSFD.astype(BFLOAT16)


def store(
    writer: CacheWriter,
    sequences: Sequence[TokenSequence],
    plans: Iterable[BatchPlan],
    sample_of: Mapping[int, int],
    recipe: TrainConfig,
    read: ReadTarget,
) -> None:
    """Run the target over batches and store what the writer does not have yet.

    Args:
        writer: of the cache.
        sequences: all of them.
        plans: the batches.
        sample_of: index of a sequence -> its sample in the cache.
        recipe: sizes of the batches.
        read: the target.
    """
    bar = progress(
        total=len(sample_of), initial=len(writer.stored), unit="seq", desc="cache", leave=None
    )
    with bar:
        for bucket, indices in plans:
            if all(sample_of[index] in writer.stored for index in indices):
                continue
            size = data.batch_size(recipe, bucket)
            batch = data.make_batch(sequences, indices, bucket, size)
            hidden_BSD, feature_BSFD = read(batch.token_BS)
            for row, index in enumerate(indices):
                sequence, sample = sequences[index], sample_of[index]
                if sample not in writer.stored:
                    part = row, slice(len(sequence.token_S))
                    arrays = feature_BSFD[part], hidden_BSD[part]
                    writer.add(sample, sequence.token_S, sequence.loss_mask_S, *arrays)
                    bar.update()


def piece_bytes(num_tokens: int, num_samples: int, spec: CacheSpec) -> int:
    """The most bytes of a one-shard cache while it is written: index and manifest are there twice.

    What a part says of its plan is shorter than the manifest.
    """
    manifest = len(manifest_text(spec, num_samples, 1).encode())
    return estimate(num_tokens, num_samples, spec) + num_samples * RECORD.itemsize + 2 * manifest


def bounded_batches(
    sequences: Sequence[TokenSequence],
    recipe: TrainConfig,
    steps: range,
    spec: CacheSpec,
    read: ReadTarget,
) -> Iterator[Batch]:
    """The batches of :func:`data.batches_from` with cached features, ``cache_gb`` at a time.

    A piece holds the sequences of as many coming batches as fit, and serves until a batch needs
    another sequence: where all fit, one piece serves the whole run. A piece that a killed run left
    is written again. Of several processes, all of which read the target together, each has a piece
    of its own.

    Args:
        sequences: all of them.
        recipe: with ``cache`` and ``cache_gb``.
        steps: the steps, counted from 0, that have yet to be done.
        spec: of the piece.
        read: the target.

    Raises:
        ValueError: not even one batch fits.
    """
    folder = Path(recipe.cache) / f"{PIECE}-{jax.process_index()}"
    limit = int(recipe.cache_gb * 1e9)
    schedule = islice(data.schedule_from(sequences, recipe, steps.start), len(steps))
    coming: deque[BatchPlan] = deque()
    shutil.rmtree(folder, ignore_errors=True)
    try:
        while sample_of := _choose_piece(coming, schedule, sequences, spec, limit):
            with CacheWriter(folder, spec, max_shard_bytes=limit) as writer:
                plans = [plan for plan in coming if sample_of.keys() >= set(plan[1])]
                store(writer, sequences, plans, sample_of, recipe, read)
            finish(folder, spec)
            samples = np.arange(len(sample_of))
            piece = CachedSequences(CacheReader(folder), samples, recipe.max_length)
            while coming and sample_of.keys() >= set(coming[0][1]):
                bucket, indices = coming.popleft()
                members = [sample_of[index] for index in indices]
                yield data.make_batch(piece, members, bucket, data.batch_size(recipe, bucket))
                coming.extend(islice(schedule, 0 if coming else 1))
            del piece  # deleted files take room for as long as they are mapped
            shutil.rmtree(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _choose_piece(
    coming: deque[BatchPlan],
    schedule: Iterator[BatchPlan],
    sequences: Sequence[TokenSequence],
    spec: CacheSpec,
    limit: int,
) -> dict[int, int]:
    """The sequences of the next batches that fit, with their samples; none where all is done.

    The batches are put into ``coming``, with one more that did not fit.
    """
    sample_of: dict[int, int] = {}
    num_tokens = 0
    for ahead in count():
        coming.extend(islice(schedule, 1 if ahead == len(coming) else 0))
        if ahead == len(coming) or len(sample_of) == len(sequences):
            break
        new = [index for index in coming[ahead][1] if index not in sample_of]
        num_tokens += sum(len(sequences[index].token_S) for index in new)
        needed = piece_bytes(num_tokens, len(sample_of) + len(new), spec)
        if needed > limit and not sample_of:
            raise ValueError(
                f"cache_gb is {limit / 1e9:g}, but a batch takes {needed / 1e9:g} GB: raise it, or "
                "lower tokens_per_batch"
            )
        if needed > limit:
            break
        sample_of.update(zip(new, count(len(sample_of)), strict=False))
    return sample_of
