"""Gemma 4's assistants as Google publishes them: a small text model without keys and values, and
two projections; ``text_config`` describes its layers, ``backbone_hidden_size`` its target."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from dspark_jax.checkpoints.hf import CONFIG_FILE, model_directory, read_checkpoint
from dspark_jax.checkpoints.tensors import read_json, read_params
from dspark_jax.config import TargetConfig
from dspark_jax.models.drafters.assistant import (
    Config,
    Params,
    config_for,
    declare_drafter,
    declare_vocab,
)
from dspark_jax.models.targets.config_json import field
from dspark_jax.models.targets.gemma_config import Config as ModelConfig
from dspark_jax.models.targets.gemma_config import config as model_config
from dspark_jax.models.targets.text_config import text_config
from dspark_jax.models.vocab import Vocab

KINDS = ("gemma4_assistant", "gemma4_unified_assistant")
SHARED = "num_kv_shared_layers"


def is_assistant(source: str | Path) -> bool:
    """Whether a directory or hub id holds an assistant.

    Raises:
        LoadError: it cannot be read.
    """
    path = model_directory(source) / CONFIG_FILE
    return path.is_file() and read_json(path).get("model_type") in KINDS


def assistant_config(config: Mapping[str, Any], target: TargetConfig) -> Config:
    """The configuration out of a ``config.json``.

    Raises:
        ValueError: a field is missing or wrong, asks for something that is not supported, or is of
            another target.
    """
    if field(config, "use_ordered_embeddings", bool, False):
        raise ValueError("use_ordered_embeddings is true: assistants that score groups of tokens")
    text = text_config(config)
    shared, layers = field(text, SHARED, int), field(text, "num_hidden_layers", int)
    if shared != layers:
        raise ValueError(f"{SHARED} is {shared}: of an assistant it must be all {layers} layers")
    model: ModelConfig = model_config({**text, SHARED: 0})
    if model.token_size or model.num_experts or model.wide_shared or model.softcap is not None:
        raise ValueError(
            "hidden_size_per_layer_input, enable_moe_block, use_double_wide_mlp and "
            "final_logit_softcapping must be off: other assistants are not supported"
        )
    return config_for(model, field(config, "backbone_hidden_size", int), target)


def read_assistant(
    source: str | Path, target: TargetConfig, dtype: Any, mesh: Mesh | None = None
) -> tuple[Config, Params, Vocab, str, Path]:
    """An assistant out of a directory or hub id.

    Args:
        source: the directory, or ``owner/name`` on the hub.
        target: sizes of the target.
        dtype: of the parameters.
        mesh: as in :func:`~dspark_jax.checkpoints.tensors.read_params`.

    Returns:
        Configuration, weights, its own vocabulary, its name, and the directory.

    Raises:
        LoadError: something is missing, broken or not supported, or of another target.
    """
    directory = model_directory(source)

    def parse(config: Mapping[str, Any]) -> Config:
        return assistant_config(config, target)

    cfg, tensors = read_checkpoint(directory, parse)
    tensors = tensors.without("lm_head.weight")  # a copy
    params, vocab = read_params((declare_drafter(cfg), declare_vocab(cfg)), tensors, dtype, mesh)
    return cfg, params, vocab, directory.resolve().name, directory
