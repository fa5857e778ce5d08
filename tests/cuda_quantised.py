"""Products with quantised weights compiled for an H100 that is not there: what they move.

``python -m tests.cuda_quantised`` prints the figures of a matrix of 4096 x 12288 and 64 rows in
bfloat16, in every form, as one line of JSON.
"""

import functools
import json

import jax
import jax.numpy as jnp

from dspark_jax.models.layers import matmul
from dspark_jax.models.quantised import BLOCKS, InBlocks, PerOutput
from tests import cuda_compile, hlo_bytes

ROWS, INPUTS, OUTPUTS = 64, 4096, 12288
WEIGHTS = INPUTS * OUTPUTS


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
    """Of every form all bytes that are moved, and those of temporaries."""
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
    """:func:`compile_all` in a process of its own."""
    return json.loads(cuda_compile.said_by_child("tests.cuda_quantised"))


if __name__ == "__main__":
    print(json.dumps(compile_all()))
