"""One entrance for models: the defaults, directories, hub ids and GGUF files, ready to use."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dspark_jax.checkpoints.deepspec import bind_vocab, load_drafter
from dspark_jax.checkpoints.default import default_drafter_path, default_target_path
from dspark_jax.checkpoints.gguf import gguf_config, is_gguf, load_gguf_target, open_gguf
from dspark_jax.checkpoints.hf import (
    CONFIG_FILE,
    model_directory,
    open_hf_target,
    read_hf_weights,
)
from dspark_jax.checkpoints.speculators import KIND, load_speculators
from dspark_jax.checkpoints.tensors import LoadError, read_json
from dspark_jax.checkpoints.tokenizer import gguf_tokenizer, load_tokenizer, stop_ids
from dspark_jax.config import DrafterConfig, TargetConfig
from dspark_jax.models.drafters.dspark import DrafterParams
from dspark_jax.models.targets.family import TargetParams
from dspark_jax.models.vocab import Vocab

# dtype of the parameters and mesh, as in load_target -> the weights.
ReadWeights = Callable[[Any, Mesh | None], TargetParams]


@dataclass(frozen=True)
class Target:
    """A target that is ready to use.

    Attributes:
        cfg: sizes.
        params: weights, layers stacked; None where they have not been read.
        tokenizer: a transformers tokenizer.
        name: short name for messages and reports.
        stop_ids: ids that end a text.
    """

    cfg: TargetConfig
    params: Any
    tokenizer: Any
    name: str
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class Drafter:
    """A drafter that is bound to a target.

    Attributes:
        cfg: sizes.
        params: weights, layers stacked.
        vocab: the target's embedding and head, or the rows that the drafter uses.
        name: short name for messages and reports.
        directory: where it lies.
    """

    cfg: DrafterConfig
    params: DrafterParams
    vocab: Vocab
    name: str
    directory: Path


def load_target(source: str | Path, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> Target:
    """A target with its tokenizer.

    Args:
        source: ``"default"``, a GGUF file, a Hugging Face directory or a hub id.
        dtype: dtype of the parameters.
        mesh: over which every parameter is split as its axes say; None for the default device.

    Raises:
        LoadError: the source is not there, broken or not supported.
    """
    target, read_weights = open_target(source)
    return replace(target, params=read_weights(dtype, mesh))


def open_target(source: str | Path) -> tuple[Target, ReadWeights]:
    """A target without its weights, and the function that reads them.

    Raises:
        LoadError: the source is not there, broken or not supported.
    """
    if str(source) == "default":
        source = default_target_path()
    if is_gguf(source):
        target, read_weights = _gguf_target(Path(source))
    else:
        target, read_weights = _hf_target(source)
    if len(target.tokenizer) > target.cfg.vocab_size:
        raise LoadError(
            f"{source}: the tokenizer has {len(target.tokenizer)} tokens, but vocab_size is "
            f"{target.cfg.vocab_size}: they do not belong together"
        )
    return target, read_weights


def _gguf_target(path: Path) -> tuple[Target, ReadWeights]:
    """A target out of a GGUF file, which is opened once for weights and tokenizer."""
    file = open_gguf(path)
    cfg = gguf_config(file, path)
    tokenizer = gguf_tokenizer(file, str(path))
    end_of_turn = {"eos_token_id": file.value("tokenizer.ggml.eot_token_id", int)}
    target = Target(cfg, None, tokenizer, path.stem, stop_ids(tokenizer, end_of_turn))
    return target, lambda dtype, mesh: load_gguf_target(path, dtype, mesh, file=file)[1]


def _hf_target(source: str | Path) -> tuple[Target, ReadWeights]:
    """A target out of a directory or hub id."""
    directory = model_directory(source)
    cfg, tensors = open_hf_target(directory)
    tokenizer = load_tokenizer(directory)
    generation = directory / "generation_config.json"
    configs = [read_json(generation)] if generation.is_file() else []
    cfg = replace(cfg, suppressed=_suppressed(generation, configs, cfg.vocab_size))
    name = Path(source).resolve().name
    target = Target(cfg, None, tokenizer, name, stop_ids(tokenizer, *configs))
    return target, lambda dtype, mesh: read_hf_weights(cfg, tensors, dtype, mesh)


def _suppressed(path: Path, configs: list[dict[str, Any]], vocab_size: int) -> tuple[int, ...]:
    """``suppress_tokens`` of a ``generation_config.json``, where there is one."""
    ids = next((config.get("suppress_tokens") for config in configs), None) or []
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise LoadError(f"{path}: suppress_tokens {ids!r} must list ids below {vocab_size}")
    return tuple(sorted(set(ids)))


def load_drafter_for(
    target: Target,
    source: str | Path,
    *,
    use_target_vocab: bool = False,
    dtype: Any = None,
    mesh: Mesh | None = None,
) -> Drafter:
    """A drafter for a loaded target.

    Args:
        target: the target.
        source: ``"default"``, a directory or a hub id, in any of the known layouts.
        use_target_vocab: whether to ignore an embedding and head of the drafter's own.
        dtype: of the parameters; None for the target's.
        mesh: that the target was read onto; None for the default device.

    Raises:
        ValueError: the source is not there, broken or not supported, or it does not fit.
    """
    dtype = target.params.norm_D.dtype if dtype is None else dtype
    cfg, params, own, directory = read_drafter(target.cfg, source, mesh)
    vocab = bind_vocab(cfg, own, target.cfg, target.params.vocab, use_target=use_target_vocab)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    name = (directory if str(source) == "default" else Path(source)).resolve().name
    return Drafter(cfg, params, vocab, name, directory)


def read_drafter(
    target_cfg: TargetConfig, source: str | Path, mesh: Mesh | None = None
) -> tuple[DrafterConfig, DrafterParams, Vocab | None, Path]:
    """A drafter as its checkpoint holds it, dtype included, in whichever of the known layouts.

    Args:
        target_cfg: of the target that it is for.
        source: ``"default"``, a directory or a hub id.
        mesh: as in :func:`load_target`.

    Returns:
        Configuration, parameters, what it holds of the vocabulary (for ``bind_vocab``), and the
        directory where it lies.

    Raises:
        LoadError: the source is not there, broken or not supported.
    """
    if str(source) == "default":
        found = default_drafter_path()
        if found is None:
            raise LoadError("this installation has no default drafter: name one, or use none")
        source = found
    directory = model_directory(source)
    if KIND in read_json(directory / CONFIG_FILE):
        return *load_speculators(directory, target_cfg.num_layers, mesh), directory
    return *load_drafter(directory, mesh=mesh), directory
