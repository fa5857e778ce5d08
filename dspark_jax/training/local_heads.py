"""Attention heads that begin by looking at the last few positions.

What a block needs most from the context is the feature just before its anchor. From random weights
attention starts uniform over hundreds of positions, and finding the last one takes longer than
everything that is learnt from it. RoPE makes looking back a fixed distance easy to state: where
query and key are constant vectors, their product depends on the distance alone, and turning the
query by the angle of ``n`` positions moves its peak to distance ``n``. Both inputs contain a
constant (residual streams have channels that hardly vary; embeddings share a mean), so a rank-one
projection yields such vectors. Head n of the first layer starts at distance n + 1.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.config import DrafterConfig
from dspark_jax.models.drafters.dspark import DrafterParams
from dspark_jax.models.layers import rms_norm
from dspark_jax.models.rope import rope_frequencies
from dspark_jax.models.vocab import Vocab, embed

# Frequency pairs that carry the position, the fastest ones: they tell neighbours apart.
PAIRS = 6
# Weight of the constant part, and what is left of the random one.
CONSTANT, RANDOM = 3.0, 0.5


def constant_direction(x_TD: np.ndarray) -> np.ndarray:
    """float64 [D]: the direction along which all rows are as nearly 1 as possible (ridge)."""
    square_DD = x_TD.T @ x_TD / len(x_TD)
    ridge = 0.3 * np.mean(x_TD**2) * np.eye(x_TD.shape[1])
    direction_D = np.linalg.solve(square_DD + ridge, x_TD.mean(0))
    return direction_D / (x_TD.mean(0) @ direction_D)


def start_with_local_heads(
    params: DrafterParams,
    vocab: Vocab,
    feature_TFD: jax.Array,
    token_T: jax.Array,
    cfg: DrafterConfig,
) -> DrafterParams:
    """``params`` whose first layer's heads look 1, 2, 3, ... positions back.

    Args:
        params: freshly initialised.
        vocab: the drafter's vocabulary.
        feature_TFD: target features of some supervised positions.
        token_T: int32 the tokens there.
        cfg: sizes.
    """
    context_TD = jnp.einsum("tfe,fed->td", feature_TFD, params.fc_FYD)
    context_TD = rms_norm(context_TD, params.hidden_norm_D, cfg.rms_norm_eps)
    masks_T = jnp.full_like(token_T, cfg.mask_token_id)
    block_TD = embed(vocab, jnp.concatenate([token_T, masks_T]))
    block_TD = rms_norm(block_TD, params.layers[0].input_norm_D[0], cfg.rms_norm_eps)

    frequency = rope_frequencies(cfg.rope, cfg.head_dim)[:PAIRS]
    half = cfg.head_dim // 2

    def turned(distance: np.ndarray) -> np.ndarray:
        angle_XP = -distance[:, None] * frequency
        vector_XH = np.zeros((len(distance), cfg.head_dim))
        vector_XH[:, : len(frequency)] = np.cos(angle_XP)
        vector_XH[:, half : half + len(frequency)] = np.sin(angle_XP)
        return vector_XH

    query_NH = turned(np.arange(1, cfg.num_heads + 1))
    key_KH = turned(np.zeros(cfg.num_kv_heads))
    q_DNH = np.einsum("d,nh->dnh", _direction(block_TD), query_NH)
    k_DKH = np.einsum("d,kh->dkh", _direction(context_TD), key_KH)
    layers = params.layers[0]
    layers = layers.replace(
        q_DNH=layers.q_DNH.at[0].set(RANDOM * layers.q_DNH[0] + CONSTANT * q_DNH),
        k_DKH=layers.k_DKH.at[0].set(RANDOM * layers.k_DKH[0] + CONSTANT * k_DKH),
    )
    return params.replace(layers=(layers, *params.layers[1:]))  # type: ignore[attr-defined]


def _direction(x_TD: jax.Array) -> np.ndarray:
    return constant_direction(np.asarray(x_TD, np.float64))
