"""Eagle3: a chain of drafts, each from the state that gave the one before (arXiv 2503.01840).

Entry i pairs the target's features at position i with token i + 1:

    g_i = fc(f_i)          s_i = layer([rms(embed(x_{i+1})) ; rms(g_i)], residual g_i)

One decoder layer, whose queries, keys and values read twice the width; causal over the entries, at
rotary position i. Its output s_i predicts token i + 2, through the final norm and the LM head. A
chain of drafts goes on with s_i in the place of the features that the target has yet to compute, so
that every draft is drawn from a law that knows all before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.axes import MESH_RULES, Buffer, Param, declare
from dspark_jax.config import DrafterConfig
from dspark_jax.models import cache as kv
from dspark_jax.models.drafters.dspark import KEEP_PRODUCTS
from dspark_jax.models.drafters.dspark import sections as sections
from dspark_jax.models.drafters.family import BlockOutputs, Choose, Law, Lessons, Reads, only_values
from dspark_jax.models.drafters.heads import DraftBlock, Drawn, block_of, draw_slot, law_confidence
from dspark_jax.models.layers import flat, matmul, rms_norm
from dspark_jax.models.merged import single_layers
from dspark_jax.models.reading import Cache, declare_caches
from dspark_jax.models.stacks import only_layer, place_of, stacks_of
from dspark_jax.models.targets.table import draft_blocks_of
from dspark_jax.models.vocab import Vocab, embed, unembed
from pallas_kernels.anchor_attention.api import anchor_attention
from pallas_kernels.ragged_attention.api import ragged_attention
from pallas_kernels.ragged_attention.groups import group_runs

lessons: Lessons = "chains"
reads: Reads = "streams"


@dataclass(frozen=True)
class Config(DrafterConfig):
    """Sizes of a drafter; ``block_size`` is the length of its chain.

    Attributes:
        norm_residual: whether the residual stream begins with the normalised features.
        norm_output: whether a chain goes on with the normalised state.
        confidence: in drafts comes of their laws, without a head.
    """

    norm_residual: bool = False
    norm_output: bool = False
    confidence: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        right: dict[str, Any] = {"num_layers": 1, "markov_rank": 0, "windows": ()}
        only_values(self, "an Eagle3 drafter", **right, confidence=True)


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


@struct.dataclass
class Context:
    """What is kept of the text.

    Attributes:
        entries: keys and values of the entries, by their positions.
        feature_LBD: the projected features of the last entry; L is 1.
    """

    entries: Cache
    feature_LBD: Any


@struct.dataclass
class Entry:
    """An entry before attention: its residual stream, query, key and value."""

    residual_XD: jax.Array
    q_XNH: jax.Array
    k_XKH: jax.Array
    v_XKH: jax.Array


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


def declare_context(cfg: Config, room: kv.Room) -> Context:
    """Declaration of the entries and of the last one's features."""
    feature = Buffer("LBD", (1, room.slots, cfg.hidden_size), room.dtype)
    return Context(declare_caches(sections(cfg), room), feature)


def for_decoding(drafter: Params, *, donate: bool) -> Params:
    """``DrafterFamily.for_decoding``."""
    layers = tuple(single_layers(stack, donate=donate) for stack in drafter.layers)
    return replace(drafter, layers=layers)


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


def finish_entry(
    drafter: Params, entry: Entry, attended_XNH: jax.Array, position_X: jax.Array, cfg: Config
) -> tuple[jax.Array, jax.Array]:
    """What the LM head reads of entries [X, D], and what a chain goes on with."""
    blocks, layer = draft_blocks_of(cfg), only_layer(drafter.layers)
    place, shared = place_of(sections(cfg), 0), blocks.shared(position_X, cfg)
    s_XD = blocks.finish(layer, entry.residual_XD, attended_XNH, place, shared, cfg)
    hidden_XD = rms_norm(s_XD, drafter.norm_D, cfg.rms_norm_eps)
    return hidden_XD, hidden_XD if cfg.norm_output else s_XD


def observe(
    drafter: Params,
    vocab: Vocab,
    context: Context,
    rows: kv.Rows,
    feature_TFD: jax.Array,
    token_BS: jax.Array,
    length_B: jax.Array,
    cfg: Config,
    *,
    kernels: str = "xla",
) -> Context:
    """``DrafterFamily.observe``: the entries of all rows. Those whose token is not known yet are
    garbage like those of rejected drafts: they lie behind all that a draft reads."""
    slot_T, position_T = rows.slot_T, rows.position_T
    next_T = token_BS.at[slot_T, position_T + 1].get(mode="clip")
    g_TD = project_features(drafter, feature_TFD)
    entry = begin_entry(drafter, vocab, next_T, g_TD, position_T, cfg)
    (held,) = context.entries
    entries = kv.write(held, 0, slot_T, position_T, entry.k_XKH, entry.v_XKH)
    is_last_T = position_T == length_B.at[slot_T].get(mode="clip") - 2
    last_T = jnp.where(is_last_T, slot_T, len(length_B))
    feature_LBD = kv.put(context.feature_LBD, 0, (last_T,), g_TD)
    return Context((entries,), feature_LBD)


