"""Caches in pages: the positions of a slot lie wherever there was room for them.

Position p of slot b lies in page ``page_BX[b, p // PAGE]`` of a pool that all slots share, at place
``p % PAGE`` of it. A number that no page has marks what a slot has no page for.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

PAGE = 64  # positions: what the kernels read at a time


def gather_pages(
    pool_QKXH: jax.Array, page_BX: jax.Array, slot_P: jax.Array | None = None
) -> jax.Array:
    """[P, K, S, H]: the caches of some slots, in the order of their positions.

    Args:
        pool_QKXH: pages of ``PAGE`` positions.
        page_BX: int32 pages of every slot; S is ``PAGE`` times their number.
        slot_P: int32 slots; None for all.
    """
    page_PX = page_BX if slot_P is None else page_BX.at[slot_P].get(mode="clip")
    pages_PXKOH = pool_QKXH.at[page_PX].get(mode="clip")
    groups, pages, heads, size, width = pages_PXKOH.shape
    return jnp.moveaxis(pages_PXKOH, 2, 1).reshape(groups, heads, pages * size, width)
