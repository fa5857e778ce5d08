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
from dspark_jax.models.cache import Beside, Room, Rows
from dspark_jax.models.layers import rms_norm
from dspark_jax.models.reading import Attention, keep_feature, start_features
from dspark_jax.models.rope import Table, rope_table
from dspark_jax.models.sequences import ATTENTION_ROWS
from dspark_jax.models.stacks import Place, Sections, loop_layers, make_sections, map_stacks
from dspark_jax.models.targets.deepseek_v4_config import Config as Config
from dspark_jax.models.targets.deepseek_v4_config import config as config
from dspark_jax.models.targets.deepseek_v4_entries import (
    choose,
    chosen_keys,
    complete,
    compress,
    index_queries,
    overlap,
    raw_inputs,
)
from dspark_jax.models.targets.deepseek_v4_layers import (
    Compressor,
    Inputs,
    Kind,
    Layer,
    attend_to,
    declare_layers,
    read_layer,
)
from dspark_jax.models.targets.deepseek_v4_state import (
    LayerState,
    attend_rows,
    chunk_run,
    declare_layers_state,
    num_slots,
    slot_run,
    store,
)
from dspark_jax.models.targets.family import TargetParams
from dspark_jax.models.vocab import Vocab, embed


def architecture(cfg: Config) -> str:
    """The class of transformers that computes the same."""
    return "DeepseekV4ForCausalLM"


def draft_fields(cfg: Config) -> dict[str, Any]:
    """What a drafter of other layers takes over from its target."""
    return {"rope": cfg.rope}


def sections(cfg: Config) -> Sections:
    """The layers by their kinds."""

    def kind(layer: int) -> Kind:
        attention = Attention(1, cfg.head_dim, cfg.window(layer), value_is_key=True)
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
    _check_kernels(kernels)
    table_of = tables(jnp.arange(token_BS.shape[1], dtype=jnp.int32), cfg)
    x_BSJD = streams.start(embed(target.vocab, token_BS), cfg.streams)

    def block(carry: Any, layer: Layer, place: Place) -> Any:
        x_BSJD, feature_FBSD = carry
        layer = fetch(layer, place.stack)
        table = table_of[place.kind.ratio > 0]

        def attend(inputs: Inputs) -> tuple[jax.Array, None]:
            return _attend_causally(layer, place.kind, inputs, table, cfg), None

        x_BSJD, _ = read_layer(layer, x_BSJD, token_BS, table, cfg, attend)
        feature_FBSD = keep_feature(feature_FBSD, streams.mean(x_BSJD), place.layer, feature_layers)
        return x_BSJD, feature_FBSD

    carry = x_BSJD, start_features(streams.mean(x_BSJD), feature_layers)
    x_BSJD, feature_FBSD = loop_layers(block, carry, target.layers, sections(cfg))
    feature_FBSD = _keep_streams(feature_FBSD, x_BSJD, feature_layers, cfg)
    return leave(target, x_BSJD, cfg), jnp.moveaxis(feature_FBSD, 0, 2)


def _keep_streams(
    feature_FXD: jax.Array, x_XJD: jax.Array, feature_layers: Sequence[int], cfg: Config
) -> jax.Array:
    """The features with the streams after the last layer, which have the numbers behind it."""
    for place, number in enumerate(feature_layers):
        if number >= cfg.num_layers:
            stream_XD = x_XJD[..., number - cfg.num_layers, :]
            feature_FXD = feature_FXD.at[place].set(stream_XD)
    return feature_FXD


def leave(target: TargetParams, x_XJD: jax.Array, cfg: Config) -> jax.Array:
    """The final norm of what the streams are read out to [X, D]."""
    hidden_XD = streams.read_out(target.extra, x_XJD, cfg.streams)
    return rms_norm(hidden_XD, target.norm_D, cfg.rms_norm_eps)


