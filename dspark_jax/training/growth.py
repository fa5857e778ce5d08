"""A drafter that begins as a shallower one.

Behind the layers of the shallower drafter come new ones whose output projections are 0, so that
they change nothing until training finds something for them to add.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.config import DrafterConfig
from dspark_jax.models.drafters.dspark import DrafterParams

# The last products of a layer's two branches, with their biases.
OUTPUTS = {"o_NHD", "o_bias_D", "down_MD", "down_bias_D"}


def with_layers_of(params: DrafterParams, fresh: DrafterParams) -> DrafterParams:
    """The weights ``params``, with the layers of ``fresh`` that go beyond theirs.

    Args:
        params: of a drafter whose layers are all of one kind.
        fresh: random weights of a deeper one.
    """

    def join(path: Any, found_LX: jax.Array, fresh_LX: jax.Array) -> jax.Array:
        more_LX = fresh_LX[len(found_LX) :]
        if path[-1].name in OUTPUTS:
            more_LX = jnp.zeros_like(more_LX)
        return jnp.concatenate([found_LX, more_LX.astype(found_LX.dtype)])

    layers = jax.tree_util.tree_map_with_path(join, params.layers, fresh.layers)
    return params.replace(layers=layers)  # type: ignore[attr-defined]


def check_same_sizes(source: str, wanted: DrafterConfig, found: DrafterConfig) -> None:
    """Refuse a drafter that is not of the recipe's sizes; it may be shallower, where all layers
    are alike, and of another block length.

    Raises:
        ValueError: names the fields that differ.
    """
    if type(wanted) is not type(found):
        raise ValueError(
            f"init_drafter {source} is a drafter of another method than the recipe's: name one of "
            "this method, or start afresh"
        )
    free = {"owns_vocab", "owns_head", "max_positions", "num_anchors", "block_size"}
    shallower = type(wanted) is DrafterConfig and found.num_layers < wanted.num_layers
    if shallower and len({*wanted.windows, *found.windows}) < 2:
        free |= {"num_layers", "windows"}
    differ = [
        f"{field.name}: {getattr(wanted, field.name)!r} -> {getattr(found, field.name)!r}"
        for field in dataclasses.fields(DrafterConfig)
        if field.name not in free and getattr(wanted, field.name) != getattr(found, field.name)
    ]
    if differ:
        raise ValueError(
            f"init_drafter {source} is another drafter than the recipe's ({', '.join(differ)}): "
            "change these settings, or start afresh"
        )
