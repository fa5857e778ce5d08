"""Prompt lookup: a drafter without a model (Saxena 2023).

What followed the last tokens earlier in the text is drafted. Of the lengths ``ngram_min`` to
``ngram_max`` the longest counts that occurs earlier, and of its occurrences the first; a block ends
with the text. As published, it is 1 to 3 tokens; in transformers 1 to 2, in vLLM usually 2 to 4.

The index of each length is a hash table of the places where n-grams were first seen. A place says
nothing by itself: what counts is the text at it, of the request that has the slot now. So nothing
has to be taken out, and a round costs the same however long the text is.

A draft's law is one-hot, and with it every committed token tells whether its draft would have
stood, verified or not, up to the first that would not: nobody knows about those behind. The share
of drafts that stood, by the length of the match up to them and by how the last match fared, is the
confidence in the next ones: a function of the committed text alone, never of the draft that it is
about. Matches that hardly promise anything are not offered.

Other axes: J places of a window, I tokens of an n-gram, X places of an index, or kinds of drafts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.axes import Buffer
from dspark_jax.config import TargetConfig
from dspark_jax.models.cache import Room, Rows
from dspark_jax.models.drafters.family import Choose, Law, Lessons, Reads
from dspark_jax.models.drafters.heads import DraftBlock
from dspark_jax.models.stacks import Sections
from dspark_jax.models.vocab import Vocab
from pallas_kernels.accept_block.rule import ONE_HOT

lessons: Lessons = "blocks"
reads: Reads = "streams"
train_blocks = None  # there is nothing to train

NAME = re.compile(r"lookup(?::(\d+)-(\d+))?", re.ASCII)
LONGEST = 16  # n-gram that may be asked for

WINDOW = 8  # places that an n-gram may take: a quarter of all are taken at most
ATTEMPTS = 4  # n-grams of a round that want the same place try another one
EMPTY = jnp.iinfo(jnp.int32).max

MOST = 12  # tokens of a match that are told apart
PRIOR = 4.0  # drafts that every kind of draft is credited with at first
LEAST = 0.3  # confidence in the first draft: less does not pay for reading the block
ABSENT = -1e4  # logit of the confidence in a draft that there is not


@dataclass(frozen=True)
class Config:
    """Sizes of lookup.

    Attributes:
        vocab_size: of the target.
        max_positions: likewise.
        block_size: most drafts of a round.
        ngram_min: tokens that have to match, at least.
        ngram_max: at most.
        confidence: whether drafts come with one, as always here.
        target_layer_ids: features that are read: none.
    """

    vocab_size: int
    max_positions: int
    block_size: int = 10
    ngram_min: int = 2
    ngram_max: int = 4
    confidence: bool = True
    target_layer_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.ngram_min <= self.ngram_max <= LONGEST:
            raise ValueError(
                f"lookup matches {self.ngram_min} to {self.ngram_max} tokens: give lengths from 1 "
                f"to {LONGEST}, the shorter one first"
            )

    @property
    def lengths(self) -> range:
        """Of n-grams."""
        return range(self.ngram_min, self.ngram_max + 1)

    @property
    def num_slots(self) -> int:
        """Slots of a block."""
        return self.block_size

    @property
    def sizes(self) -> dict[str, int]:
        """Axis letter -> size."""
        return {"V": self.vocab_size, "U": self.vocab_size}


@struct.dataclass
class NoWeights:
    """In the place of weights."""

    layers: tuple[()] = ()


@struct.dataclass
class Context:
    """What is known of the text of every slot, and what it drafts next.

    Attributes:
        first_BX: for each length of n-grams, int32 places of the last tokens of those seen first.
        token_BG: int32 drafts behind the last committed token.
        count_B: int32 how many there are.
        position_B: int32 position of that last committed token.
        match_B: int32 tokens of the match.
        held_B: int32, 1 where the first draft of the last match stood, else 0.
        stood_BX: float32 drafts of each kind that stood.
        decided_BX: those that were decided about.
    """

    first_BX: Any
    token_BG: Any
    count_B: Any
    position_B: Any
    match_B: Any
    held_B: Any
    stood_BX: Any
    decided_BX: Any


def named(source: str, target: TargetConfig) -> Config | None:
    """The configuration that ``lookup`` or ``lookup:MIN-MAX`` names; None for other names.

    Raises:
        ValueError: the lengths make no sense.
    """
    found = NAME.fullmatch(source)
    if found is None:
        return None
    cfg = Config(target.vocab_size, target.max_positions)
    if found[1] is None:
        return cfg
    return replace(cfg, ngram_min=int(found[1]), ngram_max=int(found[2]))


def declare_drafter(cfg: Config) -> NoWeights:
    """``DrafterFamily.declare_drafter``: nothing is trained."""
    return NoWeights()


def declare_context(cfg: Config, room: Room) -> Context:
    """``DrafterFamily.declare_context``. An index is as large as the target's longest text asks
    for, so that it stays where it is when a text grows: a few positions' worth of keys and values.
    """

    def numbers(dtype: Any, axes: str = "B", *sizes: int) -> Any:
        return Buffer(axes, (room.slots, *sizes), dtype, follows=True)

    num_places = 4 << (cfg.max_positions - 1).bit_length()
    index = Buffer("BX", (room.slots, num_places), jnp.int32, EMPTY, follows=True)
    return Context(
        first_BX=(index,) * len(cfg.lengths),
        token_BG=numbers(jnp.int32, "BG", cfg.block_size),
        count_B=numbers(jnp.int32),
        position_B=numbers(jnp.int32),
        match_B=numbers(jnp.int32),
        held_B=numbers(jnp.int32),
        stood_BX=numbers(jnp.float32, "BX", 2 * MOST),
        decided_BX=numbers(jnp.float32, "BX", 2 * MOST),
    )


def sections(cfg: Config) -> Sections:
    """``DrafterFamily.sections``: no layers."""
    return ()


def for_decoding(drafter: NoWeights, *, donate: bool) -> NoWeights:
    """``DrafterFamily.for_decoding``."""
    return drafter


def observe(
    drafter: NoWeights,
    vocab: Vocab,
    context: Context,
    rows: Rows,
    feature_TFD: Any,
    token_BS: jax.Array,
    length_B: jax.Array,
    cfg: Config,
    *,
    kernels: str = "xla",
) -> Context:
    """``DrafterFamily.observe``: learns from the new tokens, and looks the next drafts up."""
    num_slots = length_B.shape[0]
    began_B = jnp.zeros(num_slots, bool)
    began_B = began_B.at[rows.slot_T].max(rows.position_T == 0, mode="drop")
    context = learn(forget(context, began_B), token_BS, length_B)
    first_BX = tuple(
        enter(table_BX, rows, token_BS, length_B, n)
        for n, table_BX in zip(cfg.lengths, context.first_BX, strict=True)
    )
    place_B = find(first_BX, token_BS, length_B, cfg)
    position_B = length_B - 1
    found_B = place_B < position_B
    count_B = jnp.where(found_B, jnp.minimum(cfg.block_size, position_B - place_B), 0)
    slot_G = jnp.arange(cfg.block_size, dtype=jnp.int32)
    return context.replace(  # type: ignore[attr-defined]
        first_BX=first_BX,
        token_BG=_tokens(token_BS, jnp.arange(num_slots), place_B[:, None] + 1 + slot_G),
        count_B=count_B,
        position_B=position_B,
        match_B=jnp.where(found_B, match_length(token_BS, place_B, position_B), 0),
    )


def draft(
    drafter: NoWeights,
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
    """``DrafterFamily.draft``: what :func:`observe` has looked up."""
    confidence_BG = confidence(context)
    slot_G = jnp.arange(cfg.block_size)
    offered_BG = (slot_G < context.count_B[:, None]) & (confidence_BG[:, :1] >= LEAST)
    logit_BG = jnp.log(confidence_BG) - jnp.log1p(-confidence_BG)
    return DraftBlock(
        token_BG=context.token_BG,
        index_BG=context.token_BG,
        logits_BGU=ONE_HOT,
        confidence_logit_BG=jnp.where(offered_BG, logit_BG, ABSENT),
        count_B=jnp.sum(offered_BG, axis=1, dtype=jnp.int32),
    )


# The index.


def enter(
    table_BX: jax.Array, rows: Rows, token_BS: jax.Array, length_B: jax.Array, n: int
) -> jax.Array:
    """The index of n-grams with those that end at the rows, each at its first place.

    Args:
        table_BX: int32 places.
        rows: those at the last committed token and behind it are left out.
        token_BS: int32 committed tokens.
        length_B: int32 how many.
        n: length.
    """
    num_slots = length_B.shape[0]
    slot_T = jnp.minimum(rows.slot_T, num_slots - 1)
    position_T = rows.position_T
    wanted_T = (rows.slot_T < num_slots) & (position_T >= n - 1)
    wanted_T &= position_T < length_B[slot_T] - 1

    def attempt(_: int, table_BX: jax.Array) -> jax.Array:
        cell_TJ, same_TJ, free_TJ = _look(table_BX, slot_T, position_T, token_BS, length_B, n)[1:]
        known_T = jnp.any(same_TJ, axis=1)
        fits_TJ = jnp.where(known_T[:, None], same_TJ, free_TJ)
        cell_T = jnp.take_along_axis(cell_TJ, jnp.argmax(fits_TJ, axis=1)[:, None], axis=1)[:, 0]
        takes_T = wanted_T & jnp.any(fits_TJ, axis=1)
        row_T = jnp.where(takes_T & ~known_T, slot_T, num_slots)
        table_BX = table_BX.at[row_T, cell_T].set(EMPTY, mode="drop")
        row_T = jnp.where(takes_T, slot_T, num_slots)
        return table_BX.at[row_T, cell_T].min(position_T, mode="drop")

    # A loop of a fixed length, which is compiled once.
    entered_BX: jax.Array = jax.lax.fori_loop(0, ATTEMPTS, attempt, table_BX)
    return entered_BX


def find(
    first_BX: tuple[jax.Array, ...], token_BS: jax.Array, length_B: jax.Array, cfg: Config
) -> jax.Array:
    """int32 [B]: where the longest n-gram at the end of each text stands first, by the place of its
    last token; ``EMPTY`` where none stands earlier."""
    slot_B, position_B = jnp.arange(length_B.shape[0]), length_B - 1
    place_B = jnp.full_like(length_B, EMPTY)
    for n, table_BX in zip(cfg.lengths, first_BX, strict=True):
        entry_BJ, _, same_BJ, _ = _look(table_BX, slot_B, position_B, token_BS, length_B, n)
        own_B = jnp.min(jnp.where(same_BJ, entry_BJ, EMPTY), axis=1)
        place_B = jnp.where((own_B < position_B) & (position_B >= n - 1), own_B, place_B)
    return place_B


def _look(
    table_BX: jax.Array,
    slot_Y: jax.Array,
    position_Y: jax.Array,
    token_BS: jax.Array,
    length_B: jax.Array,
    n: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The window of the n-grams that end at some positions of some slots.

    Returns:
        The entries int32 [Y, J] and their cells; whether an entry is of the same n-gram; and
        whether it is of none that could have entered it.
    """
    mask, window_J = table_BX.shape[1] - 1, jnp.arange(WINDOW, dtype=jnp.int32)
    back_I = jnp.arange(n, dtype=jnp.int32) - (n - 1)
    gram_YI = _tokens(token_BS, slot_Y, position_Y[:, None] + back_I)
    cell_YJ = (_home(gram_YI)[:, None] + window_J) & mask
    entry_YJ = table_BX[slot_Y[:, None], cell_YJ]
    there_YJI = _tokens(token_BS, slot_Y, entry_YJ[..., None] + back_I)
    inside_YJ = (entry_YJ >= n - 1) & (entry_YJ < length_B[slot_Y][:, None] - 1)
    same_YJ = inside_YJ & jnp.all(there_YJI == gram_YI[:, None], axis=-1)
    away_YJ = (cell_YJ - _home(there_YJI)) & mask
    return entry_YJ, cell_YJ, same_YJ, ~(inside_YJ & (away_YJ < WINDOW))


