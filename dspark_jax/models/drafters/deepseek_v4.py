"""The DSpark drafter inside DeepSeek-V4's checkpoints: stages that are layers of the family.

The stages ``mtp.0``, ``mtp.1``, ... have the residual streams, the attention and the experts of the
target's layers without compressed entries. Every slot of a block sees the last ``window`` context
positions before the anchor, however far behind it the slot is, and the whole block in both
directions. The key of a context position is made of the projected features alone, of which the
streams and the norm of a stage see nothing; it is the value, too.

Sources: DSpark (2026), section 3; DeepSeek-V4 (2026), sections 2.1 to 2.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.axes import declare
from dspark_jax.config import DrafterConfig
from dspark_jax.models import hyper_connections as streams
from dspark_jax.models.cache import Room, Rows
from dspark_jax.models.drafters import ring
from dspark_jax.models.drafters.dspark import KEEP_PRODUCTS, DrafterParams
from dspark_jax.models.drafters.family import BlockOutputs, Choose, Law, Lessons, Reads
from dspark_jax.models.drafters.heads import (
    DraftBlock,
    declare_confidence_head,
    declare_markov_head,
    sample_block,
    teach_heads,
)
from dspark_jax.models.layers import flat, matmul, rms_norm
from dspark_jax.models.merged import single_layers
from dspark_jax.models.reading import Attention
from dspark_jax.models.rope import rope_table
from dspark_jax.models.stacks import Place, Sections, Stack, is_unstacked, loop_layers
from dspark_jax.models.targets.config_json import count_field, field
from dspark_jax.models.targets.deepseek_v4 import Config as TargetConfig
from dspark_jax.models.targets.deepseek_v4_layers import (
    Inputs,
    Kind,
    Layer,
    attend_to,
    declare_layers,
    keys,
    read_layer,
)
from dspark_jax.models.vocab import Vocab, embed

# (layer, index of the stage) -> keys [P, S, H] that the blocks see, and which of them, bool [P, S].
Context = Callable[[Layer, Any], tuple[jax.Array, jax.Array]]


lessons: Lessons = "blocks"
reads: Reads = "streams"


@dataclass(frozen=True, kw_only=True)
class StageConfig(DrafterConfig):
    """Sizes of a drafter whose stages are the family's layers.

    Attributes:
        stage: of a target that has the stages for layers.
    """

    stage: TargetConfig


@dataclass(frozen=True, kw_only=True)
class Config(StageConfig):
    """Sizes of a DSpark drafter."""

    @property
    def last_feature(self) -> int:
        """Features are means over the streams, which the target's last layer has like all."""
        return self.num_target_layers - 1


@struct.dataclass
class StageParams(DrafterParams):
    """Weights of a drafter.

    Attributes:
        read_out: of the streams after the last stage.
    """

    read_out: Any = None


def stages_of(target: TargetConfig, count: int) -> TargetConfig:
    """The sizes of so many layers like those of a target, without compressed entries or tables."""
    windows = (target.window(0),) * count
    plain: dict[str, Any] = {"ratios": (0,) * count, "sparse": (), "hashed": (), "suppressed": ()}
    return replace(target, num_layers=count, windows=windows, **plain)


def stage_fields(stage: TargetConfig, num_target_layers: int) -> dict[str, Any]:
    """The fields of a ``DrafterConfig`` that follow from its stages."""
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
        "head_dim", "rms_norm_eps", "rope", "max_positions", "windows",
    )  # fmt: skip
    own = {name: getattr(stage, name) for name in names}
    return own | {"stage": stage, "num_target_layers": num_target_layers, "owns_vocab": False}


def config(hf: Mapping[str, Any], target: TargetConfig, num_stages: int) -> Config:
    """The configuration of the drafter in a target's checkpoint.

    Args:
        hf: the target's ``config.json``.
        target: its configuration.
        num_stages: how many are stored, whatever ``num_nextn_predict_layers`` says.

    Raises:
        ValueError: a field is missing or wrong.
    """
    taps = field(hf, "dspark_target_layer_ids", list)
    if not all(type(layer) is int for layer in taps):
        raise ValueError(f"dspark_target_layer_ids {taps} must list layers")
    return Config(
        **stage_fields(stages_of(target, num_stages), target.num_layers),
        block_size=field(hf, "dspark_block_size", int),
        mask_token_id=count_field(hf, "dspark_noise_token_id"),
        target_layer_ids=tuple(taps),
        markov_rank=count_field(hf, "dspark_markov_rank"),
        confidence=True,
    )


