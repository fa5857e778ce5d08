"""Early exit: the target's own first N layers draft, with a final norm of their own and its head.

It has no cache: its rows read that of the target's layers, which is valid before the anchor, and
each other. What they compute is not kept; verification computes the same once more. Nothing but the
norm is trained, and without training it is the target's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.axes import declare
from dspark_jax.config import DrafterConfig, TargetConfig
from dspark_jax.models.cache import Beside, Room, Rows
from dspark_jax.models.drafters.family import (
    BlockOutputs,
    Borrowed,
    Choose,
    Law,
    Lessons,
    Reads,
    only_values,
)
from dspark_jax.models.drafters.heads import DraftBlock, Drawn, block_by_law, draw_slot
from dspark_jax.models.drafters.medusa import fields_of_heads
from dspark_jax.models.layers import rms_norm
from dspark_jax.models.stacks import Sections
from dspark_jax.models.targets.family import TargetParams
from dspark_jax.models.targets.table import family_of
from dspark_jax.models.vocab import Vocab, unembed

lessons: Lessons = "blocks"
reads: Reads = "cache"

NAME = re.compile(r"first:(\d{1,4})", re.ASCII)
CHAIN = 4  # drafts of a round, where nobody trained for another number


@dataclass(frozen=True)
class Config(DrafterConfig):
    """Sizes of a drafter: the layers are those before the target's exit, and ``target_layer_ids``
    names the last of them.

    Attributes:
        confidence: in drafts comes of their laws, without a head for it.
    """

    confidence: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        last = (self.num_layers - 1,)
        right: dict[str, Any] = {"markov_rank": 0, "windows": (), "target_layer_ids": last}
        only_values(self, "an early exit", **right, confidence=True)


@struct.dataclass
class Params:
    """Weights of a drafter.

    Attributes:
        norm_D: final norm.
        layers: none of its own.
        head: None; others have a sequential one.
        confidence: None, likewise.
    """

    norm_D: Any
    layers: tuple[()] = ()
    head: Any = None
    confidence: Any = None


def of_recipe(fields: Mapping[str, Any]) -> Config:
    """The configuration of a drafter, of the fields of a ``DrafterConfig`` that mean something."""
    eps = {"rms_norm_eps": fields["rms_norm_eps"]}
    exit_layer = {"target_layer_ids": (fields["num_layers"] - 1,)}
    return Config(**fields_of_heads(fields) | eps | exit_layer)


def named(source: str, target: TargetConfig, params: TargetParams) -> tuple[Config, Params] | None:
    """Configuration and weights that ``first:N`` names, with the target's norm; None for other
    names.

    Args:
        source: the name.
        target: sizes of the target.
        params: its weights.

    Raises:
        ValueError: the target has no N layers before its last, or its layers cannot draft.
    """
    found = NAME.fullmatch(source)
    if found is None:
        return None
    count, most = int(found[1]), target.num_layers - 1
    if not 1 <= count <= most:
        raise ValueError(f"{source}: the target has {target.num_layers} layers, give 1 to {most}")
    family = family_of(target)
    if family.beside is None:
        raise ValueError(f"{source}: layers of such a target cannot draft, name another drafter")
    names = ("vocab_size", "hidden_size", "rms_norm_eps", "max_positions")
    sizes = {name: getattr(target, name) for name in names}
    sizes |= {"num_layers": count, "num_target_layers": target.num_layers, "owns_vocab": False}
    cfg = of_recipe(sizes | {"block_size": min(CHAIN, target.max_positions - 1)})
    # The weight of the norm is what it makes of ones, whatever a family stores.
    ones_D = jnp.ones(target.hidden_size, params.norm_D.dtype)
    return cfg, Params(family.leave(params, ones_D, target))


def declare_drafter(cfg: Config) -> Params:
    """Declaration of every parameter."""
    return Params(declare("D", cfg.sizes, "norm.weight", init="ones"))


def declare_context(cfg: Config, room: Room) -> tuple[()]:
    """Nothing: the target's cache is read."""
    return ()


def sections(cfg: Config) -> Sections:
    """``DrafterFamily.sections``: no layers of its own."""
    return ()


def for_decoding(drafter: Params, *, donate: bool) -> Params:
    """``DrafterFamily.for_decoding``."""
    return drafter


def observe(
    drafter: Params,
    vocab: Vocab,
    context: tuple[()],
    rows: Rows,
    feature_TFD: jax.Array,
    token_BS: jax.Array,
    length_B: jax.Array,
    cfg: Config,
    *,
    kernels: str = "xla",
) -> tuple[()]:
    """``DrafterFamily.observe``: keeps nothing."""
    return context


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
    """``DrafterFamily.draft``: every step reads the anchor and the drafts before it once more, so
    that nothing has to be written; a few rows cost as much as one.

    Raises:
        ValueError: layers of such a target cannot draft.
    """
    beside = family_of(context.cfg).beside
    if beside is None:
        raise ValueError("layers of such a target cannot draft: name another drafter")
    drawn: list[Drawn] = []
    token_BW = anchor_B[:, None]
    for slot in range(cfg.block_size):
        place_W = jnp.arange(slot + 1, dtype=jnp.int32)
        seen_WW = place_W <= place_W[:, None]
        rows = Beside(token_BW, position_B[:, None] + place_W, position_B, seen_WW)
        x_BWD = beside(context.target, context.cache, rows, context.cfg, cfg.num_layers)
        hidden_BD = rms_norm(x_BWD[:, -1], drafter.norm_D, cfg.rms_norm_eps)
        drawn.append(draw_slot(vocab, unembed(vocab, hidden_BD), slot, choose, law))
        token_BW = jnp.concatenate([token_BW, drawn[-1][0][:, None]], axis=1)
    return block_by_law(drawn)


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
    """``DrafterFamily.train_blocks``: told the true tokens, the exit's streams are those of the
    target's pass."""
    place_BAG = anchor_BA[..., None] + jnp.arange(previous_BAG.shape[-1], dtype=jnp.int32)
    at_slots = jax.vmap(lambda x_SD, place_AG: x_SD.at[place_AG].get(mode="clip"))
    x_BAGD = at_slots(feature_BSFD[:, :, 0], place_BAG).astype(drafter.norm_D.dtype)
    return BlockOutputs(rms_norm(x_BAGD, drafter.norm_D, cfg.rms_norm_eps), None, None)
