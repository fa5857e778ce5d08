"""Anchors of a training sequence, and the labels of the blocks or chains behind them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.models.drafters.family import Lessons


@struct.dataclass
class BlockLabels:
    """What the slots of all blocks are trained towards.

    Attributes:
        token_BS: int32 the sequences.
        previous_BAG: int32 true token before each slot's prediction; slot 0 has the anchor.
        label_BAG: int32 true token that each slot predicts.
        position_BAG: int32 position whose target distribution each slot imitates.
        supervised_BAG: bool, a prefix of every block; False throughout a dummy block.
    """

    token_BS: jax.Array
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
        token_BS=token_BS,
        previous_BAG=gather(token_BS, position_BAG),
        label_BAG=gather(token_BS, position_BAG + 1),
        position_BAG=jnp.minimum(position_BAG, length - 1),
        supervised_BAG=jnp.cumprod(in_mask_BAG, axis=-1).astype(bool),
    )


def chain_labels(
    token_BS: jax.Array,
    loss_mask_BS: jax.Array,
    anchor_BA: jax.Array,
    keep_BA: jax.Array,
    num_steps: int,
) -> BlockLabels:
    """Labels of the chains behind the anchors, of ``num_steps`` slots.

    Slot k of the chain at anchor p sees the token at p + k and predicts that at p + 1 + k. It is
    supervised where position p - 1 + k, at which the true entry would stand, is in the loss mask
    and not its last: those are positions whose features the reference trains on.
    """
    length = token_BS.shape[1]
    position_BAG = anchor_BA[..., None] + jnp.arange(num_steps, dtype=jnp.int32)
    entry_BAG = position_BAG - 1
    taught_BS = _taught_entries(loss_mask_BS)

    def at(values_BS: jax.Array, index_BAG: jax.Array) -> jax.Array:
        flat = jnp.clip(index_BAG, 0, length - 1).reshape(len(values_BS), -1)
        return jnp.take_along_axis(values_BS, flat, axis=1).reshape(index_BAG.shape)

    inside_BAG = (entry_BAG >= 0) & (entry_BAG < length) & keep_BA[..., None]
    return BlockLabels(
        token_BS=token_BS,
        previous_BAG=at(token_BS, position_BAG),
        label_BAG=at(token_BS, position_BAG + 1),
        position_BAG=jnp.minimum(position_BAG, length - 1),
        supervised_BAG=at(taught_BS, entry_BAG) & inside_BAG,
    )


def _taught_entries(loss_mask_BS: jax.Array) -> jax.Array:
    """bool [B, S]: positions in the loss mask, without the last of each sequence."""
    place_S = jnp.arange(loss_mask_BS.shape[1])
    last_B1 = jnp.max(loss_mask_BS * place_S, axis=1, keepdims=True)
    return loss_mask_BS & (place_S != last_B1)


def sample_lessons(
    token_BS: jax.Array,
    loss_mask_BS: jax.Array,
    key: jax.Array,
    turn: jax.Array | float,
    sizes: tuple[int, int],
    lessons: Lessons,
) -> tuple[jax.Array, jax.Array, BlockLabels]:
    """What a drafter is taught of a batch of sequences.

    Args:
        token_BS: int32 the sequences.
        loss_mask_BS: bool, the supervised tokens.
        key: as for :func:`sample_anchors`.
        turn: likewise.
        sizes: the most anchors of a sequence, and slots behind each.
        lessons: of the drafter's family.

    Returns:
        anchor_BA, keep_BA and the labels. Of as many anchors as positions all chains are taken in
        which a slot is supervised.
    """
    num_anchors, num_slots = sizes
    if lessons == "blocks":
        anchor_BA, keep_BA = sample_anchors(key, loss_mask_BS, num_anchors, turn)
        labels = block_labels(token_BS, loss_mask_BS, anchor_BA, keep_BA, num_slots)
        return anchor_BA, keep_BA, labels
    length = token_BS.shape[1]
    taught_BS = _taught_entries(loss_mask_BS)
    later_BS = jnp.pad(taught_BS, ((0, 0), (0, num_slots)))
    steps = [later_BS[:, step : step + length - 1] for step in range(num_slots)]
    candidate_BP = functools.reduce(jnp.logical_or, steps)
    uniform_BP = (jax.random.uniform(key, candidate_BP.shape) + turn) % 1.0
    entry_BA, keep_BA = choose_anchors(uniform_BP, candidate_BP, num_anchors)
    anchor_BA = entry_BA + keep_BA
    return anchor_BA, keep_BA, chain_labels(token_BS, loss_mask_BS, anchor_BA, keep_BA, num_slots)


def taught_positions(loss_mask_BS: jax.Array, lessons: Lessons) -> jax.Array:
    """bool [B, S]: positions whose target distributions a lesson may need."""
    if lessons == "blocks":
        return loss_mask_BS
    return jnp.pad(_taught_entries(loss_mask_BS), ((0, 0), (1, 0)))[:, :-1]
