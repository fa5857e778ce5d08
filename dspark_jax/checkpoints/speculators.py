"""Drafter checkpoints written in the layout of vllm-project/speculators: DSpark and Eagle3.

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
- Eagle3's has ``eagle_aux_hidden_state_layer_ids``, which counts inputs too, and switches.
- The decoder blocks are described by a Qwen3 configuration in ``transformer_layer_config``.
- ``num_target_layers``, ``num_anchors`` and ``trained_for`` are additions of ours, which readers
  there ignore.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.axes import declare
from dspark_jax.checkpoints.deepspec import TRAINED_FOR, draft_config_dict
from dspark_jax.checkpoints.dialects import KIND, LAYER_ID_OFFSET
from dspark_jax.checkpoints.draft_tensors import D2T, EMBEDDING, HEAD, T2D
from dspark_jax.checkpoints.hf import write_checkpoint
from dspark_jax.checkpoints.tensors import dtype_of, write_params
from dspark_jax.config import DrafterConfig
from dspark_jax.models.drafters.eagle3 import Config as Eagle3Config
from dspark_jax.models.drafters.table import drafter_of
from dspark_jax.models.targets.config_json import BLOCK_TYPE, block_config_dict
from dspark_jax.models.vocab import Vocab, lm_head


def speculators_config_dict(
    cfg: DrafterConfig, verifier: Mapping[str, Any], dtype: str = "float32"
) -> dict[str, Any]:
    """The content of ``config.json``.

    Args:
        cfg: of the drafter.
        verifier: ``name_or_path`` and ``architectures`` of the target.
        dtype: of the tensors.
    """
    greedy = {
        "proposal_type": "greedy",
        "speculative_tokens": cfg.block_size,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    entering = [layer + LAYER_ID_OFFSET for layer in cfg.target_layer_ids]
    if isinstance(cfg, Eagle3Config):
        algorithm, config = (
            "eagle3",
            {
                "architectures": ["Eagle3DraftModel"],
                "eagle_aux_hidden_state_layer_ids": entering,
                "norm_before_residual": cfg.norm_residual,
                "norm_output": cfg.norm_output,
            },
        )
    else:
        algorithm, config = (
            "dspark",
            draft_config_dict(cfg)
            | {
                "architectures": ["DSparkDraftModel"],
                "aux_hidden_state_layer_ids": entering,
                "layer_id_offset": LAYER_ID_OFFSET,
                "sample_from_anchor": cfg.anchor_predicts,
            },
        )
    if algorithm == "dspark" and not cfg.markov_rank and cfg.confidence:
        config["confidence_head_with_markov"] = False  # they refuse true without a Markov head
    return config | {
        "draft_vocab_size": cfg.draft_vocab_size or cfg.vocab_size,
        "dtype": dtype,
        "torch_dtype": dtype,
        "num_target_layers": cfg.num_target_layers,
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [greedy],
            "verifier": dict(verifier),
        },
        KIND: algorithm,
        "tie_word_embeddings": False,
        "transformer_layer_config": block_config_dict(cfg),
    }


def save_speculators(
    directory: str | Path,
    cfg: DrafterConfig,
    params: Any,
    vocab: Vocab,
    verifier: Mapping[str, Any],
    trained_for: Mapping[str, str] | None = None,
) -> None:
    """Write a drafter's checkpoint; ``load_drafter`` gives the same bits back.

    Args:
        directory: where to; made if it is not there.
        cfg: the configuration; the embedding and the head are written where ``owns_vocab``.
        params: the parameters, layers stacked.
        vocab: the vocabulary that the drafter is bound to; a reduced one is written with its rows
            of the head.
        verifier: ``name_or_path`` and ``architectures`` of the target.
        trained_for: of :func:`~dspark_jax.checkpoints.identity.identity_of`, to be kept.

    Raises:
        ValueError: parameters or vocabulary do not fit the configuration.
    """
    if cfg.blocks:
        raise ValueError(
            f"the drafter's layers are {cfg.blocks}: only {BLOCK_TYPE}'s can be written"
        )
    tensors = write_params(drafter_of(cfg).declare_drafter(cfg), params)
    reduced = cfg.draft_vocab_size not in (None, cfg.vocab_size)
    if reduced:
        if vocab.d2t_U is None or vocab.d2t_U.shape != (cfg.draft_vocab_size,):
            raise ValueError(f"draft_vocab_size is {cfg.draft_vocab_size}: give as many d2t_U ids")
        id_U = np.asarray(vocab.d2t_U, np.int64)
        tensors[D2T] = id_U - np.arange(len(id_U))
        tensors[T2D] = np.isin(np.arange(cfg.vocab_size), id_U)
    if reduced or cfg.owns_vocab or cfg.owns_head:
        tensors |= write_params(declare("UD", cfg.sizes, HEAD), lm_head(vocab))
    if cfg.owns_vocab:
        tensors |= write_params(declare("VD", cfg.sizes, EMBEDDING), vocab.embed_VD)
    config = speculators_config_dict(cfg, verifier, dtype_of(params).name)
    if trained_for:
        config[TRAINED_FOR] = dict(trained_for)
    write_checkpoint(directory, config, tensors)
