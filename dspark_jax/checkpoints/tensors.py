"""Tensors in files and declared parameters, both ways.

A :class:`~dspark_jax.axes.Param` knows its tensor's name and layout in a file, so one pair of
functions maps any declaration tree: ``read_params`` (file tensor -> split axes -> transpose ->
stack on L) and ``write_params``, its exact inverse. Nothing here knows a model family. Files are
checked against the declaration before they are read, and whatever is wrong with them is a
:class:`LoadError` of one line.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from dspark_jax import files
from dspark_jax.axes import Param, Tree, is_param, map_params, partition
from dspark_jax.models.quantised import (
    BLOCKS,
    HELD_AS,
    PLAIN,
    InBlocks,
    declare_in_blocks,
    dequantise,
    quantise_param,
)

UNQUANTISED = "take the unquantised checkpoint, or a GGUF file of the model"
KEPT = ("float32", "float16", "bfloat16")  # dtypes that parameters may have


class LoadError(ValueError):
    """A model file that cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class Tensors:
    """The tensors of a checkpoint under their Hugging Face names, read when asked for.

    Attributes:
        origin: where they lie, for messages.
        shapes: name -> shape in the file.
        read: name -> array of that shape, a view of the file where that is possible.
        scales: of the matrices that are values with scales, name -> name of the scales; ``read``
            gives both as they are stored, and ``shapes`` has the plain matrices alone.
    """

    origin: str
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    scales: Mapping[str, str] = field(default_factory=dict)

    def without(self, *names: str) -> Tensors:
        """The same checkpoint with these tensors left out of the table."""
        shapes = {name: shape for name, shape in self.shapes.items() if name not in names}
        return Tensors(self.origin, shapes, self.read, self.scales)


