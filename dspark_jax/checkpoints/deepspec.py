"""Drafter checkpoints in the layout of the reference implementation (DeepSpec), both ways.

A directory holds ``config.json``, whose architecture is ``Qwen3DSparkModel``, and
``model.safetensors``. Two additions of ours, which the reference does not know: a checkpoint may
leave out the target's embedding and head (``"owns_vocab": false``), and a reduced draft vocabulary
(``draft_vocab_size``) comes with the tensor ``d2t``, its target ids in increasing order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dspark_jax.axes import declare
from dspark_jax.checkpoints.hf import HEAD, read_checkpoint, write_checkpoint
from dspark_jax.checkpoints.tensors import LoadError, Tensors, read_params, write_params
from dspark_jax.config import DrafterConfig, TargetConfig
from dspark_jax.models.drafters.dspark import DrafterParams, declare_drafter
from dspark_jax.models.targets.config_json import BLOCK_TYPE, count_field, field
from dspark_jax.models.targets.table import DRAFT_BLOCKS, draft_blocks_of
from dspark_jax.models.vocab import Vocab

EMBEDDING = "embed_tokens.weight"
D2T = "d2t"
DSPARK, DFLASH = "DSparkDraftModel", "DFlashDraftModel"
NESTED = ("block_size", "mask_token_id", "sample_from_anchor", "target_layer_ids")
ANCHOR_PREDICTS = ("sample_from_anchor", "query_zero_predicts_next")


def drafter_config(config: Mapping[str, Any]) -> DrafterConfig:
    """The configuration of a drafter out of its ``config.json``.

    Raises:
        ValueError: a field is missing or wrong, or asks for something that is not supported.
    """
    known = {blocks.architecture: blocks for blocks in DRAFT_BLOCKS.values()}
    architectures = config.get("architectures")
    name = isinstance(architectures, list) and len(architectures) == 1 and str(architectures[0])
    if name == DFLASH:
        config = _flat_dflash(config)
    if name in (DFLASH, DSPARK):  # which name the method, and not the layers
        default, kind = DRAFT_BLOCKS[""], config.get("model_type")
        blocks = DRAFT_BLOCKS.get(str(kind), default)
        if blocks is default and kind != BLOCK_TYPE:
            raise LoadError(f"model_type {kind!r} of the layers is not supported")
    elif name in known:
        blocks = known[name]
    else:
        every = ", ".join([*known, DSPARK, DFLASH])
        raise LoadError(f"architectures {architectures!r} is not supported: only one of {every}")
    reduced = config.get("draft_vocab_size")
    return DrafterConfig(
        **blocks.read(config),
        **draft_config(config, anchor_predicts=name != DFLASH),
        target_layer_ids=layer_ids(config, "target_layer_ids"),
        num_target_layers=field(config, "num_target_layers", int),
        draft_vocab_size=None if reduced is None else field(config, "draft_vocab_size", int),
        owns_vocab=field(config, "owns_vocab", bool, name != DFLASH),
    )


def _flat_dflash(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of DFlash as its authors publish it, with its nested part beside the rest.

    Raises:
        LoadError: something nested that is not understood.
    """
    nested = field(config, "dflash_config", dict)
    plain = {"use_aux_hidden_state": True, "projector_type": "dflash"}
    for key, value in nested.items():
        if key not in NESTED and plain.get(key) != value:
            raise LoadError(f"dflash_config has {key} {value!r}, which is not supported")
    return {**config, **{key: nested[key] for key in NESTED if key in nested}}


def draft_config(config: Mapping[str, Any], *, anchor_predicts: bool = True) -> dict[str, Any]:
    """The fields of ``DrafterConfig`` that all layouts of drafters spell alike.

    Args:
        config: the configuration. Its ``block_size`` counts slots.
        anchor_predicts: where it says neither ``sample_from_anchor`` nor, as others call it,
            ``query_zero_predicts_next``.

    Raises:
        LoadError: a field is missing or wrong.
    """
    said = {key: field(config, key, bool) for key in ANCHOR_PREDICTS if config.get(key) is not None}
    if len(set(said.values())) > 1:
        raise LoadError(f"{' and '.join(said)} contradict each other: remove one of them")
    anchor_predicts = next(iter(said.values()), anchor_predicts)
    slots = field(config, "block_size", int)
    if slots == 1 and not anchor_predicts:
        raise LoadError(
            "block_size is 1, and the anchor's slot predicts nothing: there is no draft"
        )
    return {
        "block_size": slots - (not anchor_predicts),
        "anchor_predicts": anchor_predicts,
        "mask_token_id": count_field(config, "mask_token_id"),
        "markov_rank": count_field(config, "markov_rank", 0),
        "markov_head": field(config, "markov_head_type", str, "vanilla"),
        "confidence": field(config, "enable_confidence_head", bool, False),
        "confidence_with_markov": field(config, "confidence_head_with_markov", bool, True),
        "num_anchors": field(config, "num_anchors", int, 512),
    }


