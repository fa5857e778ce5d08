"""Drafters that lie in the checkpoints of their targets, under names of their own.

One that was trained for such a target is written in the same form: the target's ``config.json``
with the drafter's settings, and its tensors alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dspark_jax.checkpoints.deepspec import TRAINED_FOR
from dspark_jax.checkpoints.hf import CONFIG_FILE, target_config, write_checkpoint
from dspark_jax.checkpoints.mtp import from_target, predictor_names
from dspark_jax.checkpoints.quantised import with_scales
from dspark_jax.checkpoints.tensors import (
    LoadError,
    Tensors,
    read_json,
    read_params,
    write_params,
)
from dspark_jax.checkpoints.weight_files import read_tensors
from dspark_jax.config import DrafterConfig
from dspark_jax.models.drafters.table import INSIDE, drafter_of, inside_settings


def open_inside(directory: Path) -> tuple[DrafterConfig, Tensors] | None:
    """The drafter inside a target's checkpoint, whose weights are yet to be read; None where there
    is none, or the configuration alone.

    Raises:
        LoadError: the checkpoint cannot be read, or says something else of its drafter.
    """
    path = directory / CONFIG_FILE
    hf = read_json(path) if path.is_file() else {}
    inside, layers = INSIDE.get(str(hf.get("model_type"))), hf.get("num_hidden_layers")
    if inside is None or type(layers) is not int or not any(directory.glob("*.safetensors*")):
        return None
    tensors = read_tensors(directory)
    names = predictor_names(tensors, layers)
    try:
        cfg = inside(hf, target_config(hf), names) if names else None
    except ValueError as error:
        raise LoadError(f"{path}: {error}") from None
    if cfg is None:
        return None
    tensors = tensors.without(*(tensors.shapes.keys() - names))
    return cfg, with_scales(from_target(tensors, layers))


def read_inside(
    cfg: DrafterConfig, tensors: Tensors, dtype: Any = None, mesh: Mesh | None = None
) -> Any:
    """The weights of a drafter of :func:`open_inside`; arguments and errors as in
    :func:`~dspark_jax.checkpoints.tensors.read_params`."""
    return read_params(drafter_of(cfg).declare_drafter(cfg), tensors, dtype, mesh)


def save_inside(
    directory: str | Path,
    cfg: DrafterConfig,
    params: Any,
    target: Path,
    trained_for: Mapping[str, str] | None = None,
) -> None:
    """Write a drafter under the names that it has inside a target's checkpoint.

    Args:
        directory: where to; made if it is not there.
        cfg: sizes.
        params: weights, layers stacked.
        target: the directory of its target, or of another drafter of it.
        trained_for: of :func:`~dspark_jax.checkpoints.identity.identity_of`, to be kept.
    """
    config = read_json(target / CONFIG_FILE) | (inside_settings(cfg) or {})
    if trained_for:
        config[TRAINED_FOR] = dict(trained_for)
    tensors = write_params(drafter_of(cfg).declare_drafter(cfg), params)
    write_checkpoint(directory, config, tensors)
