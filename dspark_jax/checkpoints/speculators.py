"""Drafter checkpoints in the layout of vllm-project/speculators for DSpark, both ways.

The tensors have the names of the reference layout; what differs is what the numbers mean (facts
of version 0.9.0 of that library):

- ``aux_hidden_state_layer_ids`` counts layer *inputs*: id i is the residual stream before decoder
  layer i (0 is the embedding output), so that i = l + 1 for our feature layer l. Files of ours say
  so in ``layer_id_offset``.
- ``sample_from_anchor`` is the slot convention. True is ours: slot 0, the anchor's, predicts the
  first draft, and ``block_size`` slots give as many drafts. False, or no such field in files that
  are older than it, means a block of 1 + N slots whose first predicts nothing.
- ``draft_vocab_size`` is always there; where it is less than the vocabulary's size, ``d2t`` holds
  int64 *offsets* (target id = place + d2t[place]) and ``t2d`` a bool for every target token.
- The target ("verifier") lends its embedding, and its head where the vocabulary is whole; a
  reduced head is written out as ``lm_head.weight`` [U, D].
- The decoder blocks are described by a Qwen3 configuration in ``transformer_layer_config``.
- ``num_target_layers`` and ``num_anchors`` are additions of ours, which readers there ignore.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dspark_jax.axes import declare
from dspark_jax.checkpoints.deepspec import (
    D2T,
    EMBEDDING,
    draft_config,
    draft_config_dict,
    layer_ids,
)
from dspark_jax.checkpoints.hf import HEAD, read_checkpoint, write_checkpoint
from dspark_jax.checkpoints.tensors import LoadError, Tensors, read_params, write_params
from dspark_jax.config import DrafterConfig
from dspark_jax.models.drafters.dspark import DrafterParams, declare_drafter
from dspark_jax.models.targets.config_json import BLOCK_TYPE, block_config_dict, field
from dspark_jax.models.targets.table import DRAFT_BLOCKS
from dspark_jax.models.vocab import Vocab

KIND = "speculators_model_type"
LAYER_ID_OFFSET = 1
T2D = "t2d"
# Copies of the target's weights that older files carry for training.
VERIFIER_TENSORS = ("verifier_lm_head.weight", "verifier_norm.weight")


def speculators_config(config: Mapping[str, Any], num_target_layers: int) -> DrafterConfig:
    """The configuration of a drafter out of its ``config.json``.

    Args:
        config: the content of the file.
        num_target_layers: layers of the target, for files that do not say.

    Raises:
        ValueError: a field is missing or wrong, or asks for something that is not supported.
    """
    if config.get(KIND) != "dspark":
        raise LoadError(f"{KIND} {config.get(KIND)!r} is not supported: only 'dspark'")
    offset = field(config, "layer_id_offset", int, LAYER_ID_OFFSET)
    if offset != LAYER_ID_OFFSET:
        raise LoadError(f"layer_id_offset is {offset}: only {LAYER_ID_OFFSET} is known")
    block = field(config, "transformer_layer_config", dict)
    if block.get("model_type", BLOCK_TYPE) != BLOCK_TYPE:
        raise LoadError(
            f"model_type {block['model_type']!r} of the layers: only {BLOCK_TYPE} works"
        )
    for scale in (config.get("logit_scale"), block.get("logit_scale")):
        if scale not in (None, 1, 1.0):
            raise LoadError(f"logit_scale {scale!r} is not supported: only 1")
    sizes, size = DRAFT_BLOCKS[""].read(block), field(config, "draft_vocab_size", int)
    ids = layer_ids(config, "aux_hidden_state_layer_ids")
    return DrafterConfig(
        **sizes,
        **draft_config(config, anchor_predicts=False),
        target_layer_ids=tuple(layer - offset for layer in ids),
        num_target_layers=field(config, "num_target_layers", int, num_target_layers),
        draft_vocab_size=None if size == sizes["vocab_size"] else size,
        owns_vocab=False,
    )


def speculators_config_dict(
    cfg: DrafterConfig, verifier: Mapping[str, Any], dtype: str = "float32"
) -> dict[str, Any]:
    """Inverse of :func:`speculators_config`: the content of ``config.json``.

    Args:
        cfg: of the drafter.
        verifier: ``name_or_path`` and ``architectures`` of the target.
        dtype: of the tensors.
    """
    config = draft_config_dict(cfg)
    if not cfg.markov_rank and cfg.confidence:
        config["confidence_head_with_markov"] = False  # they refuse true without a Markov head
    greedy = {
        "proposal_type": "greedy",
        "speculative_tokens": cfg.block_size,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return config | {
        "architectures": ["DSparkDraftModel"],
        "aux_hidden_state_layer_ids": [layer + LAYER_ID_OFFSET for layer in cfg.target_layer_ids],
        "draft_vocab_size": cfg.draft_vocab_size or cfg.vocab_size,
        "dtype": dtype,
        "layer_id_offset": LAYER_ID_OFFSET,
        "num_target_layers": cfg.num_target_layers,
        "sample_from_anchor": cfg.anchor_predicts,
        "speculators_config": {
            "algorithm": "dspark",
            "default_proposal_method": "greedy",
            "proposal_methods": [greedy],
            "verifier": dict(verifier),
        },
        KIND: "dspark",
        "tie_word_embeddings": False,
        "transformer_layer_config": block_config_dict(cfg),
    }


def load_speculators(
    source: str | Path, num_target_layers: int, mesh: Mesh | None = None
) -> tuple[DrafterConfig, DrafterParams, Vocab]:
    """A drafter out of a directory or hub id.

    Args:
        source: the directory, or ``owner/name`` on the hub.
        num_target_layers: layers of the target, for files that do not say.
        mesh: as in :func:`~dspark_jax.checkpoints.tensors.read_params`.

    Returns:
        Its configuration, its parameters in the dtype of the file, and what it holds of the
        vocabulary: any of embedding [V, D], head [U, D] and ``d2t_U`` (target ids).
        ``bind_vocab`` makes the drafter's vocabulary of it.

    Raises:
        LoadError: something is missing, left over, broken or not supported.
    """
    parse = partial(speculators_config, num_target_layers=num_target_layers)
    cfg, tensors = read_checkpoint(source, parse)
    d2t_U = None
    if cfg.draft_vocab_size is not None:
        d2t_U = _read_d2t(cfg, tensors)
        tensors = tensors.without(D2T, T2D)
    tensors = tensors.without(*VERIFIER_TENSORS)
    held = Vocab(
        declare("VD", cfg.sizes, EMBEDDING) if EMBEDDING in tensors.shapes else None,
        declare("UD", cfg.sizes, HEAD) if HEAD in tensors.shapes else None,
    )
    params, vocab = read_params((declare_drafter(cfg), held), tensors, mesh=mesh)
    return cfg, params, replace(vocab, d2t_U=d2t_U)


def _read_d2t(cfg: DrafterConfig, tensors: Tensors) -> jax.Array:
    """The target ids of a reduced draft vocabulary, int32."""
    size = cfg.sizes["U"]
    if tensors.shapes.get(D2T) != (size,):
        raise LoadError(
            f"{tensors.origin}: tensor {D2T} has shape {tensors.shapes.get(D2T)}, but "
            f"draft_vocab_size is {size}"
        )
    offset_U = tensors.read(D2T)
    if offset_U.dtype.kind != "i":
        raise LoadError(f"{tensors.origin}: {D2T} has dtype {offset_U.dtype}: it must be int64")
    id_U = offset_U.astype(np.int64) + np.arange(size)
    if ((id_U < 0) | (id_U >= cfg.vocab_size)).any() or (np.diff(id_U) <= 0).any():
        raise LoadError(
            f"{tensors.origin}: {D2T} must hold offsets, such that place + offset are increasing "
            f"ids below the vocab_size {cfg.vocab_size}"
        )
    if T2D in tensors.shapes and not np.array_equal(np.flatnonzero(tensors.read(T2D)), id_U):
        raise LoadError(f"{tensors.origin}: {T2D} marks other tokens than the offsets in {D2T}")
    return jnp.asarray(id_U, jnp.int32)


def save_speculators(
    directory: str | Path,
    cfg: DrafterConfig,
    params: DrafterParams,
    vocab: Vocab,
    verifier: Mapping[str, Any],
) -> None:
    """Write a drafter's checkpoint; :func:`load_speculators` gives the same bits back.

    Args:
        directory: where to; made if it is not there.
        cfg: the configuration.
        params: the parameters, layers stacked.
        vocab: the vocabulary that the drafter is bound to; a reduced one is written with its rows
            of the head.
        verifier: ``name_or_path`` and ``architectures`` of the target.

    Raises:
        ValueError: parameters or vocabulary do not fit the configuration.
    """
    if cfg.blocks:
        raise ValueError(
            f"the drafter's layers are {cfg.blocks}: only {BLOCK_TYPE}'s can be written"
        )
    tensors = write_params(declare_drafter(cfg), params)
    if cfg.draft_vocab_size not in (None, cfg.vocab_size):
        if vocab.d2t_U is None or vocab.d2t_U.shape != (cfg.draft_vocab_size,):
            raise ValueError(f"draft_vocab_size is {cfg.draft_vocab_size}: give as many d2t_U ids")
        id_U = np.asarray(vocab.d2t_U, np.int64)
        tensors[D2T] = id_U - np.arange(len(id_U))
        tensors[T2D] = np.isin(np.arange(cfg.vocab_size), id_U)
        tensors |= write_params(declare("UD", cfg.sizes, HEAD), vocab.unembed_VD)
    config = speculators_config_dict(cfg, verifier, params.norm_D.dtype.name)
    write_checkpoint(directory, config, tensors)
