"""Gemma 4's assistants: small models without a cache of their own that read the target's.

A chain, each step from the state that the one before predicts, h at first the target's own,
normalised, at the position before the anchor:

    u = layers(W_pre [sqrt(D) embed_target(x) ; h])    hidden = rms(u; norm)    h <- W_post hidden

All layers read keys and values that the target has cached: those with a window what the last layer
with a window wrote, the others what the last one without wrote. Every step of a round has the same
rotary position, the anchor's, and sees the same positions, those before it; under a window of W the
last W + 1 of them, as transformers has it. The LM head is the assistant's own embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.axes import declare
from dspark_jax.config import TargetConfig
from dspark_jax.models import cache as kv
from dspark_jax.models.drafters.chain import for_decoding as for_decoding
from dspark_jax.models.drafters.family import Borrowed, Choose, Law, Lessons, Reads
from dspark_jax.models.drafters.heads import DraftBlock, Drawn, block_by_law, draw_slot
from dspark_jax.models.drafters.medusa import declare_context as declare_context
from dspark_jax.models.drafters.medusa import observe as observe
from dspark_jax.models.layers import matmul, rms_norm
from dspark_jax.models.reading import Attention
from dspark_jax.models.stacks import (
    Place,
    Sections,
    loop_layers,
    make_sections,
    map_stacks,
    place_of,
)
from dspark_jax.models.targets import gemma
from dspark_jax.models.targets.table import family_of
from dspark_jax.models.vocab import Vocab, embed, unembed
from pallas_kernels.ragged_attention.api import ragged_attention
from pallas_kernels.ragged_attention.groups import group_runs

lessons: Lessons = "chains"
reads: Reads = "cache"
train_blocks = None  # its makers train it

CHAIN = 4  # drafts of a round


@dataclass(frozen=True)
class Config:
    """Sizes of an assistant.

    Attributes:
        model: of its layers.
        hidden_size: of the target.
        vocab_size: of both.
        window_layer: the layer of the target whose keys and values layers with a window read.
        full_layer: the one that the others read.
        block_size: most drafts of a round.
        confidence: in drafts comes of their laws.
        target_layer_ids: features that are read: none.
    """

    model: gemma.Config
    hidden_size: int
    vocab_size: int
    window_layer: int
    full_layer: int
    block_size: int = CHAIN
    confidence: bool = True
    target_layer_ids: tuple[int, ...] = ()

    @property
    def num_slots(self) -> int:
        """Slots of a block."""
        return self.block_size

    @property
    def sizes(self) -> dict[str, int]:
        """Axis letter -> size."""
        return {"V": self.vocab_size, "U": self.vocab_size}


@struct.dataclass
class Params:
    """Weights of an assistant.

    Attributes:
        before_ID: projection of its input.
        after_DO: of what it predicts for the next one.
        layers: of every stack.
        norm_D: final norm.
    """

    before_ID: Any
    layers: Any
    norm_D: Any
    after_DO: Any


def config_for(model: gemma.Config, hidden_size: int, target: TargetConfig) -> Config:
    """The configuration of an assistant of a target.

    Args:
        model: sizes of its layers.
        hidden_size: of the target that it was made for.
        target: sizes of the target.

    Raises:
        ValueError: it was made for another target.
    """
    if not isinstance(target, gemma.Config) or target.generation != 4:
        raise ValueError("an assistant reads what a Gemma 4 target caches: name another drafter")
    own = range(target.num_layers - target.num_shared)
    windowed = [layer for layer in own if target.window(layer)]
    full = [layer for layer in own if not target.window(layer)]
    for name, ours, theirs in (
        ("vocab_size", model.vocab_size, target.vocab_size),
        ("backbone_hidden_size", hidden_size, target.hidden_size),
        ("head_dim of full_attention", model.head_dim, target.head_dim),
        ("num_key_value_heads of full_attention", model.num_kv_heads, target.num_kv_heads),
        ("head_dim of sliding_attention", model.local_head_dim, target.local_head_dim),
        ("num_key_value_heads of sliding_attention", model.local_heads, target.local_heads),
        ("layers with a window", any(model.windows), bool(windowed) and any(model.windows)),
    ):
        if ours != theirs:
            raise ValueError(
                f"the assistant does not fit the target: its {name} is {ours}, the target has "
                f"{theirs}; use the assistant that was made for this target"
            )
    last = windowed[-1] if windowed else 0
    return Config(model, hidden_size, target.vocab_size, last, full[-1])


def sections(cfg: Config) -> Sections:
    """The layers by their kinds, which read a layer of the target."""
    small = cfg.model

    def kind(layer: int) -> gemma.Kind:
        window = small.window(layer)
        heads = small.local_heads if window else small.num_kv_heads
        width = small.local_head_dim if window else small.head_dim
        read = cfg.window_layer if window else cfg.full_layer
        return gemma.Kind(Attention(heads, width, window, small.scale, None, read))

    return make_sections(tuple(map(kind, range(small.num_layers))))


def declare_drafter(cfg: Config) -> Params:
    """Declaration of every parameter under its name in Google's checkpoints."""
    sizes = cfg.model.sizes | {"I": 2 * cfg.hidden_size, "O": cfg.hidden_size}
    return Params(
        before_ID=declare("ID", sizes, "pre_projection.weight", out="D"),
        layers=map_stacks(
            lambda stack: gemma.declare_stack(cfg.model, stack, "model.layers"), sections(cfg)
        ),
        norm_D=declare("D", sizes, "model.norm.weight", init="ones"),
        after_DO=declare("DO", sizes, "post_projection.weight", out="O"),
    )


