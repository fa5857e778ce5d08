"""Checkpoints whose matrices are values with scales.

``NAME.weight`` is e4m3 with a scale for each block of 128 x 128, or two e2m1 in each byte of an
int8 tensor, the low four bits first, with a scale for 32 inputs of an output; ``NAME.scale`` are
these scales in e8m0.
"""

from __future__ import annotations

from dspark_jax.checkpoints.tensors import LoadError, Tensors
from dspark_jax.models.quantised import BLOCKS

VALUES, SCALES = ".weight", ".scale"
SCALE_DTYPE = "float8_e8m0fnu"


def with_scales(tensors: Tensors) -> Tensors:
    """The same checkpoint, with the shapes of the plain matrices and without the scales in its
    table: :func:`~dspark_jax.checkpoints.tensors.read_params` then gives the matrices as they are
    stored.

    Raises:
        LoadError: values and scales do not fit each other.
    """
    shapes, scales = dict(tensors.shapes), {}
    for scale in [name for name in shapes if name.endswith(SCALES)]:
        name = scale.removesuffix(SCALES) + VALUES
        if name in shapes:
            shapes[name], scales[name] = _plain_shape(tensors, name, scale), scale
            del shapes[scale]
    return Tensors(tensors.origin, shapes, tensors.read, scales)


def _plain_shape(tensors: Tensors, name: str, scale: str) -> tuple[int, ...]:
    """Of the matrix that values and scales stand for, [out, in]."""
    value_OI, scale_OI = tensors.read(name), tensors.read(scale)
    kind = value_OI.dtype.name
    if kind not in BLOCKS or value_OI.ndim != 2 or scale_OI.dtype.name != SCALE_DTYPE:
        raise LoadError(
            f"{tensors.origin}: {name} has dtype {kind} and {len(value_OI.shape)} axes, its scales "
            f"have dtype {scale_OI.dtype.name}: of values with scales, matrices of e4m3 or of two "
            "e2m1 in an int8 are supported, and scales in e8m0"
        )
    outputs, inputs = value_OI.shape
    inputs = 2 * inputs if kind == "int8" else inputs
    sizes = zip((outputs, inputs), BLOCKS[kind], strict=True)
    blocks = tuple(-(-size // of) for size, of in sizes)
    if scale_OI.shape != blocks:
        raise LoadError(
            f"{tensors.origin}: {scale} has shape {list(scale_OI.shape)}, but {name} has "
            f"{list(blocks)} blocks: the two do not belong together"
        )
    return outputs, inputs
