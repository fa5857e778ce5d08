"""Drafter checkpoints in the layout of the reference implementation (DeepSpec), both ways.

A directory holds ``config.json``, whose architecture is ``Qwen3DSparkModel``, and
``model.safetensors``. Two additions of ours, which the reference does not know: a checkpoint may
leave out the target's embedding and head (``"owns_vocab": false``), and a reduced draft vocabulary
(``draft_vocab_size``) comes with the tensor ``d2t``, its target ids in increasing order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from dspark_jax.axes import declare
from dspark_jax.config import DrafterConfig, TargetConfig
from dspark_jax.models.drafter import DrafterParams, declare_drafter
from dspark_jax.models.hf import CONFIG_FILE, HEAD, block_config, field, model_directory
from dspark_jax.models.target import Vocab
from dspark_jax.models.tensors import (
    WEIGHTS_FILE,
    LoadError,
    Tensors,
    read_json,
    read_params,
    read_tensors,
    write_params,
)

ARCHITECTURE = "Qwen3DSparkModel"
EMBEDDING = "embed_tokens.weight"
D2T = "d2t"


def drafter_config(config: Mapping[str, Any]) -> DrafterConfig:
    """The configuration of a drafter out of its ``config.json``.

    Raises:
        ValueError: a field is missing or wrong, or asks for something that is not supported.
    """
    architectures = config.get("architectures")
    if architectures != [ARCHITECTURE]:
        raise LoadError(f"architectures {architectures} is not supported: only [{ARCHITECTURE!r}]")
    layer_ids = field(config, "target_layer_ids", list)
    if not all(type(layer) is int for layer in layer_ids):
        raise LoadError(f"target_layer_ids {layer_ids} must be a list of integers")
    bias, reduced = field(config, "attention_bias", bool, False), config.get("draft_vocab_size")
    return DrafterConfig(
        **block_config(config),
        qkv_bias=bias,
        out_bias=bias,
        block_size=field(config, "block_size", int),
        mask_token_id=_from_zero(config, "mask_token_id"),
        target_layer_ids=tuple(layer_ids),
        num_target_layers=field(config, "num_target_layers", int),
        markov_rank=_from_zero(config, "markov_rank", 0),
        markov_head=field(config, "markov_head_type", str, "vanilla"),
        confidence=field(config, "enable_confidence_head", bool, False),
        confidence_with_markov=field(config, "confidence_head_with_markov", bool, True),
        draft_vocab_size=None if reduced is None else field(config, "draft_vocab_size", int),
        owns_vocab=field(config, "owns_vocab", bool, True),
        num_anchors=field(config, "num_anchors", int, 512),
    )


def _from_zero(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """An integer field that may be 0."""
    return 0 if config.get(key, default) == 0 else int(field(config, key, int))


def drafter_config_dict(cfg: DrafterConfig, dtype: str = "float32") -> dict[str, Any]:
    """Inverse of :func:`drafter_config`: the content of ``config.json``."""
    rope: dict[str, Any] = {"rope_theta": cfg.rope.theta, "rope_type": "default"}
    if cfg.rope.factor != 1.0:
        rope |= {
            "rope_type": "llama3",
            "factor": cfg.rope.factor,
            "low_freq_factor": cfg.rope.low_freq_factor,
            "high_freq_factor": cfg.rope.high_freq_factor,
            "original_max_position_embeddings": cfg.rope.original_max_positions,
        }
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "attention_bias": cfg.qkv_bias,
        "attention_dropout": 0.0,
        "block_size": cfg.block_size,
        "dtype": dtype,
        "enable_confidence_head": cfg.confidence,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "layer_types": ["full_attention"] * cfg.num_layers,
        "markov_rank": cfg.markov_rank,
        "mask_token_id": cfg.mask_token_id,
        "max_position_embeddings": cfg.max_positions,
        "model_type": "qwen3",
        "num_anchors": cfg.num_anchors,
        "num_attention_heads": cfg.num_heads,
        "num_hidden_layers": cfg.num_layers,
        "num_key_value_heads": cfg.num_kv_heads,
        "num_target_layers": cfg.num_target_layers,
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_parameters": rope,
        "sliding_window": None,
        "target_layer_ids": list(cfg.target_layer_ids),
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": cfg.vocab_size,
    }
    if cfg.markov_rank:
        config["markov_head_type"] = cfg.markov_head
    if cfg.confidence:
        config["confidence_head_with_markov"] = cfg.confidence_with_markov
    if not cfg.owns_vocab:
        config["owns_vocab"] = False
    if cfg.draft_vocab_size is not None:
        config["draft_vocab_size"] = cfg.draft_vocab_size
    return dict(sorted(config.items()))


def _declare(cfg: DrafterConfig) -> tuple[DrafterParams, Vocab | None]:
    """Declaration of all weights in a checkpoint: the drafter's, and the vocabulary it owns."""
    if not cfg.owns_vocab:
        return declare_drafter(cfg), None
    embed = declare("VD", cfg.sizes, EMBEDDING, init="embed")
    return declare_drafter(cfg), Vocab(embed, declare("VD", cfg.sizes, HEAD, init="embed"))


