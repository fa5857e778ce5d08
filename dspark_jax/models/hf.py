"""Hugging Face checkpoints of targets, in both directions.

A :class:`~dspark_jax.axes.Param` knows its tensor's name and layout in a file, so one pair of
functions maps any declaration tree: ``read_params`` (file tensor -> split axes -> transpose ->
stack on L) and ``write_params``, its exact inverse. Only what names alone cannot say is spelled
out here: which ``config.json`` means which :class:`TargetConfig`, and which tensors may be left
over. Files are untrusted: safetensors and JSON alone are read, everything is checked against the
declaration, and whatever is wrong with them is a :class:`LoadError` of one line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.axes import Param, Tree, is_param

FAMILIES = ("llama", "qwen2", "qwen3")
INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


class LoadError(ValueError):
    """A model file that cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class Tensors:
    """The tensors of a checkpoint under their Hugging Face names, read when asked for.

    Attributes:
        origin: where they lie, for messages.
        shapes: name -> shape in the file.
        read: name -> array of that shape.
    """

    origin: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]


def file_shape(param: Param) -> tuple[int, ...]:
    """Shape of one of the parameter's tensors in the file."""
    size = dict(zip(param.axes, param.shape, strict=True))
    dims = tuple(size[axis] for axis in param.file_axes)
    if param.file_rank == len(dims):
        return dims
    total = math.prod(dims)
    # A linear layer fuses its outputs in front of its fused inputs.
    return (total,) if param.file_rank == 1 else (total // param.fan_in, param.fan_in)


def file_names(param: Param) -> list[str]:
    """Names of the parameter's tensors in the file: one, or one per stacked layer."""
    count = param.shape[0] if param.stacked else 1
    return [param.name.format(layer=layer) for layer in range(count)]


def from_file(param: Param, tensor: np.ndarray) -> np.ndarray:
    """A file tensor as a view in our layout, without L."""
    size = dict(zip(param.axes, param.shape, strict=True))
    split = tensor.reshape([size[axis] for axis in param.file_axes])
    return split.transpose([param.file_axes.index(a) for a in param.axes.removeprefix("L")])


def to_file(param: Param, value: np.ndarray) -> np.ndarray:
    """Inverse of :func:`from_file`: contiguous, in the shape of the file."""
    letters = param.axes.removeprefix("L")
    turned = value.transpose([letters.index(axis) for axis in param.file_axes])
    return np.ascontiguousarray(turned).reshape(file_shape(param))


def read_params(
    declared: Tree, tensors: Tensors, dtype: Any, *, optional: Iterable[str] = ()
) -> Tree:
    """The parameters of a declaration tree out of a checkpoint.

    Args:
        declared: pytree of Param.
        tensors: the checkpoint.
        dtype: dtype of the result; None keeps what the file has.
        optional: tensors that the checkpoint may hold although nothing declares them.

    Raises:
        LoadError: a tensor is missing, left over, or has another shape.
    """
    params = jax.tree.leaves(declared, is_leaf=is_param)
    wanted = {name: file_shape(param) for param in params for name in file_names(param)}
    _check(wanted, tensors, set(optional))

    def load(param: Param) -> jax.Array:
        names = file_names(param)
        if not param.stacked:
            view = from_file(param, tensors.read(names[0]))
            return jnp.asarray(np.ascontiguousarray(view), dtype)
        first = from_file(param, tensors.read(names[0]))
        stacked = np.empty(param.shape, first.dtype if dtype is None else dtype)
        stacked[0] = first
        for layer, name in enumerate(names[1:], 1):
            stacked[layer] = from_file(param, tensors.read(name))
        return jnp.asarray(stacked)

    return jax.tree.map(load, declared, is_leaf=is_param)


def write_params(declared: Tree, values: Tree) -> dict[str, np.ndarray]:
    """Inverse of :func:`read_params`: file name -> array in the layout of the file."""
    tensors: dict[str, np.ndarray] = {}
    params = jax.tree.leaves(declared, is_leaf=is_param)
    for param, value in zip(params, jax.tree.leaves(values), strict=True):
        array = np.asarray(value)
        layers = array if param.stacked else array[None]
        for name, layer in zip(file_names(param), layers, strict=True):
            tensors[name] = to_file(param, layer)
    return tensors


def _check(wanted: Mapping[str, tuple[int, ...]], tensors: Tensors, optional: set[str]) -> None:
    """Compare names and shapes with the declaration before anything is read."""
    missing = sorted(wanted.keys() - tensors.shapes.keys())
    if missing:
        raise LoadError(
            f"{tensors.origin}: {_some(missing)} missing: the weights do not belong to the "
            f"configuration, or the download is incomplete"
        )
    for name, shape in wanted.items():
        if tuple(tensors.shapes[name]) != shape:
            raise LoadError(
                f"{tensors.origin}: {name} has shape {list(tensors.shapes[name])}, but the "
                f"configuration says {list(shape)}: the two files do not belong together"
            )
    # Old Llama checkpoints store the RoPE frequencies, which follow from the configuration.
    left = sorted(
        name
        for name in tensors.shapes.keys() - wanted.keys() - optional
        if not name.endswith("rotary_emb.inv_freq")
    )
    if left:
        raise LoadError(
            f"{tensors.origin}: {_some(left)} left over: the model has parts that are not supported"
        )


def _some(names: list[str]) -> str:
    """A few names for a message."""
    rest = f" and {len(names) - 3} more tensors are" if len(names) > 3 else " is"
    return ", ".join(names[:3]) + (rest if len(names) != 2 and len(names) != 3 else " are")
