"""The layer for the next token but one inside DeepSeek-V4's first checkpoints, chained.

Entry t has the target's streams after its last layer at position t, and token t + 1:

    X^in_t = W_e rms(embed(x_{t+1})) added to every stream of W_h rms(X_t)

One layer of the family over the entries, causal, under the target's window, at rotary position t,
gives the streams X'_t, which predict token t + 2. A chain of drafts goes on with X'_t in the place
of the streams that the target has yet to compute. Drafts are chosen without a confidence.

Source: DeepSeek-V4 (2026), section 2.1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.axes import Buffer, declare
from dspark_jax.models import hyper_connections as streams
from dspark_jax.models.cache import Room, Rows
from dspark_jax.models.drafters import deepseek_v4, ring
from dspark_jax.models.drafters.deepseek_v4 import (
    StageConfig,
    read_out,
    stage_fields,
    stage_stack,
    stages_of,
)
from dspark_jax.models.drafters.deepseek_v4 import for_decoding as for_decoding
from dspark_jax.models.drafters.deepseek_v4 import sections as sections
from dspark_jax.models.drafters.family import Choose, Law, Lessons, Reads
from dspark_jax.models.drafters.heads import DraftBlock, Drawn, block_of, draw_slot
from dspark_jax.models.layers import matmul, rms_norm
from dspark_jax.models.rope import rope_table
from dspark_jax.models.stacks import only_layer
from dspark_jax.models.targets.config_json import count_field
from dspark_jax.models.targets.deepseek_v4 import Config as TargetConfig
from dspark_jax.models.targets.deepseek_v4_layers import (
    Inputs,
    attend_to,
    declare_layers,
    keys,
    read_layer,
)
from dspark_jax.models.vocab import Vocab, embed, unembed

CHAIN = 3  # drafts a round: files do not say, and each is one more pass of the layer


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Sizes of a drafter."""

    @property
    def last_feature(self) -> int:
        """Features are the streams after the last layer, by the numbers behind it."""
        return self.num_target_layers + self.stage.num_streams - 1


@struct.dataclass
class Params:
    """Weights of a drafter.

    Attributes:
        token_norm_D: of the embedding.
        stream_norm_D: of each stream.
        token_ID: projection of what the first norm gives.
        stream_ID: of what the second gives.
        layers: the layer, a stack of one.
        norm_D: final norm.
        read_out: of the streams after the layer.
        head: None; others have such a head.
        confidence: likewise.
    """

    token_norm_D: Any
    stream_norm_D: Any
    token_ID: Any
    stream_ID: Any
    layers: Any
    norm_D: Any
    read_out: Any
    head: Any = None
    confidence: Any = None


@struct.dataclass
class Context:
    """What is kept of the text.

    Attributes:
        key_LBSH: keys of the entries of the last positions, a :mod:`.ring`.
        stream_LBJD: the target's streams at the last position before the anchor; L is 1.
    """

    key_LBSH: Any
    stream_LBJD: Any


def inside(
    hf: Mapping[str, Any], target: TargetConfig, names: Collection[str]
) -> StageConfig | None:
    """The configuration of the drafter in a target's checkpoint; None where it holds none.

    Args:
        hf: the target's ``config.json``; with a ``dspark_block_size`` the drafter is of
            :mod:`.deepseek_v4`.
        target: its configuration.
        names: of the drafter's tensors. They alone say how many stages there are.

    Raises:
        ValueError: a field is missing or wrong.
    """
    stages = (f"mtp.{stage}.attn_norm.weight" for stage in itertools.count())
    count = sum(1 for _ in itertools.takewhile(names.__contains__, stages))
    if not count:
        return None
    if count_field(hf, "dspark_block_size", 0):
        return deepseek_v4.config(hf, target, count)
    return config(target)


def config(target: TargetConfig) -> Config:
    """The configuration of the drafter of this kind of a target."""
    layers = target.num_layers
    return Config(
        **stage_fields(stages_of(target, 1), layers),
        block_size=CHAIN,
        target_layer_ids=tuple(range(layers, layers + target.num_streams)),
    )


def declare_drafter(cfg: Config) -> Params:
    """Declaration of every parameter under its name in the target's checkpoint."""
    sizes = cfg.stage.sizes | cfg.sizes | {"I": cfg.hidden_size}
    stack = stage_stack(cfg)

    def norm(name: str) -> Any:
        return declare("D", sizes, f"mtp.0.{name}.weight", init="ones")

    return Params(
        token_norm_D=norm("enorm"),
        stream_norm_D=norm("hnorm"),
        token_ID=declare("ID", sizes, "mtp.0.e_proj.weight", out="D"),
        stream_ID=declare("ID", sizes, "mtp.0.h_proj.weight", out="D"),
        layers=(declare_layers(cfg.stage, stack.kind, stack.layers, "mtp"),),
        norm_D=norm("norm"),
        read_out=streams.declare_mixing(sizes, "mtp.0.hc_head"),
    )


def declare_context(cfg: Config, room: Room) -> Context:
    """Declaration of keys and streams."""
    shape = 1, room.slots, cfg.stage.num_streams, cfg.hidden_size
    return Context(
        ring.declare(1, cfg.window(0), cfg.stage.head_dim, room),
        Buffer("LBJD", shape, room.dtype),
    )


