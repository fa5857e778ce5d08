"""Medusa heads in the two layouts that others write them in.

- Published (``medusa_lm_head.safetensors``): ``{k}.{j}.linear.weight`` and ``.bias`` are block j of
  head k, ``{k}.{J}.weight`` its LM head. ``config.json`` may count fewer heads than are stored.
- vLLM's: ``blocks.{k}.layers.{j}.weight``, with biases or without; ``lm_heads.{k}.weight``, or one
  ``lm_head.weight`` for all; ``token_map`` holds the target ids of a reduced vocabulary.

Ours are those of the published layout without LM heads, where the target's is meant, and with
``d2t`` for a reduced vocabulary. Sizes follow from the tensors.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dspark_jax.checkpoints.draft_tensors import D2T, HEAD
from dspark_jax.checkpoints.tensors import LoadError, Tensors
from dspark_jax.models.drafters.medusa import Config, of_recipe
from dspark_jax.models.targets.config_json import field

NUM_HEADS, NUM_BLOCKS = "medusa_num_heads", "medusa_num_layers"
ARCHITECTURE = "MedusaModel"
TOKEN_MAP = "token_map"
_VLLM_BLOCK = re.compile(r"blocks\.(\d+)\.layers\.(\d+)\.(weight|bias)")
_VLLM_HEAD = re.compile(r"lm_heads\.(\d+)\.weight")


def is_medusa(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of such a drafter."""
    return NUM_HEADS in config or config.get("model_type") == "medusa"


def flat_medusa(config: Mapping[str, Any], num_target_layers: int | None = None) -> dict[str, Any]:
    """The configuration, its sizes yet to come from the tensors.

    Args:
        config: the content of ``config.json``.
        num_target_layers: layers of the target, for files that do not say.
    """
    layers = config.get("num_target_layers")
    reduced = config.get("draft_vocab_size", config.get("truncated_vocab_size"))
    return {
        **config,
        "model_type": "medusa",
        "num_target_layers": num_target_layers if layers is None else layers,
        "draft_vocab_size": None if reduced == config.get("vocab_size") else reduced,
    }


def medusa_names(tensors: Tensors) -> Tensors:
    """The tensors under the names of the published layout.

    Raises:
        LoadError: two tensors have the same name there.
    """
    found = [match for name in tensors.shapes if (match := _VLLM_BLOCK.fullmatch(name))]
    depth = 1 + max((int(match[2]) for match in found), default=0)
    names: dict[str, str] = {}
    for old in tensors.shapes:
        name = _VLLM_BLOCK.sub(r"\1.\2.linear.\3", old.removeprefix("medusa_head."))
        name = _VLLM_HEAD.sub(rf"\1.{depth}.weight", name)
        name = D2T if name == TOKEN_MAP else name
        if name in names:
            raise LoadError(f"{tensors.origin}: {names[name]} and {old} are both {name}: keep one")
        names[name] = old

    def read(name: str) -> np.ndarray:
        value = tensors.read(names[name])
        is_map = names[name] == TOKEN_MAP and value.dtype.kind == "i"
        return value.astype(np.int32) if is_map else value  # ids, and never offsets

    shapes = {name: tensors.shapes[old] for name, old in names.items()}
    return Tensors(tensors.origin, shapes, read)


def completed_medusa(flat: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """The settings that the tensors tell: how many heads of how many blocks, and their sizes.

    Raises:
        LoadError: there are no heads, or not as many blocks as the file says.
    """
    shapes = tensors.shapes
    heads = _count("{}.0.linear.weight", shapes)
    blocks = _count("0.{}.linear.weight", shapes)
    if not heads or len(shapes["0.0.linear.weight"]) != 2:
        raise LoadError(f"{tensors.origin}: 0.0.linear.weight, the first head's, is missing")
    said = flat.get(NUM_BLOCKS, flat.get("num_hidden_layers"))
    if said not in (None, blocks):
        raise LoadError(
            f"{tensors.origin}: {NUM_BLOCKS} is {said!r:.40}, but {blocks} are stored for a head"
        )
    own, shared = f"0.{blocks}.weight", shapes.get(HEAD)
    rows = shapes.get(own, shared)
    return {
        **flat,
        NUM_HEADS: heads,
        NUM_BLOCKS: blocks,
        "hidden_size": shapes["0.0.linear.weight"][0],
        "vocab_size": flat.get("vocab_size") or (rows[0] if rows else None),
        "biased": "0.0.linear.bias" in shapes,
        "own_heads": own in shapes,
    }


def _count(name: str, shapes: Mapping[str, Any]) -> int:
    """How many tensors there are of a name, numbered from 0."""
    numbered = map(name.format, itertools.count())
    return sum(1 for _ in itertools.takewhile(shapes.__contains__, numbered))


def medusa_config(flat: Mapping[str, Any]) -> Config:
    """The configuration of a drafter, of :func:`completed_medusa`.

    Raises:
        ValueError: a field is missing or wrong.
    """
    reduced = flat.get("draft_vocab_size")
    return of_recipe(
        {
            "vocab_size": field(flat, "vocab_size", int),
            "hidden_size": field(flat, "hidden_size", int),
            "num_layers": field(flat, NUM_BLOCKS, int),
            "block_size": field(flat, NUM_HEADS, int),
            "biased": field(flat, "biased", bool, True),
            "own_heads": field(flat, "own_heads", bool, False),
            "max_positions": field(flat, "max_position_embeddings", int, 2048),
            "target_layer_ids": tuple(field(flat, "target_layer_ids", list, [0])),
            "num_target_layers": field(flat, "num_target_layers", int),
            "draft_vocab_size": None if reduced is None else field(flat, "draft_vocab_size", int),
            "owns_vocab": False,
        }
    )


def medusa_config_dict(cfg: Config) -> dict[str, Any]:
    """The content of ``config.json``; inverse of :func:`medusa_config`."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "medusa",
        NUM_HEADS: cfg.block_size,
        NUM_BLOCKS: cfg.num_layers,
        "hidden_size": cfg.hidden_size,
        "vocab_size": cfg.vocab_size,
        "max_position_embeddings": cfg.max_positions,
    }