def file_shape(param: Param) -> tuple[int, ...]:
    """Shape of one of the parameter's tensors in the file."""
    size = dict(zip(param.axes, param.shape, strict=True))
    dims = tuple(size[axis] for axis in param.file_axes)
    if param.file_rank == len(dims):
        return dims
    total = math.prod(dims)
    # A linear layer fuses its outputs in front of its fused inputs.
    return (total,) if param.file_rank == 1 else (total // param.fan_in, param.fan_in)


def file_names(param: Param) -> Iterator[str]:
    """Names of the parameter's tensors in the file: one, or one for each layer and expert."""
    sizes = dict(zip(param.axes, param.shape, strict=True))
    experts = range(sizes["E"]) if "E" in param.spread else (None,)
    layers = param.layers if "L" in param.spread else (None,)
    places = itertools.product(layers, experts)
    return (param.name.format(layer=layer, expert=expert) for layer, expert in places)


def from_file(param: Param, tensor: np.ndarray) -> np.ndarray:
    """A file tensor as a view in our layout, without the axes that are spread over tensors."""
    size = dict(zip(param.axes, param.shape, strict=True))
    split = tensor.reshape([size[axis] for axis in param.file_axes])
    letters = param.axes.removeprefix(param.spread)
    return split.transpose([param.file_axes.index(axis) for axis in letters])


def to_file(param: Param, value: np.ndarray) -> np.ndarray:
    """Inverse of :func:`from_file`: contiguous, in the shape of the file."""
    letters = param.axes.removeprefix(param.spread)
    turned = value.transpose([letters.index(axis) for axis in param.file_axes])
    return np.ascontiguousarray(turned).reshape(file_shape(param))


def read_params(
    declared: Tree,
    tensors: Tensors,
    dtype: Any = None,
    mesh: Mesh | None = None,
    weights: str = PLAIN,
) -> Tree:
    """The parameters of a declaration tree out of a checkpoint.

    They are read one after the other, each straight into the shards that this process's devices
    hold, layers stacked there: no device ever holds more than its own, and the host no more than
    the shards of one parameter.

    Args:
        declared: pytree of Param.
        tensors: the checkpoint.
        dtype: dtype of the result, but of parameters that have their own; None keeps that of the
            file, where it is one of ``KEPT``, and float32 stands for others and for several.
        mesh: over which every parameter is split as its axes say; None for the default device.
        weights: the kind of values that matrices are turned into (:mod:`~dspark_jax.models.
            quantised`), each as soon as it is there. Those that are values with scales in the
            checkpoint stay as they are.

    Raises:
        LoadError: a tensor is missing, left over, or has another shape or kind of numbers.
    """
    params = jax.tree.leaves(declared, is_leaf=is_param)
    _check_tensors(params, tensors)

    def load(param: Param) -> Any:
        if next(file_names(param)) in tensors.scales:
            held = _read_in_blocks(param, tensors, mesh)
            return held if param.dtype is None else dequantise(held, param.dtype)
        return quantise_param(param, plain(param), weights)

    def plain(param: Param) -> jax.Array:
        if mesh is None:
            (value,) = _read_parts(param, tensors, dtype, [(slice(None),) * len(param.shape)])
            return jnp.asarray(value)
        sharding = NamedSharding(mesh, partition(param.axes, param.shape, mesh))
        index_of = sharding.addressable_devices_indices_map(param.shape)
        # Devices that differ in the data axis alone hold the same.
        distinct = {str(index): index for index in index_of.values()}
        values = _read_parts(param, tensors, dtype, list(distinct.values()))
        part_of = dict(zip(distinct, values, strict=True))
        parts = [jax.device_put(part_of[str(index)], to) for to, index in index_of.items()]
        whole = jax.make_array_from_single_device_arrays(param.shape, sharding, parts)
        return whole.block_until_ready()  # only then the host's memory is free for the next

    return map_params(load, declared)


def _read_parts(
    param: Param, tensors: Tensors, dtype: Any, indices: Sequence[Any]
) -> list[np.ndarray]:
    """Parts of a parameter, each cut out of every tensor as it comes.

    Args:
        param: whose tensors are read, each once.
        tensors: the checkpoint.
        dtype: of the parts; None keeps that of the file.
        indices: of each part, a slice for every axis.

    Raises:
        LoadError: the tensors do not hold the numbers that are declared.
    """
    parts: list[np.ndarray] = []
    spread, dtype = len(param.spread), param.dtype or dtype
    outer = param.shape[:spread]
    # Of every part, which members of the spread axes it holds.
    held = [[range(n)[cut] for n, cut in zip(outer, i[:spread], strict=True)] for i in indices]
    for place, name in zip(np.ndindex(*outer), file_names(param), strict=True):
        tensor = from_file(param, tensors.read(name))
        _check_numbers(param, f"{tensors.origin}: {name}", tensor)
        shares = [tensor[index[spread:]] for index in indices]
        if not parts:
            kind = (str(tensor.dtype) in KEPT and tensor.dtype) or np.float32
            parts = [
                np.empty((*map(len, members), *share.shape), kind if dtype is None else dtype)
                for members, share in zip(held, shares, strict=True)
            ]
        elif dtype is None and tensor.dtype != parts[0].dtype != np.float32:
            parts = [part.astype(np.float32) for part in parts]
        for part, share, members in zip(parts, shares, held, strict=True):
            if all(at in some for at, some in zip(place, members, strict=True)):
                within = tuple(some.index(at) for at, some in zip(place, members, strict=True))
                part[within or ...] = share
    return parts


def _check_numbers(param: Param, where: str, tensor: np.ndarray) -> None:
    """Refuse numbers of another kind than declared, and choices that there are not."""
    if param.init == "choices":
        if not jnp.issubdtype(tensor.dtype, jnp.integer):
            raise LoadError(f"{where} has dtype {tensor.dtype}, but must be integers")
        if tensor.size and not 0 <= tensor.min() <= tensor.max() < param.fan_in:
            raise LoadError(
                f"{where} holds {tensor.min()}..{tensor.max()}, but must lie in "
                f"0..{param.fan_in - 1}: the two files do not belong together"
            )
    elif not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise LoadError(
            f"{where} has dtype {tensor.dtype}, but weights must be floats: {UNQUANTISED}"
        )


def _read_in_blocks(param: Param, tensors: Tensors, mesh: Mesh | None) -> InBlocks:
    """A matrix whose tensors are values with scales, as they are stored.

    Raises:
        LoadError: some of its tensors are stored in another way than the first.
    """
    names = list(file_names(param))
    places = np.array(names, object).reshape(param.shape[: len(param.spread)])
    dtype = tensors.read(names[0]).dtype
    for name in names:
        if name not in tensors.scales or tensors.read(name).dtype != dtype:
            raise LoadError(
                f"{tensors.origin}: {name} is not stored as {names[0]} is ({dtype} with scales): "
                "take a checkpoint that has all layers alike"
            )

    def load(declared: Param, read: Callable[[str], np.ndarray]) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            outer, inner = index[: places.ndim], index[places.ndim :]
            held = np.asarray(places[outer], object)
            one = declared.shape[places.ndim :]  # groups of outputs may be an axis of their own
            rows = [read(name).reshape(one)[inner] for name in held.reshape(-1)]
            return np.stack(rows).reshape(*held.shape, *rows[0].shape).view(declared.dtype)

        if mesh is None:
            return jnp.asarray(part((slice(None),) * len(declared.shape)))
        sharding = NamedSharding(mesh, partition(declared.axes, declared.shape, mesh))
        found = jax.make_array_from_callback(declared.shape, sharding, part)
        return found.block_until_ready()

    shape = _declare_in_blocks(param, tensors)
    value_OI = load(shape.value_OI, tensors.read)
    scale_OI = load(shape.scale_OI, lambda name: tensors.read(tensors.scales[name]))
    return InBlocks(value_OI, scale_OI, shape.matrix, shape.block)


def declare_stored(param: Param, tensors: Tensors) -> Any:
    """The declaration of a parameter as it is read: of values and scales where a checkpoint has
    some, but for small matrices that have a dtype of their own."""
    if next(file_names(param)) not in tensors.scales or param.dtype is not None:
        return param
    return _declare_in_blocks(param, tensors)


def _declare_in_blocks(param: Param, tensors: Tensors) -> InBlocks:
    kind = tensors.read(next(file_names(param))).dtype.name
    try:
        return declare_in_blocks(param, BLOCKS[kind], HELD_AS[kind])
    except ValueError as error:
        raise LoadError(f"{tensors.origin}: {error}") from None


def _check_tensors(params: list[Param], tensors: Tensors) -> None:
    """Compare names and shapes with the declaration before anything is read."""
    wanted = ((name, param) for param in params for name in file_names(param))
    # An absurd number of layers must not become a list of names before it is refused.
    missing = [
        name
        for name, _ in itertools.islice(wanted, len(tensors.shapes) + 4)
        if name not in tensors.shapes
    ]
    if missing:
        raise LoadError(
            f"{tensors.origin}: {_some(missing)} missing: the weights do not belong to the "
            f"configuration, or the download is incomplete"
        )
    shapes = {name: file_shape(param) for param in params for name in file_names(param)}
    for name, shape in shapes.items():
        if tuple(tensors.shapes[name]) != shape:
            raise LoadError(
                f"{tensors.origin}: {name} has shape {list(tensors.shapes[name])}, but the "
                f"configuration says {list(shape)}: the two files do not belong together"
            )
    # Old checkpoints store the RoPE frequencies, which follow from the configuration.
    left = sorted(
        name
        for name in tensors.shapes
        if name not in shapes and not name.endswith("rotary_emb.inv_freq")
    )
    if left:
        raise LoadError(
            f"{tensors.origin}: {_some(left)} left over: the model has parts that are not "
            f"supported, or the configuration is another model's"
        )


def _some(names: list[str]) -> str:
    """The first few names and a verb, for a message."""
    if len(names) == 1:
        return f"tensor {names[0]} is"
    more = ", ..." if len(names) > 3 else ""
    return f"tensors {', '.join(names[:3])}{more} are"


def dtype_of(params: Tree) -> Any:
    """The dtype of parameters that have one in common."""
    return jax.tree.leaves(params)[0].dtype


def write_params(declared: Tree, values: Tree) -> dict[str, np.ndarray]:
    """Inverse of :func:`read_params`: file name -> array in the layout of the file.

    Raises:
        ValueError: a value is missing or has another shape than declared.
    """
    tensors: dict[str, np.ndarray] = {}

    def put(param: Param, value: Any) -> None:
        array = np.asarray(value)
        if array.shape != param.shape:
            raise ValueError(
                f"{param.name} has shape {list(array.shape)}, but is declared as "
                f"{list(param.shape)}"
            )
        places = np.ndindex(*param.shape[: len(param.spread)])
        for name, place in zip(file_names(param), places, strict=True):
            tensors[name] = to_file(param, array[place])

    map_params(put, declared, values)
    return tensors


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        LoadError: the file is missing, or not that.
    """
    if not Path(path).exists():
        raise LoadError(f"{path}: {files.absent(path)}")
    try:
        content = files.read_json(path)
    except ValueError as error:
        raise LoadError(str(error)) from None
    if not isinstance(content, dict):
        raise LoadError(f"{path}: must hold a JSON object, not a {type(content).__name__}")
    return content