def of_recipe(fields: Mapping[str, Any], target: TargetConfig) -> Config:
    """The configuration of a drafter that a recipe describes.

    Args:
        fields: of a ``DrafterConfig``.
        target: sizes of the target, whose layers the stages are like.

    Raises:
        ValueError: a field is wrong, or the stages leave no choice there.
    """
    free = "block_size", "mask_token_id", "target_layer_ids", "markov_rank", "num_anchors"
    stage = stages_of(target, fields["num_layers"])
    own = Config(
        **stage_fields(stage, target.num_layers),
        **{name: fields[name] for name in free},
        confidence=True,
    )
    for name, value in fields.items():
        if value != getattr(own, name) and (name, value) != ("windows", ()):
            raise ValueError(
                f"{name} is {value!r}: a drafter of layers like this target's has "
                f"{getattr(own, name)!r}; leave it out of the recipe"
            )
    return own


def config_dict(cfg: Config) -> dict[str, Any]:
    """What :func:`config` reads."""
    return {
        "dspark_block_size": cfg.block_size,
        "dspark_markov_rank": cfg.markov_rank,
        "dspark_noise_token_id": cfg.mask_token_id,
        "dspark_target_layer_ids": list(cfg.target_layer_ids),
    }


def stage_stack(cfg: StageConfig) -> Stack:
    """The stages, which are all alike."""
    kind = Kind(Attention(1, cfg.stage.head_dim, cfg.window(0)))
    return Stack(kind, range(cfg.num_layers))


def declare_drafter(cfg: Config) -> StageParams:
    """Declaration of every parameter under its name in the target's checkpoint."""
    sizes, last = cfg.stage.sizes | cfg.sizes | {"Y": cfg.hidden_size}, cfg.num_layers - 1
    stack = stage_stack(cfg)
    return StageParams(
        fc_FYD=declare("FYD", sizes, "mtp.0.main_proj.weight", out="D"),
        hidden_norm_D=declare("D", sizes, "mtp.0.main_norm.weight", init="ones"),
        layers=(declare_layers(cfg.stage, stack.kind, stack.layers, "mtp"),),
        norm_D=declare("D", sizes, f"mtp.{last}.norm.weight", init="ones"),
        head=declare_markov_head(cfg, f"mtp.{last}."),
        confidence=declare_confidence_head(cfg, f"mtp.{last}.", biased=False),
        read_out=streams.declare_mixing(sizes, f"mtp.{last}.hc_head"),
    )


def declare_context(cfg: Config, room: Room) -> Any:
    """Declaration of the keys of the last positions."""
    return ring.declare(cfg.num_layers, cfg.window(0), cfg.stage.head_dim, room)


def sections(cfg: StageConfig) -> Sections:
    """None of its layers has the attention of ``ragged_attention``."""
    return ()


def for_decoding(drafter: Any, *, donate: bool) -> Any:
    """``DrafterFamily.for_decoding``."""
    layers = tuple(single_layers(stack, donate=donate) for stack in drafter.layers)
    return replace(drafter, layers=layers)


def context_inputs(drafter: StageParams, feature_XFD: jax.Array, cfg: Config) -> jax.Array:
    """What the keys of the context are made of, [X, D]."""
    lead = feature_XFD.shape[:-2]
    flat_XI = feature_XFD.reshape(*lead, -1).astype(drafter.norm_D.dtype)
    context_XD = matmul(flat_XI, flat(drafter.fc_FYD, flat_XI.shape[-1]))
    return rms_norm(context_XD, drafter.hidden_norm_D, cfg.rms_norm_eps)


def observe(
    drafter: StageParams,
    vocab: Vocab,
    context: Any,
    rows: Rows,
    feature_TFD: jax.Array,
    token_BS: jax.Array,
    length_B: jax.Array,
    cfg: Config,
    *,
    kernels: str = "xla",
) -> Any:
    """``DrafterFamily.observe``: the keys of what was committed, of every stage."""
    context_TD = context_inputs(drafter, feature_TFD, cfg)
    table = rope_table(rows.position_T, cfg.stage.rope, cfg.stage.rope_dim)
    slot_T = ring.kept_slots(rows, length_B, cfg.window(0))

    def write(context: Any, layer: Layer, place: Place) -> Any:
        key_TH = keys(layer.heads, context_TD, table, cfg.stage)
        return ring.write(context, place.index, slot_T, rows.position_T, key_TH)

    return loop_layers(write, context, drafter.layers, ((stage_stack(cfg),),))


