"""Finding models: the default target and drafter, directories, hub ids and GGUF files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from dspark_jax.config import TargetConfig
from dspark_jax.models.gguf import gguf_stop_ids, load_gguf_target, open_gguf
from dspark_jax.models.target import TargetParams
from dspark_jax.models.tokenizer import gguf_tokenizer, stop_ids


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
        source: a GGUF file.
        dtype: dtype of the parameters.

    Raises:
        LoadError: the source is not there, broken or not supported.
    """
    path = Path(source)
    file = open_gguf(path)
    cfg, params = load_gguf_target(path, dtype, file=file)
    tokenizer = gguf_tokenizer(file, str(path))
    stops = tuple(sorted({*stop_ids(tokenizer), *gguf_stop_ids(file)}))
    return Target(cfg, params, tokenizer, path.stem, stops)
