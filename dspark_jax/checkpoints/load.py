"""One entrance for models: the defaults, directories, hub ids and GGUF files, ready to use."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from dspark_jax.axes import Param, map_params
from dspark_jax.checkpoints.assistant import is_assistant, read_assistant
from dspark_jax.checkpoints.deepspec import bind_vocab, load_drafter
from dspark_jax.checkpoints.default import default_drafter_path, default_target_path
from dspark_jax.checkpoints.dialects import names_a_model
from dspark_jax.checkpoints.drafter_methods import method_of
from dspark_jax.checkpoints.ends import end_ids, known_ends
from dspark_jax.checkpoints.gguf import gguf_config, is_gguf, load_gguf_target, open_gguf
from dspark_jax.checkpoints.gguf_tokenizer import gguf_tokenizer
from dspark_jax.checkpoints.hf import (
    CONFIG_FILE,
    model_directory,
    open_hf_target,
    read_hf_weights,
)
from dspark_jax.checkpoints.identity import identity_of, trained_for, warn_of_another_target
from dspark_jax.checkpoints.inside import open_inside, read_inside
from dspark_jax.checkpoints.runs import drafter_directory
from dspark_jax.checkpoints.tensors import LoadError, read_json
from dspark_jax.checkpoints.tokenizer import ids_without_token, load_tokenizer
from dspark_jax.config import DrafterConfig, TargetConfig
from dspark_jax.drafting import AnyDrafterConfig
from dspark_jax.models.drafters.table import (
    beside,
    drafter_of,
    of_draft_model,
    with_lookup,
    without_checkpoint,
)
from dspark_jax.models.quantised import PLAIN, Quantised, check_kind, quantise_params
from dspark_jax.models.targets.family import TargetParams
from dspark_jax.models.targets.table import chat_template
from dspark_jax.models.vocab import Vocab

logger = logging.getLogger(__name__)

# dtype of the parameters, mesh and kind of weights, as in load_target -> the weights.
ReadWeights = Callable[..., TargetParams]


@dataclass(frozen=True)
class Target:
    """A target that is ready to use.

    Attributes:
        cfg: sizes.
        params: weights, layers stacked; None where they have not been read.
        tokenizer: a transformers tokenizer.
        name: short name for messages and reports.
        stop_ids: ids that end a text.
        source: the directory or GGUF file where it lies; None for one that was made in memory.
    """

    cfg: TargetConfig
    params: Any
    tokenizer: Any
    name: str
    stop_ids: tuple[int, ...]
    source: Path | None = None

    def identity(self) -> dict[str, str]:
        """What a drafter that is trained for it records; empty where it lies nowhere."""
        return {} if self.source is None else identity_of(self.source, self.name, self.tokenizer)


@dataclass(frozen=True)
class Drafter:
    """A drafter that is bound to a target.

    Attributes:
        cfg: sizes.
        params: weights, layers stacked.
        vocab: the target's embedding and head, or the rows that the drafter uses.
        name: short name for messages and reports.
        directory: where it lies; None for a drafter without files.
    """

    cfg: AnyDrafterConfig
    params: Any
    vocab: Vocab
    name: str
    directory: Path | None


def load_target(
    source: str | Path,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    weights: str = PLAIN,
) -> Target:
    """A target with its tokenizer.

    Args:
        source: ``"default"``, a GGUF file, a Hugging Face directory or a hub id.
        dtype: dtype of the parameters.
        mesh: over which every parameter is split as its axes say; None for the default device.
        weights: ``"plain"``, or the kind of values that the layers' matrices are turned into,
            ``"int8"`` or ``"fp8"``.

    Raises:
        LoadError: the source is not there, broken or not supported.
    """
    check_kind(weights)
    target, read_weights = open_target(source)
    return replace(target, params=read_weights(dtype, mesh, weights))


def open_target(source: str | Path) -> tuple[Target, ReadWeights]:
    """A target without its weights, and the function that reads them.

    Raises:
        LoadError: the source is not there, broken or not supported.
    """
    if str(source) == "default":
        source = default_target_path()
    if is_gguf(source):
        target, read_weights = _gguf_target(Path(source))
    else:
        target, read_weights = _hf_target(source)
    if not target.stop_ids:
        logger.warning(
            "%s: nothing says where its texts end, and answers are cut at their limits: name "
            "an eos_token_id in generation_config.json or an eos_token in tokenizer_config.json",
            source,
        )
    cfg = target.cfg
    unnamed = ids_without_token(target.tokenizer, cfg.vocab_size)
    suppressed = tuple(sorted({*cfg.suppressed, *unnamed}))
    if len(suppressed) == cfg.vocab_size:
        raise LoadError(f"{source}: the tokenizer has no token below vocab_size {cfg.vocab_size}")
    return replace(target, cfg=replace(cfg, suppressed=suppressed)), read_weights


def _gguf_target(path: Path) -> tuple[Target, ReadWeights]:
    """A target out of a GGUF file, which is opened once for weights and tokenizer."""
    file = open_gguf(path)
    cfg = gguf_config(file, path)
    tokenizer = gguf_tokenizer(file, str(path))
    keys = "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"
    stated = [(f"{path}: {key}", file.value(key, int)) for key in keys]
    stated = [(f"{path}: the tokenizer's eos_token", tokenizer.eos_token_id), *stated]
    known = known_ends(file.value("tokenizer.ggml.tokens", list))
    stops = end_ids(stated, cfg.vocab_size, known)
    key = "tokenizer.ggml.suppress_tokens"
    hidden = _suppressed(f"{path}: {key}", file.value(key, list, []), cfg.vocab_size)
    cfg = replace(cfg, suppressed=hidden)
    target = Target(cfg, None, tokenizer, path.stem, stops, path)

    def read(dtype: Any, mesh: Mesh | None, weights: str = PLAIN) -> TargetParams:
        return load_gguf_target(path, dtype, mesh, weights, file=file)[1]

    return target, read


def _hf_target(source: str | Path) -> tuple[Target, ReadWeights]:
    """A target out of a directory or hub id."""
    directory = model_directory(source)
    cfg, tensors = open_hf_target(directory)
    tokenizer = load_tokenizer(directory)
    if not tokenizer.chat_template:
        tokenizer.chat_template = chat_template(cfg, tokenizer.get_vocab())
    path = directory / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    hidden = generation.get("suppress_tokens") or []
    cfg = replace(cfg, suppressed=_suppressed(f"{path}: suppress_tokens", hidden, cfg.vocab_size))
    if generation.get("eos_token_id") is None:
        path = directory / CONFIG_FILE
        config = read_json(path)
        text = config.get("text_config")
        generation = {**(text if isinstance(text, dict) else {}), **config}
    stated = [
        (f"{path}: eos_token_id", generation.get("eos_token_id")),
        (f"{directory}: the tokenizer's eos_token", tokenizer.eos_token_id),
    ]
    name = Path(source).resolve().name
    target = Target(cfg, None, tokenizer, name, end_ids(stated, cfg.vocab_size), directory)
    return target, partial(read_hf_weights, cfg, tensors)


def _suppressed(where: str, ids: Any, vocab_size: int) -> tuple[int, ...]:
    """Ids that a file says are never drawn."""
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise LoadError(f"{where} {ids!r:.60} must list ids below {vocab_size}")
    return tuple(sorted(set(ids)))


def load_drafter_for(
    target: Target,
    source: str | Path,
    *,
    own_vocab: bool = False,
    dtype: Any = None,
    mesh: Mesh | None = None,
    weights: str = PLAIN,
) -> Drafter:
    """A drafter for a loaded target; says what it was trained for where that is another one.

    Args:
        target: the target.
        source: ``"default"``, which is the drafter inside the target's checkpoint where there is
            one; a directory or a hub id, in any dialect; a run of training, or ``RUN@STEP``; a
            smaller model with the target's tokens, in any form that :func:`load_target` takes; the
            name of a drafter without files, ``"lookup"`` or ``"lookup:MIN-MAX"``, ``"lookahead"``
            or ``"lookahead:N-W"``, or ``"first:N"`` for the target's first N layers; or one with
            lookup beside it,
            ``"default+lookup"``.
        own_vocab: whether to draft with an embedding and head of the drafter's own, where it has
            them, in place of the target's.
        dtype: of the parameters; None for the target's.
        mesh: that the target was read onto; None for the default device.
        weights: as in :func:`load_target`.

    Raises:
        ValueError: the source is not there, broken or not supported, or it does not fit.
    """
    named, source = source, drafter_directory(source)
    known = without_checkpoint(str(source), target.cfg, target.params)
    if known is not None:
        return Drafter(*known, target.params.vocab, str(source), None)
    pair = beside(str(source), target.cfg)
    if pair is not None:
        read = load_drafter_for(
            target, pair[0], own_vocab=own_vocab, dtype=dtype, mesh=mesh, weights=weights
        )
        both = with_lookup(read.cfg, read.params, pair[1])
        return replace(read, cfg=both[0], params=both[1], name=f"{read.name}+lookup")
    dtype = target.params.norm_D.dtype if dtype is None else dtype
    if str(source) != "default" and not is_gguf(source) and is_assistant(source):
        return Drafter(*read_assistant(source, target.cfg, dtype, mesh))
    if str(source) != "default" and is_model(source):
        return _draft_model(target, load_target(source, dtype, mesh, weights))
    cfg, params, own, directory = read_drafter(target, source, mesh)
    vocab = bind_vocab(cfg, own, target.cfg, target.params.vocab, own_vocab=own_vocab)
    if target.source is not None:
        warn_of_another_target(trained_for(directory), target.identity)
    declared = drafter_of(cfg).declare_drafter(cfg)

    def converted(param: Param, leaf: Any) -> Any:
        return leaf if isinstance(leaf, Quantised) else leaf.astype(param.dtype or dtype)

    params = quantise_params(declared, map_params(converted, declared, params), weights)
    name = (directory if str(source) == "default" else Path(named)).resolve().name
    if directory == target.source:
        logger.info("the drafter is the one inside %s: %d drafts a round", name, cfg.block_size)
    return Drafter(cfg, params, vocab, name, directory)


def is_model(source: str | Path) -> bool:
    """Whether a source of a drafter is a model of its own, and has no drafter inside."""
    if is_gguf(source):
        return True
    directory = model_directory(source)
    path = directory / CONFIG_FILE
    if not path.is_file() or open_inside(directory) is not None:
        return False
    config = read_json(path)
    return names_a_model(config) and method_of(config) is None


def _draft_model(target: Target, model: Target) -> Drafter:
    """A model as drafter.

    Raises:
        LoadError: its tokens are not the target's.
    """
    common = min(target.cfg.vocab_size, model.cfg.vocab_size)
    tokens, others = (
        {token: i for token, i in one.tokenizer.get_vocab().items() if i < common}
        for one in (target, model)
    )
    differ = sorted(tokens.items() ^ others.items(), key=lambda pair: (pair[1], pair[0]))
    if differ:
        token, _ = differ[0]
        raise LoadError(
            f"{model.name} cannot draft for {target.name}: the token {token!r:.40} has the id "
            f"{others.get(token)} there and {tokens.get(token)} here, and so have "
            f"{len(differ) - 1} more: name a model with the target's tokenizer"
        )
    cfg, vocab = of_draft_model(model.cfg, model.params.vocab, target.cfg)
    return Drafter(cfg, model.params, vocab, model.name, model.source)


def default_drafter(target: str | Path) -> str:
    """What drafts for a target where nobody says: ``"default"``, which is the one inside its
    checkpoint or the packaged one for the default target; ``"none"`` where there is neither.

    Args:
        target: what :func:`load_target` takes.

    Raises:
        LoadError: the target is not there, or its files are broken.
    """
    return "none" if str(target) != "default" and _directory_inside(target) is None else "default"


def default_drafter_directory(target: str | Path | None) -> Path | None:
    """Where the drafter ``"default"`` of a target lies: in its own directory where it is inside its
    checkpoint, else in this package; None where that has none.

    Args:
        target: what :func:`load_target` takes, or where a loaded one lies; None for nowhere.

    Raises:
        LoadError: the target is not there, or its files are broken.
    """
    if target is None or str(target) == "default":
        return default_drafter_path()
    return _directory_inside(target) or default_drafter_path()


def _directory_inside(target: str | Path) -> Path | None:
    """The directory of a target that has a drafter inside; None for all others."""
    if is_gguf(target):
        return None
    directory = model_directory(target)
    return None if open_inside(directory) is None else directory


def read_drafter(
    target: Target,
    source: str | Path,
    mesh: Mesh | None = None,
) -> tuple[DrafterConfig, Any, Vocab | None, Path]:
    """A drafter as its checkpoint holds it, dtype included, in whichever dialect.

    Args:
        target: that it is for; its weights need not be read.
        source: ``"default"``, a directory or a hub id; one of a target is read for the drafter
            inside, and a run of training for one of its own.
        mesh: as in :func:`load_target`.

    Returns:
        Configuration, parameters, what it holds of the vocabulary (for ``bind_vocab``), and the
        directory where it lies.

    Raises:
        LoadError: the source is not there, broken or not supported.
    """
    if str(source) == "default":
        found = default_drafter_directory(target.source)
        if found is None:
            raise LoadError("this installation has no default drafter: name one, or use none")
        source = found
    directory = model_directory(drafter_directory(source))
    inside = open_inside(directory)
    if inside is not None:
        cfg, tensors = inside
        return cfg, read_inside(cfg, tensors, mesh=mesh), None, directory
    given: dict[str, Any] = {"mesh": mesh, "num_target_layers": target.cfg.num_layers}
    if target.tokenizer is not None:
        given["token_id"] = target.tokenizer.get_vocab().get
    return *load_drafter(directory, **given), directory
