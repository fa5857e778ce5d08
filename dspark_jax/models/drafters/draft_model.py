"""A smaller model with the same tokens as drafter (arXiv 2211.17192, 2302.01318).

It drafts one token after the other, each from its own distribution behind all that is committed.
Its cache follows the target's: it reads every row that the target reads, accepted or not, so that
both are valid up to the same length, a block that was accepted whole included. What it reads while
it drafts stays in the round.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.config import TargetConfig
from dspark_jax.models.cache import Room, Rows
from dspark_jax.models.drafters.family import Choose, Law, Lessons, Reads
from dspark_jax.models.drafters.heads import DraftBlock, Drawn, block_by_law, draw_slot
from dspark_jax.models.merged import single_layers
from dspark_jax.models.stacks import Sections
from dspark_jax.models.targets.family import TargetParams
from dspark_jax.models.targets.table import family_of
from dspark_jax.models.vocab import Vocab, unembed

lessons: Lessons = "chains"
reads: Reads = "streams"
train_blocks = None  # it is trained as a model of its own
CHAIN = 4  # drafts of a round


@dataclass(frozen=True)
class Config:
    """Sizes of a draft model.

    Attributes:
        model: of the model itself.
        vocab_size: of the target.
        block_size: most drafts of a round.
        confidence: in drafts comes of their laws.
        target_layer_ids: features that are read: none.
    """

    model: TargetConfig
    vocab_size: int
    block_size: int = CHAIN
    confidence: bool = True
    target_layer_ids: tuple[int, ...] = ()

    @property
    def num_slots(self) -> int:
        """Slots of a block."""
        return self.block_size

    @property
    def sizes(self) -> dict[str, int]:
        """Axis letter -> size."""
        common = min(self.vocab_size, self.model.vocab_size)
        return {"V": self.vocab_size, "U": common}


def common_vocab(cfg: Config, own: Vocab) -> Vocab:
    """The vocabulary that a draft model draws from: the ids that the target has too.

    Args:
        cfg: sizes.
        own: embedding and LM head of the draft model.
    """
    size = cfg.sizes["U"]
    if size == cfg.vocab_size == cfg.model.vocab_size:
        return own
    head_VD = own.embed_VD if own.unembed_VD is None else own.unembed_VD
    d2t_U = None if size == cfg.vocab_size else jnp.arange(size, dtype=jnp.int32)
    return replace(own, unembed_VD=head_VD[:size], d2t_U=d2t_U)


def declare_drafter(cfg: Config) -> TargetParams:
    """Declaration of every parameter, as of a target."""
    return family_of(cfg.model).declare(cfg.model)


def declare_context(cfg: Config, room: Room) -> Any:
    """Declaration of its cache."""
    return family_of(cfg.model).declare_cache(cfg.model, room)


def sections(cfg: Config) -> Sections:
    """The layers by their kinds."""
    return family_of(cfg.model).sections(cfg.model)


def for_decoding(drafter: TargetParams, *, donate: bool) -> TargetParams:
    """``DrafterFamily.for_decoding``."""
    layers = tuple(single_layers(stack, donate=donate) for stack in drafter.layers)
    return replace(drafter, layers=layers)


def observe(
    drafter: TargetParams,
    vocab: Vocab,
    context: Any,
    rows: Rows,
    feature_TFD: jax.Array,
    token_BS: jax.Array,
    length_B: jax.Array,
    cfg: Config,
    *,
    kernels: str = "xla",
) -> Any:
    """``DrafterFamily.observe``: reads what the target has read."""
    chunks, num_rows = None, len(rows.slot_T)
    if rows.runs is not None:
        num_rows -= rows.runs[0] * rows.runs[1]
        chunks = jax.tree.map(lambda x_T: x_T[num_rows:].reshape(rows.runs), rows)
    first = jax.tree.map(lambda x_T: x_T[:num_rows], rows)
    most = num_rows if rows.most is None else min(rows.most, num_rows)
    given = drafter, context, first, cfg.model
    return family_of(cfg.model).extend(
        *given, (), rows_per_slot=most, chunks=chunks, kernels=kernels
    )[2]


def draft(
    drafter: TargetParams,
    vocab: Vocab,
    context: Any,
    anchor_B: jax.Array,
    position_B: jax.Array,
    choose: Choose,
    law: Law,
    cfg: Config,
    *,
    kernels: str,
) -> DraftBlock:
    """``DrafterFamily.draft``."""
    drawn: list[Drawn] = []
    token_B, slot_B = anchor_B, jnp.arange(len(anchor_B), dtype=jnp.int32)
    for slot in range(cfg.block_size):
        rows = Rows(token_B, slot_B, position_B + slot)
        hidden_BD, _, context = family_of(cfg.model).extend(
            drafter, context, rows, cfg.model, (), rows_per_slot=1, kernels=kernels
        )
        drawn.append(draw_slot(vocab, unembed(vocab, hidden_BD), slot, choose, law))
        token_B = drawn[-1][0]
    return block_by_law(drawn)
