"""Drafter checkpoints: read in every dialect, written in the reference layout (DeepSpec).

A directory holds ``config.json``, whose architecture is ``Qwen3DSparkModel``, and
``model.safetensors``. Two additions of ours, which the reference does not know: a checkpoint may
leave out the target's embedding and head (``"owns_vocab": false``), and a reduced draft vocabulary
(``draft_vocab_size``) comes with the tensor ``d2t``, its target ids in increasing order.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dspark_jax.axes import declare
from dspark_jax.checkpoints.dialects import OUTPUTS, flat_config
from dspark_jax.checkpoints.draft_tensors import (
    D2T,
    EMBEDDING,
    HEAD,
    draft_vocabulary,
    plain_names,
)
from dspark_jax.checkpoints.drafter_methods import method_of, method_of_config
from dspark_jax.checkpoints.hf import (
    CONFIG_FILE,
    model_directory,
    read_checkpoint,
    write_checkpoint,
)
from dspark_jax.checkpoints.tensors import LoadError, Tensors, dtype_of, read_params, write_params
from dspark_jax.config import DrafterConfig, TargetConfig
from dspark_jax.models.drafters.table import drafter_of
from dspark_jax.models.targets.config_json import count_field, field
from dspark_jax.models.targets.table import DRAFT_BLOCKS, draft_blocks_of
from dspark_jax.models.vocab import Vocab

logger = logging.getLogger(__name__)

TRAINED_FOR = "trained_for"  # the key of config.json
W1 = "markov_head.markov_w1.weight"
CONFIDENCE = "confidence_head.proj.weight"
UNRELATED = 0.5  # relative difference of two vocabularies


def drafter_config(config: Mapping[str, Any]) -> DrafterConfig:
    """The configuration of a drafter out of its ``config.json``, in any dialect.

    Raises:
        ValueError: a field is missing or wrong, or asks for something that is not supported.
    """
    return _config_of(_flat(config))


def _flat(
    config: Mapping[str, Any],
    num_target_layers: int | None = None,
    token_id: Callable[[str], int | None] | None = None,
) -> dict[str, Any]:
    """The configuration in the words of the reference layout, of every method."""
    method = method_of(config)
    if method is not None:
        return method.flat(config, num_target_layers)
    return flat_config(config, num_target_layers, token_id)


def _config_of(flat: Mapping[str, Any]) -> DrafterConfig:
    """The configuration of a drafter, of :func:`_flat`."""
    method = method_of(flat)
    if method is not None:
        return method.config(flat)
    known = {blocks.architecture: blocks for blocks in DRAFT_BLOCKS.values()}
    reduced = flat.get("draft_vocab_size")
    anchor_predicts = field(flat, "sample_from_anchor", bool)
    slots = field(flat, "block_size", int)
    if slots == 1 and not anchor_predicts:
        raise LoadError(
            "block_size is 1, and the anchor's slot predicts nothing: there is no draft"
        )
    return DrafterConfig(
        **known[flat["architectures"][0]].read(flat),
        block_size=slots - (not anchor_predicts),
        anchor_predicts=anchor_predicts,
        mask_token_id=count_field(flat, "mask_token_id"),
        markov_rank=count_field(flat, "markov_rank", 0),
        markov_head=field(flat, "markov_head_type", str, "vanilla"),
        confidence=field(flat, "enable_confidence_head", bool, False),
        confidence_with_markov=field(flat, "confidence_head_with_markov", bool, True),
        num_anchors=field(flat, "num_anchors", int, 512),
        target_layer_ids=tuple(flat[OUTPUTS]),
        num_target_layers=field(flat, "num_target_layers", int),
        draft_vocab_size=None if reduced is None else field(flat, "draft_vocab_size", int),
        owns_vocab=field(flat, "owns_vocab", bool, True),
    )


def draft_config_dict(cfg: DrafterConfig) -> dict[str, Any]:
    """The settings that all layouts of drafters spell alike."""
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


def drafter_config_dict(cfg: DrafterConfig, dtype: str = "float32") -> dict[str, Any]:
    """Inverse of :func:`drafter_config`: the content of ``config.json``."""
    blocks, method = draft_blocks_of(cfg), method_of_config(cfg)
    if method is None:
        own = {
            **blocks.write(cfg),
            **draft_config_dict(cfg),
            "architectures": [blocks.architecture],
        }
    else:
        own = method.config_dict(cfg)
    config = {
        **own,
        "dtype": dtype,
        "torch_dtype": dtype,
        "num_target_layers": cfg.num_target_layers,
        "target_layer_ids": list(cfg.target_layer_ids),
    }
    if not cfg.owns_vocab:
        config["owns_vocab"] = False
    if cfg.draft_vocab_size is not None:
        config["draft_vocab_size"] = cfg.draft_vocab_size
    return config


def _declare(cfg: DrafterConfig) -> tuple[Any, Vocab | None]:
    """Declaration of all weights in a checkpoint: the drafter's, and the vocabulary it owns."""
    declared = drafter_of(cfg).declare_drafter(cfg)
    if not cfg.owns_vocab and not cfg.owns_head:
        return declared, None
    embed = declare("VD", cfg.sizes, EMBEDDING, init="embed") if cfg.owns_vocab else None
    head = declare("UD" if cfg.owns_head else "VD", cfg.sizes, HEAD, init="embed")
    return declared, Vocab(embed, head, embed_scale=cfg.embed_scale, softcap=cfg.softcap)


