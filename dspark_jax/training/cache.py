"""Target features on disk: the reference's target cache, format version 2.

A cache is a directory. ``manifest.json`` says what it holds, and is written last: without it there
is no cache. ``samples.idx`` has one record a sample, dense and in order. The shards hold, a sample
after the other and unaligned, the arrays of :data:`ARRAYS`; a sample never spans two shards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dspark_jax.checkpoints.tensors import LoadError, read_json

MANIFEST, INDEX = "manifest.json", "samples.idx"
BFLOAT16 = np.dtype(jnp.bfloat16)
# Of a sample, in the order of the file; the index has the offset of each in its shard.
ARRAYS = (
    "input_ids",
    "attention_mask",
    "loss_mask",
    "target_hidden_states",
    "target_last_hidden_states",
)
OFFSETS = [(f"{name}_offset", "<u8") for name in ARRAYS]
RECORD = np.dtype([("sample_id", "<u8"), ("shard_id", "<u4"), ("seq_len", "<u4"), *OFFSETS])
FORMAT: Mapping[str, Any] = {
    "version": 2,
    "hidden_dtype": "bfloat16",
    "token_dtype": "int32",
    "mask_dtype": "uint8",
    "index_record_size": RECORD.itemsize,
}
# A mapped shard keeps a file descriptor, of which a process has about a thousand.
MAPPED_SHARDS = 256


@dataclass(frozen=True)
class CacheSpec:
    """What a cache holds.

    Attributes:
        target: name of the target, as a training configuration spells it.
        layer_ids: the feature layers, F of them.
        hidden_size: D of the target.
        notes: further keys of the manifest, which nobody needs for reading; ``rendering`` has
            what of its recipe's ``Rendering`` is not the default.
    """

    target: str
    layer_ids: tuple[int, ...]
    hidden_size: int
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def token_bytes(self) -> tuple[int, ...]:
        """Bytes a token in each of :data:`ARRAYS`."""
        return 4, 1, 1, 2 * len(self.layer_ids) * self.hidden_size, 2 * self.hidden_size


@dataclass(frozen=True)
class CachedSample:
    """Views of one sample's memory-mapped arrays.

    Attributes:
        token_S: int32 ids; unaligned.
        loss_mask_S: uint8, 1 where a token is supervised.
        feature_SFD: bfloat16 residual stream after the feature layers.
        hidden_SD: bfloat16 hidden states after the final norm.
    """

    token_S: np.ndarray
    loss_mask_S: np.ndarray
    feature_SFD: np.ndarray
    hidden_SD: np.ndarray


def shard_name(shard_id: int) -> str:
    """The file of a shard."""
    return f"shard-{shard_id:05d}.bin"


def manifest_text(spec: CacheSpec, num_samples: int, num_shards: int) -> str:
    """The manifest of a cache."""
    manifest = {
        **spec.notes,
        **FORMAT,
        "target_model_name_or_path": spec.target,
        "target_layer_ids": list(spec.layer_ids),
        "hidden_size": spec.hidden_size,
        "num_samples": num_samples,
        "num_shards": num_shards,
        "shards": [{"shard_id": i, "file_name": shard_name(i)} for i in range(num_shards)],
    }
    return json.dumps(manifest, indent=2, sort_keys=True)


def estimate(num_tokens: int, num_samples: int, spec: CacheSpec) -> int:
    """Bytes of the shards and the index of a cache, exactly; its manifest is a kilobyte or so."""
    return num_tokens * sum(spec.token_bytes) + num_samples * RECORD.itemsize


class CacheReader:
    """A cache that was checked on opening, memory-mapped: samples are views, nothing is copied.

    Attributes:
        directory: where it lies.
        spec: what it holds.
        record_N: of the samples, with the fields of :data:`RECORD`.
        size_bytes: of the shards and the index.
    """

    def __init__(self, directory: str | Path) -> None:
        """Open a cache.

        Raises:
            LoadError: it is unfinished, of another version or damaged.
        """
        self.directory = Path(directory)
        self.spec, num_samples, names = _read_manifest(self.directory)
        self.record_N = _read_index(self.directory / INDEX, num_samples)
        sizes = [_size(self.directory / name) for name in names]
        self.size_bytes = sum(sizes) + self.record_N.nbytes
        self._check_places(names, np.array(sizes, np.uint64))
        paths = [self.directory / name for name in names]
        open_shard = partial(np.memmap, dtype=np.uint8, mode="r")
        self._shard = lru_cache(MAPPED_SHARDS)(lambda shard_id: open_shard(paths[shard_id]))

    def _check_places(self, names: list[str], size_by_shard: np.ndarray) -> None:
        """Refuse an index that points beyond its shards."""
        path, record_N = self.directory / INDEX, self.record_N
        shard_N, length_N = record_N["shard_id"], record_N["seq_len"].astype(np.uint64)
        for wrong_N, remark in (
            (record_N["sample_id"] != np.arange(len(record_N)), "is not in its place"),
            (shard_N >= len(names), "lies in a shard that the manifest does not name"),
            (length_N == 0, "has no tokens"),
        ):
            if wrong_N.any():
                raise LoadError(f"{path} is damaged: sample {wrong_N.argmax()} {remark}")
        size_N = size_by_shard[shard_N]
        for (name, _), width in zip(OFFSETS, self.spec.token_bytes, strict=True):
            # Foreign numbers: sums might wrap round, differences and quotients do not.
            start_N = np.minimum(record_N[name], size_N)
            beyond_N = (record_N[name] > size_N) | (length_N > (size_N - start_N) // width)
            if beyond_N.any():
                sample = int(beyond_N.argmax())
                raise LoadError(
                    f"{self.directory / names[shard_N[sample]]} is truncated: it has "
                    f"{size_N[sample]} bytes, and {name.removesuffix('_offset')} of sample "
                    f"{sample} end beyond them: copy or write the cache again"
                )

    def __len__(self) -> int:
        """Samples."""
        return len(self.record_N)

    def __getitem__(self, sample: int) -> CachedSample:
        """Views of one sample's arrays; they keep its shard mapped."""
        record = self.record_N[sample]
        shard, length = self._shard(int(record["shard_id"])), int(record["seq_len"])
        width = self.spec.hidden_size

        def view(name: str, dtype: Any, *shape: int) -> np.ndarray:
            count = length * int(np.prod(shape, dtype=np.int64))
            array = np.frombuffer(shard, dtype, count, int(record[f"{name}_offset"]))
            return array.reshape(length, *shape)

        return CachedSample(
            token_S=view("input_ids", "<i4"),
            loss_mask_S=view("loss_mask", np.uint8),
            feature_SFD=view("target_hidden_states", BFLOAT16, len(self.spec.layer_ids), width),
            hidden_SD=view("target_last_hidden_states", BFLOAT16, width),
        )

    def require(self, wanted: CacheSpec) -> None:
        """Refuse a cache of another target, other layers or prompts that were rendered otherwise.

        Raises:
            ValueError: names the setting, what the cache has, and the remedy.
        """
        found = self.spec
        remedy = "or write a cache for this configuration"
        for name, has, needs in (
            ("target", found.target, wanted.target),
            ("target_layer_ids", found.layer_ids, wanted.layer_ids),
            ("hidden_size", found.hidden_size, wanted.hidden_size),
            (
                "rendering (system, chat_template, template_args)",
                found.notes.get("rendering", {}),
                wanted.notes.get("rendering", {}),
            ),
        ):
            if has != needs:
                raise ValueError(
                    f"cache {self.directory} was written with {name} {has}, but the "
                    f"configuration has {needs}: change {name}, {remedy}"
                )


