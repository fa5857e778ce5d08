"""What a drafter's blocks are made of: a family's own layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from dspark_jax.models.stacks import Sections, Stack


@dataclass(frozen=True)
class DraftBlocks:
    """The layers of a drafter, in the parts between which attention stands.

    Attributes:
        architecture: name of a drafter with these blocks in the reference implementation.
        read: ``(config.json)``: fields of ``DrafterConfig`` that describe the layers; ValueError
            for what is wrong.
        write: ``(cfg)``: inverse of ``read``.
        sections: ``(cfg)``: the layers; every kind has an ``attention``.
        declare: ``(cfg, stack)``: the parameters of a stack.
        shared: ``(position_X, cfg)``: what all layers share (RoPE).
        project: ``(layer, x_XD, place, shared, cfg)``: queries [X, N, H], keys and values
            [X, K, H] of a block's own slots.
        heads: the same of inputs that are normalised already, of any width.
        inject: ``(layer, k_XKH, v_XKH, place, shared, cfg)``: keys and values of the context, from
            its products with the layer's matrices (v None where there is none for values).
        finish: ``(layer, x_XD, attended_XNH, place, shared, cfg)``: the residual stream after the
            layer.
    """

    architecture: str
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[Any], dict[str, Any]]
    sections: Callable[[Any], Sections]
    declare: Callable[[Any, Stack], Any]
    shared: Callable[[jax.Array, Any], Any]
    project: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    heads: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    inject: Callable[..., tuple[jax.Array, jax.Array]]
    finish: Callable[..., jax.Array]
