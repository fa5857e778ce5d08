"""Matrices that are not plain numbers: values of few bits times scales, multiplied as they lie.

- :class:`PerOutput`: int8 or e4m3 with a scale for every output, made here of plain matrices
  (``--weights``). The scale multiplies the product's result, so that XLA converts the values inside
  of the product.
- :class:`InBlocks`: as files store them. e4m3 with a scale for every block of 128 x 128, whose
  product is one for every block of outputs, with inputs that are scaled for it; XLA fuses that,
  too. And e2m1, two in a byte, with a scale for 32 inputs of an output: nothing fuses that, so it
  is unpacked panel by panel, each small enough to stay in a GPU's L2 cache.

Formats: OCP 8-bit floating point (2023) for e4m3; OCP microscaling formats (2023) for e2m1 and
e8m0, whose byte b means 2^(b - 127), and 255 not a number.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from dspark_jax.axes import Param, map_params

# Kinds of values that plain matrices are turned into, and the largest number of each.
KINDS = {"int8": (jnp.int8, 127.0), "fp8": (jnp.float8_e4m3fn, 448.0)}
PLAIN = "plain"
PANEL = 2**23  # weights, 16 MB in bfloat16
E2M1 = jnp.dtype(jnp.uint8)  # of values that are two in a byte
# Of the values of stored matrices by their dtypes in a file: the dtype here, and outputs and inputs
# of a scale.
HELD_AS = {"float8_e4m3fn": jnp.dtype(jnp.float8_e4m3fn), "int8": E2M1}
BLOCKS = {"float8_e4m3fn": (128, 128), "int8": (1, 32)}
# Axes of the matrices that are quantised: those of the layers, and the drafter's projection of
# features. Routers (E) and small heads (I, O, R) stay, and so do vocabularies.
MATRIX_AXES = frozenset("DMNKHFY")


@struct.dataclass
class PerOutput:
    """A matrix of inputs and outputs with a scale for every output.

    Attributes:
        value: int8 or e4m3, the axes of the matrix, and leading ones.
        scale: float32, the same axes, of which the inputs have size 1.
    """

    value: Any
    scale: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the plain matrix, with the leading axes."""
        return tuple(self.value.shape)

    def __getitem__(self, where: Any) -> PerOutput:
        return PerOutput(self.value[where], self.scale[where])


