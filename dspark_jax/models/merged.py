"""The weights of layers in the form for decoding: single layers, whose products of one input are
one.

Training holds, and files store, every matrix by itself and the layers of a stack on a leading L.
Out of a stack a GPU copies a layer's matrices before it multiplies; and every product is a launch,
of fewer tiles than the device has processors where it is as narrow as keys and values are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dspark_jax.models.layers import Merged
from dspark_jax.models.quantised import InBlocks, PerOutput, Quantised

Tree = Any
Join = Callable[..., jax.Array]


def _alone(matrix_LX: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(matrix_LX, index, keepdims=False)


def _join_heads(*matrices_LDNH: jax.Array, index: jax.Array) -> jax.Array:
    """[D, K, J, H] of one layer: what belongs to a key head lies beside it."""
    parts_DNH = [_alone(matrix, index) for matrix in matrices_LDNH]
    width, kv_heads, dim = parts_DNH[-1].shape
    return jnp.concatenate([x.reshape(width, kv_heads, -1, dim) for x in parts_DNH], axis=2)


def _join_columns(*matrices_LDM: jax.Array, index: jax.Array) -> jax.Array:
    """[D, M, J] of one layer. As [D, J, M] a flat product would gather the weights of a mesh."""
    return jnp.stack([_alone(matrix, index) for matrix in matrices_LDM], axis=-1)


# Fields of a struct of weights that are one product.
_PRODUCTS: dict[tuple[str, ...], Join] = {
    ("q_DNH", "k_DKH", "v_DKH"): _join_heads,
    ("gate_DM", "up_DM"): _join_columns,
}


def single_layers(stack: Tree, *, donate: bool = False) -> tuple[Tree, ...]:
    """The layers of a stack one by one; every array keeps its sharding, without L.

    Matrices of one input become one (:class:`Merged`), on a mesh where they are split alike: not
    with queries whose heads divide over the devices where key heads do not.

    Args:
        stack: weights of layers on a leading axis L, on their devices.
        donate: whether the stack is deleted, each of its arrays when the layers are cut out of it:
            memory then never holds more beside the model than one matrix of all layers. Otherwise
            it holds the layers twice, for as long as the caller keeps the stack.
    """
    count = jax.tree.leaves(stack)[0].shape[0]

    def cut(join: Join, *parts: Any) -> Any:
        if isinstance(parts[0], PerOutput):
            return _each(functools.partial(cut, join), parts)
        program = _program(join, _without_layers(parts[-1], join is not _alone))
        layers = [program(*parts, index=index) for index in range(count)]
        if donate:
            jax.block_until_ready(layers)
            for part in parts:
                part.delete()
        return layers

    def convert(tree: Tree) -> Tree:
        """The tree with a list of the layers' arrays in the place of every array."""
        if tree is None:
            return None
        if not hasattr(tree, "__dataclass_fields__") or isinstance(tree, Quantised):
            return jax.tree.map(functools.partial(cut, _alone), tree)
        fields = {name: getattr(tree, name) for name in tree.__dataclass_fields__}
        merged: dict[str, Any] = {}
        for names, join in _PRODUCTS.items():
            parts = [fields[name] for name in names if fields.get(name) is not None]
            if len(parts) > 1 and _alike(parts):
                merged |= dict.fromkeys(names) | {names[0]: Merged(cut(join, *parts))}
        others = {name: convert(value) for name, value in fields.items() if name not in merged}
        return tree.replace(**others, **merged)

    lists = convert(stack)

    def layer(index: int) -> Tree:
        return jax.tree.map(lambda each: each[index], lists, is_leaf=lambda x: isinstance(x, list))

    return tuple(map(layer, range(count)))


def join_context(stack: Tree) -> Any:
    """The matrices of keys and values (or of keys alone) of all layers of a stack as one,
    [D, K, J, H]: layer after layer, for one input of all of them."""

    def join(*parts: jax.Array) -> jax.Array:
        return _program(_join_layers, _without_layers(parts[-1], True))(*parts)

    parts = [part for part in (stack.k_DKH, stack.v_DKH) if part is not None]
    return _each(join, parts) if isinstance(parts[0], PerOutput) else join(*parts)


def split_context(products_XKJH: jax.Array, num_layers: int) -> list[tuple[Any, Any]]:
    """Products with a matrix of :func:`join_context`, as keys and values (None without) [X, K, H]
    of every layer."""
    parts = products_XKJH.shape[-2] // num_layers
    each = [products_XKJH[..., place, :] for place in range(products_XKJH.shape[-2])]
    return [
        (each[place], each[place + 1] if parts == 2 else None)
        for place in range(0, len(each), parts)
    ]


def _join_layers(*matrices_LDKH: jax.Array) -> jax.Array:
    all_DKLJH = jnp.moveaxis(jnp.stack(matrices_LDKH, axis=1), (0, 1), (2, 3))
    return all_DKLJH.reshape(*all_DKLJH.shape[:2], -1, all_DKLJH.shape[-1])


@functools.cache
def _program(join: Join, where: NamedSharding | None) -> Any:
    """A join, compiled, its result on the devices of a mesh."""
    return jax.jit(join, out_shardings=where)


def _each(function: Callable[..., Any], parts: Sequence[PerOutput]) -> PerOutput:
    """A function of matrices, of the values and of the scales of quantised ones: they have the same
    axes."""
    values, scales = [part.value for part in parts], [part.scale for part in parts]
    return PerOutput(function(*values), function(*scales))


def _alike(parts: Sequence[Any]) -> bool:
    """Whether matrices have a form that can be joined, and are split over a mesh alike."""
    if any(isinstance(part, InBlocks) for part in parts):
        return False
    return len({_spec(jax.tree.leaves(part)[0]) for part in parts}) == 1


def _spec(array: jax.Array) -> PartitionSpec | None:
    """How an array is split over a mesh; None where it lies on one device."""
    sharding = array.sharding
    return sharding.spec if isinstance(sharding, NamedSharding) else None


def _without_layers(array: jax.Array, joined: bool) -> NamedSharding | None:
    """The sharding of one layer of an array [L, D, X], or of several that are joined,
    [D, X, J]."""
    if not isinstance(array.sharding, NamedSharding):
        return None
    mesh, spec = array.sharding.mesh, [*array.sharding.spec, *[None] * array.ndim][1 : array.ndim]
    return NamedSharding(mesh, PartitionSpec(*spec[:2], *[None] * joined, *spec[2:]))
