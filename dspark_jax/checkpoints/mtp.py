"""MTP layers, inside their targets' checkpoints and by themselves.

- DeepSeek-V3 and GLM name them as a layer behind those of the target: ``model.layers.{L}`` has
  ``enorm``, ``hnorm``, ``eh_proj``, ``shared_head.norm`` and a layer's own tensors, and copies of
  the target's embedding and head. These are the names here, too.
- Qwen3-Next and Qwen3.5 have ``mtp.pre_fc_norm_embedding``, ``mtp.pre_fc_norm_hidden``, ``mtp.fc``,
  ``mtp.norm`` and ``mtp.layers.0``; the weights of all their norms are stored less one.

By itself such a layer has a ``config.json`` in the words of the reference layout, whose
architecture is ``Qwen3MTPModel`` (``Gemma4MTPModel`` with Gemma's layer).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dspark_jax.checkpoints.draft_tensors import EMBEDDING, HEAD
from dspark_jax.checkpoints.tensors import LoadError, Tensors
from dspark_jax.models.draft_blocks import DraftBlocks
from dspark_jax.models.drafters.mtp import CHAIN, Config
from dspark_jax.models.targets.config_json import field
from dspark_jax.models.targets.table import DRAFT_BLOCKS, draft_blocks_of

METHOD = "MTPModel"  # in architectures
STEPS = "num_nextn_predict_steps"  # length of the chain
OTHERS = "mtp."  # what Qwen's names begin with
_QWEN = {
    "mtp.pre_fc_norm_embedding.weight": "enorm.weight",
    "mtp.pre_fc_norm_hidden.weight": "hnorm.weight",
    "mtp.fc.weight": "eh_proj.weight",
    "mtp.norm.weight": "shared_head.norm.weight",
}
_OWN = re.compile(r"layers\.(\d+)\.(.*)")


def predictor_names(tensors: Tensors, num_layers: int) -> set[str]:
    """The tensors of a target's checkpoint that are those of its MTP layer.

    Args:
        tensors: of the checkpoint.
        num_layers: of the target.
    """
    behind = f"model.layers.{num_layers}."
    ours = f"{behind}eh_proj.weight" in tensors.shapes
    return {
        name
        for name in tensors.shapes
        if name.startswith(OTHERS) or (ours and name.startswith(behind))
    }


def from_target(tensors: Tensors, num_layers: int) -> Tensors:
    """The tensors of :func:`predictor_names` under the declared names, without the copies of the
    target's embedding and head.

    Raises:
        LoadError: the layer has a part that is not computed here.
    """
    if "mtp.fc.weight" not in tensors.shapes:
        behind = f"model.layers.{num_layers}."
        return tensors.without(f"{behind}shared_head.head.weight", f"{behind}embed_tokens.weight")
    q, o = (tensors.shapes.get(f"mtp.layers.0.self_attn.{x}_proj.weight", ()) for x in "qo")
    if len(q) == len(o) == 2 and q[0] == 2 * o[1]:
        raise LoadError(
            f"{tensors.origin}: the queries of mtp.layers.0 come with gates, which are not "
            "supported: choose another drafter"
        )
    names = {}
    for old in tensors.shapes:
        own = _QWEN.get(old, old.removeprefix("mtp.layers.0."))
        names[f"model.layers.{num_layers}.{own}"] = old

    def read(name: str) -> np.ndarray:
        value = tensors.read(names[name])
        return value + np.ones((), value.dtype) if value.ndim == 1 else value

    shapes = {name: tensors.shapes[old] for name, old in names.items()}
    return Tensors(tensors.origin, shapes, read)


def is_mtp(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of such a drafter by itself."""
    return METHOD in str(config.get("architectures"))


def flat_mtp(config: Mapping[str, Any], num_target_layers: int | None = None) -> dict[str, Any]:
    """The configuration, its number of the target's layers included.

    Args:
        config: the content of ``config.json``.
        num_target_layers: layers of the target, for files that do not say.

    Raises:
        LoadError: there is no such layer.
    """
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and len(named) == 1 else named
    if name not in _BLOCKS:
        raise LoadError(f"architectures {named!r:.60} is not supported: use {', '.join(_BLOCKS)}")
    layers = config.get("num_target_layers")
    return {
        **config,
        "architectures": [name],
        "num_target_layers": num_target_layers if layers is None else layers,
    }


def mtp_names(tensors: Tensors) -> Tensors:
    """The tensors of a drafter by itself under the declared names.

    Raises:
        LoadError: two tensors have the same name there.
    """
    names: dict[str, str] = {}
    for old in tensors.shapes:
        found, name = _OWN.fullmatch(old), old
        if found is not None:
            copies = {"shared_head.head.weight": HEAD, "embed_tokens.weight": EMBEDDING}
            name = copies.get(found[2], f"model.{old}")
        if name in names:
            raise LoadError(f"{tensors.origin}: {names[name]} and {old} are both {name}: keep one")
        names[name] = old
    shapes = {name: tensors.shapes[old] for name, old in names.items()}
    return Tensors(tensors.origin, shapes, lambda name: tensors.read(names[name]))


def completed_mtp(flat: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """The settings that a file leaves to its tensors: norms and biases of the layer."""
    prefix = f"model.layers.{flat.get('num_target_layers')}.self_attn."
    return {
        **flat,
        "use_qk_norm": f"{prefix}q_norm.weight" in tensors.shapes,
        "attention_bias": f"{prefix}q_proj.bias" in tensors.shapes,
    }


def mtp_config(flat: Mapping[str, Any]) -> Config:
    """The configuration of a drafter, of :func:`completed_mtp`.

    Raises:
        ValueError: a field is missing or wrong, or asks for something that is not supported.
    """
    reduced = flat.get("draft_vocab_size")
    return Config(
        **_BLOCKS[flat["architectures"][0]].read(flat),
        qk_norm=field(flat, "use_qk_norm", bool, True),
        block_size=field(flat, STEPS, int, CHAIN),
        target_layer_ids=tuple(field(flat, "target_layer_ids", list, [0])),
        num_target_layers=field(flat, "num_target_layers", int),
        draft_vocab_size=None if reduced is None else field(flat, "draft_vocab_size", int),
        owns_vocab=field(flat, "owns_vocab", bool, True),
        norm_output=field(flat, "norm_output", bool, False),
    )


def mtp_config_dict(cfg: Config) -> dict[str, Any]:
    """What ``config.json`` says of a drafter by itself; inverse of :func:`mtp_config`."""
    blocks = draft_blocks_of(cfg)
    return {
        **blocks.write(cfg),
        "architectures": [_architecture_of(blocks)],
        "num_nextn_predict_layers": 1,
        STEPS: cfg.block_size,
        "norm_output": cfg.norm_output,
    }


def _architecture_of(blocks: DraftBlocks) -> str:
    return blocks.architecture.replace("DSparkModel", METHOD)


_BLOCKS = {_architecture_of(blocks): blocks for blocks in DRAFT_BLOCKS.values()}