def check_values(reader: CacheReader) -> Iterator[int]:
    """Read every value of a cache; yields the number of each sample that is sound.

    Raises:
        LoadError: names the first sample with a value that cannot be; or no sample has two tokens
            of an answer in a row, which a block takes.
    """
    blocks = False
    for number in range(len(reader)):
        sample = reader[number]
        mask_S = sample.loss_mask_S
        blocks |= bool((mask_S[:-1] & mask_S[1:]).any())
        for wrong, remark in (
            ((sample.token_S < 0).any(), "a negative token id"),
            ((sample.loss_mask_S > 1).any(), "a loss mask that is neither 0 nor 1"),
            (not np.isfinite(sample.feature_SFD).all(), "features that are not finite"),
            (not np.isfinite(sample.hidden_SD).all(), "hidden states that are not finite"),
        ):
            if wrong:
                raise LoadError(f"{reader.directory}: sample {number} has {remark}")
        yield number
    if not blocks:
        raise LoadError(
            f"{reader.directory}: no sample has two tokens of an answer in a row: nothing could "
            "be trained on it; write the cache again from conversations with answers"
        )


def _read_manifest(directory: Path) -> tuple[CacheSpec, int, list[str]]:
    """What a cache holds, its number of samples, and the files of its shards by their ids."""
    path = directory / MANIFEST
    if not path.is_file():
        raise LoadError(
            f"{directory} is no target cache: it has no {MANIFEST}, which is written last; name "
            "another directory, or finish it with dspark cache write"
        )
    manifest = read_json(path)
    for key, value in FORMAT.items():
        if manifest.get(key) != value:
            raise LoadError(
                f"{path}: {key} is {manifest.get(key)!r}, not {value!r}: such a cache is not "
                "supported; write one with dspark cache write"
            )
    layers, shards = manifest.get("target_layer_ids"), manifest.get("shards")
    if not isinstance(layers, list) or not layers or any(type(x) is not int for x in layers):
        raise LoadError(f"{path}: target_layer_ids is {layers!r}: it must be a list of integers")
    for key, most in (("hidden_size", 2**24), ("num_samples", 2**48), ("num_shards", 2**32)):
        if type(manifest.get(key)) is not int or not 0 < manifest[key] < most:
            raise LoadError(f"{path}: {key} is {manifest.get(key)!r}: it must be positive")
    if not isinstance(shards, list):
        shards = []
    try:
        names = {shard["shard_id"]: str(shard["file_name"]) for shard in shards}
        ordered = [names[i] for i in range(manifest["num_shards"])]
    except (TypeError, KeyError):
        raise LoadError(f"{path}: shards must name the files of all shards") from None
    for name in ordered:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise LoadError(f"{path}: {name!r} is no file of this directory")
    target = str(manifest.get("target_model_name_or_path", "unknown"))
    notes = {key: manifest[key] for key in ("rendering",) if key in manifest}
    spec = CacheSpec(target, tuple(layers), manifest["hidden_size"], notes)
    return spec, manifest["num_samples"], ordered


def _read_index(path: Path, num_samples: int) -> np.ndarray:
    expected = num_samples * RECORD.itemsize
    if _size(path) != expected:
        raise LoadError(
            f"{path} has {_size(path)} bytes, but the records of {num_samples} samples take "
            f"{expected}: copy or write the cache again"
        )
    return np.fromfile(path, RECORD)


def _size(path: Path) -> int:
    if not path.is_file():
        raise LoadError(f"{path} is missing: copy or write the cache again")
    return path.stat().st_size
