"""Blockwise parallel decoding: one wide layer on the target's last state guesses the tokens ahead
(Stern et al., arXiv 1811.03115).

    [u_1 ; .. ; u_K] = relu(h A + a) P + p          hidden_k = h + u_k,     k = 1 .. K

The hidden layer is K times as wide as h. Each hidden_k goes through the target's own LM head. Their
first head, the next token, is the target itself; the state h is the one that gave the anchor, as
for :mod:`.medusa`, so that no slot knows the anchor or another draft.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.axes import declare
from dspark_jax.config import DrafterConfig
from dspark_jax.models.drafters.family import (
    BlockOutputs,
    Choose,
    Law,
    Lessons,
    Reads,
    only_values,
)
from dspark_jax.models.drafters.heads import DraftBlock, block_by_law, draw_slot
from dspark_jax.models.drafters.medusa import Context, fields_of_heads, states_before
from dspark_jax.models.drafters.medusa import declare_context as declare_context
from dspark_jax.models.drafters.medusa import for_decoding as for_decoding
from dspark_jax.models.drafters.medusa import observe as observe
from dspark_jax.models.drafters.medusa import sections as sections
from dspark_jax.models.layers import matmul
from dspark_jax.models.vocab import Vocab, unembed

lessons: Lessons = "blocks"
reads: Reads = "state"


@dataclass(frozen=True)
class Config(DrafterConfig):
    """Sizes of a drafter of ``block_size`` slots; sizes of attention and feature layers mean
    nothing.

    Attributes:
        confidence: in drafts comes of their laws, without a head for it.
    """

    confidence: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        right: dict[str, Any] = {"num_layers": 1, "markov_rank": 0, "windows": ()}
        only_values(self, "a blockwise drafter", **right, confidence=True)

    @property
    def sizes(self) -> dict[str, int]:
        """Axis letter -> size; M and O are those of the layer."""
        wide = self.block_size * self.hidden_size
        return super().sizes | {"M": wide, "O": wide}


@struct.dataclass
class Params:
    """Weights of a drafter.

    Attributes:
        input_DM: A.
        input_bias_M: a.
        output_MO: P, all slots side by side.
        output_bias_O: p, likewise.
        layers: none.
        head: None; others have a sequential one.
        confidence: None, likewise.
    """

    input_DM: Any
    input_bias_M: Any
    output_MO: Any
    output_bias_O: Any
    layers: tuple[()] = ()
    head: Any = None
    confidence: Any = None


def of_recipe(fields: Mapping[str, Any]) -> Config:
    """The configuration of a drafter, of the fields of a ``DrafterConfig`` that mean something."""
    return Config(**fields_of_heads(fields))


def declare_drafter(cfg: Config) -> Params:
    """Declaration of every parameter; P begins as zeros, so that every slot does as the target."""
    sizes = cfg.sizes
    return Params(
        input_DM=declare("DM", sizes, "input.weight", out="M"),
        input_bias_M=declare("M", sizes, "input.bias", out="M", init="zeros"),
        output_MO=declare("MO", sizes, "output.weight", out="O", init="zeros"),
        output_bias_O=declare("O", sizes, "output.bias", out="O", init="zeros"),
    )


def slot_hidden(drafter: Params, hidden_XD: jax.Array, cfg: Config) -> jax.Array:
    """What the LM head reads of all slots [X, G, D]."""
    hidden_XD = hidden_XD.astype(drafter.input_DM.dtype)
    z_XM = jax.nn.relu(matmul(hidden_XD, drafter.input_DM) + drafter.input_bias_M)
    u_XO = matmul(z_XM, drafter.output_MO) + drafter.output_bias_O
    return hidden_XD[..., None, :] + u_XO.reshape(*u_XO.shape[:-1], cfg.block_size, -1)


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
    logits_BGU = unembed(vocab, slot_hidden(drafter, context.hidden_LBD[0], cfg))
    each = enumerate(jnp.moveaxis(logits_BGU, 1, 0))
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
    """``DrafterFamily.train_blocks``."""
    hidden_BAD = states_before(feature_BSFD, anchor_BA)
    return BlockOutputs(slot_hidden(drafter, hidden_BAD, cfg), None, None)
