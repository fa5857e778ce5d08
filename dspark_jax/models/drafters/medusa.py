"""Medusa: heads on the target's last state that guess the tokens ahead (arXiv 2401.10774).

    hidden_k = h + silu(A_k h + b_k)          logits_k = W_k hidden_k,     k = 1 .. K

The state h is the one that gave the anchor, so that no head knows the anchor or another draft. W_k
is the target's LM head, or in checkpoints of others a matrix of the head's own. A head may have
several such blocks, one behind the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.axes import Buffer, declare
from dspark_jax.config import DrafterConfig
from dspark_jax.models.cache import Room, Rows, put
from dspark_jax.models.drafters.family import (
    BlockOutputs,
    Choose,
    Law,
    Lessons,
    Reads,
    only_values,
)
from dspark_jax.models.drafters.heads import DraftBlock, block_by_law, draw_slot
from dspark_jax.models.layers import add, matmul
from dspark_jax.models.stacks import Sections
from dspark_jax.models.vocab import Vocab, unembed

lessons: Lessons = "blocks"
reads: Reads = "state"


@dataclass(frozen=True)
class Config(DrafterConfig):
    """Sizes of a drafter: ``block_size`` heads of ``num_layers`` blocks; sizes of attention and
    feature layers mean nothing.

    Attributes:
        confidence: in drafts comes of their laws, without a head for it.
        biased: whether the blocks have biases.
        own_heads: whether every head has a matrix W of its own.
    """

    confidence: bool = True
    biased: bool = True
    own_heads: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        only_values(self, "a Medusa drafter", markov_rank=0, confidence=True, windows=())


@struct.dataclass
class Block:
    """Weights of a residual block; the bias may be None."""

    weight_DO: Any
    bias_O: Any


@struct.dataclass
class Head:
    """Weights of a head: its blocks, and its LM head [U, D] or None."""

    blocks: tuple[Block, ...]
    unembed_UD: Any


@struct.dataclass
class Params:
    """Weights of a drafter.

    Attributes:
        heads: of every slot.
        layers: none.
        head: None; others have such a head.
        confidence: likewise.
    """

    heads: tuple[Head, ...]
    layers: tuple[()] = ()
    head: Any = None
    confidence: Any = None


@struct.dataclass
class Context:
    """The target's state before each anchor, which gave it; L is 1."""

    hidden_LBD: Any


def of_recipe(fields: Mapping[str, Any]) -> Config:
    """The configuration of a drafter, of the fields of a ``DrafterConfig`` that mean something."""
    own = {name: fields[name] for name in ("biased", "own_heads") if name in fields}
    return Config(**fields_of_heads(fields), **own)


def fields_of_heads(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ``DrafterConfig`` that mean something without attention, among others."""
    known = {name: fields[name] for name in _MEANT if name in fields}
    return {**known, "intermediate_size": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 2}


_MEANT = (
    "vocab_size", "hidden_size", "num_layers", "block_size", "max_positions", "target_layer_ids",
    "num_target_layers", "draft_vocab_size", "owns_vocab", "embed_scale", "softcap",
)  # fmt: skip


def declare_drafter(cfg: Config) -> Params:
    """Declaration of every parameter under its name in the published layout."""
    sizes = cfg.sizes | {"O": cfg.hidden_size}

    def block(name: str) -> Block:
        bias = declare("O", sizes, f"{name}.bias", out="O", init="zeros") if cfg.biased else None
        return Block(declare("DO", sizes, f"{name}.weight", out="O", init="zeros"), bias)

    def head(slot: int) -> Head:
        blocks = (block(f"{slot}.{place}.linear") for place in range(cfg.num_layers))
        name = f"{slot}.{cfg.num_layers}.weight"
        own = declare("UD", sizes, name, init="embed") if cfg.own_heads else None
        return Head(tuple(blocks), own)

    return Params(tuple(map(head, range(cfg.block_size))))


def declare_context(cfg: Config, room: Room) -> Context:
    """Declaration of the states."""
    return Context(Buffer("LBD", (1, room.slots, cfg.hidden_size), jnp.float32))


def sections(cfg: Config) -> Sections:
    """``DrafterFamily.sections``: no layers."""
    return ()


def for_decoding(drafter: Params, *, donate: bool) -> Params:
    """``DrafterFamily.for_decoding``."""
    return drafter


def observe(
    drafter: Params,
    vocab: Vocab,
    context: Context,
    rows: Rows,
    feature_TFD: jax.Array,
    token_BS: jax.Array,
    length_B: jax.Array,
    cfg: Config,
    *,
    kernels: str = "xla",
) -> Context:
    """``DrafterFamily.observe``: keeps the last states."""
    is_last_T = rows.position_T == length_B.at[rows.slot_T].get(mode="clip") - 2
    slot_T = jnp.where(is_last_T, rows.slot_T, len(length_B))
    hidden_TD = feature_TFD[:, 0].astype(jnp.float32)
    return Context(put(context.hidden_LBD, 0, (slot_T,), hidden_TD))


def head_hidden(head: Head, hidden_XD: jax.Array) -> jax.Array:
    """What a head's matrix reads [X, D]."""
    for block in head.blocks:
        mixed_XD = add(matmul(hidden_XD, block.weight_DO), block.bias_O)
        hidden_XD = hidden_XD + jax.nn.silu(mixed_XD)
    return hidden_XD


def draft(
    drafter: Params,
    vocab: Vocab,
    context: Context,
    anchor_B: jax.Array,
    position_B: jax.Array,
    choose: Choose,
    law: Law,
    cfg: Config,
    *,
    kernels: str,
) -> DraftBlock:
    """``DrafterFamily.draft``."""
    dtype = drafter.heads[0].blocks[0].weight_DO.dtype
    hidden_BD = context.hidden_LBD[0].astype(dtype)

    def logits(head: Head) -> jax.Array:
        own = vocab
        if head.unembed_UD is not None:
            own = vocab.replace(unembed_VD=head.unembed_UD, outputs_DV=None)  # type: ignore[attr-defined]
        return unembed(own, head_hidden(head, hidden_BD))

    each = enumerate(map(logits, drafter.heads))
    drawn = [draw_slot(vocab, logits_BU, slot, choose, law) for slot, logits_BU in each]
    return block_by_law(drawn)


def train_blocks(
    drafter: Params,
    vocab: Vocab,
    feature_BSFD: jax.Array,
    token_BS: jax.Array,
    previous_BAG: jax.Array,
    anchor_BA: jax.Array,
    keep_BA: jax.Array,
    cfg: Config,
    *,
    kernels: str,
) -> BlockOutputs:
    """``DrafterFamily.train_blocks``.

    Raises:
        ValueError: the heads have matrices of their own, which are not trained.
    """
    if cfg.own_heads:
        raise ValueError(
            "Medusa heads with matrices of their own are neither trained nor exported: train "
            "others on the target's LM head"
        )
    hidden_BAD = states_before(feature_BSFD, anchor_BA).astype(
        drafter.heads[0].blocks[0].weight_DO.dtype
    )
    hidden = [head_hidden(head, hidden_BAD) for head in drafter.heads]
    return BlockOutputs(jnp.stack(hidden, axis=2), None, None)


def states_before(feature_BSFD: jax.Array, anchor_BA: jax.Array) -> jax.Array:
    """The target's states [B, A, D] that gave the anchors."""
    before_BA = jnp.maximum(anchor_BA - 1, 0)
    return jax.vmap(lambda x_SD, place_A: x_SD[place_A])(feature_BSFD[:, :, 0], before_BA)