def load_drafter(
    source: str | Path,
    dtype: Any = None,
    mesh: Mesh | None = None,
    *,
    num_target_layers: int | None = None,
    token_id: Callable[[str], int | None] | None = None,
) -> tuple[DrafterConfig, Any, Vocab | None]:
    """A drafter out of a directory or hub id, in any dialect.

    Args:
        source: the directory, or ``owner/name`` on the hub.
        dtype: dtype of the parameters; None keeps that of the file.
        mesh: as in :func:`~dspark_jax.checkpoints.tensors.read_params`.
        num_target_layers: as in :func:`~dspark_jax.checkpoints.dialects.flat_config`.
        token_id: likewise.

    Returns:
        Its configuration, its parameters, and what it holds of the vocabulary: embedding and LM
        head (of the whole vocabulary or the reduced one) where they are there, ``d2t_U`` where its
        vocabulary is reduced, None where none of these. :func:`bind_vocab` makes the drafter's
        vocabulary of it.

    Raises:
        LoadError: something is missing, left over, broken or not supported.
    """
    given: dict[str, Any] = {"num_target_layers": num_target_layers, "token_id": token_id}
    cfg, held, tensors, d2t_U, tied = open_drafter(source, **given)
    declared = drafter_of(cfg).declare_drafter(cfg)
    params, vocab = read_params((declared, held), tensors, dtype, mesh)
    if tied:
        vocab = replace(vocab, unembed_VD=vocab.embed_VD)
    vocab = replace(vocab, d2t_U=None if d2t_U is None else jnp.asarray(d2t_U))
    return cfg, params, vocab if jax.tree.leaves(vocab) else None


def open_drafter(
    source: str | Path,
    *,
    num_target_layers: int | None = None,
    token_id: Callable[[str], int | None] | None = None,
) -> tuple[DrafterConfig, Vocab, Tensors, np.ndarray | None, bool]:
    """A drafter whose weights are yet to be read; arguments and errors as in :func:`load_drafter`.

    Returns:
        Its configuration, the declaration of what it holds of the vocabulary, its tensors, the
        target ids of a reduced vocabulary, and whether its head is its embedding.
    """
    directory = model_directory(source)
    parse = partial(_flat, num_target_layers=num_target_layers, token_id=token_id)
    flat, tensors = read_checkpoint(directory, parse)
    method, tensors = method_of(flat), plain_names(tensors)
    if method is not None:
        tensors = method.names(tensors)
    try:
        cfg = _config_of(_completed(flat, tensors))
    except ValueError as error:
        raise LoadError(f"{directory / CONFIG_FILE}: {error}") from None
    d2t_U, tensors = draft_vocabulary(tensors, cfg.draft_vocab_size, cfg.vocab_size)
    cfg = replace(cfg, draft_vocab_size=None if d2t_U is None else len(d2t_U))
    head = tensors.shapes.get(HEAD)
    whole = head is not None and head[0] == cfg.vocab_size
    owns = whole and EMBEDDING in tensors.shapes  # whatever it says
    cfg = replace(cfg, owns_vocab=owns, owns_head=method is not None and head is not None)
    held = Vocab(
        declare("VD", cfg.sizes, EMBEDDING) if EMBEDDING in tensors.shapes else None,
        declare("VD" if whole else "UD", cfg.sizes, HEAD) if head else None,
        embed_scale=cfg.embed_scale,
        softcap=cfg.softcap,
    )
    return cfg, held, tensors, d2t_U, head is None and bool(flat.get("tie_word_embeddings"))


