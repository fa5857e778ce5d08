"""Chains: drafts one after the other, each from the state that gave the one before.

Entry i pairs what is known of the target at position i with token i + 1; one decoder layer, causal
over the entries, makes of it a state that predicts token i + 2. A chain of drafts goes on with that
state in the place of what the target has yet to compute, so that every draft is drawn from a law
that knows all before it. Its cache is written once, with true entries; those of drafts live in the
round alone. What an entry is made of, and what is read of its state, is a method's own
(:class:`Links`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.axes import MESH_RULES, Buffer
from dspark_jax.config import DrafterConfig
from dspark_jax.models import cache as kv
from dspark_jax.models.drafters.dspark import KEEP_PRODUCTS, sections
from dspark_jax.models.drafters.family import BlockOutputs, Choose, Law, only_values
from dspark_jax.models.drafters.heads import DraftBlock, Drawn, block_by_law, draw_slot
from dspark_jax.models.layers import rms_norm
from dspark_jax.models.merged import single_layers
from dspark_jax.models.reading import Cache, declare_caches
from dspark_jax.models.stacks import only_layer, place_of, stacks_of
from dspark_jax.models.targets.table import draft_blocks_of
from dspark_jax.models.vocab import Vocab, unembed
from pallas_kernels.anchor_attention.api import anchor_attention
from pallas_kernels.ragged_attention.api import ragged_attention
from pallas_kernels.ragged_attention.groups import group_runs


@dataclass(frozen=True)
class ChainConfig(DrafterConfig):
    """Sizes of a drafter; ``block_size`` is the length of its chain.

    Attributes:
        norm_output: whether a chain goes on with the normalised state.
        confidence: in drafts comes of their laws, without a head.
    """

    norm_output: bool = False
    confidence: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        right: dict[str, Any] = {"num_layers": 1, "markov_rank": 0, "windows": ()}
        only_values(self, "a drafter of chains", **right, confidence=True)


@struct.dataclass
class Context:
    """What is kept of the text.

    Attributes:
        entries: keys and values of the entries, by their positions.
        state_LBD: what the last entry begins with; L is 1.
    """

    entries: Cache
    state_LBD: Any


@struct.dataclass
class Entry:
    """An entry before attention: its residual stream, query, key and value."""

    residual_XD: jax.Array
    q_XNH: jax.Array
    k_XKH: jax.Array
    v_XKH: jax.Array


@dataclass(frozen=True)
class Links:
    """What a method's entries are made of.

    Attributes:
        state: ``(drafter, feature_XFD)``: what a true entry begins with [X, D].
        begin: ``(drafter, vocab, token_X, state_XD, position_X, cfg)``: entries up to their
            attention, of the tokens behind their positions.
    """

    state: Callable[[Any, jax.Array], jax.Array]
    begin: Callable[..., Entry]


def declare_context(cfg: ChainConfig, room: kv.Room) -> Context:
    """Declaration of the entries and of the last one's beginning."""
    state = Buffer("LBD", (1, room.slots, cfg.hidden_size), room.dtype)
    return Context(declare_caches(sections(cfg), room), state)


def for_decoding(drafter: Any, *, donate: bool) -> Any:
    """``DrafterFamily.for_decoding``."""
    layers = tuple(single_layers(stack, donate=donate) for stack in drafter.layers)
    return replace(drafter, layers=layers)


def finish(
    drafter: Any, entry: Entry, attended_XNH: jax.Array, position_X: jax.Array, cfg: ChainConfig
) -> tuple[jax.Array, jax.Array]:
    """What the LM head reads of entries [X, D], and what a chain goes on with.

    Args:
        drafter: weights.
        entry: the entries.
        attended_XNH: what their queries have seen.
        position_X: int32 their positions.
        cfg: sizes.
    """
    blocks, layer = draft_blocks_of(cfg), only_layer(drafter.layers)
    place, shared = place_of(sections(cfg), 0), blocks.shared(position_X, cfg)
    s_XD = blocks.finish(layer, entry.residual_XD, attended_XNH, place, shared, cfg)
    hidden_XD = rms_norm(s_XD, drafter.norm_D, cfg.rms_norm_eps)
    return hidden_XD, hidden_XD if cfg.norm_output else s_XD


