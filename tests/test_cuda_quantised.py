"""What products with quantised weights move on a GPU, compiled for one without it.

A matrix of 4096 x 12288 and 64 rows, in bfloat16: the plain product reads 100 MB of weights.
"""

import functools
import json

import jax
import jax.numpy as jnp
import pytest

from dspark_jax.models.layers import matmul
from dspark_jax.models.quantised import BLOCKS, PANEL, InBlocks, PerOutput
from tests import cuda_compile, hlo_bytes

ROWS, INPUTS, OUTPUTS = 64, 4096, 12288
WEIGHTS = INPUTS * OUTPUTS
BESIDE = 20e6  # bytes: rows and results, the latter in float32 and in parts too


def in_blocks(dtype, block):
    """e4m3, or two e2m1 in a byte."""
    width = INPUTS // 2 if dtype == jnp.uint8 else INPUTS
    scales = OUTPUTS // block[0], INPUTS // block[1]
    return InBlocks(
        jax.ShapeDtypeStruct((OUTPUTS, width), dtype),
        jax.ShapeDtypeStruct(scales, jnp.float8_e8m0fnu),
        (INPUTS, OUTPUTS),
        block,
    )


def per_output(dtype):
    value = jax.ShapeDtypeStruct((INPUTS, OUTPUTS), dtype)
    return PerOutput(value, jax.ShapeDtypeStruct((1, OUTPUTS), jnp.float32))


FORMS = {
    "plain": jax.ShapeDtypeStruct((INPUTS, OUTPUTS), jnp.bfloat16),
    "int8": per_output(jnp.int8),
    "fp8": per_output(jnp.float8_e4m3fn),
    "e4m3 in blocks": in_blocks(jnp.float8_e4m3fn, BLOCKS["float8_e4m3fn"]),
    "e2m1 in blocks": in_blocks(jnp.uint8, BLOCKS["int8"]),
}


def compile_all():
    """Of every form, in a process of its own: all bytes that are moved, the largest array that is
    written, and the memory for temporaries."""
    jax.default_backend = lambda: "gpu"
    device = jax.sharding.SingleDeviceSharding(cuda_compile.topology(1)[0])
    found = {}
    for name, w in FORMS.items():
        x = jax.ShapeDtypeStruct((ROWS, INPUTS), jnp.bfloat16)
        here = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), (x, w)
        )
        compiled = jax.jit(matmul).lower(*here).compile()
        computations, entry = hlo_bytes.parse(compiled.as_text())
        items = hlo_bytes.Program(computations, entry, lambda *_: 0).items
        temporary = compiled.memory_analysis().temp_size_in_bytes
        found[name] = {"moved": hlo_bytes.total_bytes(items), "temporary": temporary}
    return found


@functools.cache
def measured():
    return json.loads(cuda_compile.said_by_child("tests.test_cuda_quantised"))


needs_compiler = pytest.mark.skipif(
    cuda_compile.problem() is not None, reason=str(cuda_compile.problem())
)


@pytest.mark.smoke
@needs_compiler
@pytest.mark.parametrize(
    ("name", "width"), [("plain", 2), ("int8", 1), ("fp8", 1), ("e4m3 in blocks", 1)]
)
def test_weights_are_read_once_as_they_lie(name, width):
    found = measured()[name]
    assert width * WEIGHTS <= found["moved"] <= width * WEIGHTS + BESIDE
    assert found["temporary"] <= BESIDE


@needs_compiler
def test_bytes_of_two_weights_are_unpacked_panel_by_panel():
    """No matrix is written out: a panel is, and is read out of the L2 cache again. That counts
    here, so that it is no fewer bytes than a plain matrix has."""
    found = measured()["e2m1 in blocks"]
    packed, unpacked = WEIGHTS * (1 / 2 + 1 / 32), 2 * WEIGHTS
    assert found["temporary"] <= 2 * PANEL + BESIDE
    assert unpacked / 2 > 2 * PANEL + BESIDE
    assert found["moved"] <= packed + 2 * unpacked + 4 * BESIDE


if __name__ == "__main__":
    print(json.dumps(compile_all()))