def declare_vocab(cfg: Config) -> Vocab:
    """Declaration of its embedding, which is its LM head."""
    return Vocab(declare("VD", cfg.model.sizes, "model.embed_tokens.weight", init="embed"))


def draft(
    drafter: Params,
    vocab: Vocab,
    context: Borrowed,
    anchor_B: jax.Array,
    position_B: jax.Array,
    choose: Choose,
    law: Law,
    cfg: Config,
    *,
    kernels: str,
) -> DraftBlock:
    """``DrafterFamily.draft``."""
    groups, dtype = group_runs(None, len(anchor_B), 1), drafter.norm_D.dtype
    shared = gemma.tables(position_B, cfg.model)
    written = family_of(context.cfg).sections(context.cfg)

    def block(x_BD: jax.Array, layer: Any, place: Place) -> jax.Array:
        own = place.kind.attention
        q_BNH = gemma.project(layer, x_BD, place, shared, cfg.model)[0]
        at = place_of(written, own.reads)
        held = context.cache[at.stack]
        out_BNH = ragged_attention(
            q_BNH.astype(held.k[0].dtype),
            groups=groups,
            limit_T=position_B,
            window=own.window + 1 if own.window else None,
            scale=own.scale,
            implementation=kernels,
            **kv.attention_inputs(held, at.index),
        )
        return gemma.finish(layer, x_BD, out_BNH.astype(x_BD.dtype), place, shared, cfg.model)

    drawn: list[Drawn] = []
    token_B, h_BD = anchor_B, context.own.hidden_LBD[0].astype(dtype)
    for slot in range(cfg.block_size):
        token_BD = embed(context.target.vocab, token_B).astype(dtype)
        x_BD = matmul(jnp.concatenate([token_BD, h_BD], axis=-1), drafter.before_ID)
        u_BD = loop_layers(block, x_BD, drafter.layers, sections(cfg))
        hidden_BD = rms_norm(u_BD, drafter.norm_D, cfg.model.rms_norm_eps)
        drawn.append(draw_slot(vocab, unembed(vocab, hidden_BD), slot, choose, law))
        token_B, h_BD = drawn[-1][0], matmul(hidden_BD, drafter.after_DO)
    return block_by_law(drawn)
