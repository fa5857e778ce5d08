"""Eagle3: a chain of drafts, each from the state that gave the one before (arXiv 2503.01840).

Entry i pairs the target's features at position i with token i + 1:

    g_i = fc(f_i)          s_i = layer([rms(embed(x_{i+1})) ; rms(g_i)], residual g_i)

One decoder layer, whose queries, keys and values read twice the width; causal over the entries, at
rotary position i. Its output s_i predicts token i + 2, through the final norm and the LM head, and
takes the place of g in a chain of drafts (:mod:`.chain`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.axes import Param, declare
from dspark_jax.models.drafters import chain
from dspark_jax.models.drafters.chain import ChainConfig, Entry, Links
from dspark_jax.models.drafters.chain import declare_context as declare_context
from dspark_jax.models.drafters.chain import for_decoding as for_decoding
from dspark_jax.models.drafters.dspark import sections as sections
from dspark_jax.models.drafters.family import Lessons, Reads
from dspark_jax.models.layers import flat, matmul, rms_norm
from dspark_jax.models.stacks import only_layer, place_of, stacks_of
from dspark_jax.models.targets.table import draft_blocks_of
from dspark_jax.models.vocab import Vocab, embed

lessons: Lessons = "chains"
reads: Reads = "streams"


@dataclass(frozen=True)
class Config(ChainConfig):
    """Sizes of a drafter.

    Attributes:
        norm_residual: whether the residual stream begins with the normalised features.
    """

    norm_residual: bool = False


def of_recipe(fields: Mapping[str, Any]) -> Config:
    """The configuration of a drafter that is trained.

    Args:
        fields: of a ``DrafterConfig``, without a confidence head.
    """
    return Config(**{**fields, "confidence": True})


@struct.dataclass
class Params:
    """Weights of a drafter.

    Attributes:
        fc_FYD: projection of the concatenated features; feature_norm_D follows it.
        layers: the layer, a stack of one, whose queries, keys and values read [2 D].
        norm_D: final norm.
        head: None; others have such a head.
        confidence: likewise.
    """

    fc_FYD: Any
    feature_norm_D: Any
    layers: Any
    norm_D: Any
    head: Any = None
    confidence: Any = None


def declare_drafter(cfg: Config) -> Params:
    """Declaration of every trainable parameter under its name in the reference layout."""
    sizes = cfg.sizes | {"Y": cfg.hidden_size}
    (stack,) = stacks_of(sections(cfg))
    layer = draft_blocks_of(cfg).declare(cfg, stack)

    def wide(param: Param | None) -> Param | None:
        if param is None:
            return None
        layers, width, *heads = param.shape
        return replace(param, shape=(layers, 2 * width, *heads), fan_in=2 * param.fan_in)

    layer = layer.replace(**{name: wide(getattr(layer, name)) for name in _WIDE})
    return Params(
        fc_FYD=declare("FYD", sizes, "fc.weight", out="D"),
        feature_norm_D=declare("D", sizes, "layers.0.hidden_norm.weight", init="ones"),
        layers=(layer,),
        norm_D=declare("D", sizes, "norm.weight", init="ones"),
    )


_WIDE = ("q_DNH", "k_DKH", "v_DKH")


def project_features(drafter: Params, feature_XFD: jax.Array) -> jax.Array:
    """``g`` [X, D] of features."""
    flat_XI = feature_XFD.reshape(*feature_XFD.shape[:-2], -1).astype(drafter.norm_D.dtype)
    return matmul(flat_XI, flat(drafter.fc_FYD, flat_XI.shape[-1]))


def begin_entry(
    drafter: Params,
    vocab: Vocab,
    token_X: jax.Array,
    g_XD: jax.Array,
    position_X: jax.Array,
    cfg: Config,
) -> Entry:
    """Entries up to their attention.

    Args:
        drafter: weights.
        vocab: the drafter's vocabulary (embeddings).
        token_X: int32 tokens behind the entries' positions.
        g_XD: projected features, or states of a chain.
        position_X: int32 positions.
        cfg: sizes.
    """
    blocks, layer = draft_blocks_of(cfg), only_layer(drafter.layers)
    e_XD = embed(vocab, token_X).astype(drafter.norm_D.dtype)
    e_XD = rms_norm(e_XD, layer.input_norm_D, cfg.rms_norm_eps)
    h_XD = rms_norm(g_XD.astype(e_XD.dtype), drafter.feature_norm_D, cfg.rms_norm_eps)
    both_XI = jnp.concatenate([e_XD, h_XD], axis=-1)
    place, shared = place_of(sections(cfg), 0), blocks.shared(position_X, cfg)
    qkv = blocks.heads(layer, both_XI, place, shared, cfg)
    return Entry(h_XD if cfg.norm_residual else g_XD.astype(e_XD.dtype), *qkv)


_LINKS = Links(project_features, begin_entry)

observe = functools.partial(chain.observe, _LINKS)
draft = functools.partial(chain.draft, _LINKS)
train_blocks = functools.partial(chain.train_blocks, _LINKS)
