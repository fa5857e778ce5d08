"""Drafters in the layouts that this and other programs read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dspark_jax.checkpoints.deepspec import save_drafter
from dspark_jax.checkpoints.default import HUB_ID
from dspark_jax.checkpoints.drafter_methods import check_layout
from dspark_jax.checkpoints.hf import model_directory
from dspark_jax.checkpoints.inside import save_inside
from dspark_jax.checkpoints.speculators import save_speculators
from dspark_jax.checkpoints.tensors import dtype_of
from dspark_jax.config import DrafterConfig, TargetConfig
from dspark_jax.models.drafters.table import inside_settings
from dspark_jax.models.targets.table import family_of
from dspark_jax.models.vocab import Vocab


def save_layout(
    directory: Path,
    layout: str,
    drafter: tuple[DrafterConfig, Any, Vocab],
    target: tuple[str | Path, TargetConfig],
    trained_for: Mapping[str, str] | None = None,
    *,
    own_vocab: bool = False,
) -> None:
    """Write a drafter's checkpoint in a layout, in the dtype of its parameters.

    Args:
        directory: where to; made if it is not there.
        layout: ``"dspark"`` is the project's own: the reference layout without embedding and
            head. ``"deepspec"`` is the reference layout, ``"speculators"`` that of
            vllm-project/speculators. Of a drafter in the form of one inside its target's
            checkpoint both of the former are that checkpoint's.
        drafter: sizes, weights, and the vocabulary that it is bound to.
        target: what ``load_target`` took, and its sizes.
        trained_for: what the drafter's checkpoint records of its target.
        own_vocab: whether the vocabulary is the drafter's own and written in every layout.

    Raises:
        ValueError: the layout cannot hold the drafter.
    """
    cfg, params, vocab = drafter
    if inside_settings(cfg) is not None:
        if layout == "speculators":
            raise ValueError(
                "the drafter has the form of one inside its target's checkpoint, which the format "
                "speculators does not hold: choose the format deepspec"
            )
        save_own(directory, drafter, target[0], trained_for)
        return
    check_layout(cfg, layout)
    dtype = dtype_of(params)
    embed_VD = vocab.embed_VD.astype(dtype)
    head_UD = embed_VD if vocab.unembed_VD is None else vocab.unembed_VD.astype(dtype)
    held = replace(vocab, embed_VD=embed_VD, unembed_VD=head_UD)
    if layout == "speculators":
        source, target_cfg = target
        name = HUB_ID if str(source) == "default" else str(source)
        architecture = family_of(target_cfg).architecture(target_cfg)
        verifier = {"name_or_path": name, "architectures": [architecture]}
        cfg = replace(cfg, owns_vocab=own_vocab)
        save_speculators(directory, cfg, params, held, verifier, trained_for)
        return
    if layout == "deepspec" and cfg.draft_vocab_size is not None:
        raise ValueError(
            f"draft_vocab_size is {cfg.draft_vocab_size}, and the reference layout has no reduced "
            "vocabulary: add --full-vocabulary, or choose the format speculators"
        )
    if own_vocab and cfg.draft_vocab_size is not None:
        raise ValueError(
            f"draft_vocab_size is {cfg.draft_vocab_size}, and only the format speculators holds "
            "the drafter's own rows of a reduced vocabulary: leave --own-vocab out"
        )
    cfg = replace(cfg, owns_vocab=own_vocab or layout == "deepspec")
    save_drafter(directory, cfg, params, held, trained_for)


def save_own(
    directory: Path,
    drafter: tuple[DrafterConfig, Any, Vocab | None],
    target: str | Path,
    trained_for: Mapping[str, str] | None = None,
) -> None:
    """Write a drafter's checkpoint in the layout of its kind: the reference layout, or that of its
    target's checkpoint where the drafter has the form of one inside.

    Args:
        directory: where to; made if it is not there.
        drafter: sizes, weights, and what is to be held of its vocabulary.
        target: what ``load_target`` took.
        trained_for: what the drafter's checkpoint records of its target.
    """
    cfg, params, own = drafter
    if inside_settings(cfg) is None:
        save_drafter(directory, cfg, params, own, trained_for)
    else:
        save_inside(directory, cfg, params, model_directory(target), trained_for)
