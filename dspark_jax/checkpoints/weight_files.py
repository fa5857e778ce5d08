"""The weight files of a model directory, and safetensors as untrusted input.

Which files hold the weights is said by their names, or by an index that may be older than they are;
whatever is wrong with them is a :class:`~dspark_jax.checkpoints.tensors.LoadError` of one line.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from dspark_jax.checkpoints.tensors import UNQUANTISED, LoadError, Tensors, read_json
from dspark_jax.files import absent, foreign

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
# What the last word of a tensor's name says about how its layer is quantised.
QUANTISED = {
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "scales": "GPTQ, AWQ or MLX",
    "SCB": "bitsandbytes",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "weight_scale_inv": "fp8",
    "weight_scale": "fp8 or compressed-tensors",
    "weight_packed": "compressed-tensors",
    "k_scale": "fp8",
    "v_scale": "fp8",
}
# Files that are no weights as read here -> what they are, and the remedy.
OTHERS = {
    r"snapshots": "a folder of the hub's cache: name a directory in it",
    r".*\.gguf": "a GGUF file: name it itself instead of its directory",
    r"adapter_.*": "an adapter: merge it with its model first",
    r".*\.(bin|pt|pth|ckpt)": "pickled, and not read: convert it to safetensors",
    r"consolidated.*": "of another layout: take the files made for transformers",
}

# Of a file, its tensors as views of it.
Views = dict[str, np.ndarray]


def read_tensors(directory: str | Path) -> Tensors:
    """The tensors of a checkpoint directory, in one safetensors file or several.

    Raises:
        LoadError: a file is missing, truncated or otherwise broken, or the weights are quantised.
    """
    directory = Path(directory)
    views: dict[str, np.ndarray] = {}
    place_of: dict[str, str] = {}
    files, indexed = _weight_files(directory)
    for file in files:
        for name, view in map_safetensors(directory / file).items():
            if name not in views or indexed.get(name) == file:
                views[name], place_of[name] = view, file
            elif name not in indexed:
                raise LoadError(
                    f"{directory}: {place_of[name]} and {file} both hold {name}, and no index says "
                    f"which is meant: remove one of them"
                )
    for name in views:
        word = name.rpartition(".")[2]
        if word in QUANTISED:
            raise LoadError(
                f"{directory}: {name} is a tensor of quantised weights ({QUANTISED[word]}), which "
                f"are not supported: {UNQUANTISED}"
            )
    shapes = {name: view.shape for name, view in views.items()}
    return Tensors(str(directory), shapes, views.__getitem__)


def _weight_files(directory: Path) -> tuple[list[str], Mapping[str, str]]:
    """The files that hold the weights, and what an index says of which tensor lies where."""
    there = sorted(path.name for path in directory.glob("*.safetensors"))
    there = [name for name in there if not re.match(r"\.|adapter_|consolidated", name)]
    index = directory / INDEX_FILE
    if not index.is_file():
        return _unindexed(directory, there), {}
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise LoadError(f"{index}: weight_map must map tensors to files")
    files = sorted(set(places.values()))
    for file in files:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise LoadError(f"{index}: {file!r} is not the plain name of a safetensors file")
    if WEIGHTS_FILE in there and WEIGHTS_FILE not in files:  # as in transformers
        logger.warning("%s is not used: %s holds the model", index, WEIGHTS_FILE)
        return [WEIGHTS_FILE], {}
    lost = [file for file in files if not (directory / file).is_file()]
    if not lost:
        return files, places
    # Shards may have come under other names.
    others = [file for file in there if file not in files]
    found = {name for file in others for name in map_safetensors(directory / file)}
    if {name for name, file in places.items() if file in lost} <= found:
        logger.warning(
            "%s names %s, which is not there: %s holds its tensors",
            index,
            ", ".join(lost),
            ", ".join(others),
        )
        return [*(file for file in files if file not in lost), *others], places
    raise LoadError(
        f"{directory / lost[0]}: {absent(directory / lost[0])}, but {INDEX_FILE} names it: the "
        f"download is incomplete"
    )


def _unindexed(directory: Path, there: list[str]) -> list[str]:
    """The files that hold the weights where no index names them."""
    if WEIGHTS_FILE in there:
        return [WEIGHTS_FILE]
    if len(there) == 1 and not re.search(r"-\d+-of-\d+\.", there[0]):
        logger.warning("%s: %s is taken for %s", directory, there[0], WEIGHTS_FILE)
        return there
    shards = [re.fullmatch(r"(.+)-(\d+)-of-(\d+)\.safetensors", name) for name in there]
    numbers = {int(shard[2]) for shard in shards if shard}
    counts = {(shard[1], int(shard[3])) for shard in shards if shard}
    if len(counts) == 1 and all(shards):
        ((_, count),) = counts
        if numbers == set(range(1, count + 1)):
            return there
        raise LoadError(
            f"{directory}: {len(numbers)} of {count} shards are there ({', '.join(there[:3])}"
            f"{', ...' if len(there) > 3 else ''}): the download is incomplete"
        )
    if there:
        raise LoadError(
            f"{directory}: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there, and several other "
            f"files might be meant ({', '.join(there[:4])}): keep the right one alone"
        )
    reason = f"neither {WEIGHTS_FILE} nor {INDEX_FILE} is there"
    raise LoadError(f"{directory}: {reason}; {what_else(directory)}")


def what_else(directory: Path) -> str:
    """What a directory holds that is no model, and what to do with it, for a message."""
    names = sorted(path.name for path in directory.iterdir())
    for pattern, what in OTHERS.items():
        found = [name for name in names if re.fullmatch(pattern, name)]
        if found:
            return f"{found[0]} is {what}"
    return "is this a model directory, and the download complete?"


def map_safetensors(path: Path) -> Views:
    """The tensors of a safetensors file as views of its mapping: nothing is read yet.

    Raises:
        LoadError: the file is missing, broken or truncated, or has numbers of an unknown kind.
    """
    if not path.is_file():
        raise LoadError(f"{path}: {absent(path)}; the download is incomplete")
    try:
        reason = foreign(path)
        if reason:
            raise LoadError(f"{path} is {reason}")
        safe_open(path, framework="numpy")  # which checks the header against the file
        mapped = np.memmap(path, np.uint8, "r").view(np.ndarray)
    except OSError as error:
        raise LoadError(f"{path} is not readable: {error.strerror or error}") from None
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise LoadError(f"{path}: broken or truncated safetensors file ({reason})") from None
    start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
    header = json.loads(mapped[8:start].tobytes())
    header.pop("__metadata__", None)
    return {name: _view(path, name, entry, mapped[start:]) for name, entry in header.items()}


def _view(path: Path, name: str, entry: Mapping[str, Any], data: np.ndarray) -> np.ndarray:
    """A tensor of a safetensors file, whose header has been checked."""
    if entry["dtype"] not in DTYPES:
        raise LoadError(
            f"{path}: {name} has dtype {entry['dtype']}, which is not supported: {UNQUANTISED}"
        )
    first, end = entry["data_offsets"]
    kind = jnp.dtype(DTYPES[entry["dtype"]])
    return data[first:end].view(kind).reshape(entry["shape"])
