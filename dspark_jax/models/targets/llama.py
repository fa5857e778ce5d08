"""Decoder-only targets (Llama, Qwen2, Qwen3): dense encoding, cached extension, LM head.

``encode`` reads whole sequences and keeps nothing: training features. ``extend`` reads the rows of
a flat ragged batch against a cache: prefill and verification are the same operation. Both return
the residual stream after chosen layers ("features", spec section 2) beside the last hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax import axes
from dspark_jax.config import TargetConfig
from dspark_jax.models import cache as kv
from dspark_jax.models import vocab as vocabulary
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
from dspark_jax.models.targets.config_json import block_config, field
from dspark_jax.models.targets.family import TargetParams
from dspark_jax.models.vocab import Vocab
from pallas_kernels.ragged_attention.api import ragged_attention
from pallas_kernels.ragged_attention.groups import Groups, group_by_slot, group_runs


@dataclass(frozen=True)
class Config(TargetConfig):
    """Sizes of a target; which of the kin it is shows in its biases and in ``qk_norm``."""


def config(hf: Mapping[str, Any]) -> Config:
    """The configuration out of a ``config.json`` of Llama, Qwen2 or Qwen3.

    Raises:
        ValueError: a field is missing or wrong, or asks for something that is not supported.
    """
    kind, bias = hf["model_type"], field(hf, "attention_bias", bool, False)
    return Config(
        **block_config(hf),
        qk_norm=kind == "qwen3",
        qkv_bias=bias or kind == "qwen2",
        out_bias=bias and kind != "qwen2",
        tied=field(hf, "tie_word_embeddings", bool, False),
    )


def architecture(cfg: Config) -> str:
    """The class of transformers that computes the same."""
    if cfg.qk_norm:
        return "Qwen3ForCausalLM"
    return "Qwen2ForCausalLM" if cfg.qkv_bias and not cfg.out_bias else "LlamaForCausalLM"


def declare(cfg: Config) -> TargetParams:
    """Declaration of every parameter under its Hugging Face name."""

    def param(letters: str, name: str, init: str) -> axes.Param:
        return axes.declare(letters, cfg.sizes, name, init=init)

    head = None if cfg.tied else param("VD", "lm_head.weight", "embed")
    return TargetParams(
        vocab=Vocab(param("VD", "model.embed_tokens.weight", "embed"), head),
        layers=declare_layers(cfg, "model.layers"),
        norm_D=param("D", "model.norm.weight", "ones"),
    )


def declare_cache(cfg: Config, num_slots: int, num_positions: int, dtype: Any) -> kv.KVCache:
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
    cfg: Config,
    feature_layers: Sequence[int] = (),
    fetch: Callable[[Layer], Layer] = lambda layer: layer,
) -> tuple[jax.Array, jax.Array]:
    """Read whole sequences without a cache; see :class:`TargetFamily`."""
    length = token_BS.shape[1]
    position_BS = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), token_BS.shape)
    table = rope_table(position_BS, cfg)
    x_BSD = embed(target.vocab, token_BS, cfg)

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
    cfg: Config,
    feature_layers: Sequence[int] = (),
    *,
    rows_per_slot: int,
    chunks: Rows | None = None,
    kernels: str = "xla",
) -> tuple[jax.Array, jax.Array, kv.KVCache]:
    """Read T rows: write their keys and values, attend to everything up to their position; see
    :class:`TargetFamily`.

    The dense layers see T flat rows; for the attention alone they are grouped by slot, so that
    every slot's cache is read once. Donate the cache: it is written in place.
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
    x_TD = embed(target.vocab, rows.token_T, cfg)

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


def embed(vocab: Vocab, token_X: jax.Array, cfg: Config) -> jax.Array:
    """The residual stream [X, D] before the first layer: the embedding as it is."""
    return vocabulary.embed(vocab, token_X)


def unembed(vocab: Vocab, hidden_XD: jax.Array, cfg: Config) -> jax.Array:
    """Logits [X, V], float32: the LM head's as they are."""
    return vocabulary.unembed(vocab, hidden_XD)