def _completed(flat: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """The settings that a file leaves to its tensors: which heads there are."""
    method = method_of(flat)
    if method is not None:
        return method.completed(flat, tensors)
    confidence = tensors.shapes.get(CONFIDENCE)
    found: dict[str, Any] = {"enable_confidence_head": confidence is not None}
    markov = tensors.shapes.get(W1, ())
    found["markov_rank"] = markov[1] if len(markov) == 2 else 0
    if confidence is not None and len(confidence) == 2:
        found["confidence_head_with_markov"] = confidence[1] != flat.get("hidden_size")
    return {**flat, **{key: value for key, value in found.items() if flat.get(key) is None}}


def _checked_d2t(d2t_U: np.ndarray, cfg: DrafterConfig, origin: str) -> np.ndarray:
    """The same ids, known to be sorted and to lie in the vocabulary."""
    inside = d2t_U.dtype == np.int32 and d2t_U[0] >= 0 and d2t_U[-1] < cfg.vocab_size
    if not inside or (np.diff(d2t_U) <= 0).any():
        raise LoadError(
            f"{origin}: {D2T} must hold increasing int32 ids below the vocab_size {cfg.vocab_size}"
        )
    return d2t_U


def save_drafter(
    directory: str | Path,
    cfg: DrafterConfig,
    params: Any,
    vocab: Vocab | None = None,
    trained_for: Mapping[str, str] | None = None,
) -> None:
    """Write a drafter's checkpoint; :func:`load_drafter` gives the same bits back.

    Args:
        directory: where to; made if it is not there.
        cfg: the configuration; what it says about the vocabulary must be in ``vocab``.
        params: the parameters, layers stacked.
        vocab: embedding and whole head where ``owns_vocab``, ``d2t_U`` where reduced.
        trained_for: of :func:`~dspark_jax.checkpoints.identity.identity_of`, to be kept.

    Raises:
        ValueError: parameters or vocabulary do not fit the configuration.
    """
    if (cfg.owns_vocab or cfg.owns_head) and vocab is None:
        raise ValueError("owns_vocab is true: give the embedding and the head, or set it to false")
    owned = None
    if vocab and (cfg.owns_vocab or cfg.owns_head):
        embed_VD = vocab.embed_VD if cfg.owns_vocab else None
        owned = Vocab(embed_VD, vocab.unembed_VD, embed_scale=cfg.embed_scale, softcap=cfg.softcap)
    tensors = write_params(_declare(cfg), (params, owned))
    if cfg.draft_vocab_size is not None:
        if vocab is None or vocab.d2t_U is None or vocab.d2t_U.shape != (cfg.draft_vocab_size,):
            raise ValueError(f"draft_vocab_size is {cfg.draft_vocab_size}: give as many d2t_U ids")
        tensors[D2T] = _checked_d2t(np.asarray(vocab.d2t_U), cfg, str(directory))
    config = drafter_config_dict(cfg, dtype_of(params).name)
    if trained_for:
        config[TRAINED_FOR] = dict(trained_for)
    write_checkpoint(directory, config, tensors)


def bind_vocab(
    cfg: DrafterConfig,
    own: Vocab | None,
    target_cfg: TargetConfig,
    target_vocab: Vocab,
    *,
    own_vocab: bool = False,
) -> Vocab:
    """The vocabulary that a drafter works with: the target's arrays, never a copy of them.

    An embedding or head of its own that differs from the target's by more than rounding (one side
    was quantised or trained on) is left aside with a warning, or kept on request.

    Args:
        cfg: of the drafter.
        own: what its checkpoint holds, as :func:`load_drafter` gives it; a head may be whole or
            have the rows of the draft vocabulary alone.
        target_cfg: of the target.
        target_vocab: its embedding and head.
        own_vocab: draft with the drafter's own embedding and head, where it has them, in the dtype
            of the target's.

    Returns:
        Embedding, head (U rows of it under a reduced draft vocabulary) and ``d2t_U``.

    Raises:
        ValueError: the drafter does not fit the target.
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
    if own is None:
        return bound
    head_UD = own.unembed_VD
    if head_UD is not None and bound.d2t_U is not None and len(head_UD) == cfg.vocab_size:
        head_UD = jnp.take(head_UD, bound.d2t_U, axis=0)
    target_UD = whole_VD if bound.unembed_VD is None else bound.unembed_VD
    if own_vocab:
        embed = embed_VD if own.embed_VD is None else own.embed_VD.astype(embed_VD.dtype)
        head = target_UD if head_UD is None else head_UD.astype(whole_VD.dtype)
        return replace(bound, embed_VD=embed, unembed_VD=head)
    if own.embed_VD is not None:
        _warn_of_difference(EMBEDDING, own.embed_VD, embed_VD)
    if head_UD is not None and not cfg.owns_head:
        _warn_of_difference(HEAD, head_UD, target_UD)
    elif head_UD is not None and _difference(head_UD, target_UD) > 0:
        bound = replace(bound, unembed_VD=head_UD.astype(whole_VD.dtype))
    return bound


def _warn_of_difference(name: str, own: jax.Array, target: jax.Array) -> None:
    """Say how far two arrays are apart, where that is more than rounding."""
    difference = _difference(own, target)
    if difference == 0:
        return
    per_cent = 100 * difference
    logger.warning(
        "the drafter's own %s differs from the target's by %s %%: %sthe target's is used "
        "(--own-vocab, own_vocab=True keep the drafter's)",
        name,
        f"{per_cent:.2g}" if per_cent < 10 else f"{per_cent:.0f}",
        "is this the target that it was trained for? " if difference > UNRELATED else "",
    )


def _difference(own: jax.Array, target: jax.Array) -> float:
    """Norm of the difference over the target's norm; 0 where one is the other one rounded."""
    coarse = min(own.dtype, target.dtype, key=lambda dtype: dtype.itemsize)
    for dtype in (coarse, jnp.bfloat16, jnp.float16):
        if bool(jnp.array_equal(own.astype(dtype), target.astype(dtype))):
            return 0.0
    gap, norm = _norms(own, target)
    return float(gap) / max(float(norm), 1e-30)


@jax.jit
def _norms(own: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of the difference, and of the target, in float32."""
    target = target.astype(jnp.float32)
    return jnp.linalg.norm(own.astype(jnp.float32) - target), jnp.linalg.norm(target)
