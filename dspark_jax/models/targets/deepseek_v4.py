"""DeepSeek-V4: streams of residuals, shared keys, compressed entries, experts by table or score.

Source: DeepSeek-V4 (2026).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.axes import declare as declare_param
from dspark_jax.models import hyper_connections as streams
from dspark_jax.models.layers import rms_norm
from dspark_jax.models.reading import Attention, keep_feature, start_features
from dspark_jax.models.rope import Table, rope_table
from dspark_jax.models.sequences import ATTENTION_ROWS
from dspark_jax.models.stacks import Place, Sections, loop_layers, make_sections, map_stacks
from dspark_jax.models.targets.deepseek_v4_config import Config as Config
from dspark_jax.models.targets.deepseek_v4_config import config as config
from dspark_jax.models.targets.deepseek_v4_entries import (
    choose,
    complete,
    compress,
    overlap,
    raw_inputs,
)
from dspark_jax.models.targets.deepseek_v4_layers import (
    Compressor,
    Kind,
    Layer,
    attend_to,
    declare_layers,
    read_layer,
)
from dspark_jax.models.targets.family import TargetParams
from dspark_jax.models.vocab import Vocab, embed


def architecture(cfg: Config) -> str:
    """The class of transformers that computes the same."""
    return "DeepseekV4ForCausalLM"


def draft_fields(cfg: Config) -> dict[str, Any]:
    """What a drafter of other layers takes over from its target."""
    return {"rope": cfg.rope, "num_kv_heads": 1}


def sections(cfg: Config) -> Sections:
    """The layers by their kinds."""

    def kind(layer: int) -> Kind:
        attention = Attention(1, cfg.head_dim, cfg.window(layer))
        ratio, sparse = cfg.ratios[layer], layer in cfg.sparse
        return Kind(attention, ratio, sparse, layer in cfg.hashed)

    return make_sections(tuple(map(kind, range(cfg.num_layers))))


def declare(cfg: Config) -> TargetParams:
    """Declaration of every parameter under its name in the released files."""
    head = None if cfg.tied else declare_param("VD", cfg.sizes, "head.weight", init="embed")
    return TargetParams(
        vocab=Vocab(declare_param("VD", cfg.sizes, "embed.weight", init="embed"), head),
        layers=map_stacks(
            lambda stack: declare_layers(cfg, stack.kind, stack.layers), sections(cfg)
        ),
        norm_D=declare_param("D", cfg.sizes, "norm.weight", init="ones"),
        extra=streams.declare_mixing(cfg.sizes, "hc_head"),
    )


def tables(position_X: jax.Array, cfg: Config) -> tuple[Table, Table]:
    """RoPE of layers without and with compressed entries, at some positions."""
    plain = rope_table(position_X, cfg.rope, cfg.rope_dim)
    return plain, rope_table(position_X, cfg.compressed_rope, cfg.rope_dim)


def encode(
    target: TargetParams,
    token_BS: jax.Array,
    cfg: Config,
    feature_layers: Sequence[int] = (),
    fetch: Callable[[Any, int], Any] = lambda layer, stack: layer,
    kernels: str = "xla",
) -> tuple[jax.Array, jax.Array]:
    """Read whole sequences; see :class:`TargetFamily`."""
    position_S = jnp.arange(token_BS.shape[1], dtype=jnp.int32)
    table_of = tables(position_S, cfg)
    x_BSJD = streams.start(embed(target.vocab, token_BS), cfg.streams)

    def block(carry: Any, layer: Layer, place: Place) -> Any:
        x_BSJD, feature_FBSD = carry
        layer = fetch(layer, place.stack)

        def attend(*inputs: jax.Array) -> tuple[jax.Array, None]:
            return _attend_causally(layer, place.kind, cfg, table_of[1], *inputs), None

        table = table_of[place.kind.ratio > 0]
        x_BSJD, _ = read_layer(layer, x_BSJD, token_BS, table, cfg, attend)
        feature_FBSD = keep_feature(feature_FBSD, streams.mean(x_BSJD), place.layer, feature_layers)
        return x_BSJD, feature_FBSD

    carry = x_BSJD, start_features(streams.mean(x_BSJD), feature_layers)
    x_BSJD, feature_FBSD = loop_layers(block, carry, target.layers, sections(cfg))
    return _leave(target, x_BSJD, cfg), jnp.moveaxis(feature_FBSD, 0, 2)


def _leave(target: TargetParams, x_XJD: jax.Array, cfg: Config) -> jax.Array:
    hidden_XD = streams.read_out(target.extra, x_XJD, cfg.streams)
    return rms_norm(hidden_XD, target.norm_D, cfg.rms_norm_eps)


def _attend_causally(
    layer: Layer,
    kind: Kind,
    cfg: Config,
    table: Table,
    u_BSD: jax.Array,
    latent_BSI: jax.Array,
    q_BSNH: jax.Array,
    key_BSH: jax.Array,
) -> jax.Array:
    """Attention of whole sequences, ``ATTENTION_ROWS`` rows at a time."""
    length, dtype = q_BSNH.shape[1], key_BSH.dtype
    entry_BKH = index_BKH = None
    if kind.ratio and length >= kind.ratio:
        entry_BKH = entries_of(layer.compressor, u_BSD, kind, cfg).astype(dtype)
    if kind.sparse and entry_BKH is not None:
        index_BKH = entries_of(layer.indexer.compressor, u_BSD, kind, cfg).astype(dtype)
    parts = []
    for first in range(0, length, ATTENTION_ROWS):
        end, start = min(first + ATTENTION_ROWS, length), max(0, first - kind.attention.window + 1)
        rows = slice(first, end)
        age_CS = jnp.arange(first, end)[:, None] - jnp.arange(start, end)
        visible_CS = (age_CS >= 0) & (age_CS < kind.attention.window)
        seen = [(key_BSH[:, start:end], visible_CS[None])]
        if entry_BKH is not None and end >= kind.ratio:
            count = end // kind.ratio
            visible_BCS = complete(jnp.arange(first, end), count, kind)[None]
            if index_BKH is not None:
                own = table[0][rows], table[1][rows]
                inputs = u_BSD[:, rows], latent_BSI[:, rows], index_BKH[:, :count]
                visible_BCS = choose(layer.indexer, *inputs, visible_BCS, own, cfg)
            seen.append((entry_BKH[:, :count], visible_BCS))
        parts.append(attend_to(q_BSNH[:, rows], seen, layer.heads.sink_N))
    return jnp.concatenate(parts, axis=1)


def entries_of(compressor: Compressor, u_BSD: jax.Array, kind: Kind, cfg: Config) -> jax.Array:
    """All complete entries of whole sequences, float32 [B, K, H]."""
    batch, length, _ = u_BSD.shape
    count, before = length // kind.ratio, overlap(kind)
    raw_BSX = raw_inputs(compressor, u_BSD[:, : count * kind.ratio])
    raw_BSX = jnp.pad(raw_BSX, ((0, 0), (before, 0), (0, 0)))
    window_BK = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))
    return compress(compressor, raw_BSX, window_BK, kind, cfg)
