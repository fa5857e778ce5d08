"""DSpark with prompt lookup: where the text repeats itself, what followed is drafted instead.

Both drafters see every text. A request whose last tokens stand earlier in its text, at least
``least_match`` of them, gets the drafts of :mod:`.lookup`; all others those of :mod:`.dspark`. The
choice is by the committed text alone, so the law of every draft is known before it is made:
DSpark's own, or all mass on one token. With it the draft is verified like any other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.config import DrafterConfig
from dspark_jax.models.cache import Room, Rows
from dspark_jax.models.drafters import dspark, lookup
from dspark_jax.models.drafters.family import Choose, Law, Lessons, Reads
from dspark_jax.models.drafters.heads import DraftBlock
from dspark_jax.models.stacks import Sections
from dspark_jax.models.vocab import Vocab
from pallas_kernels.accept_block.rule import OneHot

lessons: Lessons = "blocks"
reads: Reads = "streams"
train_blocks = None  # the drafter beside it is trained by itself

LEAST_MATCH = 4  # tokens: with fewer, what DSpark makes of the text is the better guess


@dataclass(frozen=True)
class Config:
    """Sizes of both.

    Attributes:
        dspark: of the drafter that is trained.
        lookup: of the other one, whose blocks are as long.
        least_match: tokens of a match from which on it drafts.
    """

    dspark: DrafterConfig
    lookup: lookup.Config
    least_match: int = LEAST_MATCH

    @property
    def block_size(self) -> int:
        """Most drafts of a round."""
        return self.dspark.block_size

    @property
    def confidence(self) -> bool:
        """Whether drafts come with a confidence in each."""
        return self.dspark.confidence

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        """Feature layers."""
        return self.dspark.target_layer_ids

    @property
    def sizes(self) -> dict[str, int]:
        """Axis letter -> size."""
        return self.dspark.sizes


@struct.dataclass
class Weights:
    """Those of the drafter that has any."""

    dspark: Any

    @property
    def layers(self) -> Any:
        """Its layers."""
        return self.dspark.layers

    @property
    def norm_D(self) -> Any:
        """Its final norm."""
        return self.dspark.norm_D


@struct.dataclass
class Context:
    """Of both."""

    dspark: Any
    lookup: lookup.Context


def with_lookup(cfg: DrafterConfig, params: Any, other: lookup.Config) -> tuple[Config, Weights]:
    """A DSpark drafter with lookup beside it.

    Raises:
        ValueError: it is another drafter.
    """
    if type(cfg) is not DrafterConfig:
        raise ValueError("lookup goes with DSpark and DFlash drafters: name one of these before +")
    return Config(cfg, replace(other, block_size=cfg.block_size)), Weights(params)


def declare_drafter(cfg: Config) -> Weights:
    """``DrafterFamily.declare_drafter``."""
    return Weights(dspark.declare_drafter(cfg.dspark))


def declare_context(cfg: Config, room: Room) -> Context:
    """``DrafterFamily.declare_context``."""
    return Context(
        dspark.declare_context(cfg.dspark, room), lookup.declare_context(cfg.lookup, room)
    )


def sections(cfg: Config) -> Sections:
    """``DrafterFamily.sections``."""
    return dspark.sections(cfg.dspark)


def for_decoding(drafter: Weights, *, donate: bool) -> Weights:
    """``DrafterFamily.for_decoding``."""
    return Weights(dspark.for_decoding(drafter.dspark, donate=donate))


def observe(
    drafter: Weights,
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
    """``DrafterFamily.observe``."""
    read = rows, feature_TFD, token_BS, length_B
    return Context(
        dspark.observe(drafter.dspark, vocab, context.dspark, *read, cfg.dspark, kernels=kernels),
        lookup.observe(lookup.NoWeights(), vocab, context.lookup, *read, cfg.lookup),
    )


def draft(
    drafter: Weights,
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
    given = anchor_B, position_B, choose, law
    own = dspark.draft(drafter.dspark, vocab, context.dspark, *given, cfg.dspark, kernels=kernels)
    other = lookup.draft(
        lookup.NoWeights(), vocab, context.lookup, *given, cfg.lookup, kernels=kernels
    )
    index_BG, count_B = places(other, vocab)
    found_B = (context.lookup.match_B >= cfg.least_match) & (count_B > 0)

    def pick(theirs: jax.Array, ours: jax.Array) -> jax.Array:
        return jnp.where(found_B.reshape(-1, *(1,) * (ours.ndim - 1)), theirs, ours)

    assert not isinstance(own.logits_BGU, OneHot)
    certain_BGU = index_BG[..., None] == jnp.arange(own.logits_BGU.shape[-1])
    confidence_BG = own.confidence_logit_BG
    if confidence_BG is not None:
        confidence_BG = pick(other.confidence_logit_BG, confidence_BG)
    return DraftBlock(
        token_BG=pick(other.token_BG, own.token_BG),
        index_BG=pick(index_BG, own.index_BG),
        logits_BGU=pick(jnp.where(certain_BGU, 0, -jnp.inf), own.logits_BGU),
        confidence_logit_BG=confidence_BG,
        count_B=pick(count_B, jnp.full_like(count_B, cfg.block_size)),
    )


def places(block: DraftBlock, vocab: Vocab) -> tuple[jax.Array, jax.Array]:
    """Places of the tokens of lookup in a draft vocabulary, int32 [B, G], and how many drafts there
    are before the first that has none, int32 [B]."""
    if vocab.d2t_U is None:
        return block.index_BG, block.count_B
    same_BGU = block.token_BG[..., None] == vocab.d2t_U
    known_BG = jnp.cumprod(jnp.any(same_BGU, axis=-1).astype(jnp.int32), axis=1)
    count_B = jnp.minimum(block.count_B, jnp.sum(known_BG, axis=1, dtype=jnp.int32))
    return jnp.argmax(same_BGU, axis=-1).astype(jnp.int32), count_B
