"""Hugging Face directories and hub ids: checkpoints, and targets.

The tensors follow from the declaration (``tensors.py``), the configuration from the family.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jax.sharding import Mesh
from safetensors.numpy import save

from dspark_jax.checkpoints.mtp import predictor_names
from dspark_jax.checkpoints.quantised import with_scales
from dspark_jax.checkpoints.tensor_names import renamed, split_experts, text_part
from dspark_jax.checkpoints.tensors import (
    LoadError,
    Tensors,
    read_json,
    read_params,
)
from dspark_jax.checkpoints.weight_files import WEIGHTS_FILE, read_tensors, what_else
from dspark_jax.config import TargetConfig
from dspark_jax.files import absent, write_together
from dspark_jax.models.quantised import PLAIN
from dspark_jax.models.targets.family import TargetParams
from dspark_jax.models.targets.table import FAMILIES, declared_name, family_of
from dspark_jax.models.targets.text_config import TEXT_OF, text_config

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT")

CONFIG_FILE = "config.json"
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "vocab*", "merges.txt"]
COPIES = ["consolidated*", "original/*"]  # the same weights in other layouts
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def target_config(config: Mapping[str, Any]) -> TargetConfig:
    """The configuration of a target out of its ``config.json``.

    Raises:
        ValueError: a field is missing or wrong, or asks for something that is not supported.
    """
    text = text_config(config)
    name = text["model_type"]
    if name not in tuple(FAMILIES):
        said = "is missing" if name is None else f"{name!r} is not supported"
        beside = "" if config.get("text_config") is None else f" of {config.get('model_type')!r}"
        known = ", ".join(sorted({*FAMILIES, *TEXT_OF}))
        raise LoadError(f"model_type{beside} {said}: use a model of {known}")
    return FAMILIES[name].config(text)


def model_directory(source: str | Path) -> Path:
    """The directory of a model: ``source`` itself, or a snapshot of that hub id.

    Raises:
        LoadError: it is neither a directory nor a model that the hub gives out.
    """
    if Path(source).is_dir():
        return Path(source)
    if Path(source).is_file():
        raise LoadError(f"{source} is a file: name its directory, {Path(source).absolute().parent}")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        raise LoadError(f"{source}: no such directory; name a model directory or a hub id")
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(str(source), allow_patterns=HUB_FILES, ignore_patterns=COPIES)
        return Path(found)
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
    if not path.exists():
        raise LoadError(f"{path}: {absent(path)}; {what_else(directory)}")
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

    Both are written beside their places and renamed into them, the configuration last: whoever
    reads meanwhile sees a whole checkpoint or a directory without one. Other files stay.

    Raises:
        OSError: there is no room, or no right, to write; what was there before stays.
    """
    directory = Path(directory)
    write_together(
        {
            directory / WEIGHTS_FILE: save(dict(tensors), metadata={"format": "pt"}),
            directory / CONFIG_FILE: json.dumps(config, indent=2, sort_keys=True) + "\n",
        }
    )


def open_hf_target(source: str | Path) -> tuple[TargetConfig, Tensors]:
    """A target out of a Hugging Face directory or hub id, whose weights are yet to be read.

    A head in the file is the model's, whatever ``tie_word_embeddings`` says. Where there is none,
    and nothing says that there ought to be, it is the embedding.

    Args:
        source: the directory, or ``owner/name`` on the hub.

    Returns:
        Its configuration, and the tensors that its family declares.

    Raises:
        LoadError: something is missing, broken or not supported.
    """

    def parse(hf: Mapping[str, Any]) -> tuple[TargetConfig, Any]:
        return target_config(hf), text_config(hf).get("tie_word_embeddings")

    (cfg, said), tensors = read_checkpoint(source, parse)
    tensors = tensors.without(*predictor_names(tensors, cfg.num_layers))
    tensors = split_experts(text_part(tensors))
    tensors = with_scales(renamed(tensors, functools.partial(declared_name, cfg)))
    vocab = family_of(cfg).declare(replace(cfg, tied=False)).vocab
    embedding, head = vocab.embed_VD.name, vocab.unembed_VD.name
    if head not in tensors.shapes and not cfg.tied:
        if said is not None:
            raise LoadError(
                f"{tensors.origin}: tie_word_embeddings is false, but {head} is missing: complete "
                f"the download, or set it to true in {CONFIG_FILE} where the embedding is the head"
            )
        logger.warning("%s has no %s: the embedding is taken for it", tensors.origin, head)
        return replace(cfg, tied=True), tensors
    if cfg.tied and {head, embedding} <= tensors.shapes.keys():
        if np.array_equal(tensors.read(head), tensors.read(embedding)):
            return cfg, tensors.without(head)
        logger.warning(
            "%s: tie_word_embeddings is true, but %s differs from %s: it is used",
            tensors.origin,
            head,
            embedding,
        )
        return replace(cfg, tied=False), tensors
    return cfg, tensors


def read_hf_weights(
    cfg: TargetConfig,
    tensors: Tensors,
    dtype: Any,
    mesh: Mesh | None = None,
    weights: str = PLAIN,
) -> TargetParams:
    """The weights of an opened target; arguments and errors as in :func:`load_hf_target`, and
    ``weights`` as in :func:`~dspark_jax.checkpoints.tensors.read_params`."""
    return read_params(family_of(cfg).declare(cfg), tensors, dtype, mesh, weights)


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
    cfg, tensors = open_hf_target(source)
    return cfg, read_hf_weights(cfg, tensors, dtype, mesh)
