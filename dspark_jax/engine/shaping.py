"""What shapes the target's law before temperature and filters: penalties, biases and masks.

    l' = l / r if l > 0 else l * r      tokens of prompt and new text (Keskar et al. 2019, 4.1)
    l' = l - presence [n > 0] - frequency n + bias      n times among the new tokens
    l' = next to -inf                                   what the mask of a grammar forbids

Every verified row has the law of its own prefix: the committed text and the drafts before it in the
block, so that acceptance judges each draft, and draws what follows, by the law of the very place.

Axes: B slots, C columns of a block (the anchor and its drafts), T rows, S positions, V vocabulary
(of one shard, where it is split), J entries of a bias, X words of 32 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dspark_jax.models.vocab import SUPPRESSED
from pallas_kernels.accept_block.rule import VerifyPlan
from pallas_kernels.accept_block.xla import shard_start

if TYPE_CHECKING:
    from dspark_jax.engine.request import Request

MOST_BIASES = 300  # of a request: what a round has room for
MOST_TOP = 20  # likeliest tokens that are reported
ALL = np.uint32(0xFFFFFFFF)  # a word of a mask that forbids nothing


@struct.dataclass
class Shaping:
    """What the requests of a round ask for; a slot that asks for nothing has 0, 0, 1, no bias.

    Attributes:
        presence_B: float32, ``presence_penalty`` of ``Request``.
        frequency_B: float32, ``frequency_penalty``.
        repetition_B: float32, ``repetition_penalty``.
        asked_B: int32 length of the prompt as it was asked: what lies behind is new.
        bias_id_BJ: int32 ids, padded with -1.
        bias_BJ: float32.
        top_B: int32, how many of the likeliest tokens are wanted.
    """

    presence_B: jax.Array
    frequency_B: jax.Array
    repetition_B: jax.Array
    asked_B: jax.Array
    bias_id_BJ: jax.Array
    bias_BJ: jax.Array
    top_B: jax.Array


@struct.dataclass
class Masks:
    """What grammars make of a block, once its drafts are known.

    Attributes:
        allowed_BCX: uint32, bit i of word w allows token 32 w + i behind the anchor and the first c
            drafts.
        usable_B: int32 drafts up to the first that its mask forbids, that one included: it is
            judged and falls, and those behind it can never count.
    """

    allowed_BCX: jax.Array
    usable_B: jax.Array


def check_penalties(presence: float, frequency: float, repetition: float) -> None:
    """Raises ValueError where a penalty of one request has no meaning."""
    for name, value in (("presence_penalty", presence), ("frequency_penalty", frequency)):
        if not -2 <= value <= 2:
            raise ValueError(f"{name} is {value}: give a number in -2..2 (0 is off)")
    if not 0.01 <= repetition <= 100:
        raise ValueError(
            f"repetition_penalty is {repetition}: give a number in 0.01..100 (1 is off)"
        )


def is_shaped(request: Request) -> bool:
    """Whether a request asks for anything of this module, or for the likeliest tokens."""
    penalties = request.presence_penalty, request.frequency_penalty, request.repetition_penalty - 1
    others = request.logit_bias, request.top_logprobs, request.grammar is not None
    return any(penalties) or any(map(bool, others))


def shaping_of(asked: Mapping[int, Request], num_slots: int) -> Shaping:
    """In numpy, from the requests of some slots as they were asked."""
    values: dict[str, Any] = {
        "presence_B": np.zeros(num_slots, np.float32),
        "frequency_B": np.zeros(num_slots, np.float32),
        "repetition_B": np.ones(num_slots, np.float32),
        "asked_B": np.zeros(num_slots, np.int32),
        "bias_id_BJ": np.full((num_slots, MOST_BIASES), -1, np.int32),
        "bias_BJ": np.zeros((num_slots, MOST_BIASES), np.float32),
        "top_B": np.zeros(num_slots, np.int32),
    }
    for slot, request in asked.items():
        values["presence_B"][slot] = request.presence_penalty
        values["frequency_B"][slot] = request.frequency_penalty
        values["repetition_B"][slot] = request.repetition_penalty
        values["asked_B"][slot] = len(request.prompt_ids)
        values["top_B"][slot] = request.top_logprobs
        count = len(request.logit_bias)
        values["bias_id_BJ"][slot, :count] = list(request.logit_bias)
        values["bias_BJ"][slot, :count] = list(request.logit_bias.values())
    return Shaping(**values)


def no_masks(num_slots: int, num_columns: int, num_tokens: int) -> Masks:
    """In numpy, masks that forbid nothing."""
    allowed_BCX: Any = np.full((num_slots, num_columns, -(-num_tokens // 32)), ALL)
    usable_B: Any = np.full(num_slots, num_columns - 1, np.int32)
    return Masks(allowed_BCX, usable_B)


def shape_logits(
    logits_TV: jax.Array,
    token_BS: jax.Array,
    length_B: jax.Array,
    token_BC: jax.Array,
    plan: VerifyPlan,
    shaping: Shaping,
    allowed_BCX: jax.Array,
    axis_name: str | None = None,
) -> jax.Array:
    """Logits of the shaped laws, float32 [T, V].

    Args:
        logits_TV: the target's own, any float dtype.
        token_BS: int32 committed tokens, the first ``length_B`` of them.
        length_B: int32, the anchor included.
        token_BC: int32 anchors and drafts.
        plan: which row is whose.
        shaping: of the slots.
        allowed_BCX: of :class:`Masks`.
        axis_name: inside ``jax.shard_map``, the mesh axis that V is split over in equal parts.
    """
    (num_rows, num_tokens), num_slots = logits_TV.shape, len(length_B)
    start = shard_start(num_tokens, axis_name)
    slot_T = jnp.minimum(plan.slot_T, num_slots - 1)
    row_T1 = jnp.arange(num_rows)[:, None]

    def place(token_X: jax.Array, wanted_X: jax.Array | bool) -> jax.Array:
        """Places of tokens in this shard; what is not wanted, or not here, lies beyond its end."""
        place_X = token_X - start
        inside_X = (token_X >= start) & (place_X < num_tokens)
        return jnp.where(inside_X & wanted_X, place_X, num_tokens)

    def count(wanted_BS: jax.Array) -> jax.Array:
        """How often each token is among the wanted ones, [T, V]."""
        count_BV = jnp.zeros((num_slots, num_tokens), jnp.float32)
        place_BS = place(token_BS, wanted_BS)
        count_BV = count_BV.at[jnp.arange(num_slots)[:, None], place_BS].add(1, mode="drop")
        return count_BV[slot_T] + drafted_TV

    column_C, position_S = jnp.arange(token_BC.shape[1]), jnp.arange(token_BS.shape[1])
    before_TC = (column_C > 0) & (column_C <= plan.column_T[:, None])  # the anchor is committed
    drafted_TV = jnp.zeros((num_rows, num_tokens), jnp.float32)
    drafted_TV = drafted_TV.at[row_T1, place(token_BC[slot_T], before_TC)].add(1, mode="drop")
    committed_BS = position_S < length_B[:, None]
    new_TV = count(committed_BS & (position_S >= shaping.asked_B[:, None]))
    seen_TV = count(committed_BS) > 0

    presence_T1, frequency_T1, repetition_T1 = (
        value_B[slot_T, None]
        for value_B in (shaping.presence_B, shaping.frequency_B, shaping.repetition_B)
    )
    logits_TV = logits_TV.astype(jnp.float32)
    repeated_TV = jnp.where(logits_TV > 0, logits_TV / repetition_T1, logits_TV * repetition_T1)
    logits_TV = jnp.where(seen_TV, repeated_TV, logits_TV)
    logits_TV -= presence_T1 * (new_TV > 0) + frequency_T1 * new_TV
    biased_TJ = place(shaping.bias_id_BJ[slot_T], True)
    logits_TV = logits_TV.at[row_T1, biased_TJ].add(shaping.bias_BJ[slot_T], mode="drop")
    word_TX = allowed_BCX[slot_T, jnp.minimum(plan.column_T, len(column_C) - 1)]
    return jnp.where(_bits(word_TX, start, num_tokens), logits_TV, SUPPRESSED)


def _bits(word_TX: jax.Array, start: jax.Array | int, count: int) -> jax.Array:
    """bool [T, V]: so many bits from one on."""
    bit_TX = (word_TX[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    bit_TV = bit_TX.reshape(len(word_TX), -1) == 1
    return jax.lax.dynamic_slice_in_dim(bit_TV, start, count, axis=1)
