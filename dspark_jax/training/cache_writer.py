"""Writing a target cache: several processes at once, each killed and resumed at will.

Process I of N has a folder of its own, ``.writing/part-I-of-N``, with shards that nobody else
touches and an index to which a record is appended once its sample is in the shard. Whatever lies
behind the last record is cut when the process comes again. When all parts are complete, any process
may publish them; every step of that can be repeated, and the manifest comes last.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from dspark_jax.files import write_atomically
from dspark_jax.training.cache import (
    ARRAYS,
    BFLOAT16,
    INDEX,
    MANIFEST,
    RECORD,
    CacheSpec,
    manifest_text,
    shard_name,
)

MAX_SHARD_BYTES = 4 << 30
WRITING, PLAN, COMPLETE = ".writing", "plan.json", "complete"


def part_folder(directory: Path, rank: int, world: int) -> Path:
    """Where process ``rank`` of ``world`` writes."""
    return directory / WRITING / f"part-{rank:05d}-of-{world:05d}"


def is_complete(directory: Path, rank: int, world: int) -> bool:
    """Whether a part has all its samples and only waits to be published."""
    return (part_folder(directory, rank, world) / COMPLETE).exists()


class CacheWriter:
    """One process's part of a cache; a context manager that completes the part on success.

    Attributes:
        stored: ids of the samples that are there, an earlier run's included.
    """

    def __init__(
        self,
        directory: Path,
        spec: CacheSpec,
        rank: int = 0,
        world: int = 1,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        """Begin a part, or go on where a killed process stopped.

        Raises:
            ValueError: the cache or this part is complete, the directory holds the beginnings of
                another cache, or another process writes this part now.
        """
        if (directory / MANIFEST).exists() or is_complete(directory, rank, world):
            raise ValueError(f"{directory} is written already: name another directory")
        self.spec, self.max_shard_bytes = spec, max_shard_bytes
        self.folder = part_folder(directory, rank, world)
        _check_beginnings(directory, spec, world)
        write_atomically(self.folder / PLAN, manifest_text(spec, 0, 0))
        self._index = (self.folder / INDEX).open("a+b")
        try:
            fcntl.flock(self._index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._index.close()
            raise ValueError(
                f"{self.folder} is being written by another process: give each its own --process"
            ) from None
        record_N = self._recover()
        self.stored = set(record_N["sample_id"].tolist())
        self._shard_id = int(record_N["shard_id"][-1]) if len(record_N) else 0
        self._shard = self._open_shard()

    def _recover(self) -> np.ndarray:
        """The records whose samples are whole; everything behind them is cut."""
        self._index.seek(0)
        data = self._index.read()
        record_N = np.frombuffer(data[: len(data) // RECORD.itemsize * RECORD.itemsize], RECORD)
        sizes = {path.name: path.stat().st_size for path in self.folder.glob("shard-*.bin")}
        end_N = _ends(record_N, self.spec)
        size_N = [sizes.get(shard_name(shard), 0) for shard in record_N["shard_id"]]
        torn_N = end_N > np.array(size_N, np.int64)
        whole = int(torn_N.argmax()) if torn_N.any() else len(record_N)
        record_N = record_N[:whole]
        self._index.truncate(whole * RECORD.itemsize)
        last = int(record_N["shard_id"][-1]) if whole else 0
        for name in sizes:
            if name > shard_name(last):
                (self.folder / name).unlink()
            elif name == shard_name(last):
                os.truncate(self.folder / name, int(end_N[whole - 1]) if whole else 0)
        return record_N

    def _open_shard(self) -> IO[bytes]:
        return (self.folder / shard_name(self._shard_id)).open("ab")

    def add(
        self,
        sample_id: int,
        token_S: np.ndarray,
        loss_mask_S: np.ndarray,
        feature_SFD: np.ndarray,
        hidden_SD: np.ndarray,
    ) -> None:
        """Append a sample; numbers of a wider type are rounded to bfloat16.

        Raises:
            ValueError: the sample is there already, is empty, or has other sizes.
        """
        width, length = self.spec.hidden_size, len(token_S)
        arrays = (
            np.asarray(token_S, "<i4"),
            np.ones(length, np.uint8),
            np.asarray(loss_mask_S, np.uint8),
            np.asarray(feature_SFD, BFLOAT16).reshape(-1, len(self.spec.layer_ids) * width),
            np.asarray(hidden_SD, BFLOAT16).reshape(-1, width),
        )
        if sample_id in self.stored or not length:
            raise ValueError(f"sample {sample_id} is empty or was written already")
        if {len(array) for array in arrays} != {length}:
            raise ValueError(f"sample {sample_id} has arrays of different lengths")
        sizes = [array.nbytes for array in arrays]
        self._make_room(sum(sizes))
        offsets = self._shard.tell() + np.cumsum([0, *sizes[:-1]])
        for array in arrays:
            self._shard.write(np.ascontiguousarray(array).view(np.uint8).data)
        self._shard.flush()
        record = np.array([(sample_id, self._shard_id, length, *offsets)], RECORD)
        self._index.write(record.tobytes())
        self._index.flush()
        self.stored.add(sample_id)

    def _make_room(self, size_bytes: int) -> None:
        """Open the next shard where this one would become too large."""
        used = self._shard.tell()
        if used and used + size_bytes > self.max_shard_bytes:
            self._close_shard()
            self._shard_id += 1
            self._shard = self._open_shard()

    def _close_shard(self) -> None:
        os.fsync(self._shard.fileno())
        self._shard.close()

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._close_shard()
        os.fsync(self._index.fileno())
        if kind is None:
            (self.folder / COMPLETE).touch()
        self._index.close()


def finish(directory: Path, spec: CacheSpec, world: int = 1) -> bool:
    """Publish a cache whose parts are all complete.

    The shards get global numbers in the order of the ranks. Several processes may do this at once,
    and one that is killed leaves what the next one needs.

    Returns:
        Whether the cache is whole now; False while another part is still being written.

    Raises:
        ValueError: a sample or a shard is missing, or the parts are another cache's.
    """
    if not (directory / MANIFEST).exists():
        if all(is_complete(directory, rank, world) for rank in range(world)):
            _check_beginnings(directory, spec, world)
            with suppress(FileNotFoundError):  # another process was quicker, and has cleaned up
                _publish(directory, world, spec)
        if not (directory / MANIFEST).exists():
            return False
    shutil.rmtree(directory / WRITING, ignore_errors=True)
    for left in directory.glob(".*.part"):  # of one that was killed while it published
        left.unlink(missing_ok=True)
    return True


def _publish(directory: Path, world: int, spec: CacheSpec) -> None:
    parts, num_shards = [], 0
    for folder in (part_folder(directory, rank, world) for rank in range(world)):
        record_N = np.fromfile(folder / INDEX, RECORD)
        for shard in np.unique(record_N["shard_id"]):
            with suppress(FileNotFoundError):  # it was moved before
                (folder / shard_name(shard)).replace(directory / shard_name(num_shards + shard))
        record_N["shard_id"] += num_shards
        num_shards += len(np.unique(record_N["shard_id"]))
        parts.append(record_N)
    record_N = np.concatenate(parts)
    record_N = record_N[np.argsort(record_N["sample_id"])]
    dense = np.array_equal(record_N["sample_id"], np.arange(len(record_N)))
    if not dense or not all((directory / shard_name(i)).exists() for i in range(num_shards)):
        raise ValueError(
            f"{directory} lacks samples or shards that were written: remove it and write it again"
        )
    write_atomically(directory / INDEX, record_N.tobytes())
    write_atomically(directory / MANIFEST, manifest_text(spec, len(record_N), num_shards))


def _check_beginnings(directory: Path, spec: CacheSpec, world: int) -> None:
    """Refuse to go on with another cache's parts."""
    plan = found = manifest_text(spec, 0, 0)
    for folder in (directory / WRITING).glob("part-*"):
        with suppress(FileNotFoundError):
            found = (folder / PLAN).read_text(encoding="utf-8")
        if found != plan or not folder.name.endswith(f"-of-{world:05d}"):
            raise ValueError(
                f"{folder} belongs to an unfinished cache of another configuration or number of "
                f"processes: use those again, or remove {directory / WRITING}"
            )


def _ends(record_N: np.ndarray, spec: CacheSpec) -> np.ndarray:
    """int64 end of each sample in its shard."""
    length_N = record_N["seq_len"].astype(np.int64)
    last = f"{ARRAYS[-1]}_offset"
    return record_N[last].astype(np.int64) + length_N * spec.token_bytes[-1]