def entry_inputs(
    drafter: Params, vocab: Vocab, token_X: jax.Array, x_XJD: jax.Array, cfg: Config
) -> jax.Array:
    """``X^in`` of entries [X, J, D].

    Args:
        drafter: weights.
        vocab: the drafter's vocabulary (embeddings).
        token_X: int32 tokens behind the entries' positions.
        x_XJD: streams at these positions.
        cfg: sizes.
    """
    dtype = drafter.norm_D.dtype
    token_XD = rms_norm(embed(vocab, token_X).astype(dtype), drafter.token_norm_D, cfg.rms_norm_eps)
    stream_XJD = rms_norm(x_XJD.astype(dtype), drafter.stream_norm_D, cfg.rms_norm_eps)
    given_XD = matmul(token_XD, drafter.token_ID)
    return matmul(stream_XJD, drafter.stream_ID) + given_XD[..., None, :]


def entry_keys(drafter: Params, x_XJD: jax.Array, position_X: jax.Array, cfg: Config) -> jax.Array:
    """Keys [X, H] of entries, of their inputs alone."""
    layer = only_layer(drafter.layers)
    mix = streams.mix(layer.attention_mixing, x_XJD, cfg.stage.streams)
    u_XD = rms_norm(streams.join(mix, x_XJD), layer.attention_norm_D, cfg.rms_norm_eps)
    table = rope_table(position_X, cfg.stage.rope, cfg.stage.rope_dim)
    return keys(layer.heads, u_XD, table, cfg.stage)


def observe(
    drafter: Params,
    vocab: Vocab,
    context: Context,
    rows: Rows,
    feature_TFD: jax.Array,
    token_BS: jax.Array,
    length_B: jax.Array,
    cfg: Config,
    *,
    kernels: str = "xla",
) -> Context:
    """``DrafterFamily.observe``: keys of the entries whose token is known, and the last streams."""
    slot_T = ring.kept_slots(rows, length_B, cfg.window(0))
    next_T = token_BS.at[slot_T, rows.position_T + 1].get(mode="clip")
    x_TJD = entry_inputs(drafter, vocab, next_T, feature_TFD, cfg)
    key_TH = entry_keys(drafter, x_TJD, rows.position_T, cfg)
    last_T = rows.position_T == length_B.at[slot_T].get(mode="clip") - 2
    last_T = jnp.where(last_T, slot_T, len(length_B))

    def put(held_BJD: jax.Array) -> jax.Array:
        return held_BJD.at[last_T].set(feature_TFD.astype(held_BJD.dtype), mode="drop")

    held = context.stream_LBJD
    kept = tuple(map(put, held)) if isinstance(held, tuple) else jax.vmap(put)(held)
    return Context(ring.write(context.key_LBSH, 0, slot_T, rows.position_T, key_TH), kept)


def chain(
    drafter: Params,
    vocab: Vocab,
    x_PJD: jax.Array,
    anchor_P: jax.Array,
    position_P: jax.Array,
    key_PSH: jax.Array,
    place_PS: jax.Array,
    step: Callable[[jax.Array, int], jax.Array],
    cfg: Config,
) -> None:
    """Drafts behind P anchors, one after the other.

    Args:
        drafter: weights.
        vocab: the drafter's vocabulary (embeddings).
        x_PJD: the target's streams at the positions before the anchors.
        anchor_P: int32 anchor tokens.
        position_P: int32 their positions.
        key_PSH: keys of entries.
        place_PS: int32 their positions; those from the one before the anchor on are not read.
        step: ``(x_PJD, slot) -> token_P``: the token of a slot, of the streams that predict it.
        cfg: sizes.
    """
    token_P, own, layer = anchor_P, [], only_layer(drafter.layers)
    for slot in range(cfg.block_size):
        at_P = position_P - 1 + slot
        table = rope_table(at_P[:, None], cfg.stage.rope, cfg.stage.rope_dim)
        oldest_P1 = at_P[:, None] - cfg.window(0) + 1
        seen_PS = (place_PS >= jnp.maximum(oldest_P1, 0)) & (place_PS < position_P[:, None] - 1)

        def attend(inputs: Inputs, seen_PS: jax.Array = seen_PS) -> tuple[jax.Array, None]:
            own.append(inputs.key_XH)
            chain_PSH = jnp.concatenate(own, axis=1)  # no longer than the window
            every_PCS = jnp.ones((len(chain_PSH), 1, chain_PSH.shape[1]), bool)
            seen = [(key_PSH.astype(chain_PSH.dtype), seen_PS[:, None]), (chain_PSH, every_PCS)]
            return attend_to(inputs.q_XNH, seen, layer.heads.sink_N), None

        x_PJD = entry_inputs(drafter, vocab, token_P, x_PJD, cfg)
        x_PCJD, _ = read_layer(layer, x_PJD[:, None], None, table, cfg.stage, attend)
        x_PJD = x_PCJD[:, 0]
        token_P = step(x_PJD, slot)


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
    """``DrafterFamily.draft``."""
    drawn: list[Drawn] = []

    def step(x_BJD: jax.Array, slot: int) -> jax.Array:
        logits_BU = unembed(vocab, read_out(drafter, x_BJD, cfg)[1])
        drawn.append(draw_slot(vocab, logits_BU, slot, choose, law))
        return drawn[-1][0]

    key_BSH, x_BJD = context.key_LBSH[0], context.stream_LBJD[0]
    x_BJD = x_BJD.astype(drafter.norm_D.dtype)
    place_BS = ring.positions(position_B, key_BSH.shape[1])
    chain(drafter, vocab, x_BJD, anchor_B, position_B, key_BSH, place_BS, step, cfg)
    return block_of(drawn)


train_blocks = None  # of these there is no training yet
lessons: Lessons = "chains"
reads: Reads = "streams"
