"""Axes: one legend, one declaration of every array, one map from axes to the mesh.

Legend. Arrays are named after their axes (``hidden_BGD``), and the same letters are the logical
axes of the sharding rules:

    B slots (requests)   S cache positions      T rows of a flat ragged batch
    G block size         C = G + 1              A anchors of a training sequence
    L layers             F feature layers       D width            M MLP width
    N query heads        K key/value heads      H head dimension   R Markov rank
    V vocabulary         U draft vocabulary     E experts          Y width of features (= D)
    Z vocabulary of a table in which tokens are looked up and nothing else: a whole one on every
      device, since rows of one that is split cost a collective
    P chunks of prompts  W rows of a chunk      I, O inputs and outputs of a small head
    J products in one, or residual streams      Q pages of a cache     X any leading axes

A :class:`Param` states shape, axes, initialiser and the Hugging Face name of a parameter once;
initialisation, sharding, restoring and the name tables are derived from it. A :class:`Buffer` does
the same for an array of decoding state.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

logger = logging.getLogger(__name__)

Tree = Any


@dataclass(frozen=True)
class Param:
    """Declaration of one parameter.

    Attributes:
        axes: one letter per dimension, in our layout; a leading ``L`` is the stacked layer axis.
        shape: sizes in the order of ``axes``.
        init: ``"normal"`` (standard deviation ``fan_in ** -0.5``), ``"embed"`` (standard
            deviation 0.02), ``"ones"`` or ``"zeros"``; of integers ``"choices"`` below ``fan_in``.
        fan_in: number of inputs that one output sums over (``"normal"`` only).
        name: Hugging Face tensor name; ``{layer}`` stands for the layer where ``L`` is stacked, and
            ``{expert}`` for the expert where every one has a tensor of its own.
        file_axes: the axes in the order in which the file stores them (torch linear layers are
            ``[out, in]``), without those that are ``spread``. Axes that the file fuses (heads and
            head dimension) are adjacent there, so that a reshape separates them.
        file_rank: number of dimensions of the tensor in the file.
        layers: which layers of the model are stacked, where they are.
        dtype: of what has one of its own, whatever the model's: small matrices that rounding would
            harm, and integers. None for the model's.
        inputs: the axes that one output of a matrix sums over; empty for what is no matrix.
    """

    axes: str
    shape: tuple[int, ...]
    name: str
    file_axes: str
    file_rank: int
    init: str = "normal"
    fan_in: int = 1
    layers: range = range(0)
    dtype: Any = None
    inputs: str = ""

    @property
    def spread(self) -> str:
        """The leading axes that have a tensor in the file for each of their members."""
        return _spread(self.axes, self.name)

    def below(self, limit: int) -> Param:
        """Of ``"choices"``: integers below a limit."""
        return replace(self, fan_in=limit)


def _spread(axes: str, name: str) -> str:
    spread = "L" if axes.startswith("L") else ""
    return spread + "E" if "{expert}" in name else spread


def declare(
    axes: str,
    sizes: Mapping[str, int],
    name: str,
    *,
    out: str = "",
    init: str = "normal",
    layers: range = range(0),
    dtype: Any = None,
) -> Param:
    """A :class:`Param` with sizes looked up by axis letter.

    Args:
        axes: our layout, e.g. ``"LDNH"``.
        sizes: axis letter -> size; of ``L`` it is the number of ``layers``.
        name: Hugging Face tensor name.
        out: axes on the output side of a linear layer (``"NH"``); the file holds them, fused, in
            front of the fused inputs (of a bias: alone). Empty: the file holds our layout.
        init: how it is initialised, see :class:`Param`.
        layers: whether layers are stacked, likewise.
        dtype: likewise.
    """
    letters = axes.removeprefix(_spread(axes, name))
    inputs = "".join(letter for letter in letters if letter not in out)
    if out:
        file_axes, file_rank = out + inputs, 2 if inputs else 1
    else:
        file_axes, file_rank = letters, len(letters)
    fan_in = math.prod(sizes[letter] for letter in inputs)
    sizes = {**sizes, "L": len(layers)}
    shape = tuple(sizes[letter] for letter in axes)
    summed = inputs if out else ""
    return Param(axes, shape, name, file_axes, file_rank, init, fan_in, layers, dtype, summed)


def is_param(leaf: object) -> bool:
    """Whether a leaf of a declaration tree is a :class:`Param`."""
    return isinstance(leaf, Param)


def map_params(function: Any, declared: Tree, *trees: Tree) -> Tree:
    """``jax.tree.map`` over a declaration tree, whose leaves are :class:`Param`."""
    return jax.tree.map(function, declared, *trees, is_leaf=is_param)


def init_params(key: jax.Array, declared: Tree, dtype: Any = jnp.float32) -> Tree:
    """Random parameters for a declaration tree, leaf by leaf from ``key``.

    Args:
        key: a ``jax.random`` key.
        declared: pytree of :class:`Param`.
        dtype: dtype of the parameters, but of those that have their own.
    """
    leaves, structure = jax.tree.flatten(declared, is_leaf=is_param)
    keys = jax.random.split(key, len(leaves))

    def init(param: Param, leaf_key: jax.Array) -> jax.Array:
        own = param.dtype or dtype
        if param.init == "ones":
            return jnp.ones(param.shape, own)
        if param.init == "zeros":
            return jnp.zeros(param.shape, own)
        if param.init == "choices":
            return jax.random.randint(leaf_key, param.shape, 0, param.fan_in, own)
        scale = 0.02 if param.init == "embed" else param.fan_in**-0.5
        return (scale * jax.random.normal(leaf_key, param.shape)).astype(own)

    return jax.tree.unflatten(structure, [init(p, k) for p, k in zip(leaves, keys, strict=True)])


def abstract_params(declared: Tree, dtype: Any = jnp.float32) -> Tree:
    """``jax.ShapeDtypeStruct`` for every declared parameter, of this dtype unless it has its
    own."""
    return map_params(
        lambda param: jax.ShapeDtypeStruct(param.shape, param.dtype or dtype), declared
    )


@dataclass(frozen=True)
class Buffer:
    """Declaration of one array of decoding state.

    Attributes:
        axes: one letter per dimension: ``B`` is slots, ``S`` is positions, a leading ``L`` is the
            stacked layer axis.
        shape: sizes in the order of ``axes``.
        dtype: of the array.
        fill: what an empty slot or position holds.
        span: positions that each place of ``S`` is about. An array with so many places as the text
            has spans holds each at its own place; one with fewer is a ring of the latest ones.
        follows: whether it follows from the tokens of the text alone, and is made of them again
            where a text is restored.
    """

    axes: str
    shape: tuple[int, ...]
    dtype: Any
    fill: float = 0
    span: int = 1
    follows: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes over all devices."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


def abstract_buffers(declared: Tree, mesh: Mesh | None = None) -> Tree:
    """``jax.ShapeDtypeStruct`` for every declared :class:`Buffer`.

    Args:
        declared: pytree of :class:`Buffer`.
        mesh: over which they are split as their axes say; None for the default device.
    """

    def abstract(buffer: Buffer, sharding: Any = None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(buffer.shape, buffer.dtype, sharding=sharding)

    if mesh is None:
        return jax.tree.map(abstract, declared)
    return jax.tree.map(abstract, declared, declared_shardings(declared, mesh))


def empty_buffers(declared: Tree, mesh: Mesh | None = None) -> Tree:
    """Arrays in which nothing is stored yet; arguments as for :func:`abstract_buffers`."""
    return jax.tree.map(
        lambda buffer, leaf: jnp.full(leaf.shape, buffer.fill, leaf.dtype, device=leaf.sharding),
        declared,
        abstract_buffers(declared, mesh),
    )


def unstacked(declared: Tree) -> Tree:
    """The declaration with a tuple of single layers in the place of every stack of buffers."""

    def single(b: Buffer) -> Buffer | tuple[Buffer, ...]:
        stack = b.axes.startswith("L")
        return (replace(b, axes=b.axes[1:], shape=b.shape[1:]),) * b.shape[0] if stack else b

    return jax.tree.map(single, declared)


# Logical axis -> mesh axes. Everything that is not named here is replicated. ``D``, ``R`` and ``I``
# are sharded in parameters alone: activations are split over slots or sequences.
MESH_RULES: Mapping[str, tuple[str, ...]] = {
    "B": ("data", "fsdp"),
    "Q": ("data", "fsdp"),
    "N": ("tensor",),
    "K": ("tensor",),
    "M": ("tensor",),
    "V": ("tensor",),
    "U": ("tensor",),
    "D": ("fsdp",),
    "R": ("fsdp",),
    "I": ("fsdp",),
    "E": ("expert",),
}
MESH_AXES = ("data", "fsdp", "expert", "tensor")


def make_mesh(
    data: int = 1,
    tensor: int = 1,
    fsdp: int = 1,
    expert: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """A (data, fsdp, expert, tensor) mesh over as many devices, the first ones.

    Args:
        data: parts of the batch, each with all parameters.
        tensor: parts of heads, MLP and vocabulary.
        fsdp: parts of the batch that share one copy of parameters and optimiser state (training).
        expert: parts of the experts of every layer, all of which see the whole batch.
        devices: to choose from; None for all.

    Raises:
        ValueError: there are fewer devices than that.

    >>> make_mesh(data=1).shape["data"]
    1
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = data, fsdp, expert, tensor
    count = math.prod(sizes)
    if min(sizes) < 1 or count > len(devices):
        named = " x ".join(f"{axis}={n}" for axis, n in zip(MESH_AXES, sizes, strict=True))
        raise ValueError(
            f"mesh {named} needs {count} devices, "
            f"but {len(devices)} are here: choose sizes whose product is at most {len(devices)}"
        )
    return Mesh(np.array(devices[:count]).reshape(sizes), MESH_AXES)


