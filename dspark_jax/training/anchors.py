"""Anchors of a training sequence and the labels of their blocks (spec sections 8 and 10)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class BlockLabels:
    """What the slots of all blocks are trained towards.

    Attributes:
        previous_BAG: int32 true token before each slot's prediction; slot 0 has the anchor.
        label_BAG: int32 true token that each slot predicts.
        position_BAG: int32 position whose target distribution each slot imitates.
        supervised_BAG: bool, a prefix of every block; False throughout a dummy block.
    """

    previous_BAG: jax.Array
    label_BAG: jax.Array
    position_BAG: jax.Array
    supervised_BAG: jax.Array


def anchor_candidates(loss_mask_BS: jax.Array) -> jax.Array:
    """bool [B, S-1]: positions that are, with the next one, in the loss mask."""
    return loss_mask_BS[:, :-1] & loss_mask_BS[:, 1:]


def choose_anchors(
    uniform_BP: jax.Array, candidate_BP: jax.Array, num_anchors: int
) -> tuple[jax.Array, jax.Array]:
    """The ``num_anchors`` candidates with the smallest random numbers, in ascending order.

    Args:
        uniform_BP: one random number a position.
        candidate_BP: bool, which positions may be anchors.
        num_anchors: static; sequences with fewer candidates get dummies at the end.

    Returns:
        anchor_BA int32 (0 for a dummy) and keep_BA bool.
    """
    count = candidate_BP.shape[1]
    if num_anchors > count:
        padding = ((0, 0), (0, num_anchors - count))
        uniform_BP = jnp.pad(uniform_BP, padding)
        candidate_BP = jnp.pad(candidate_BP, padding)
    rank_BP = jnp.where(candidate_BP, uniform_BP, 2.0)
    _, chosen_BA = jax.lax.top_k(-rank_BP, num_anchors)
    keep_BA = jnp.take_along_axis(candidate_BP, chosen_BA, axis=1)
    anchor_BA = jnp.sort(jnp.where(keep_BA, chosen_BA, candidate_BP.shape[1]), axis=1)
    keep_BA = anchor_BA < candidate_BP.shape[1]
    return jnp.where(keep_BA, anchor_BA, 0).astype(jnp.int32), keep_BA


def sample_anchors(
    key: jax.Array, loss_mask_BS: jax.Array, num_anchors: int, turn: jax.Array | float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Up to ``num_anchors`` distinct anchors a sequence, uniformly; see :func:`choose_anchors`.

    ``turn`` in [0, 1) turns the random numbers round, so that several draws with one key and
    evenly spaced turns hardly overlap.
    """
    candidate_BP = anchor_candidates(loss_mask_BS)
    uniform_BP = (jax.random.uniform(key, candidate_BP.shape) + turn) % 1.0
    return choose_anchors(uniform_BP, candidate_BP, num_anchors)


def block_labels(
    token_BS: jax.Array,
    loss_mask_BS: jax.Array,
    anchor_BA: jax.Array,
    keep_BA: jax.Array,
    block_size: int,
) -> BlockLabels:
    """Labels of the blocks behind the anchors.

    Slot k of the block at anchor p predicts the token at p + 1 + k. It is supervised while every
    position up to that one lies in the sequence and in the loss mask.
    """
    length = token_BS.shape[1]
    slot_G = jnp.arange(block_size, dtype=jnp.int32)
    position_BAG = anchor_BA[..., None] + slot_G

    def gather(values_BS: jax.Array, index_BAG: jax.Array) -> jax.Array:
        flat = jnp.minimum(index_BAG, length - 1).reshape(index_BAG.shape[0], -1)
        return jnp.take_along_axis(values_BS, flat, axis=1).reshape(index_BAG.shape)

    inside_BAG = position_BAG + 1 < length
    in_mask_BAG = gather(loss_mask_BS, position_BAG + 1) & inside_BAG & keep_BA[..., None]
    return BlockLabels(
        previous_BAG=gather(token_BS, position_BAG),
        label_BAG=gather(token_BS, position_BAG + 1),
        position_BAG=jnp.minimum(position_BAG, length - 1),
        supervised_BAG=jnp.cumprod(in_mask_BAG, axis=-1).astype(bool),
    )
