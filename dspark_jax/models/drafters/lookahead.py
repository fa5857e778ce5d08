"""Lookahead decoding: the target itself guesses n-grams, by Jacobi iteration beside the decoding
(Fu et al., arXiv 2402.02057).

A window of N - 1 levels of W columns lies ahead of the text. The token at level l, column i stands
at position a + i + l, a being that of the anchor, which is level 0, column 0. It sees the text up
to the anchor, level 0 up to its own column, and in its column the levels 1 to l. In the pass that
verifies drafts the target reads the window, too: what it predicts behind the last level completes
an n-gram of every column. Then the oldest level goes and the predictions are the newest; the window
moves by a column a round. The extra (N - 1) W - 1 rows are the price of the method.

A pool holds the latest n-gram that began with a token, and the one that begins with the anchor is
drafted: one chain a round, so that of the several that the authors keep for a token all but the
latest would never be read. A draft's law is one-hot, and the confidence in it is learnt as
:mod:`.lookup` does, by its place in the block. Nothing is trained, and every text fills a pool of
its own: the most likely tokens at any temperature, from a window that begins with random tokens of
the prompt.

Axes beside the legend's: I levels of the window, W its columns, X places of the pool.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.axes import Buffer
from dspark_jax.config import TargetConfig
from dspark_jax.models.cache import Beside, Room, Rows
from dspark_jax.models.drafters import lookup
from dspark_jax.models.drafters.family import Choose, Law, Lessons, Reads
from dspark_jax.models.drafters.heads import DraftBlock
from dspark_jax.models.drafters.lookup import NoWeights
from dspark_jax.models.drafters.lookup import for_decoding as for_decoding
from dspark_jax.models.drafters.lookup import sections as sections
from dspark_jax.models.targets.table import family_of
from dspark_jax.models.vocab import Vocab, unembed

lessons: Lessons = "blocks"
reads: Reads = "state"
train_blocks = None  # there is nothing to train

NAME = re.compile(r"lookahead(?::(\d{1,3})-(\d{1,3}))?", re.ASCII)
LENGTHS, COLUMNS = range(3, 17), range(1, 65)
PLACES = 4096  # of the pool: a token's is its id modulo them
NOBODY = -1
_STEP = 40503  # odd, so that numbers times it differ modulo a power of two


@dataclass(frozen=True)
class Config:
    """Sizes of lookahead; by default those of the authors' example.

    Attributes:
        vocab_size: of the target.
        max_positions: of the target.
        length: N, tokens of an n-gram.
        columns: W, of the window.
        confidence: whether drafts come with one, as always here.
        target_layer_ids: features that are read: none.
    """

    vocab_size: int
    max_positions: int
    length: int = 5
    columns: int = 7
    confidence: bool = True
    target_layer_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.length not in LENGTHS or self.columns not in COLUMNS:
            raise ValueError(
                f"lookahead has n-grams of {self.length} tokens and {self.columns} columns: give "
                f"{LENGTHS[0]} to {LENGTHS[-1]} tokens and {COLUMNS[0]} to {COLUMNS[-1]} columns"
            )

    @property
    def block_size(self) -> int:
        """Most drafts of a round."""
        return self.length - 1

    @property
    def num_slots(self) -> int:
        """Slots of a block."""
        return self.block_size

    @property
    def levels(self) -> int:
        """Of the window."""
        return self.length - 1

    @property
    def rows_beside(self) -> int:
        """Rows that the target reads beside the anchor and its drafts."""
        return self.levels * self.columns - 1

    @property
    def guesses(self) -> lookup.Config:
        """Sizes of what is known of the drafts."""
        return lookup.Config(self.vocab_size, self.max_positions, self.block_size)

    @property
    def sizes(self) -> dict[str, int]:
        """Axis letter -> size."""
        return {"V": self.vocab_size, "U": self.vocab_size}


@struct.dataclass
class Context:
    """What is known of every slot.

    Attributes:
        guess: its drafts, and how those before them fared; without an index.
        window_BIW: int32 tokens; the place of the anchor means nothing.
        age_B: int32 rounds that the window has seen: in the first of them it is not the target's.
        key_BX: int32 first tokens of the n-grams in the pool; ``NOBODY`` for none.
        tail_BXI: int32 what followed.
    """

    guess: lookup.Context
    window_BIW: Any
    age_B: Any
    key_BX: Any
    tail_BXI: Any


def named(source: str, target: TargetConfig) -> Config | None:
    """The configuration that ``lookahead`` or ``lookahead:N-W`` names; None for other names.

    Raises:
        ValueError: the numbers make no sense, or the target cannot read such a window.
    """
    found = NAME.fullmatch(source)
    if found is None:
        return None
    if family_of(target).beside is None:
        raise ValueError(f"{source}: such a target reads no rows beside a text, name another one")
    numbers = () if found[1] is None else (int(found[1]), int(found[2]))
    return Config(target.vocab_size, target.max_positions, *numbers)


def declare_drafter(cfg: Config) -> NoWeights:
    """``DrafterFamily.declare_drafter``: nothing is trained."""
    return NoWeights()


def declare_context(cfg: Config, room: Room) -> Context:
    """``DrafterFamily.declare_context``. A text that is restored begins with a new window."""

    def numbers(axes: str, *sizes: int, fill: int = 0) -> Buffer:
        return Buffer(axes, (room.slots, *sizes), jnp.int32, fill, follows=True)

    guess = lookup.declare_context(cfg.guesses, room)
    return Context(
        guess=guess.replace(first_BX=()),  # type: ignore[attr-defined]
        window_BIW=numbers("BIW", cfg.levels, cfg.columns),
        age_B=numbers("B"),
        key_BX=numbers("BX", PLACES, fill=NOBODY),
        tail_BXI=numbers("BXI", PLACES, cfg.length - 1),
    )


def window(context: Context, position_B: jax.Array, cfg: Config) -> Beside:
    """The window as rows that see the text up to the anchor, and each other, but for the anchor,
    which is there already.

    Args:
        context: of the slots.
        position_B: int32 positions of the anchors.
        cfg: sizes.
    """
    level_IW, column_IW = jnp.indices((cfg.levels, cfg.columns), dtype=jnp.int32)
    level_R, column_R = level_IW.reshape(-1)[1:], column_IW.reshape(-1)[1:]
    first_RR = (level_R == 0) & (column_R <= column_R[:, None])
    own_RR = (level_R > 0) & (level_R <= level_R[:, None]) & (column_R == column_R[:, None])
    return Beside(
        token_BW=context.window_BIW.reshape(len(position_B), -1)[:, 1:],
        position_BW=position_B[:, None] + level_R + column_R,
        limit_B=position_B + 1,
        seen_WW=first_RR | own_RR,
    )


def observe(
    drafter: NoWeights,
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
    """``DrafterFamily.observe``: completes n-grams, where the window was read behind the rows, and
    finds the next drafts."""
    num_slots = len(length_B)
    began_B = jnp.zeros(num_slots, bool)
    began_B = began_B.at[rows.slot_T].max(rows.position_T == 0, mode="drop")
    context = _begin(context, began_B, token_BS, length_B)
    if len(feature_TFD) > len(rows.slot_T):
        hidden_RD = feature_TFD[len(rows.slot_T) :, 0]
        hidden_BRD = hidden_RD.reshape(num_slots, cfg.rows_beside, -1)[:, -cfg.columns :]
        best_BW = jnp.argmax(unembed(vocab, hidden_BRD), axis=-1).astype(jnp.int32)
        moved_B = (length_B - 1 > context.guess.position_B) & ~began_B
        context = move(context, best_BW, moved_B, token_BS, cfg)
    guess: Any = lookup.learn(context.guess, token_BS, length_B)
    anchor_B = jnp.take_along_axis(token_BS, length_B[:, None] - 1, axis=1)[:, 0]
    place_B, slot_B = anchor_B % PLACES, jnp.arange(num_slots)
    found_B = context.key_BX[slot_B, place_B] == anchor_B
    guess = guess.replace(
        token_BG=context.tail_BXI[slot_B, place_B],
        count_B=jnp.where(found_B, cfg.block_size, 0),
        position_B=length_B - 1,
        match_B=found_B.astype(jnp.int32),
    )
    return context.replace(guess=guess)  # type: ignore[attr-defined]


def _begin(
    context: Context, began_B: jax.Array, token_BS: jax.Array, length_B: jax.Array
) -> Context:
    """The context, anew for slots whose text begins: a window of random tokens of the prompt."""
    _, levels, columns = context.window_BIW.shape
    number_IW = jnp.arange(levels * columns, dtype=jnp.int32).reshape(levels, columns)
    place_BIW = (number_IW + 1) * _STEP % 65536 % length_B[:, None, None]
    slot_B11 = jnp.arange(len(length_B))[:, None, None]
    fresh_BIW = token_BS[slot_B11, place_BIW]
    began_B11 = began_B[:, None, None]
    return Context(
        guess=lookup.forget(context.guess, began_B),
        window_BIW=jnp.where(began_B11, fresh_BIW, context.window_BIW),
        age_B=jnp.where(began_B, 0, context.age_B),
        key_BX=jnp.where(began_B[:, None], NOBODY, context.key_BX),
        tail_BXI=context.tail_BXI,
    )


def move(
    context: Context, best_BW: jax.Array, moved_B: jax.Array, token_BS: jax.Array, cfg: Config
) -> Context:
    """The context after a round: the n-grams of all columns in the pool, and the next window.

    Args:
        context: of the round; its guesses still know where the anchor was.
        best_BW: int32 predictions behind the last level.
        moved_B: bool, slots that have decoded.
        token_BS: int32 committed tokens.
        cfg: sizes.
    """
    num_slots = len(moved_B)
    anchor_B = jnp.take_along_axis(token_BS, context.guess.position_B[:, None], axis=1)
    window_BIW = context.window_BIW.at[:, 0, 0].set(anchor_B[:, 0])
    gram_BIW = jnp.concatenate([window_BIW, best_BW[:, None]], axis=1)
    known_B = moved_B & (context.age_B >= cfg.levels - 1)
    slot_B = jnp.where(known_B, jnp.arange(num_slots), num_slots)
    key_BX, tail_BXI = context.key_BX, context.tail_BXI
    for column in reversed(range(cfg.columns)):  # the nearest to the text is the latest
        first_B = gram_BIW[:, 0, column]
        key_BX = key_BX.at[slot_B, first_B % PLACES].set(first_B, mode="drop")
        tail_BXI = tail_BXI.at[slot_B, first_B % PLACES].set(gram_BIW[:, 1:, column], mode="drop")
    return context.replace(  # type: ignore[attr-defined]
        window_BIW=jnp.where(moved_B[:, None, None], gram_BIW[:, 1:], context.window_BIW),
        age_B=context.age_B + moved_B,
        key_BX=key_BX,
        tail_BXI=tail_BXI,
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
    """``DrafterFamily.draft``: what :func:`observe` has found."""
    given = anchor_B, position_B, choose, law
    return lookup.draft(drafter, vocab, context.guess, *given, cfg.guesses, kernels=kernels)
