"""Which target a drafter was trained for: recorded in its ``config.json``, compared on loading.

A drafter works with any target of its sizes, and verification keeps the text right; only drafts
are accepted less often. A difference is therefore a warning.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.checkpoints.deepspec import TRAINED_FOR
from dspark_jax.checkpoints.hf import CONFIG_FILE
from dspark_jax.checkpoints.tensors import read_json
from dspark_jax.checkpoints.weight_files import read_tensors

logger = logging.getLogger(__name__)

SAMPLES, SAMPLE_BYTES = 16, 64


def identity_of(source: Path, name: str, tokenizer: Any) -> dict[str, str]:
    """What tells a target from others, cheaply.

    Args:
        source: its directory, or its GGUF file.
        name: of the model.
        tokenizer: a transformers tokenizer.

    Returns:
        ``target``, the name, and SHA-256 digests, 16 hexadecimal digits each: ``weights`` of the
        names, types and shapes of all tensors and 16 samples of 64 bytes spread evenly over each
        (of a GGUF file: over its size, and 4096 samples), ``tokenizer`` of the tokens with their
        ids, ``template`` of the chat template.
    """
    if source.is_file():
        samples = _samples(np.memmap(source, np.uint8, "r"), 256 * SAMPLES)
        weights = _digest([str(source.stat().st_size).encode(), samples])
    else:
        tensors, parts = read_tensors(source), []
        for tensor in sorted(tensors.shapes):
            array = np.ascontiguousarray(tensors.read(tensor)).reshape(-1)
            head = f"{tensor} {array.dtype.name} {list(tensors.shapes[tensor])}"
            parts += [head.encode(), _samples(array.view(np.uint8), SAMPLES)]
        weights = _digest(parts)
    tokens = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[::-1]))
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    return {
        "target": name,
        "weights": weights,
        "tokenizer": _digest([tokens.encode()]),
        "template": _digest([template.encode()]),
    }


def trained_for(directory: Path) -> dict[str, str]:
    """What a drafter's ``config.json`` records of its target; empty where it records nothing.

    Raises:
        LoadError: the file cannot be read.
    """
    record = read_json(directory / CONFIG_FILE).get(TRAINED_FOR)
    if not isinstance(record, dict):
        return {}
    return {key: value for key, value in record.items() if isinstance(value, str)}


def warn_of_another_target(
    record: Mapping[str, str], found: Callable[[], Mapping[str, str]]
) -> None:
    """Say what differs between the target that a drafter was trained for and the loaded one.

    Args:
        record: of :func:`trained_for`.
        found: gives :func:`identity_of` the loaded one; asked only where there is a record.
    """
    if not record:
        return
    now = found()
    differ = [k for k in ("weights", "tokenizer", "template") if record.get(k, now[k]) != now[k]]
    if differ:
        logger.warning(
            "the drafter was trained for %s, and of %s the %s differ%s (a quantised or fine-tuned "
            "model's weights do): drafts may be accepted less often, the text stays the target's",
            record.get("target", "another target"),
            now["target"],
            " and the ".join(differ),
            "" if differ[0] == "weights" or len(differ) > 1 else "s",
        )


def _samples(data: np.ndarray, count: int) -> bytes:
    """So many pieces of an array of bytes, evenly spread; all of it where it is small."""
    if data.size <= count * SAMPLE_BYTES:
        return data.tobytes()
    starts = np.linspace(0, data.size - SAMPLE_BYTES, count).astype(np.int64)
    return b"".join(data[start : start + SAMPLE_BYTES].tobytes() for start in starts)


def _digest(parts: list[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]
