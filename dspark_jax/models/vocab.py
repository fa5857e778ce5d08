"""Embedding and LM head, which target and drafter share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dspark_jax.models.by_outputs import by_outputs, product
from dspark_jax.models.layers import cap

SUPPRESSED = -1e30  # finite, so that no product with it is not a number


@struct.dataclass
class Vocab:
    """Embedding and LM head, shared by target and drafter.

    Attributes:
        embed_VD: token embeddings.
        unembed_VD: rows of the LM head; None where it is the embedding (tied). A drafter's own
            view of a reduced vocabulary holds the U rows of ``d2t_U`` here.
        d2t_U: int32 target ids of the draft vocabulary; None for all of V.
        outputs_DV: the LM head as a :class:`~dspark_jax.models.by_outputs.ByOutputs`, in place of
            its rows (:func:`head_by_outputs`).
        embed_scale: of the embeddings, rounded to their dtype.
        softcap: logits become ``softcap * tanh(logits / softcap)``; None leaves them.
    """

    embed_VD: Any
    unembed_VD: Any = None
    d2t_U: Any = None
    outputs_DV: Any = None
    embed_scale: float = struct.field(pytree_node=False, default=1.0)
    softcap: float | None = struct.field(pytree_node=False, default=None)


def embedding_axes(tied: bool) -> str:
    """The axes of ``embed_VD``: where it is the LM head too, it is split over a mesh like one."""
    return "VD" if tied else "ZD"


def embed(vocab: Vocab, token_X: jax.Array) -> jax.Array:
    """Token embeddings [X, D]."""
    embed_XD = jnp.take(vocab.embed_VD, token_X, axis=0, mode="clip")
    if vocab.embed_scale == 1:
        return embed_XD
    return embed_XD * jnp.asarray(vocab.embed_scale, embed_XD.dtype)


def lm_head(vocab: Vocab) -> jax.Array:
    """Rows of the LM head [V, D] (or [U, D] under a reduced draft vocabulary), but where it is a
    :class:`~dspark_jax.models.by_outputs.ByOutputs`."""
    return vocab.embed_VD if vocab.unembed_VD is None else vocab.unembed_VD


def unembed(vocab: Vocab, hidden_XD: jax.Array) -> jax.Array:
    """Logits [X, V] (or [X, U] under a reduced draft vocabulary), float32."""
    if vocab.outputs_DV is not None:
        logits_XV = product(hidden_XD, vocab.outputs_DV)
    else:
        logits_XV = jnp.einsum(
            "...d,vd->...v", hidden_XD, lm_head(vocab), preferred_element_type=jnp.float32
        )
    return cap(logits_XV, vocab.softcap)


def suppress(
    logits_XV: jax.Array, ids: tuple[int, ...], d2t_U: jax.Array | None = None
) -> jax.Array:
    """Logits under which some ids have no chance.

    Args:
        logits_XV: or [X, U].
        ids: of the target's vocabulary.
        d2t_U: target ids of a reduced draft vocabulary.
    """
    if not ids:
        return logits_XV
    # A mask that is a constant: padded vocabularies have hundreds of such ids.
    size = logits_XV.shape[-1] if d2t_U is None else max(ids) + 1
    hidden_V = np.zeros(size, bool)
    hidden_V[list(ids)] = True
    hidden_X = jnp.asarray(hidden_V)
    if d2t_U is not None:
        hidden_X = hidden_X.at[d2t_U].get(mode="fill", fill_value=False)
    return jnp.where(hidden_X, SUPPRESSED, logits_XV)


def head_by_outputs(vocab: Vocab) -> Vocab:
    """The vocabulary with its LM head in the form that a CPU decodes with; a tied head becomes a
    second array."""
    if vocab.outputs_DV is not None:
        return vocab
    return vocab.replace(unembed_VD=None, outputs_DV=by_outputs(lm_head(vocab).T))  # type: ignore[attr-defined]
