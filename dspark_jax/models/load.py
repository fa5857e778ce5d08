"""Finding models: the default target and drafter, directories, hub ids and GGUF files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dspark_jax.config import TargetConfig
from dspark_jax.models.gguf import load_gguf_target, open_gguf
from dspark_jax.models.hf import load_hf_target, model_directory
from dspark_jax.models.target import TargetParams
from dspark_jax.models.tensors import read_json
from dspark_jax.models.tokenizer import gguf_tokenizer, load_tokenizer, stop_ids


@dataclass(frozen=True)
class Target:
    """A target that is ready to use.

    Attributes:
        cfg: sizes.
        params: weights, layers stacked.
        tokenizer: a transformers tokenizer.
        name: short name for messages and reports.
        stop_ids: ids that end a text.
    """

    cfg: TargetConfig
    params: TargetParams
    tokenizer: Any
    name: str
    stop_ids: tuple[int, ...]


def load_target(source: str | Path, dtype: Any = jnp.float32) -> Target:
    """A target with its tokenizer.

    Args:
        source: a GGUF file, a Hugging Face directory or a hub id.
        dtype: dtype of the parameters.

    Raises:
        LoadError: the source is not there, broken or not supported.
    """
    if str(source).endswith(".gguf"):
        return _gguf_target(Path(source), dtype)
    directory = model_directory(source)
    cfg, params = load_hf_target(directory, dtype)
    tokenizer = load_tokenizer(directory)
    generation = directory / "generation_config.json"
    configs = [read_json(generation)] if generation.is_file() else []
    stops = stop_ids(tokenizer, *configs)
    return Target(cfg, params, tokenizer, Path(source).name, stops)


def _gguf_target(path: Path, dtype: Any) -> Target:
    """A target out of a GGUF file, which is opened once for weights and tokenizer."""
    file = open_gguf(path)
    cfg, params = load_gguf_target(path, dtype, file=file)
    tokenizer = gguf_tokenizer(file, str(path))
    end_of_turn = {"eos_token_id": file.value("tokenizer.ggml.eot_token_id", int)}
    return Target(cfg, params, tokenizer, path.stem, stop_ids(tokenizer, end_of_turn))
