"""Decoder-only targets (Llama, Qwen2, Qwen3): dense encoding, cached extension, LM head.

``encode`` reads whole sequences and keeps nothing: training features. ``extend`` reads the rows of
a flat ragged batch against a cache: prefill and verification are the same operation. Both return
the residual stream after chosen layers ("features", spec section 2) beside the last hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dspark_jax.axes import Param, declare
from dspark_jax.config import TargetConfig
from dspark_jax.models import cache as kv
from dspark_jax.models.cache import Rows
from dspark_jax.models.layers import (
    Layer,
    attend_causally,
    declare_layers,
    finish_layer,
    loop_layers,
    project_qkv,
    rms_norm,
)
from dspark_jax.models.rope import rope_table
from dspark_jax.models.vocab import Vocab, embed
from pallas_kernels.ragged_attention.api import ragged_attention
from pallas_kernels.ragged_attention.groups import Groups, group_by_slot, group_runs


@struct.dataclass
class TargetParams:
    """Weights of a target: vocabulary, blocks (stacked on L, or a tuple), final norm."""

    vocab: Vocab
    layers: Any
    norm_D: Any


def declare_target(cfg: TargetConfig) -> TargetParams:
    """Declaration of every parameter under its Hugging Face name."""
    sizes = cfg.sizes

    def vector(name: str) -> Param:
        return declare("D", sizes, name, init="ones")

    unembed = None if cfg.tied else declare("VD", sizes, "lm_head.weight", init="embed")
    return TargetParams(
        vocab=Vocab(declare("VD", sizes, "model.embed_tokens.weight", init="embed"), unembed),
        layers=declare_layers(cfg, "model.layers"),
        norm_D=vector("model.norm.weight"),
    )


def declare_cache(cfg: TargetConfig, num_slots: int, num_positions: int, dtype: Any) -> kv.KVCache:
    """Declaration of what :func:`extend` keeps of ``num_slots`` texts of ``num_positions``."""
    return kv.declare_kv(cfg, num_slots, num_positions, dtype)


def _keep_feature(
    feature_FXD: jax.Array, x_XD: jax.Array, layer: Any, feature_layers: Sequence[int]
) -> jax.Array:
    """The features with the residual stream after ``layer``, if it is one of the chosen."""
    if not feature_layers:
        return feature_FXD
    if isinstance(layer, int):
        if layer not in feature_layers:
            return feature_FXD
        return feature_FXD.at[feature_layers.index(layer)].set(x_XD)
    hit_F = jnp.asarray(np.array(feature_layers, np.int32)) == layer
    place = jnp.where(hit_F.any(), jnp.argmax(hit_F), len(feature_layers))
    return feature_FXD.at[place].set(x_XD, mode="drop")


def _start_features(x_XD: jax.Array, feature_layers: Sequence[int]) -> jax.Array:
    """Room for the features, the embedding output (layer -1) already in its place."""
    feature_FXD = jnp.zeros((len(feature_layers), *x_XD.shape), x_XD.dtype)
    return _keep_feature(feature_FXD, x_XD, -1, feature_layers)


def encode(
    target: TargetParams,
    token_BS: jax.Array,
    cfg: TargetConfig,
    feature_layers: Sequence[int] = (),
    fetch: Callable[[Layer], Layer] = lambda layer: layer,
) -> tuple[jax.Array, jax.Array]:
    """Read whole sequences from position 0, causally, without a cache.

    Padding belongs at the end: nothing before it ever sees it.

    Args:
        target: weights.
        token_BS: int32 token ids.
        cfg: sizes.
        feature_layers: layers whose residual stream is returned; -1 is the embedding output.
        fetch: what is done to a layer's weights when its turn comes, for instance gathering them.

    Returns:
        hidden_BSD after the final norm, and feature_BSFD; both in the dtype of the weights.
    """
    length = token_BS.shape[1]
    position_BS = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), token_BS.shape)
    table = rope_table(position_BS, cfg)
    x_BSD = embed(target.vocab, token_BS)

    def block(carry: Any, layer: Layer, index: Any) -> Any:
        x_BSD, feature_FBSD = carry
        layer = fetch(layer)
        h_BSD = rms_norm(x_BSD, layer.input_norm_D, cfg.rms_norm_eps)
        q, k, v = project_qkv(layer, h_BSD, table, cfg)
        x_BSD = finish_layer(layer, x_BSD, attend_causally(q, k, v), cfg)
        return x_BSD, _keep_feature(feature_FBSD, x_BSD, index, feature_layers)

    carry = (x_BSD, _start_features(x_BSD, feature_layers))
    x_BSD, feature_FBSD = loop_layers(block, carry, target.layers)
    hidden_BSD = rms_norm(x_BSD, target.norm_D, cfg.rms_norm_eps)
    return hidden_BSD, jnp.moveaxis(feature_FBSD, 0, 2)


def extend(
    target: TargetParams,
    cache: kv.KVCache,
    rows: Rows,
    cfg: TargetConfig,
    feature_layers: Sequence[int] = (),
    *,
    rows_per_slot: int,
    chunks: Rows | None = None,
    kernels: str = "xla",
) -> tuple[jax.Array, jax.Array, kv.KVCache]:
    """Read T rows: write their keys and values, attend to everything up to their position.

    The dense layers see T flat rows; for the attention alone they are grouped by slot, so that
    every slot's cache is read once. Donate the cache: it is written
    in place.

    Args:
        target: weights.
        cache: valid before each slot's first row.
        rows: the batch; at most ``rows_per_slot`` (static) rows a slot.
        cfg: sizes.
        feature_layers: as in :func:`encode`.
        rows_per_slot: the most rows that one slot has here.
        chunks: pieces of prompts in the same pass, [P, W]: each is W positions of one slot, of
            which those behind the first may be padding. They follow the T rows in the results. A
            chunk sees all that is written here before it in its slot.
        kernels: the implementation of ``ragged_attention``.

    Returns:
        hidden_TD after the final norm, feature_TFD, and the cache with the rows written. Rows of
        padding hold garbage.
    """
    num_rows, num_slots = rows.token_T.shape[0], kv.num_slots(cache)
    groups = group_by_slot(rows.slot_T, rows.position_T, num_slots, rows_per_slot)
    attend_rows = _cache_attention(groups, rows, num_slots, kernels)
    if chunks is not None:
        flat = jax.tree.map(lambda x_PW: x_PW.reshape(-1), chunks)
        runs = group_runs(chunks.slot_T[:, 0], *chunks.slot_T.shape)
        attend_chunks = _cache_attention(runs, flat, num_slots, kernels)
        rows = jax.tree.map(lambda *parts: jnp.concatenate(parts), rows, flat)
    table = rope_table(rows.position_T, cfg)
    x_TD = embed(target.vocab, rows.token_T)

    def block(carry: Any, layer: Layer, index: Any) -> Any:
        x_TD, feature_FTD, cache = carry
        h_TD = rms_norm(x_TD, layer.input_norm_D, cfg.rms_norm_eps)
        q_TNH, k_TKH, v_TKH = project_qkv(layer, h_TD, table, cfg)
        cache = kv.write(cache, index, rows.slot_T, rows.position_T, k_TKH, v_TKH)
        out_TNH = attend_rows(q_TNH[:num_rows], cache, index)
        if chunks is not None:
            out_chunks_TNH = attend_chunks(q_TNH[num_rows:], cache, index)
            out_TNH = jnp.concatenate([out_TNH, out_chunks_TNH])
        x_TD = finish_layer(layer, x_TD, out_TNH, cfg)
        return x_TD, _keep_feature(feature_FTD, x_TD, index, feature_layers), cache

    carry = (x_TD, _start_features(x_TD, feature_layers), cache)
    x_TD, feature_FTD, cache = loop_layers(block, carry, target.layers)
    hidden_TD = rms_norm(x_TD, target.norm_D, cfg.rms_norm_eps)
    return hidden_TD, jnp.moveaxis(feature_FTD, 0, 1), cache


def _cache_attention(
    groups: Groups, rows: Rows, num_slots: int, kernels: str
) -> Callable[[jax.Array, kv.KVCache, Any], jax.Array]:
    """(q_TNH, cache, layer) -> out_TNH: rows that see their slot up to their own position."""
    limit_T = jnp.where(rows.slot_T < num_slots, rows.position_T + 1, 0)

    def attention(q_TNH: jax.Array, cache: kv.KVCache, layer: Any) -> jax.Array:
        inputs = kv.attention_inputs(cache, layer)
        return ragged_attention(
            q_TNH, groups=groups, limit_T=limit_T, implementation=kernels, **inputs
        )

    return attention
