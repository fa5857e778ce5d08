"""Hugging Face directories and hub ids: checkpoints, and targets.

The tensors follow from the declaration (``tensors.py``), the configuration from the family.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save

from dspark_jax.checkpoints.tensors import (
    WEIGHTS_FILE,
    LoadError,
    Tensors,
    read_json,
    read_params,
    read_tensors,
    split_experts,
    text_part,
)
from dspark_jax.config import TargetConfig
from dspark_jax.models.targets.family import TargetParams
from dspark_jax.models.targets.table import FAMILIES, family_of

ConfigT = TypeVar("ConfigT")

CONFIG_FILE = "config.json"
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "vocab*", "merges.txt"]
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def target_config(config: Mapping[str, Any]) -> TargetConfig:
    """The configuration of a target out of its ``config.json``.

    Raises:
        ValueError: a field is missing or wrong, or asks for something that is not supported.
    """
    name = config.get("model_type")
    if name not in tuple(FAMILIES):
        raise LoadError(
            f"model_type {name!r} is not supported: use a model of {', '.join(FAMILIES)}"
        )
    return FAMILIES[name].config(config)


def model_directory(source: str | Path) -> Path:
    """The directory of a model: ``source`` itself, or a snapshot of that hub id.

    Raises:
        LoadError: it is neither a directory nor a model that the hub gives out.
    """
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        raise LoadError(f"{source}: no such directory; name a model directory or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=HUB_FILES))
    except Exception as error:  # its own errors, the HTTP library's, the operating system's
        raise LoadError(
            f"{source}: no such directory, and the Hugging Face hub did not give it out "
            f"({type(error).__name__}): check the name, the network and your access"
        ) from None


def read_checkpoint(
    source: str | Path, parse: Callable[[Mapping[str, Any]], ConfigT]
) -> tuple[ConfigT, Tensors]:
    """Configuration and tensors of a directory or hub id.

    Args:
        source: the directory, or ``owner/name`` on the hub.
        parse: makes the configuration out of ``config.json``; ValueError where it cannot.

    Raises:
        LoadError: something is missing, broken or not supported; the message names the file.
    """
    directory = model_directory(source)
    path = directory / CONFIG_FILE
    config = read_json(path)
    try:
        cfg = parse(config)
    except ValueError as error:
        raise LoadError(f"{path}: {error}") from None
    return cfg, read_tensors(directory)


def write_checkpoint(
    directory: str | Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> None:
    """Write a configuration and tensors that :func:`read_checkpoint` reads.

    Each file is written beside its place and renamed into it, the configuration last: whoever
    reads meanwhile sees a whole checkpoint or a directory without one. Other files stay.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in (
        (WEIGHTS_FILE, save(dict(tensors), metadata={"format": "pt"})),
        (CONFIG_FILE, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()),
    ):
        beside = directory / f".{name}.{os.getpid()}"
        beside.write_bytes(content)
        beside.replace(directory / name)


def load_hf_target(
    source: str | Path, dtype: Any, mesh: Mesh | None = None
) -> tuple[TargetConfig, TargetParams]:
    """A target out of a Hugging Face directory or hub id.

    Args:
        source: the directory, or ``owner/name`` on the hub.
        dtype: dtype of the parameters.
        mesh: as in :func:`~dspark_jax.checkpoints.tensors.read_params`.

    Raises:
        LoadError: something is missing, broken or not supported.
    """
    cfg, tensors = read_checkpoint(source, target_config)
    tensors = split_experts(text_part(tensors))
    if cfg.tied and HEAD in tensors.shapes and EMBEDDING in tensors.shapes:
        if not np.array_equal(tensors.read(HEAD), tensors.read(EMBEDDING)):
            raise LoadError(
                f"{tensors.origin}: tie_word_embeddings is true, but {HEAD} differs from "
                f"{EMBEDDING}"
            )
        tensors = tensors.without(HEAD)
    return cfg, read_params(family_of(cfg).declare(cfg), tensors, dtype, mesh)
