"""Times of serving attention: ``python -m pallas_kernels.ragged_attention.bench [--json]``.

The implementation ``library`` is ``jax.nn.dot_product_attention`` (cuDNN on a GPU) with a mask of
each row's own range, the keys and values lying in its own order, [B, S, K, H].
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_attention.cases import Case


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
    groups = case.grouping
    limit_PC = groups.gather(arguments["limit_T"])
    return {
        "q_PCNH": groups.gather(arguments["q_TNH"]),
        "k_BSKH": jnp.swapaxes(arguments["k_BKSH"], 1, 2),
        "v_BSKH": jnp.swapaxes(arguments["v_BKSH"], 1, 2),
        "limit_PC": limit_PC + case.rows if case.bidirectional else limit_PC,
    }
