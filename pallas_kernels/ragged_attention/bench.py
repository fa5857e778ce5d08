"""Times of serving attention: ``python -m pallas_kernels.ragged_attention.bench [--json]``.

The implementation ``library`` is ``jax.nn.dot_product_attention`` (cuDNN on a GPU) with a mask of
each row's own range, the keys and values lying in its own order, [B, S, K, H].
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels import benchmark
from pallas_kernels.benchmark import Way, Work
from pallas_kernels.ragged_attention.api import ragged_attention
from pallas_kernels.ragged_attention.cases import CASES, Case
from pallas_kernels.ragged_attention.pages import gather_pages

CPU_BYTES = 2**28  # of a case's arrays, more of which a CPU is not asked to read again and again


def library(
    q_PCNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    limit_PC: jax.Array,
    window: int | None = None,
    implementation: Literal["xla", "cudnn"] | None = None,
) -> jax.Array:
    """[P, C, N, H] of one group of rows a slot; every row sees something.

    It cannot be told to leave alone what lies behind the valid part of a cache, and a block's own
    keys must lie in it: ``limit_PC`` is the end of the block then.
    """
    position_S = jnp.arange(k_BSKH.shape[1], dtype=jnp.int32)
    seen_PCS = position_S < limit_PC[..., None]
    if window is not None:
        seen_PCS &= position_S >= limit_PC[..., None] - window
    return jax.nn.dot_product_attention(
        q_PCNH, k_BSKH, v_BSKH, mask=seen_PCS[:, None], implementation=implementation
    )


def library_arguments(case: Case, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a case as :func:`library` takes them."""
    groups, table = case.grouping, arguments["page_BX"]
    limit_PC = groups.gather(arguments["limit_T"])
    caches = [arguments[name] for name in ("k_BKSH", "v_BKSH")]
    if table is not None:  # in the order of their positions, before the time is taken
        caches = [gather_pages(pool, table) for pool in caches]
    k_BSKH, v_BSKH = (jnp.swapaxes(cache, 1, 2) for cache in caches)
    return {
        "q_PCNH": groups.gather(arguments["q_TNH"]),
        "k_BSKH": k_BSKH,
        "v_BSKH": v_BSKH,
        "limit_PC": limit_PC + case.rows if case.bidirectional else limit_PC,
    }


def works() -> Iterator[Work]:
    """The cases that this device is to run: a CPU the small ones, in float32."""
    gpu = benchmark.on_gpu()
    dtype = jnp.bfloat16 if gpu else jnp.float32
    for case in CASES:
        if not gpu and _total_bytes(case, dtype) > CPU_BYTES:
            continue
        inputs = functools.partial(_inputs, case, dtype)
        ways = {
            name: Way(functools.partial(_attend, case, name), inputs)
            for name in benchmark.implementations()
        }
        cudnn: Literal["cudnn"] | None = "cudnn" if gpu else None
        library_inputs = functools.partial(_library_inputs, case, dtype)
        ways["library"] = Way(
            functools.partial(library, window=case.window, implementation=cudnn), library_inputs
        )
        yield Work(case.name, *case.cost(jnp.dtype(dtype).itemsize), ways)


def _total_bytes(case: Case, dtype: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(case.shapes(dtype)))


def _inputs(case: Case, dtype: Any, seed: int) -> tuple[dict[str, Any]]:
    return (case.arguments(dtype, seed),)


def _attend(case: Case, implementation: str, arguments: dict[str, Any]) -> jax.Array:
    return ragged_attention(
        groups=case.grouping, window=case.window, implementation=implementation, **arguments
    )


def _library_inputs(case: Case, dtype: Any, seed: int) -> tuple[jax.Array, ...]:
    return tuple(library_arguments(case, case.arguments(dtype, seed)).values())


if __name__ == "__main__":
    print(benchmark.command("Times of ragged_attention on this device.", works()))
