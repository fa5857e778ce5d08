"""Times of training attention: ``python -m pallas_kernels.anchor_attention.bench [--json]``.

Every case is timed twice: the forward pass, and the gradient of queries, keys and values, whose
floor is that of forward and backward together.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import benchmark
from pallas_kernels.anchor_attention.api import anchor_attention
from pallas_kernels.anchor_attention.cases import CASES, make_inputs
from pallas_kernels.benchmark import Way, Work

# The backward pass has five products where the forward pass has two, and reads all that this reads
# and writes, the gradient of the result, and writes a gradient of every argument.
GRADIENT_FLOPS = 3.5
GRADIENT_BYTES = 3


def gradient(*arguments: Any, implementation: str = "xla") -> Any:
    """Gradients of queries, context and own keys and values, for a result weighted with itself."""

    def weighed(*values: Any) -> jax.Array:
        out_BAGNH = anchor_attention(*values, *arguments[4:], implementation=implementation)
        out_BAGNH = out_BAGNH.astype(jnp.float32)
        return jnp.sum(out_BAGNH * jax.lax.stop_gradient(out_BAGNH))

    return jax.grad(weighed, argnums=(0, 1, 2, 3))(*arguments[:4])


def works() -> Iterator[Work]:
    """The cases that this device is to run: a CPU those in float32."""
    for case in CASES:
        if not benchmark.on_gpu() and case.dtype != "float32":
            continue
        least_bytes, least_flops = case.cost()
        inputs = functools.partial(make_inputs, case)
        forward, backward = (
            {
                name: Way(functools.partial(step, implementation=name), inputs)
                for name in benchmark.implementations()
            }
            for step in (anchor_attention, gradient)
        )
        yield Work(case.name, least_bytes, least_flops, forward)
        backward_bytes = GRADIENT_BYTES * least_bytes
        backward_flops = int(GRADIENT_FLOPS * least_flops)
        yield Work(f"gradient, {case.name}", backward_bytes, backward_flops, backward)


if __name__ == "__main__":
    print(benchmark.command("Times of anchor_attention on this device.", works()))