def block_streams(
    drafter: StageParams,
    vocab: Vocab,
    anchor_P: jax.Array,
    position_P: jax.Array,
    context: Context,
    cfg: Config,
) -> jax.Array:
    """The streams [P, G, J, D] of the blocks behind P anchors, after the last stage.

    Args:
        drafter: weights.
        vocab: the drafter's vocabulary (embeddings).
        anchor_P: int32 anchor tokens.
        position_P: int32 their positions.
        context: see :data:`Context`.
        cfg: sizes.
    """
    slot_G = jnp.arange(cfg.block_size, dtype=jnp.int32)
    token_PG = jnp.where(slot_G == 0, anchor_P[:, None], cfg.mask_token_id)
    table = rope_table(position_P[:, None] + slot_G, cfg.stage.rope, cfg.stage.rope_dim)
    x_PGD = embed(vocab, token_PG).astype(drafter.norm_D.dtype)
    own_PGG = jnp.ones((len(anchor_P), cfg.block_size, cfg.block_size), bool)

    def stage(x_PGJD: jax.Array, layer: Layer, place: Place) -> jax.Array:
        def compute(x_PGJD: jax.Array, layer: Layer, index: Any) -> jax.Array:
            key_PSH, seen_PS = context(layer, index)
            seen_PGS = jnp.broadcast_to(seen_PS[:, None], (*token_PG.shape, seen_PS.shape[-1]))

            def attend(inputs: Inputs) -> tuple[jax.Array, None]:
                own_PGH = inputs.key_XH
                seen = [(key_PSH.astype(own_PGH.dtype), seen_PGS), (own_PGH, own_PGG)]
                return attend_to(inputs.q_XNH, seen, layer.heads.sink_N), None

            return read_layer(layer, x_PGJD, None, table, cfg.stage, attend)[0]

        if not is_unstacked(drafter.layers):  # the form that is trained
            compute = jax.checkpoint(compute, policy=KEEP_PRODUCTS, prevent_cse=False)
        return compute(x_PGJD, layer, place.index)

    start_PGJD = streams.start(x_PGD, cfg.stage.streams)
    return loop_layers(stage, start_PGJD, drafter.layers, ((stage_stack(cfg),),))


def read_out(drafter: Any, x_XJD: jax.Array, cfg: StageConfig) -> tuple[jax.Array, jax.Array]:
    """What the heads read of the streams, and what the LM head reads, [X, D] each."""
    state_XD = streams.read_out(drafter.read_out, x_XJD, cfg.stage.streams)
    return state_XD, rms_norm(state_XD, drafter.norm_D, cfg.rms_norm_eps)


def draft(
    drafter: StageParams,
    vocab: Vocab,
    context: Any,
    anchor_B: jax.Array,
    position_B: jax.Array,
    choose: Choose,
    law: Law,
    cfg: Config,
    *,
    kernels: str,
) -> DraftBlock:
    """``DrafterFamily.draft``."""

    def held(layer: Layer, index: Any) -> tuple[jax.Array, jax.Array]:
        key_BSH = context[index]
        return key_BSH, ring.positions(position_B, key_BSH.shape[1]) >= 0

    x_BGJD = block_streams(drafter, vocab, anchor_B, position_B, held, cfg)
    state_BGD, hidden_BGD = read_out(drafter, x_BGJD, cfg)
    return sample_block(drafter, vocab, hidden_BGD, anchor_B, choose, cfg, law, state_BGD)


def train_blocks(
    drafter: StageParams,
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
    """``DrafterFamily.train_blocks``; a dummy block, whose anchor is 0, sees no context."""
    context_BSD = context_inputs(drafter, feature_BSFD, cfg)
    position_S = jnp.arange(context_BSD.shape[1], dtype=jnp.int32)
    table = rope_table(position_S, cfg.stage.rope, cfg.stage.rope_dim)
    before_BAW = anchor_BA[..., None] + jnp.arange(-cfg.window(0), 0)
    count = anchor_BA.size

    def window(layer: Layer, index: Any) -> tuple[jax.Array, jax.Array]:
        key_BSH = keys(layer.heads, context_BSD, table, cfg.stage)
        place_BAW = jnp.maximum(before_BAW, 0)
        key_BAWH = jax.vmap(lambda key_SH, place_AW: key_SH[place_AW])(key_BSH, place_BAW)
        return key_BAWH.reshape(count, *key_BAWH.shape[2:]), (before_BAW >= 0).reshape(count, -1)

    x_PGJD = block_streams(
        drafter, vocab, previous_BAG[..., 0].reshape(-1), anchor_BA.reshape(-1), window, cfg
    )
    x_BAGJD = x_PGJD.reshape(*previous_BAG.shape, *x_PGJD.shape[2:])
    state_BAGD, hidden_BAGD = read_out(drafter, x_BAGJD, cfg)
    return BlockOutputs(hidden_BAGD, *teach_heads(drafter, previous_BAG, state_BAGD, cfg))