def observe(
    links: Links,
    drafter: Any,
    vocab: Vocab,
    context: Context,
    rows: kv.Rows,
    feature_TFD: jax.Array,
    token_BS: jax.Array,
    length_B: jax.Array,
    cfg: ChainConfig,
    *,
    kernels: str = "xla",
) -> Context:
    """``DrafterFamily.observe``: the entries of all rows. Those whose token is not known yet are
    garbage like those of rejected drafts: they lie behind all that a draft reads."""
    slot_T, position_T = rows.slot_T, rows.position_T
    next_T = token_BS.at[slot_T, position_T + 1].get(mode="clip")
    state_TD = links.state(drafter, feature_TFD)
    entry = links.begin(drafter, vocab, next_T, state_TD, position_T, cfg)
    (held,) = context.entries
    entries = kv.write(held, 0, slot_T, position_T, entry.k_XKH, entry.v_XKH)
    is_last_T = position_T == length_B.at[slot_T].get(mode="clip") - 2
    last_T = jnp.where(is_last_T, slot_T, len(length_B))
    state_LBD = kv.put(context.state_LBD, 0, (last_T,), state_TD)
    return Context((entries,), state_LBD)


def draft(
    links: Links,
    drafter: Any,
    vocab: Vocab,
    context: Context,
    anchor_B: jax.Array,
    position_B: jax.Array,
    choose: Choose,
    law: Law,
    cfg: ChainConfig,
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
    token_B, state_BD = anchor_B, context.state_LBD[0]
    for slot in range(cfg.block_size):
        at_B = position_B - 1 + slot
        entry = links.begin(drafter, vocab, token_B, state_BD, at_B, cfg)
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
        hidden_BD, state_BD = finish(drafter, entry, out_BNH, at_B, cfg)
        drawn.append(draw_slot(vocab, unembed(vocab, hidden_BD), slot, choose, law))
        token_B = drawn[-1][0]
    return block_by_law(drawn)


def train_blocks(
    links: Links,
    drafter: Any,
    vocab: Vocab,
    feature_BSFD: jax.Array,
    token_BS: jax.Array,
    previous_BAG: jax.Array,
    anchor_BA: jax.Array,
    keep_BA: jax.Array,
    cfg: ChainConfig,
    *,
    kernels: str,
) -> BlockOutputs:
    """``DrafterFamily.train_blocks``, the training-time test: a chain behind every anchor, whose
    own states take the place of features, and true tokens that of its drafts. At step k an entry
    sees the true ones before it, and of the steps up to k those of its own chain."""
    length = token_BS.shape[1]
    state_BSD = links.state(drafter, feature_BSFD)
    position_BS = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), token_BS.shape)
    true = links.begin(drafter, vocab, jnp.roll(token_BS, -1, axis=1), state_BSD, position_BS, cfg)
    entry_BA = jnp.maximum(anchor_BA - 1, 0)
    attention, (heads_axis,) = stacks_of(sections(cfg))[0].kind.attention, MESH_RULES["K"]

    def step(
        drafter: Any, token_BA: jax.Array, state_BAD: jax.Array, own: Any, slot: int
    ) -> tuple[jax.Array, jax.Array, Any]:
        at_BA = entry_BA + slot
        entry = links.begin(drafter, vocab, token_BA, state_BAD, at_BA, cfg)
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
        return *finish(drafter, entry, out_BAGNH[:, :, 0], at_BA, cfg), own

    state_BAD = jax.vmap(lambda state_SD, entry_A: state_SD[entry_A])(state_BSD, entry_BA)
    again = jax.checkpoint(step, policy=KEEP_PRODUCTS, prevent_cse=False, static_argnums=4)
    hidden, own = [], ()
    for slot in range(previous_BAG.shape[-1]):
        hidden_BAD, state_BAD, own = again(drafter, previous_BAG[..., slot], state_BAD, own, slot)
        hidden.append(hidden_BAD)
    return BlockOutputs(jnp.stack(hidden, axis=2), None, None)
