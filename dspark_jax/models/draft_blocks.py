"""What a drafter's blocks are made of: a family's own layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from dspark_jax.models.stacks import Sections


@dataclass(frozen=True)
class DraftBlocks:
    """The layers of a drafter, in the parts between which attention stands.

    Attributes:
        sections: ``(cfg)``: the layers; every kind has an ``attention``.
        declare: ``(cfg, layers)``: the parameters of a stack.
        shared: ``(position_X, cfg)``: what all layers share (RoPE).
        embed: ``(vocab, token_X, cfg)``: the residual stream [X, D] before the first layer.
        project: ``(layer, x_XD, place, shared, cfg)``: queries [X, N, H], keys and values
            [X, K, H] of a block's own slots.
        inject: ``(layer, context_XD, place, shared, cfg)``: keys and values of the context.
        finish: ``(layer, x_XD, attended_XNH, place, shared, cfg)``: the residual stream after the
            layer.
    """

    sections: Callable[[Any], Sections]
    declare: Callable[[Any, range], Any]
    shared: Callable[[jax.Array, Any], Any]
    embed: Callable[[Any, jax.Array, Any], jax.Array]
    project: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    inject: Callable[..., tuple[jax.Array, jax.Array]]
    finish: Callable[..., jax.Array]