def draft_config_dict(cfg: DrafterConfig) -> dict[str, Any]:
    """Inverse of :func:`draft_config`."""
    config: dict[str, Any] = {
        "block_size": cfg.num_slots,
        "enable_confidence_head": cfg.confidence,
        "markov_rank": cfg.markov_rank,
        "mask_token_id": cfg.mask_token_id,
        "num_anchors": cfg.num_anchors,
    }
    if not cfg.anchor_predicts:
        config["sample_from_anchor"] = False
    if cfg.markov_rank:
        config["markov_head_type"] = cfg.markov_head
    if cfg.confidence:
        config["confidence_head_with_markov"] = cfg.confidence_with_markov
    return config


def layer_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """A field that lists layers.

    Raises:
        LoadError: the key is missing, or its value is not a list of integers.
    """
    ids = field(config, key, list)
    if not all(type(layer) is int for layer in ids):
        raise LoadError(f"{key} {ids} must be a list of integers")
    return tuple(ids)


def drafter_config_dict(cfg: DrafterConfig, dtype: str = "float32") -> dict[str, Any]:
    """Inverse of :func:`drafter_config`: the content of ``config.json``."""
    blocks = draft_blocks_of(cfg)
    config = {
        **blocks.write(cfg),
        **draft_config_dict(cfg),
        "architectures": [blocks.architecture],
        "dtype": dtype,
        "num_target_layers": cfg.num_target_layers,
        "target_layer_ids": list(cfg.target_layer_ids),
    }
    if not cfg.owns_vocab:
        config["owns_vocab"] = False
    if cfg.draft_vocab_size is not None:
        config["draft_vocab_size"] = cfg.draft_vocab_size
    return config


def _declare(cfg: DrafterConfig) -> tuple[DrafterParams, Vocab | None]:
    """Declaration of all weights in a checkpoint: the drafter's, and the vocabulary it owns."""
    if not cfg.owns_vocab:
        return declare_drafter(cfg), None
    embed = declare("VD", cfg.sizes, EMBEDDING, init="embed")
    head = declare("VD", cfg.sizes, HEAD, init="embed")
    vocab = Vocab(embed, head, embed_scale=cfg.embed_scale, softcap=cfg.softcap)
    return declare_drafter(cfg), vocab


def load_drafter(
    source: str | Path, dtype: Any = None, mesh: Mesh | None = None
) -> tuple[DrafterConfig, DrafterParams, Vocab | None]:
    """A drafter out of a directory or hub id.

    Args:
        source: the directory, or ``owner/name`` on the hub.
        dtype: dtype of the parameters; None keeps that of the file.
        mesh: as in :func:`~dspark_jax.checkpoints.tensors.read_params`.

    Returns:
        Its configuration, its parameters, and what it holds of the vocabulary: embedding and
        whole LM head where it owns them, ``d2t_U`` where its vocabulary is reduced, None where
        neither. :func:`bind_vocab` makes the drafter's vocabulary of it.

    Raises:
        LoadError: something is missing, left over, broken or not supported.
    """
    cfg, tensors = read_checkpoint(source, drafter_config)
    if not {EMBEDDING, HEAD} & tensors.shapes.keys():
        cfg = replace(cfg, owns_vocab=False)  # whatever it says
    if cfg.draft_vocab_size is None:
        params, vocab = read_params(_declare(cfg), tensors, dtype, mesh)
        return cfg, params, vocab
    d2t_U = _read_d2t(cfg, tensors)
    params, vocab = read_params(_declare(cfg), tensors.without(D2T), dtype, mesh)
    return cfg, params, replace(vocab or Vocab(None), d2t_U=d2t_U)


def _read_d2t(cfg: DrafterConfig, tensors: Tensors) -> jax.Array:
    """The target ids of a reduced draft vocabulary."""
    if tensors.shapes.get(D2T) != (cfg.draft_vocab_size,):
        raise LoadError(
            f"{tensors.origin}: tensor {D2T} has shape {tensors.shapes.get(D2T)}, but "
            f"draft_vocab_size is {cfg.draft_vocab_size}"
        )
    return jnp.array(_checked_d2t(tensors.read(D2T), cfg, tensors.origin))