def _tokens(token_BS: jax.Array, slot_Y: jax.Array, position_YX: jax.Array) -> jax.Array:
    """Tokens at some positions of some slots; those outside are any."""
    slot_YX = slot_Y.reshape(slot_Y.shape + (1,) * (position_YX.ndim - 1))
    last = token_BS.shape[1] - 1
    return token_BS[slot_YX, jnp.clip(position_YX, 0, last)]


def _home(gram_XI: jax.Array) -> jax.Array:
    """int32 [X] hash of n-grams, not yet cut to the size of an index."""
    mixed_X = jnp.zeros(gram_XI.shape[:-1], jnp.uint32)
    for token_X in jnp.moveaxis(gram_XI.astype(jnp.uint32), -1, 0):
        mixed_X = (mixed_X ^ token_X) * jnp.uint32(0x9E3779B1)
        mixed_X ^= mixed_X >> 15
    return (mixed_X & jnp.uint32(0x7FFFFFFF)).astype(jnp.int32)


def match_length(token_BS: jax.Array, place_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """int32 [B]: how many tokens up to both positions are the same, at most ``MOST``."""
    back_X, slot_B = jnp.arange(MOST, dtype=jnp.int32), jnp.arange(token_BS.shape[0])
    there_BX, here_BX = place_B[:, None] - back_X, position_B[:, None] - back_X
    same_BX = _tokens(token_BS, slot_B, there_BX) == _tokens(token_BS, slot_B, here_BX)
    same_BX &= there_BX >= 0
    return jnp.sum(jnp.cumprod(same_BX.astype(jnp.int32), axis=1), axis=1)


# Confidence.


def learn(context: Context, token_BS: jax.Array, length_B: jax.Array) -> Context:
    """The context that has seen what became of its drafts.

    Args:
        context: of the round before.
        token_BS: int32 committed tokens of now.
        length_B: int32 how many.
    """
    block_size = context.token_BG.shape[1]
    slot_G = jnp.arange(block_size, dtype=jnp.int32)
    position_BG = context.position_B[:, None] + 1 + slot_G
    token_BG = _tokens(token_BS, jnp.arange(length_B.shape[0]), position_BG)
    stood_BG = jnp.cumprod((token_BG == context.token_BG).astype(jnp.int32), axis=1)
    before_BG = jnp.pad(stood_BG, ((0, 0), (1, 0)), constant_values=1)[:, :-1] > 0
    known_BG = (slot_G < context.count_B[:, None]) & (position_BG < length_B[:, None])
    decided_BG = known_BG & before_BG
    kind_BGX = kinds(context)[..., None] == jnp.arange(2 * MOST)
    stood_BGX = kind_BGX & (decided_BG & (stood_BG > 0))[..., None]
    return context.replace(  # type: ignore[attr-defined]
        stood_BX=context.stood_BX + jnp.sum(stood_BGX, axis=1),
        decided_BX=context.decided_BX + jnp.sum(kind_BGX & decided_BG[..., None], axis=1),
        held_B=jnp.where(decided_BG[:, 0], stood_BG[:, 0], context.held_B),
    )


def kinds(context: Context) -> jax.Array:
    """int32 [B, G]: which drafts are alike: those behind equally long matches, their own block's
    drafts before them included, after a match that held or one that did not."""
    slot_G = jnp.arange(context.token_BG.shape[1], dtype=jnp.int32)
    match_BG = jnp.clip(context.match_B[:, None] + slot_G, 1, MOST)
    return context.held_B[:, None] * MOST + match_BG - 1


def confidence(context: Context) -> jax.Array:
    """float32 [B, G]: share of the drafts of the same kind that stood. At first it is that of a
    match of m tokens in most texts, m / (m + 2)."""
    match_X = 1.0 + jnp.arange(2 * MOST) % MOST
    credit_X = PRIOR * match_X / (match_X + 2)
    share_BX = (context.stood_BX + credit_X) / (context.decided_BX + PRIOR)
    return jnp.take_along_axis(share_BX, kinds(context), axis=1)


def forget(context: Context, began_B: jax.Array) -> Context:
    """The context without what is known of slots whose text begins."""

    def clear(x_BX: jax.Array) -> jax.Array:
        return jnp.where(began_B.reshape(-1, *(1,) * (x_BX.ndim - 1)), 0, x_BX)

    names = "count_B", "held_B", "stood_BX", "decided_BX"
    return context.replace(**{name: clear(getattr(context, name)) for name in names})  # type: ignore[attr-defined]