def draft(
    drafter: Params,
    vocab: Vocab,
    context: Context,
    anchor_B: jax.Array,
    position_B: jax.Array,
    choose: Choose,
    law: Law,
    cfg: Config,
    *,
    kernels: str,
) -> DraftBlock:
    """``DrafterFamily.draft``: the last entry, once more for its query, and the chain behind it.
    The keys and values of both live here alone."""
    (held,) = context.entries
    attention = stacks_of(sections(cfg))[0].kind.attention
    dtype, groups = held.k[0].dtype, group_runs(None, len(anchor_B), 1)
    drawn: list[Drawn] = []
    own: list[tuple[jax.Array, jax.Array]] = []
    token_B, g_BD = anchor_B, context.feature_LBD[0]
    for slot in range(cfg.block_size):
        at_B = position_B - 1 + slot
        entry = begin_entry(drafter, vocab, token_B, g_BD, at_B, cfg)
        own.append((entry.k_XKH.astype(dtype), entry.v_XKH.astype(dtype)))
        keys, values = zip(*own, strict=True)
        out_BNH = ragged_attention(
            entry.q_XNH.astype(dtype),
            groups=groups,
            limit_T=jnp.maximum(position_B - 1, 0),
            own=(jnp.stack(keys, axis=1), jnp.stack(values, axis=1)),
            scale=attention.scale,
            implementation=kernels,
            **kv.attention_inputs(held, 0),
        )
        out_BNH = out_BNH.astype(entry.q_XNH.dtype)
        hidden_BD, g_BD = finish_entry(drafter, entry, out_BNH, at_B, cfg)
        drawn.append(draw_slot(vocab, unembed(vocab, hidden_BD), slot, choose, law))
        token_B = drawn[-1][0]
    return block_of(drawn, [law_confidence(logits_BU) for _, _, logits_BU in drawn])


def train_blocks(
    drafter: Params,
    vocab: Vocab,
    feature_BSFD: jax.Array,
    token_BS: jax.Array,
    previous_BAG: jax.Array,
    anchor_BA: jax.Array,
    keep_BA: jax.Array,
    cfg: Config,
    *,
    kernels: str,
) -> BlockOutputs:
    """``DrafterFamily.train_blocks``, the training-time test: a chain behind every anchor, whose
    own states take the place of features, and true tokens that of its drafts. At step k an entry
    sees the true ones before it, and of the steps up to k those of its own chain."""
    length = token_BS.shape[1]
    g_BSD = project_features(drafter, feature_BSFD)
    position_BS = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), token_BS.shape)
    true = begin_entry(drafter, vocab, jnp.roll(token_BS, -1, axis=1), g_BSD, position_BS, cfg)
    entry_BA = jnp.maximum(anchor_BA - 1, 0)
    attention, (heads_axis,) = stacks_of(sections(cfg))[0].kind.attention, MESH_RULES["K"]

    def step(
        drafter: Params, token_BA: jax.Array, g_BAD: jax.Array, own: Any, slot: int
    ) -> tuple[jax.Array, jax.Array, Any]:
        at_BA = entry_BA + slot
        entry = begin_entry(drafter, vocab, token_BA, g_BAD, at_BA, cfg)
        own = (*own, (entry.k_XKH, entry.v_XKH))
        keys, values = zip(*own, strict=True)
        out_BAGNH = anchor_attention(
            entry.q_XNH[:, :, None],
            true.k_XKH,
            true.v_XKH,
            (jnp.stack(keys, axis=2), jnp.stack(values, axis=2)),
            entry_BA,
            keep_BA,
            scale=attention.scale,
            sequences_axes=MESH_RULES["B"],
            heads_axis=heads_axis,
        )
        return *finish_entry(drafter, entry, out_BAGNH[:, :, 0], at_BA, cfg), own

    g_BAD = jax.vmap(lambda g_SD, entry_A: g_SD[entry_A])(g_BSD, entry_BA)
    again = jax.checkpoint(step, policy=KEEP_PRODUCTS, prevent_cse=False, static_argnums=4)
    hidden, own = [], ()
    for slot in range(previous_BAG.shape[-1]):
        hidden_BAD, g_BAD, own = again(drafter, previous_BAG[..., slot], g_BAD, own, slot)
        hidden.append(hidden_BAD)
    return BlockOutputs(jnp.stack(hidden, axis=2), None, None)
