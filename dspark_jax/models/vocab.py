"""Embedding and LM head, which target and drafter share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Vocab:
    """Embedding and LM head, shared by target and drafter.

    Attributes:
        embed_VD: token embeddings.
        unembed_VD: rows of the LM head; None where it is the embedding (tied). A drafter's own
            view of a reduced vocabulary holds the U rows of ``d2t_U`` here.
        d2t_U: int32 target ids of the draft vocabulary; None for all of V.
        unembed_DV: the LM head by columns, in place of its rows (:func:`by_columns`).
    """

    embed_VD: Any
    unembed_VD: Any = None
    d2t_U: Any = None
    unembed_DV: Any = None


def embed(vocab: Vocab, token_X: jax.Array) -> jax.Array:
    """Token embeddings [X, D]."""
    return jnp.take(vocab.embed_VD, token_X, axis=0, mode="clip")


def lm_head(vocab: Vocab) -> jax.Array:
    """Rows of the LM head [V, D] (or [U, D] under a reduced draft vocabulary)."""
    if vocab.unembed_DV is not None:
        return vocab.unembed_DV.T
    return vocab.embed_VD if vocab.unembed_VD is None else vocab.unembed_VD


def unembed(vocab: Vocab, hidden_XD: jax.Array) -> jax.Array:
    """Logits [X, V] (or [X, U] under a reduced draft vocabulary), float32."""
    if vocab.unembed_DV is not None:
        return jnp.matmul(hidden_XD, vocab.unembed_DV, preferred_element_type=jnp.float32)
    return jnp.einsum(
        "...d,vd->...v", hidden_XD, lm_head(vocab), preferred_element_type=jnp.float32
    )


def by_columns(vocab: Vocab) -> Vocab:
    """The vocabulary with its LM head by columns, which a CPU multiplies a few rows with faster
    (5 rows of SmolLM2: 3.9 ms instead of 5.0); a tied head becomes a second array."""
    if vocab.unembed_DV is not None:
        return vocab
    return vocab.replace(unembed_VD=None, unembed_DV=jnp.asarray(lm_head(vocab).T))  # type: ignore[attr-defined]