@struct.dataclass
class InBlocks:
    """A matrix by its outputs, as files have it, with a scale for every block.

    Attributes:
        value_OI: e4m3 [X, O, I]; or uint8 [X, O, I / 2], two e2m1 each, the low four bits first.
        scale_OI: e8m0, of blocks; the last ones may be partial.
        matrix: the axes of the plain matrix by its inputs.
        block: outputs and inputs of a scale.
    """

    value_OI: Any
    scale_OI: Any
    matrix: tuple[int, ...] = struct.field(pytree_node=False)
    block: tuple[int, int] = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the plain matrix, with the leading axes."""
        return (*self.value_OI.shape[:-2], *self.matrix)

    def __getitem__(self, where: Any) -> InBlocks:
        value_OI, scale_OI = self.value_OI[where], self.scale_OI[where]
        return InBlocks(value_OI, scale_OI, self.matrix, self.block)


Quantised = PerOutput | InBlocks


def check_kind(kind: str) -> None:
    """Refuse a kind of weights that there is not.

    Raises:
        ValueError: names it and those that there are.
    """
    if kind not in (PLAIN, *KINDS):
        raise ValueError(f"weights is {kind!r}: choose one of {', '.join((PLAIN, *KINDS))}")


def quantise(w: jax.Array, inputs: tuple[int, ...], kind: str) -> PerOutput:
    """A matrix in a kind of :data:`KINDS`, rounded to nearest, the largest of an output to the
    largest there is.

    Args:
        w: plain.
        inputs: which axes are summed over.
        kind: ``"int8"`` or ``"fp8"``.
    """
    dtype, most = KINDS[kind]
    w = w.astype(jnp.float32)
    largest = jnp.max(jnp.abs(w), axis=inputs, keepdims=True)
    scale = jnp.where(largest > 0, largest / most, 1.0)
    value = w / scale
    return PerOutput((jnp.round(value) if kind == "int8" else value).astype(dtype), scale)


def quantise_params(declared: Any, params: Any, kind: str) -> Any:
    """Parameters of which the matrices are of a kind, one after the other.

    Args:
        declared: pytree of Param.
        params: plain ones.
        kind: of :data:`KINDS`, or ``"plain"``, which leaves everything as it is.
    """
    return map_params(functools.partial(quantise_param, kind=kind), declared, params)


def quantise_param(param: Param, value: jax.Array, kind: str) -> Any:
    """One parameter of :func:`quantise_params`."""
    if kind == PLAIN or not is_matrix(param):
        return value
    inputs = tuple(param.axes.index(axis) for axis in param.inputs)
    return _quantise(value, inputs, kind)


_quantise = jax.jit(quantise, static_argnums=(1, 2))


def is_matrix(param: Param) -> bool:
    """Whether a parameter is among the matrices that are quantised."""
    plain = param.dtype is None
    return (
        plain and bool(param.inputs) and set(param.axes.removeprefix(param.spread)) <= MATRIX_AXES
    )


def declare_quantised(declared: Any, kind: str) -> Any:
    """The declaration of :func:`quantise_params`: of values and scales where there are some."""

    def declare(param: Param) -> Any:
        if kind == PLAIN or not is_matrix(param):
            return param
        return _declare_per_output(param, KINDS[kind][0])

    return map_params(declare, declared)


def declare_like(declared: Any, params: Any) -> Any:
    """The declaration of parameters some of which may be quantised."""

    def declare(param: Param, held: Any) -> Any:
        if isinstance(held, InBlocks):
            return declare_in_blocks(param, held.block, held.value_OI.dtype)
        return (
            _declare_per_output(param, held.value.dtype) if isinstance(held, PerOutput) else param
        )

    return map_params(declare, declared, params)


def declare_in_blocks(param: Param, block: tuple[int, int], dtype: Any) -> InBlocks:
    """The declaration of a matrix that a file has in blocks; the axes that are fused there go by
    the first of them.

    Args:
        param: a matrix, whose outputs follow its inputs; but for outputs that go before, which are
            groups of inputs and outputs of their own.
        block: outputs and inputs of a scale.
        dtype: of the values.

    Raises:
        ValueError: a group is not of whole blocks.
    """
    sizes = dict(zip(param.axes, param.shape, strict=True))
    start = min(param.axes.index(axis) for axis in param.inputs)
    lead, letters = param.axes[:start], param.axes[start:]
    outer, matrix = param.shape[:start], param.shape[start:]
    inputs = math.prod(sizes[axis] for axis in param.inputs)
    outputs = math.prod(matrix) // inputs
    if len(lead) > len(param.spread) and outputs % block[0]:
        raise ValueError(
            f"{param.name} has groups of {outputs} outputs, and scales for {block[0]}: groups must "
            "be of whole blocks"
        )
    axes = lead + letters[len(param.inputs)] + letters[0]
    in_value = inputs // 2 if dtype == E2M1 else inputs
    blocks = tuple(-(-size // of) for size, of in zip((outputs, inputs), block, strict=True))
    return InBlocks(
        replace(param, axes=axes, shape=(*outer, outputs, in_value), dtype=dtype),
        replace(param, axes=axes, shape=(*outer, *blocks), dtype=jnp.float8_e8m0fnu),
        matrix,
        block,
    )


def _declare_per_output(param: Param, dtype: Any) -> PerOutput:
    sizes = zip(param.axes, param.shape, strict=True)
    shape = tuple(1 if axis in param.inputs else size for axis, size in sizes)
    axes = "".join("X" if axis in param.inputs else axis for axis in param.axes)
    return PerOutput(
        replace(param, dtype=dtype), replace(param, axes=axes, shape=shape, dtype=jnp.float32)
    )


def split(w: Any, lead: Any, inputs: Any, outputs: Any) -> Any:
    """How a matrix [X, I, O] of any form is split over mesh axes.

    Args:
        w: with one leading axis.
        lead: mesh axis of what leads, or None.
        inputs: of the inputs.
        outputs: of the outputs.
    """
    if isinstance(w, InBlocks):
        spec = P(lead, outputs, inputs)
        return InBlocks(spec, spec, w.matrix, w.block)
    spec = P(lead, inputs, outputs)
    return PerOutput(spec, P(lead, None, outputs)) if isinstance(w, PerOutput) else spec


def dequantise(w: Quantised, dtype: Any = jnp.float32) -> jax.Array:
    """The plain matrix, with the leading axes; exact where the dtype has the numbers."""
    if isinstance(w, PerOutput):
        return w.value.astype(dtype) * w.scale.astype(dtype)
    value_OI = w.value_OI
    if value_OI.dtype == E2M1:
        both = jnp.stack(_halves(value_OI, dtype), axis=-1)
        value_OI = both.reshape(*both.shape[:-2], -1)
    outputs, inputs = value_OI.shape[-2:]
    scale_OI = _spread(_spread(w.scale_OI.astype(dtype), -2, w.block[0], outputs), -1, w.block[1],
                       inputs)  # fmt: skip
    plain_IO = jnp.swapaxes(value_OI.astype(dtype) * scale_OI, -1, -2)
    return plain_IO.reshape(w.shape)


def in_blocks_product(x_XI: jax.Array, w: InBlocks) -> jax.Array:
    """``x @ w``, accumulated in float32, with the matrix and the result in the dtype of ``x``; w
    has no leading axes."""
    x_TI = x_XI.reshape(-1, x_XI.shape[-1])
    by_panels = w.value_OI.dtype == E2M1
    out_TO = _by_panels(x_TI, w) if by_panels else _by_blocks(x_TI, w)
    return out_TO.reshape(*x_XI.shape[:-1], -1)


def _by_blocks(x_TI: jax.Array, w: InBlocks) -> jax.Array:
    """A product for every block of outputs, with inputs that have its scales; the scales are powers
    of two, so that nothing is rounded."""
    (size, inputs), outputs = w.block, w.value_OI.shape[0]
    scale_BI = _spread(w.scale_OI.astype(x_TI.dtype), -1, inputs, x_TI.shape[1])

    def blocks(scale_BI: jax.Array, value_BOI: jax.Array) -> jax.Array:
        out_TBO = jnp.einsum(
            "bti,boi->tbo",
            x_TI * scale_BI[:, None],
            value_BOI.astype(x_TI.dtype),
            preferred_element_type=jnp.float32,
        )
        return out_TBO.astype(x_TI.dtype).reshape(len(x_TI), -1)

    whole, parts = outputs // size, []
    if whole:
        value_BOI = w.value_OI[: whole * size].reshape(whole, size, -1)
        parts.append(blocks(scale_BI[:whole], value_BOI))
    if whole < len(scale_BI):  # the last block is partial
        parts.append(blocks(scale_BI[whole:], w.value_OI[None, whole * size :]))
    return jnp.concatenate(parts, axis=1)


def _by_panels(x_TI: jax.Array, w: InBlocks) -> jax.Array:
    """Panels of outputs are unpacked one after the other. The values of a byte's low bits stand
    before those of its high bits, and so do the inputs: together they would be put in turn."""
    outputs, inputs = w.value_OI.shape[0], x_TI.shape[1]
    x_TI = jnp.concatenate([x_TI[:, ::2], x_TI[:, 1::2]], axis=1)
    fits = (n for n in range(1, outputs) if outputs % n == 0 and outputs // n * inputs <= PANEL)
    num_panels = next(fits, outputs)

    def panel(parts: tuple[jax.Array, jax.Array]) -> jax.Array:
        value_OI, scale_OI = parts
        scale_OI = _spread(scale_OI.astype(x_TI.dtype), -1, w.block[1] // 2, inputs // 2)
        low_OI, high_OI = _halves(value_OI, x_TI.dtype)
        plain_OI = jnp.concatenate([low_OI * scale_OI, high_OI * scale_OI], axis=1)
        out_TO = jnp.matmul(x_TI, plain_OI.T, preferred_element_type=jnp.float32)
        return out_TO.astype(x_TI.dtype)

    split = (part.reshape(num_panels, -1, part.shape[1]) for part in (w.value_OI, w.scale_OI))
    out_PTO = jax.lax.map(panel, tuple(split))
    return jnp.moveaxis(out_PTO, 0, 1).reshape(len(x_TI), outputs)


def _halves(value_OI: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The values of the low and of the high four bits of every byte."""
    return _e2m1(value_OI & 15, dtype), _e2m1(value_OI >> 4, dtype)


def _e2m1(code_X: jax.Array, dtype: Any) -> jax.Array:
    """0, 1/2, 1, 3/2, 2, 3, 4, 6 by their codes, and the negative ones from 8 on."""
    code_X = code_X.astype(jnp.int32)
    exponent_X, bit_X = (code_X >> 1) & 3, code_X & 1
    twice_X = jnp.where(exponent_X == 0, bit_X, (2 + bit_X) << jnp.maximum(exponent_X - 1, 0))
    half_X = twice_X.astype(dtype) * jnp.asarray(0.5, dtype)
    return jnp.where(code_X >= 8, -half_X, half_X)


def _spread(scale_X: jax.Array, axis: int, size: int, length: int) -> jax.Array:
    """Every scale as often as it is needed along an axis of this length."""
    spread_X = jnp.repeat(scale_X, size, axis=axis)
    return jax.lax.slice_in_dim(spread_X, 0, length, axis=axis)
