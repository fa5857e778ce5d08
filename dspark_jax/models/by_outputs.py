"""Matrices by their outputs: the form in which a CPU multiplies a few rows at its memory's speed.

A round multiplies a few rows with all of the weights, and should take as long as reading those
once. Libraries for matrix products first copy the matrix into pieces of their own liking, which
takes as long again. Here a product of few rows is one reduction with many results, which XLA
compiles to a loop that reads every weight once for all rows; by its outputs a matrix lies in memory
in the order of the sums. Several places of it are read in turn: a CPU fetches ahead in each of
them, and with one alone it waits, the longer the more rows there are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.models.quantised import PerOutput
from pallas_kernels import dispatch

FEW_ROWS = 12  # with more, the library is faster
LARGE = 2**16  # weights of a matrix; a smaller one is not worth a loop of its own
PLACES = (4, 3, 2)  # that are read in turn, as many as there can be
SUMS = 12  # at once, where two places do not need more: the fewer, the sooner it is compiled

# Matrices of a model by their names, with the number of axes that are inputs.
_MATRICES: Mapping[str, int] = {
    "q_DNH": 1,  # where it is alone
    "o_NHD": 2,
    "down_MD": 1,
    "fc_FYD": 2,
    "weight_DX": 1,
    "context_DKJH": 1,
}


@struct.dataclass
class ByOutputs:
    """A matrix by its outputs.

    Attributes:
        weight_OI: one axis for inputs and outputs each, the halves of the inputs swapped.
        shape: the axes of the matrix by its inputs.
        scale_O: of the outputs of a quantised matrix; None of a plain one.
    """

    weight_OI: Any
    shape: tuple[int, ...] = struct.field(pytree_node=False)
    scale_O: Any = None


def by_outputs(w: jax.Array | PerOutput, num_inputs: int = 1) -> ByOutputs:
    """A matrix whose first ``num_inputs`` axes are inputs, by its outputs; a copy."""
    if isinstance(w, PerOutput):
        # XLA converts e4m3 value by value on a CPU. bfloat16 holds all of them.
        value = w.value if w.value.dtype == jnp.int8 else w.value.astype(jnp.bfloat16)
        return replace(by_outputs(value, num_inputs), scale_O=w.scale.reshape(-1))
    return ByOutputs(_turn(w, math.prod(w.shape[:num_inputs])), w.shape)


@functools.partial(jax.jit, static_argnums=1)  # or each of its steps would be compiled
def _turn(w: jax.Array, inputs: int) -> jax.Array:
    return swap_halves(w.reshape(inputs, -1).T)


def matrices_by_outputs(params: Any) -> Any:
    """Parameters of which the matrices are by their outputs; layers are single ones, in tuples."""
    if isinstance(params, tuple):
        return tuple(map(matrices_by_outputs, params))
    if not is_dataclass(params):
        return params

    def changed(name: str, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(changed(name, one) for one in value)
        if name not in _MATRICES or not isinstance(value, jax.Array | PerOutput):
            return matrices_by_outputs(value)
        return by_outputs(value, _MATRICES[name])

    found = {field.name: getattr(params, field.name) for field in fields(params)}
    return replace(params, **{name: changed(name, value) for name, value in found.items()})  # type: ignore[type-var]


def product(x_XI: jax.Array, w: ByOutputs) -> jax.Array:
    """``x @ w``, [X, O] in float32."""
    outputs, inputs = w.weight_OI.shape
    num_rows = math.prod(x_XI.shape[:-1])
    x_RI = swap_halves(x_XI.reshape(num_rows, inputs))
    places = [count for count in PLACES if outputs % count == 0]
    reads_once = num_rows <= FEW_ROWS and w.weight_OI.size >= LARGE and dispatch.sums_are_fast()
    if reads_once and places:
        num_places = next((count for count in places if count * num_rows <= SUMS), places[-1])
        out_RO = _sums(x_RI, w.weight_OI.reshape(num_places, -1, inputs))
    else:
        weight_OI = w.weight_OI if w.scale_O is None else w.weight_OI.astype(x_RI.dtype)
        out_RO = jnp.matmul(x_RI, weight_OI.T, preferred_element_type=jnp.float32)
    if w.scale_O is not None:
        out_RO = out_RO * w.scale_O
    return out_RO.reshape(*x_XI.shape[:-1], outputs)


def swap_halves(x_XI: jax.Array) -> jax.Array:
    """The last axis with its second half before its first.

    For the sake of the rows: XLA writes down what is put together of pieces. Anything else it would
    compute again for every output.
    """
    half = x_XI.shape[-1] // 2
    return jnp.concatenate([x_XI[..., half:], x_XI[..., :half]], axis=-1)


def _sums(x_RI: jax.Array, part_PQI: jax.Array) -> jax.Array:
    """[R, P * Q] of a matrix in P parts of Q outputs."""
    rows = [x_I.astype(jnp.float32) for x_I in x_RI]
    parts = [part_QI.astype(jnp.float32) for part_QI in part_PQI]
    term_NQI = tuple(part_QI * x_I for x_I in rows for part_QI in parts)
    zero_N = (jnp.float32(0),) * len(term_NQI)

    def add(left_N: tuple[Any, ...], right_N: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(left + right for left, right in zip(left_N, right_N, strict=True))

    return jnp.stack(jax.lax.reduce(term_NQI, zero_N, add, (1,))).reshape(len(rows), -1)
