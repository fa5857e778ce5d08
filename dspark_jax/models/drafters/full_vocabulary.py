"""A drafter over a reduced vocabulary as the same drafter over the whole one, exactly.

The whole head gives every token a logit, so the tokens outside the draft vocabulary need a bias
that rules them out. The sequential head can add one: its rank grows by a component that is always
1, whose row of W2 is 0 inside the draft vocabulary and ``EXCLUDED`` outside. Sums of inside tokens
gain zeros alone; the probability of all others is 0 in floating point.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.config import DrafterConfig
from dspark_jax.models.drafters.dspark import DrafterParams
from dspark_jax.models.drafters.heads import ConfidenceHead, MarkovHead

EXCLUDED = -1e4
SATURATED = 100.0  # its sigmoid and its tanh are 1 in every floating-point format


def with_full_vocabulary(
    cfg: DrafterConfig, params: DrafterParams, d2t_U: jax.Array
) -> tuple[DrafterConfig, DrafterParams]:
    """The drafter over all of V whose distributions are those of the given one.

    Args:
        cfg: of the drafter, with a ``draft_vocab_size``.
        params: its parameters, layers stacked.
        d2t_U: int32 target ids of its vocabulary.

    Returns:
        Configuration (``markov_rank`` one higher; a drafter without a sequential head gets a
        vanilla one) and parameters in the same dtype.

    Raises:
        ValueError: the drafter has no place for a sequential head.
    """
    if type(cfg) is not DrafterConfig:
        raise ValueError(
            "a drafter of this kind has no place for a sequential head, which would rule out the "
            "other tokens: leave --full-vocabulary out"
        )
    dtype = params.norm_D.dtype
    head = params.head
    if head is None:
        head = MarkovHead(
            w1_ZR=jnp.zeros((cfg.vocab_size, 0), dtype), w2_RU=jnp.zeros((0, len(d2t_U)), dtype)
        )
    rank, kind = cfg.markov_rank, cfg.markov_head if cfg.markov_rank else "vanilla"
    w2_RV = np.zeros((rank + 1, cfg.vocab_size), dtype)
    w2_RV[rank] = EXCLUDED
    w2_RV[rank, d2t_U] = 0
    w2_RV[:rank, d2t_U] = head.w2_RU
    mix_IO, bias_O = _grown_mix(head, rank, kind)
    full = MarkovHead(
        w1_ZR=_grown(head.w1_ZR, 1, rank, 1.0),
        w2_RU=jnp.asarray(w2_RV),
        mix_IO=mix_IO,
        mix_bias_O=bias_O,
    )
    confidence = params.confidence
    if confidence is not None and cfg.confidence_with_markov:
        rows = len(confidence.w_IO)
        confidence = ConfidenceHead(_grown(confidence.w_IO, 0, rows, 0.0), confidence.bias_O)
    cfg = replace(cfg, draft_vocab_size=None, markov_rank=rank + 1, markov_head=kind)
    return cfg, replace(params, head=full, confidence=confidence)


def _grown_mix(head: MarkovHead, rank: int, kind: str) -> tuple[Any, Any]:
    """Gate or joint projection whose new output is 1, and whose old outputs see nothing new."""
    mix_IO, bias_O = head.mix_IO, head.mix_bias_O
    if kind == "gated":  # inputs h, embedding; output the gate, which multiplies the embedding
        mix_IO = _grown(_grown(mix_IO, 0, len(mix_IO), 0.0), 1, rank, 0.0)
        bias_O = _grown(bias_O, 0, rank, SATURATED)
    if kind == "rnn":  # inputs state, embedding, h; outputs gate, candidate, output
        for place in (2 * rank, rank):
            mix_IO = _grown(mix_IO, 0, place, 0.0)
        for place, value in ((3 * rank, SATURATED), (2 * rank, 0.0), (rank, 0.0)):
            mix_IO = _grown(mix_IO, 1, place, 0.0)
            bias_O = _grown(bias_O, 0, place, value)
    return mix_IO, bias_O


def _grown(array: Any, axis: int, place: int, value: float) -> jax.Array:
    """The array with a slice of one value inserted before ``place``."""
    return jnp.asarray(np.insert(np.asarray(array), place, value, axis=axis))
