"""Blockwise drafters, of which there are no files but our own: ``input`` and ``output`` are the two
matrices of the layer with their biases, and ``config.json`` names the architecture and the slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_jax.models.drafters.blockwise import Config, of_recipe
from dspark_jax.models.targets.config_json import field

ARCHITECTURE = "BlockwiseModel"


def is_blockwise(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of such a drafter."""
    return config.get("architectures") == [ARCHITECTURE]


def flat_blockwise(
    config: Mapping[str, Any], num_target_layers: int | None = None
) -> dict[str, Any]:
    """The configuration; arguments as for the other methods."""
    layers = config.get("num_target_layers")
    return {**config, "num_target_layers": num_target_layers if layers is None else layers}


def blockwise_config(flat: Mapping[str, Any]) -> Config:
    """The configuration of a drafter, of :func:`flat_blockwise`.

    Raises:
        ValueError: a field is missing or wrong.
    """
    reduced = flat.get("draft_vocab_size")
    return of_recipe(
        {
            "vocab_size": field(flat, "vocab_size", int),
            "hidden_size": field(flat, "hidden_size", int),
            "num_layers": 1,
            "block_size": field(flat, "block_size", int),
            "max_positions": field(flat, "max_position_embeddings", int),
            "target_layer_ids": tuple(field(flat, "target_layer_ids", list, [0])),
            "num_target_layers": field(flat, "num_target_layers", int),
            "draft_vocab_size": None if reduced is None else field(flat, "draft_vocab_size", int),
            "owns_vocab": False,
        }
    )


def blockwise_config_dict(cfg: Config) -> dict[str, Any]:
    """The content of ``config.json``; inverse of :func:`blockwise_config`."""
    return {
        "architectures": [ARCHITECTURE],
        "block_size": cfg.block_size,
        "hidden_size": cfg.hidden_size,
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_positions,
    }