def _checked_d2t(d2t_U: np.ndarray, cfg: DrafterConfig, origin: str) -> np.ndarray:
    """The same ids, known to be sorted and to lie in the vocabulary."""
    inside = d2t_U.dtype == np.int32 and d2t_U[0] >= 0 and d2t_U[-1] < cfg.vocab_size
    if not inside or (np.diff(d2t_U) <= 0).any():
        raise LoadError(
            f"{origin}: {D2T} must hold increasing int32 ids below the vocab_size {cfg.vocab_size}"
        )
    return d2t_U


def save_drafter(
    directory: str | Path, cfg: DrafterConfig, params: DrafterParams, vocab: Vocab | None = None
) -> None:
    """Write a drafter's checkpoint; :func:`load_drafter` gives the same bits back.

    Args:
        directory: where to; made if it is not there.
        cfg: the configuration; what it says about the vocabulary must be in ``vocab``.
        params: the parameters, layers stacked.
        vocab: embedding and whole head where ``owns_vocab``, ``d2t_U`` where reduced.

    Raises:
        ValueError: parameters or vocabulary do not fit the configuration.
    """
    if cfg.owns_vocab and vocab is None:
        raise ValueError("owns_vocab is true: give the embedding and the head, or set it to false")
    owned = None
    if vocab and cfg.owns_vocab:
        owned = Vocab(
            vocab.embed_VD, vocab.unembed_VD, embed_scale=cfg.embed_scale, softcap=cfg.softcap
        )
    tensors = write_params(_declare(cfg), (params, owned))
    if cfg.draft_vocab_size is not None:
        if vocab is None or vocab.d2t_U is None or vocab.d2t_U.shape != (cfg.draft_vocab_size,):
            raise ValueError(f"draft_vocab_size is {cfg.draft_vocab_size}: give as many d2t_U ids")
        tensors[D2T] = _checked_d2t(np.asarray(vocab.d2t_U), cfg, str(directory))
    write_checkpoint(directory, drafter_config_dict(cfg, params.norm_D.dtype.name), tensors)


def bind_vocab(
    cfg: DrafterConfig,
    own: Vocab | None,
    target_cfg: TargetConfig,
    target_vocab: Vocab,
    *,
    use_target: bool = False,
) -> Vocab:
    """The vocabulary that a drafter works with: the target's arrays, never a copy of them.

    Args:
        cfg: of the drafter.
        own: what its checkpoint holds, as :func:`load_drafter` gives it; a head may be whole or
            have the rows of the draft vocabulary alone.
        target_cfg: of the target.
        target_vocab: its embedding and head.
        use_target: do not compare the drafter's own embedding and head with the target's.

    Returns:
        Embedding, head (U rows of it under a reduced draft vocabulary) and ``d2t_U``.

    Raises:
        ValueError: the drafter does not fit the target, or its own vocabulary differs.
    """
    for name, ours, theirs in (
        ("vocab_size", cfg.vocab_size, target_cfg.vocab_size),
        ("hidden_size", cfg.hidden_size, target_cfg.hidden_size),
        ("num_target_layers", cfg.num_target_layers, target_cfg.num_layers),
    ):
        if ours != theirs:
            raise ValueError(
                f"the drafter does not fit the target: its {name} is {ours}, the target has "
                f"{theirs}; use a drafter that was trained for this target"
            )
    embed_VD, head_VD = target_vocab.embed_VD, target_vocab.unembed_VD
    whole_VD = embed_VD if head_VD is None else head_VD
    bound = target_vocab
    if cfg.draft_vocab_size is not None:
        if own is None or own.d2t_U is None:
            raise ValueError(f"draft_vocab_size is {cfg.draft_vocab_size}, but d2t is missing")
        rows_UD = jnp.take(whole_VD, own.d2t_U, axis=0)
        bound = replace(target_vocab, unembed_VD=rows_UD, d2t_U=own.d2t_U)
    if own is None or use_target:
        return bound
    if own.embed_VD is not None:
        _compare(EMBEDDING, own.embed_VD, embed_VD)
    if own.unembed_VD is not None:
        is_whole = len(own.unembed_VD) == cfg.vocab_size
        _compare(HEAD, own.unembed_VD, whole_VD if is_whole else bound.unembed_VD)
    return bound


def _compare(name: str, own: jax.Array, target: jax.Array) -> None:
    """Equal in the coarser of the two dtypes, as one of them may have been rounded on loading."""
    coarse = min(own.dtype, target.dtype, key=lambda dtype: dtype.itemsize)
    if not bool(jnp.array_equal(own.astype(coarse), target.astype(coarse))):
        raise ValueError(
            f"the drafter's own {name} differs from the target's: it was trained for other "
            f"weights; choose that target, or ask for the target's vocabulary to be used"
        )
