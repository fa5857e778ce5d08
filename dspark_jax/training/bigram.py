"""A sequential head that begins as the bigram model of the answers.

A vanilla head's bias ``W1[x] W2`` is a low-rank table of bigram logits, but from random weights it
needs thousands of updates to become one: every update touches the rows of a few tokens. Counting
gives it at once. With counts c(x, y), unigram law p(y) and a Dirichlet prior of strength alpha,

    log p(y | x) = log p(y) + log(1 + c(x, y) / (alpha p(y))) + const(x),

whose second term is sparse and not negative. Its truncated singular value decomposition, weighted
by how often rows and columns occur, fills rank R - 1; the last component carries log p(y).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import sparse
from scipy.sparse import linalg

from dspark_jax.config import DrafterConfig
from dspark_jax.models.drafters.dspark import DrafterParams
from dspark_jax.training.data import TokenSequence

PRIOR_STRENGTH = 20.0
# The backbone's logits start small beside the bigrams', and grow as they learn to help.
NORM_START = 0.3


def bigram_factors(
    sequences: Sequence[TokenSequence],
    t2d_V: np.ndarray,
    vocab_size: int,
    draft_size: int,
    rank: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Low-rank bigram logits of the answers.

    Args:
        sequences: whose answers are counted.
        t2d_V: int32 place of every token in the draft vocabulary, -1 outside it.
        vocab_size: V.
        draft_size: U.
        rank: R, at least 2.

    Returns:
        w1_ZR and w2_RU, float32; their product is log p(y | x) up to a constant a row. A token
        that never occurs predicts the unigram law.
    """
    before = np.concatenate([one.token_S[:-1][one.loss_mask_S[1:]] for one in sequences])
    after = t2d_V[np.concatenate([one.token_S[1:][one.loss_mask_S[1:]] for one in sequences])]
    before, after = before[after >= 0], after[after >= 0]
    unigram_U = np.bincount(after, minlength=draft_size) + 0.5
    unigram_U = unigram_U / unigram_U.sum()
    row_V = np.sqrt(np.bincount(before, minlength=vocab_size).astype(np.float64))
    column_U = np.sqrt(unigram_U)

    ones = np.ones(len(before))
    excess = sparse.coo_matrix((ones, (before, after)), (vocab_size, draft_size)).tocsr()
    excess.data = np.log1p(excess.data / (PRIOR_STRENGTH * unigram_U[excess.indices]))
    weighted = sparse.diags(row_V) @ excess @ sparse.diags(column_U)
    components = min(rank - 1, min(weighted.shape) - 1)

    w1_ZR, w2_RU = np.zeros((vocab_size, rank)), np.zeros((rank, draft_size))
    if len(before):
        left, value, right = linalg.svds(weighted.tocsr(), k=components, random_state=0)
        seen = row_V > 0
        w1_ZR[seen, :components] = left[seen] * np.sqrt(value) / row_V[seen, None]
        w2_RU[:components] = np.sqrt(value)[:, None] * right / column_U
    w1_ZR[:, -1] = 1.0
    w2_RU[-1] = np.log(unigram_U) - np.log(unigram_U).mean()
    # Rows and columns of equal size learn at an equal pace.
    balance_R = np.sqrt(np.linalg.norm(w1_ZR, axis=0) / (np.linalg.norm(w2_RU, axis=1) + 1e-9))
    balance_R = np.where(balance_R > 0, balance_R, 1.0)
    return (w1_ZR / balance_R).astype(np.float32), (w2_RU * balance_R[:, None]).astype(np.float32)


def start_from_bigrams(
    params: DrafterParams, sequences: Sequence[TokenSequence], t2d_V: Any, cfg: DrafterConfig
) -> DrafterParams:
    """``params`` with a vanilla head that is the bigram model of the sequences' answers."""
    places = np.arange(cfg.vocab_size) if t2d_V is None else np.asarray(t2d_V)
    draft_size = cfg.draft_vocab_size or cfg.vocab_size
    w1_ZR, w2_RU = bigram_factors(sequences, places, cfg.vocab_size, draft_size, cfg.markov_rank)
    head = params.head.replace(w1_ZR=jnp.asarray(w1_ZR), w2_RU=jnp.asarray(w2_RU))
    norm_D = jax.tree.map(lambda x: NORM_START * x, params.norm_D)
    return params.replace(head=head, norm_D=norm_D)  # type: ignore[attr-defined]
