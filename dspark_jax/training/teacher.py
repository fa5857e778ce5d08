"""The frozen target's side of the loss: its distributions, which no update changes."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.config import DrafterConfig, TrainConfig
from dspark_jax.models.vocab import Vocab, lm_head, unembed
from pallas_kernels.chunks import chunk_sizes, join_chunks, split_chunks
from pallas_kernels.devices import free_axes

# Positions of the target at a time, and the most numbers, 1 GB, that its laws may take.
LAW_ROWS = 512
LAW_ELEMENTS = 2**28


@struct.dataclass
class Teacher:
    """The target at every position of the sequences, from which its distributions follow.

    Attributes:
        hidden_BSD: last hidden states, normalised.
        log_norm_BS: float32 logarithm of the sum of all V exponentials, where the draft vocabulary
            is reduced; None where the U logits are all there are.
        row_BS: int32 rows of ``law_TU`` (:func:`spell_out`); the others are None where it is given.
    """

    hidden_BSD: Any = None
    log_norm_BS: Any = None
    row_BS: Any = None


@jax.named_scope("target")
def make_teacher(target_vocab: Vocab, hidden_BSD: jax.Array, reduced: bool) -> Teacher:
    """The target's distributions, not yet spelt out.

    Args:
        target_vocab: the target's LM head.
        hidden_BSD: its last (normalised) hidden states.
        reduced: whether the draft vocabulary is a part of V.
    """
    if not reduced:
        return Teacher(hidden_BSD, None)
    batch, length, _ = hidden_BSD.shape
    vocab_size = target_vocab.embed_VD.shape[0]
    count, size = chunk_sizes(length, batch * vocab_size)

    def log_norm(hidden_BXD: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(unembed(target_vocab, hidden_BXD), axis=-1)

    log_norm_CBX = jax.lax.map(log_norm, split_chunks(hidden_BSD, count, size))
    return Teacher(hidden_BSD, join_chunks(log_norm_CBX, length))


@jax.named_scope("target")
def spell_out(
    target_vocab: Vocab, vocab: Vocab, hidden_BSD: jax.Array, supervised_BS: jax.Array
) -> tuple[Teacher, jax.Array]:
    """The target's distributions that every update of a batch reads, computed once.

    Args:
        target_vocab: the target's LM head.
        vocab: the drafter's vocabulary.
        hidden_BSD: the target's last (normalised) hidden states.
        supervised_BS: bool; other positions cost nothing.

    Returns:
        The teacher, and ``law_TU``: float32 probabilities inside the draft vocabulary, of the
        supervised positions one behind the other; what follows them is 0.
    """
    hidden_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
    order_T = jnp.argsort(~supervised_BS.reshape(-1), stable=True)
    rows = min(LAW_ROWS, len(order_T))
    padded_T = jnp.pad(order_T, (0, -len(order_T) % rows))

    def step(turn: jax.Array, law_TU: jax.Array) -> jax.Array:
        hidden_XD = hidden_TD[jax.lax.dynamic_slice_in_dim(padded_T, turn * rows, rows)]
        logits_XV = unembed(target_vocab, hidden_XD)
        logits_XU = logits_XV if vocab.d2t_U is None else logits_XV[:, vocab.d2t_U]
        law_XU = jnp.exp(logits_XU - jax.nn.logsumexp(logits_XV, axis=-1, keepdims=True))
        return jax.lax.dynamic_update_slice_in_dim(law_TU, law_XU, turn * rows, axis=0)

    empty_TU = jnp.zeros((len(padded_T), lm_head(vocab).shape[0]))
    law_TU = jax.lax.fori_loop(0, -(-supervised_BS.sum() // rows), step, empty_TU)
    return Teacher(row_BS=jnp.argsort(order_T).reshape(supervised_BS.shape)), law_TU


def laws_pay(cfg: DrafterConfig, recipe: TrainConfig, num_positions: int) -> bool:
    """Whether the target's laws of a batch are computed once for all updates: where there are
    several, memory bears it, and no mesh splits the sequences."""
    numbers = num_positions * (cfg.draft_vocab_size or cfg.vocab_size)
    devices = math.prod(free_axes().values())
    return recipe.updates_per_batch > 1 and devices == 1 and numbers <= LAW_ELEMENTS