_replicated: set[tuple[str, int, int]] = set()


def partition(
    axes: str, shape: Sequence[int], mesh: Mesh | AbstractMesh, unused: Sequence[str] = ()
) -> PartitionSpec:
    """The :class:`PartitionSpec` of an array with these logical axes.

    An axis that does not divide over its mesh axes (9 heads over 2 devices) is replicated, and
    that is logged once. A mesh axis is used once an array, by the first axis that asks for it;
    those that are ``unused`` never.
    """
    spec: list[tuple[str, ...] | None] = []
    used = set(unused)
    for letter, size in zip(axes, shape, strict=True):
        wanted = [
            name for name in MESH_RULES.get(letter, ()) if mesh.shape[name] > 1 and name not in used
        ]
        parts = math.prod(mesh.shape[name] for name in wanted)
        if size % parts:
            fact = (letter, size, parts)
            if fact not in _replicated:
                _replicated.add(fact)
                logger.info("axis %s of size %d is replicated over %d devices", *fact)
            wanted = []
        used.update(wanted)
        spec.append(tuple(wanted) or None)
    return PartitionSpec(*spec)


def declared_shardings(declared: Tree, mesh: Mesh, unused: Sequence[str] = ()) -> Tree:
    """A ``NamedSharding`` for every :class:`Param` or :class:`Buffer`; ``unused`` as in
    :func:`partition`."""
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, partition(leaf.axes, leaf.shape, mesh, unused)), declared
    )