def _attend_causally(
    layer: Layer, kind: Kind, inputs: Inputs, table: Table, cfg: Config
) -> jax.Array:
    """Attention of whole sequences, ``ATTENTION_ROWS`` rows at a time."""
    length, dtype = inputs.q_XNH.shape[1], inputs.key_XH.dtype
    count = length // kind.ratio if kind.ratio else 0
    if count:
        entry_BKH = entries_of(layer.compressor, inputs.u_XD, kind, cfg).astype(dtype)
    if kind.sparse and count > cfg.index_top:
        index_BKH = entries_of(layer.indexer.compressor, inputs.u_XD, kind, cfg).astype(dtype)
        index = index_queries(layer.indexer, inputs.u_XD, inputs.latent_XI, table, cfg)
    parts = []
    for first in range(0, length, ATTENTION_ROWS):
        end, start = min(first + ATTENTION_ROWS, length), max(0, first - kind.attention.window + 1)
        row_C = jnp.arange(first, end)
        age_CS = row_C[:, None] - jnp.arange(start, end)
        visible_CS = (age_CS >= 0) & (age_CS < kind.attention.window)
        seen = [(inputs.key_XH[:, start:end], visible_CS[None])]
        count = end // kind.ratio if kind.ratio else 0
        if count:
            found = entry_BKH[:, :count], complete(row_C, count, kind)[None]
            if kind.sparse and count > cfg.index_top:
                q_BCNH, head_BCN = (x[:, first:end] for x in index)
                own_BKH = index_BKH[:, :count]
                best_BCK, visible_BCK = choose(q_BCNH, head_BCN, own_BKH, found[1], cfg.index_top)
                found = chosen_keys(entry_BKH, best_BCK), visible_BCK
            seen.append(found)
        parts.append(attend_to(inputs.q_XNH[:, first:end], seen, layer.heads.sink_N))
    return jnp.concatenate(parts, axis=1)


def entries_of(compressor: Compressor, u_BSD: jax.Array, kind: Kind, cfg: Config) -> jax.Array:
    """All complete entries of whole sequences, float32 [B, K, H]."""
    batch, length, _ = u_BSD.shape
    count, before = length // kind.ratio, overlap(kind)
    raw_BSX = raw_inputs(compressor, u_BSD[:, : count * kind.ratio])
    raw_BSX = jnp.pad(raw_BSX, ((0, 0), (before, 0), (0, 0)))
    window_BK = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))
    return compress(compressor, raw_BSX, window_BK, kind, cfg)


def declare_cache(cfg: Config, room: Room) -> tuple[LayerState, ...]:
    """Declaration of what :func:`extend` keeps."""
    return map_stacks(
        lambda stack: declare_layers_state(cfg, stack.kind, len(stack.layers), room), sections(cfg)
    )


beside = None  # what it keeps of a text cannot be read past


def extend(
    target: TargetParams,
    cache: tuple[LayerState, ...],
    rows: Rows,
    cfg: Config,
    feature_layers: Sequence[int] = (),
    *,
    rows_per_slot: int,
    chunks: Rows | None = None,
    beside: Beside | None = None,
    kernels: str = "xla",
) -> tuple[jax.Array, jax.Array, tuple[LayerState, ...]]:
    """Read T rows against what is kept of their slots; see :class:`TargetFamily`."""
    _check_kernels(kernels)
    if beside is not None:
        raise ValueError("rows beside a text are given, which this target cannot read")
    runs = [slot_run(rows, num_slots(cache[0]), rows_per_slot)]
    if chunks is not None:
        runs.append(chunk_run(chunks, num_slots(cache[0]), len(rows.slot_T)))
        flat = jax.tree.map(lambda x_PW: x_PW.reshape(-1), chunks)
        rows = jax.tree.map(lambda *parts: jnp.concatenate(parts), rows, flat)
    table_of = tables(rows.position_T, cfg)
    x_TJD = streams.start(embed(target.vocab, rows.token_T), cfg.streams)

    def block(carry: Any, layer: Layer, place: Place) -> Any:
        x_TJD, feature_FTD, cache = carry
        table = table_of[place.kind.ratio > 0]

        def attend(inputs: Inputs) -> tuple[jax.Array, LayerState]:
            state = cache[place.stack]
            state = store(state, place.index, layer, place.kind, inputs, rows, runs, cfg)
            held = state, place.index, layer, place.kind
            return attend_rows(*held, inputs, table, runs, cfg), state

        x_TJD, state = read_layer(layer, x_TJD, rows.token_T, table, cfg, attend)
        cache = (*cache[: place.stack], state, *cache[place.stack + 1 :])
        feature_FTD = keep_feature(feature_FTD, streams.mean(x_TJD), place.layer, feature_layers)
        return x_TJD, feature_FTD, cache

    carry = x_TJD, start_features(streams.mean(x_TJD), feature_layers), cache
    x_TJD, feature_FTD, cache = loop_layers(block, carry, target.layers, sections(cfg))
    feature_FTD = _keep_streams(feature_FTD, x_TJD, feature_layers, cfg)
    return leave(target, x_TJD, cfg), jnp.moveaxis(feature_FTD, 0, 1), cache


def _check_kernels(kernels: str) -> None:
    if kernels != "xla":
        raise ValueError(
            f"kernels is {kernels!r}, which have no form for this target: choose 'xla'"
        )