def load_drafter(
    source: str | Path, dtype: Any = None
) -> tuple[DrafterConfig, DrafterParams, Vocab | None]:
    """A drafter out of a directory or hub id.

    Args:
        source: the directory, or ``owner/name`` on the hub.
        dtype: dtype of the parameters; None keeps that of the file.

    Returns:
        Its configuration, its parameters, and what it holds of the vocabulary: embedding and
        whole LM head where it owns them, ``d2t_U`` where its vocabulary is reduced, None where
        neither. :func:`bind_vocab` makes the drafter's vocabulary of it.

    Raises:
        LoadError: something is missing, left over, broken or not supported.
    """
    directory = model_directory(source)
    config = read_json(directory / CONFIG_FILE)
    try:
        cfg = drafter_config(config)
    except ValueError as error:
        raise LoadError(f"{directory / CONFIG_FILE}: {error}") from None
    tensors = read_tensors(directory)
    if cfg.draft_vocab_size is None:
        params, vocab = read_params(_declare(cfg), tensors, dtype)
        return cfg, params, vocab
    d2t_U = _read_d2t(cfg, tensors)
    params, vocab = read_params(_declare(cfg), tensors.without(D2T), dtype)
    return cfg, params, replace(vocab or Vocab(None), d2t_U=d2t_U)


def _read_d2t(cfg: DrafterConfig, tensors: Tensors) -> jax.Array:
    """The target ids of a reduced draft vocabulary."""
    if tensors.shapes.get(D2T) != (cfg.draft_vocab_size,):
        raise LoadError(
            f"{tensors.origin}: tensor {D2T} has shape {tensors.shapes.get(D2T)}, but "
            f"draft_vocab_size is {cfg.draft_vocab_size}"
        )
    return jnp.asarray(_checked_d2t(tensors.read(D2T), cfg, tensors.origin))


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

    Every file is written beside its place and renamed into it, the configuration last: whoever
    reads meanwhile sees a whole checkpoint or a directory without one. Other files stay.

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
    owned = Vocab(vocab.embed_VD, vocab.unembed_VD) if vocab and cfg.owns_vocab else None
    tensors = write_params(_declare(cfg), (params, owned))
    if cfg.draft_vocab_size is not None:
        if vocab is None or vocab.d2t_U is None or vocab.d2t_U.shape != (cfg.draft_vocab_size,):
            raise ValueError(f"draft_vocab_size is {cfg.draft_vocab_size}: give as many d2t_U ids")
        tensors[D2T] = _checked_d2t(np.asarray(vocab.d2t_U), cfg, str(directory))
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = drafter_config_dict(cfg, params.norm_D.dtype.name)
    weights = save(tensors, metadata={"format": "pt"})
    for name, content in (
        (WEIGHTS_FILE, weights),
        (CONFIG_FILE, (json.dumps(config, indent=2) + "\n").encode()),
    ):
        beside = directory / f".{name}.{os.getpid()}"
        beside.write_bytes(content)
        beside.replace(directory / name)


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
        own: what its checkpoint holds, as :func:`load_drafter` gives it.
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
    if own is not None and own.embed_VD is not None and not use_target:
        _compare(EMBEDDING, own.embed_VD, embed_VD)
        _compare(HEAD, own.unembed_VD, whole_VD)
    if cfg.draft_vocab_size is None:
        return Vocab(embed_VD, head_VD)
    if own is None or own.d2t_U is None:
        raise ValueError(f"draft_vocab_size is {cfg.draft_vocab_size}, but d2t is missing")
    return Vocab(embed_VD, jnp.take(whole_VD, own.d2t_U, axis=0), own.d2t_U)


def _compare(name: str, own: jax.Array, target: jax.Array) -> None:
    """Equal in the coarser of the two dtypes, as one of them may have been rounded on loading."""
    coarse = min(own.dtype, target.dtype, key=lambda dtype: dtype.itemsize)
    if not bool(jnp.array_equal(own.astype(coarse), target.astype(coarse))):
        raise ValueError(
            f"the drafter's own {name} differs from the target's: it was trained for other "
            f"weights; choose that target, or ask for the target's vocabulary to be used"
        )