def device_bytes(
    declared: Tree, mesh: Mesh | AbstractMesh | None = None, dtype: Any = jnp.float32
) -> int:
    """Bytes that one device holds of what is declared.

    Args:
        declared: pytree of :class:`Param` and :class:`Buffer`.
        mesh: over which they are split as their axes say, whose devices need not be there; None
            for one device.
        dtype: of parameters that state none.
    """

    def held(leaf: Param | Buffer) -> int:
        shape = leaf.shape
        if mesh is not None:
            shape = NamedSharding(mesh, partition(leaf.axes, shape, mesh)).shard_shape(shape)
        return math.prod(shape) * jnp.dtype(leaf.dtype or dtype).itemsize

    return sum(map(held, jax.tree.leaves(declared)))


def spans_processes(mesh: Mesh) -> bool:
    """Whether a mesh has devices of several processes."""
    return len({device.process_index for device in mesh.devices.flat}) > 1


def place(tree: Tree, shardings: Any) -> Tree:
    """Arrays that every process holds whole, on the devices of a mesh.

    Args:
        tree: arrays; those that lie on the devices of several processes already may move there.
        shardings: one for each of them, or one for all.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def put(array: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return jax.device_put(array, sharding)
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)


def gather(tree: Tree) -> Tree:
    """The inverse of :func:`place`: NumPy arrays, whole in every process; all must ask."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
