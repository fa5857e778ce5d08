"""The DSpark drafter's backbone: KV injection and bidirectional blocks (paper, section 3).

The target's features are projected once to ``c_j``, and every draft layer turns them into keys and
values with the same projections that serve its block: the context. A block is the anchor followed
by mask tokens; its slots see the context strictly before the anchor, and each other in both
directions. The same functions serve training (A anchors a sequence) and decoding (A = 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.axes import MESH_RULES, declare
from dspark_jax.config import DrafterConfig
from dspark_jax.models import cache as kv
from dspark_jax.models.drafters.family import BlockOutputs, Choose, Law, Lessons, Reads
from dspark_jax.models.drafters.heads import (
    DraftBlock,
    declare_confidence_head,
    declare_markov_head,
    sample_block,
    teach_heads,
)
from dspark_jax.models.layers import flat, matmul, project_for_many, project_kv, rms_norm
from dspark_jax.models.merged import join_context, single_layers, split_context
from dspark_jax.models.reading import Cache, declare_caches
from dspark_jax.models.stacks import (
    Place,
    Sections,
    Stack,
    is_unstacked,
    loop_layers,
    map_stacks,
    place_of,
    stacks_of,
)
from dspark_jax.models.targets.table import draft_blocks_of
from dspark_jax.models.vocab import Vocab, embed
from pallas_kernels.anchor_attention.api import SAVED, anchor_attention
from pallas_kernels.ragged_attention.api import ragged_attention
from pallas_kernels.ragged_attention.groups import group_runs

Config = DrafterConfig
lessons: Lessons = "blocks"
reads: Reads = "streams"

# What a training step keeps of a layer for the backward pass: results of matrix products. All
# else, several times as large, is cheap to compute again.
KEEP_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(SAVED),
)


@struct.dataclass
class DrafterParams:
    """Trainable weights of a drafter; embedding and LM head are the target's (``Vocab``).

    Attributes:
        fc_FYD: projection of the concatenated features; hidden_norm_D follows it.
        layers: blocks, of every stack (:mod:`~dspark_jax.models.stacks`).
        norm_D: final norm.
        head: ``MarkovHead`` or None.
        confidence: ``ConfidenceHead`` or None.
    """

    fc_FYD: Any
    hidden_norm_D: Any
    layers: Any
    norm_D: Any
    head: Any
    confidence: Any


@struct.dataclass
class MergedDrafter(DrafterParams):
    """A drafter for decoding.

    Attributes:
        context_DKJH: of every stack the matrices of keys and values of all its layers as one, a
            second time, for :func:`inject`.
    """

    context_DKJH: tuple[Any, ...] = ()


def for_decoding(drafter: DrafterParams, *, donate: bool) -> MergedDrafter:
    """``DrafterFamily.for_decoding``."""
    context = tuple(map(join_context, drafter.layers))
    layers = tuple(single_layers(stack, donate=donate) for stack in drafter.layers)
    return MergedDrafter(**{**vars(drafter), "layers": layers}, context_DKJH=context)


def sections(cfg: DrafterConfig) -> Sections:
    """The layers by their kinds."""
    return draft_blocks_of(cfg).sections(cfg)


def declare_drafter(cfg: DrafterConfig) -> DrafterParams:
    """Declaration of every trainable parameter under its name in the reference layout."""
    blocks = draft_blocks_of(cfg)
    sizes = cfg.sizes | {"Y": cfg.hidden_size}
    return DrafterParams(
        fc_FYD=declare("FYD", sizes, "fc.weight", out="D"),
        hidden_norm_D=declare("D", sizes, "hidden_norm.weight", init="ones"),
        layers=map_stacks(lambda stack: blocks.declare(cfg, stack), blocks.sections(cfg)),
        norm_D=declare("D", sizes, "norm.weight", init="ones"),
        head=declare_markov_head(cfg),
        confidence=declare_confidence_head(cfg),
    )


def declare_context(cfg: DrafterConfig, room: kv.Room) -> Cache:
    """Declaration of the injected keys and values."""
    return declare_caches(draft_blocks_of(cfg).sections(cfg), room)


def inject(
    drafter: DrafterParams, feature_XFD: jax.Array, position_X: jax.Array, cfg: DrafterConfig
) -> tuple[tuple[Any, Any], ...]:
    """Keys and values of the context for every draft layer.

    Args:
        drafter: weights.
        feature_XFD: features of the chosen target layers.
        position_X: int32 positions of these tokens.
        cfg: sizes.

    Returns:
        k and v of every stack, [L, X, K, H] each, or tuples of L arrays where the layers are
        unstacked.
    """
    blocks = draft_blocks_of(cfg)
    flat_XI = feature_XFD.reshape(*position_X.shape, -1).astype(drafter.norm_D.dtype)
    context_XD = matmul(flat_XI, flat(drafter.fc_FYD, flat_XI.shape[-1]))
    context_XD = rms_norm(context_XD, drafter.hidden_norm_D, cfg.rms_norm_eps)
    shared = blocks.shared(position_X, cfg)

    def keys_values(number: int, stack: Stack) -> tuple[Any, Any]:
        layers, place = drafter.layers[number], place_of(blocks.sections(cfg), stack.layers[0])

        def one(layer: Any, products: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
            return blocks.inject(layer, *products, place, shared, cfg)

        if not isinstance(layers, tuple):
            return jax.vmap(lambda layer: one(layer, project_kv(layer, context_XD)))(layers)
        if isinstance(drafter, MergedDrafter):
            together_XKJH = project_for_many(context_XD, drafter.context_DKJH[number])
            products = split_context(together_XKJH, len(layers))
        else:
            products = [project_kv(layer, context_XD) for layer in layers]
        k, v = zip(*map(one, layers, products), strict=True)
        return k, v

    stacks = stacks_of(blocks.sections(cfg))
    return tuple(keys_values(number, stack) for number, stack in enumerate(stacks))


def observe(
    drafter: DrafterParams,
    vocab: Vocab,
    context: Cache,
    rows: kv.Rows,
    feature_TFD: jax.Array,
    token_BS: jax.Array,
    length_B: jax.Array,
    cfg: DrafterConfig,
    *,
    kernels: str = "xla",
) -> Cache:
    """``DrafterFamily.observe``: injects the rows at their slots and positions."""

    def write(stack: Stack, cache: kv.KVCache, new: tuple[Any, Any]) -> kv.KVCache:
        for index, (k, v) in enumerate(zip(*new, strict=True)):
            window = stack.kind.attention.window
            cache = kv.write(cache, index, rows.slot_T, rows.position_T, k, v, window)
        return cache

    stacks = stacks_of(draft_blocks_of(cfg).sections(cfg))
    return tuple(map(write, stacks, context, inject(drafter, feature_TFD, rows.position_T, cfg)))


def block_hidden(
    drafter: DrafterParams,
    vocab: Vocab,
    anchor_BA: jax.Array,
    position_BA: jax.Array,
    context: Cache,
    cfg: DrafterConfig,
    keep_BA: jax.Array | None = None,
    *,
    kernels: str = "xla",
) -> jax.Array:
    """Backbone states of the blocks behind the given anchors.

    Args:
        drafter: weights.
        vocab: the drafter's vocabulary (embeddings).
        anchor_BA: int32 anchor tokens.
        position_BA: int32 positions of the anchors; context positions before them are visible.
        context: valid at least before each anchor.
        cfg: sizes.
        keep_BA: False marks a dummy block: mask tokens only, attending to nothing.
        kernels: the implementation of ``anchor_attention``.

    Returns:
        hidden_BAGD after the final norm.
    """
    if keep_BA is None:
        keep_BA = jnp.ones(anchor_BA.shape, bool)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, place: Place) -> jax.Array:
        (heads_axis,), own = MESH_RULES["K"], place.kind.attention
        return anchor_attention(
            q,
            *kv.read(context[place.stack], place.index),
            (k, v),
            position_BA,
            keep_BA,
            window=own.window or None,
            scale=own.scale,
            sequences_axes=MESH_RULES["B"],
            heads_axis=heads_axis,
            implementation=kernels,
        )

    return _backbone(drafter, vocab, anchor_BA, position_BA, keep_BA, attend, cfg)


def train_blocks(
    drafter: DrafterParams,
    vocab: Vocab,
    feature_BSFD: jax.Array,
    token_BS: jax.Array,
    previous_BAG: jax.Array,
    anchor_BA: jax.Array,
    keep_BA: jax.Array,
    cfg: DrafterConfig,
    *,
    kernels: str,
) -> BlockOutputs:
    """``DrafterFamily.train_blocks``."""
    position_BS = jnp.broadcast_to(
        jnp.arange(feature_BSFD.shape[1], dtype=jnp.int32), feature_BSFD.shape[:2]
    )
    injected = inject(drafter, feature_BSFD, position_BS, cfg)
    context = tuple(kv.of_sequences(k, v) for k, v in injected)
    first_BA = previous_BAG[..., 0]
    hidden_BAGD = block_hidden(
        drafter, vocab, first_BA, anchor_BA, context, cfg, keep_BA, kernels=kernels
    )
    return BlockOutputs(hidden_BAGD, *teach_heads(drafter, previous_BAG, hidden_BAGD, cfg))


def draft(
    drafter: DrafterParams,
    vocab: Vocab,
    context: Cache,
    anchor_B: jax.Array,
    position_B: jax.Array,
    choose: Choose,
    law: Law,
    cfg: DrafterConfig,
    *,
    kernels: str,
) -> DraftBlock:
    """``DrafterFamily.draft``."""
    hidden_BGD = slot_hidden(drafter, vocab, anchor_B, position_B, context, cfg, kernels=kernels)
    return sample_block(drafter, vocab, hidden_BGD, anchor_B, choose, cfg, law)


def slot_hidden(
    drafter: DrafterParams,
    vocab: Vocab,
    anchor_B: jax.Array,
    position_B: jax.Array,
    context: Cache,
    cfg: DrafterConfig,
    *,
    kernels: str = "xla",
) -> jax.Array:
    """:func:`block_hidden` where a slot has one anchor: the block behind it, hidden_BGD.

    Args:
        drafter: as for :func:`block_hidden`.
        vocab: likewise.
        context: likewise.
        cfg: likewise.
        anchor_B: int32 anchor tokens.
        position_B: int32 their positions.
        kernels: the implementation of ``ragged_attention``.
    """
    groups = group_runs(None, anchor_B.shape[0], cfg.num_slots)
    limit_T = jnp.repeat(position_B, cfg.num_slots)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, place: Place) -> jax.Array:
        dtype = context[place.stack].k[0].dtype
        out_TNH = ragged_attention(
            q.reshape(-1, *q.shape[-2:]).astype(dtype),
            groups=groups,
            limit_T=limit_T,
            own=(k[:, 0].astype(dtype), v[:, 0].astype(dtype)),
            window=place.kind.attention.window or None,
            scale=place.kind.attention.scale,
            implementation=kernels,
            **kv.attention_inputs(context[place.stack], place.index),
        )
        return out_TNH.reshape(q.shape).astype(q.dtype)

    anchor_BA, position_BA = anchor_B[:, None], position_B[:, None]
    keep_BA = jnp.ones(anchor_BA.shape, bool)
    return _backbone(drafter, vocab, anchor_BA, position_BA, keep_BA, attend, cfg)[:, 0]


def _backbone(
    drafter: DrafterParams,
    vocab: Vocab,
    anchor_BA: jax.Array,
    position_BA: jax.Array,
    keep_BA: jax.Array,
    attend: Callable[[jax.Array, jax.Array, jax.Array, Place], jax.Array],
    cfg: DrafterConfig,
) -> jax.Array:
    """hidden_BAGD with ``attend(q_BAGNH, k_BAGKH, v_BAGKH, place)`` as the blocks' attention."""
    blocks = draft_blocks_of(cfg)
    slot_G = jnp.arange(cfg.num_slots, dtype=jnp.int32)
    first_BAG = (slot_G == 0) & keep_BA[..., None]
    token_BAG = jnp.where(first_BAG, anchor_BA[..., None], cfg.mask_token_id)
    shared = blocks.shared(position_BA[..., None] + slot_G, cfg)
    x_BAGD = embed(vocab, token_BAG).astype(drafter.norm_D.dtype)

    def block(x_BAGD: jax.Array, layer: Any, place: Place) -> jax.Array:
        def compute(x_BAGD: jax.Array, layer: Any, index: Any) -> jax.Array:
            here = replace(place, index=index)
            q, k, v = blocks.project(layer, x_BAGD, here, shared, cfg)
            return blocks.finish(layer, x_BAGD, attend(q, k, v, here), here, shared, cfg)

        if not is_unstacked(drafter.layers):  # the form that is trained
            compute = jax.checkpoint(compute, policy=KEEP_PRODUCTS, prevent_cse=False)
        return compute(x_BAGD, layer, place.index)

    x_BAGD = loop_layers(block, x_BAGD, drafter.layers, blocks.sections(cfg))
    x_BAGD = x_BAGD[..., -cfg.block_size :, :]
    return rms_norm(x_BAGD, drafter.norm_D, cfg.rms_norm_eps)
