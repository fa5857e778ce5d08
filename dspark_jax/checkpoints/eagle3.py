"""Configurations of Eagle3 drafters, in the layouts of those who train them.

Their tensors are the same everywhere, under names that ``draft_tensors`` knows. The facts:

- DeepSpec names the layer in the architecture (``Qwen3Eagle3Model``), counts features by the
  outputs of layers, and calls the length of a chain ``ttt_length``.
- SafeAILab's, SpecForge's and SGLang's drafters have a reduced vocabulary with a head of its own,
  and where nothing says otherwise the streams that *enter* layers 2, L // 2 and L - 3 as features.
  What they nest in ``eagle_config`` counts outputs.
- speculators' have ``speculators_model_type`` "eagle3" and describe the layer in
  ``transformer_layer_config``; ``eagle_aux_hidden_state_layer_ids``, which vLLM reads too, counts
  inputs. Of their switches ``norm_before_residual`` and ``norm_output`` are computed here.
- Norms of q and k are there where their tensors are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_jax.checkpoints.dialects import (
    INPUTS,
    KIND,
    LAYERS,
    OUTPUTS,
    layer_ids,
    refuse_other_meanings,
)
from dspark_jax.checkpoints.tensors import LoadError, Tensors
from dspark_jax.models.draft_blocks import DraftBlocks
from dspark_jax.models.drafters.eagle3 import Config
from dspark_jax.models.targets.config_json import BLOCK_TYPE, field
from dspark_jax.models.targets.table import DRAFT_BLOCKS, FAMILIES, draft_blocks_of

METHOD = "Eagle3"  # in architectures
NESTED = "eagle_config"
CHAIN = 7  # drafts of a round where a file does not say: as in DeepSpec's evaluation
# Settings that may have other values here, and are read.
SWITCHES = ("norm_before_residual", "norm_output", "use_qk_norm", "qk_norm")


def is_eagle3(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of such a drafter."""
    return config.get(KIND) == "eagle3" or METHOD in str(config.get("architectures"))


def flat_eagle3(config: Mapping[str, Any], num_target_layers: int | None = None) -> dict[str, Any]:
    """The configuration of a drafter in the words of the reference layout.

    Args:
        config: the content of ``config.json``, in any of the layouts.
        num_target_layers: layers of the target, for files that do not say.

    Returns:
        One level: ``architectures`` names the layer, ``target_layer_ids`` counts outputs, and
        ``ttt_length`` is there.

    Raises:
        ValueError: a setting is wrong, contradicts another, or bears a meaning that is not
            understood; names it.
    """
    flat = {key: value for key, value in config.items() if key not in (LAYERS, NESTED)}
    if KIND in config:
        flat = {**field(config, LAYERS, dict), **flat, "ttt_length": _proposed(config)}
        flat["norm_before_residual"] = field(config, "norm_before_residual", bool)
    nested = field(config, NESTED, dict, {})
    if nested.get(INPUTS[1]) is not None:
        if flat.get(OUTPUTS) not in (None, nested[INPUTS[1]]):
            raise LoadError(f"{NESTED} and {OUTPUTS} name other layers: remove one of them")
        flat[OUTPUTS] = nested[INPUTS[1]]
    for part in (flat, nested):
        refuse_other_meanings(part, flat, but=SWITCHES)
    layers = flat.get("num_target_layers")
    layers = num_target_layers if layers is None else layers
    if not any(flat.get(key) for key in (OUTPUTS, *INPUTS)):
        if type(layers) is not int:
            raise LoadError(f"{INPUTS[1]} is missing, and so is the number of the target's layers")
        flat[INPUTS[1]] = [2, layers // 2, layers - 3]
    whole = flat.get("draft_vocab_size") == flat.get("vocab_size")
    return flat | {
        "architectures": [_architecture(config)],
        OUTPUTS: layer_ids(flat),
        "num_target_layers": layers,
        "draft_vocab_size": None if whole else flat.get("draft_vocab_size"),
        "ttt_length": CHAIN if flat.get("ttt_length") is None else flat["ttt_length"],
    }


def _proposed(config: Mapping[str, Any]) -> Any:
    """How many drafts speculators' file proposes; None where it does not say."""
    methods = field(config, "speculators_config", dict, {}).get("proposal_methods")
    first = methods[0] if isinstance(methods, list) and methods else None
    return first.get("speculative_tokens") if isinstance(first, dict) else None


def _architecture(config: Mapping[str, Any]) -> str:
    """The reference layout's name of a drafter with this layer.

    Raises:
        LoadError: there is no such layer.
    """
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and len(named) == 1 else named
    if name in _BLOCKS:
        return str(name)
    kind = field(config, LAYERS, dict, config).get("model_type") or BLOCK_TYPE
    if FAMILIES.get(str(kind)) is not FAMILIES[BLOCK_TYPE]:
        raise LoadError(f"model_type {kind!r} of the layer is not supported: only {BLOCK_TYPE}'s")
    return next(iter(_BLOCKS))


def eagle3_config(flat: Mapping[str, Any]) -> Config:
    """The configuration of a drafter, of :func:`flat_eagle3`.

    Raises:
        ValueError: a field is missing or wrong, or asks for something that is not supported.
    """
    if flat.get("head_dim") is None and flat.get("model_type") != BLOCK_TYPE:
        width, heads = field(flat, "hidden_size", int), field(flat, "num_attention_heads", int)
        flat = {**flat, "head_dim": max(width // heads, 1)}
    reduced = flat.get("draft_vocab_size")
    return Config(
        **_BLOCKS[flat["architectures"][0]].read(flat),
        qk_norm=field(flat, "use_qk_norm", bool, True),
        block_size=field(flat, "ttt_length", int),
        target_layer_ids=tuple(flat[OUTPUTS]),
        num_target_layers=field(flat, "num_target_layers", int),
        draft_vocab_size=None if reduced is None else field(flat, "draft_vocab_size", int),
        owns_vocab=field(flat, "owns_vocab", bool, True),
        norm_residual=field(flat, "norm_before_residual", bool, False),
        norm_output=field(flat, "norm_output", bool, False),
    )


def completed_eagle3(flat: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """The settings that a file leaves to its tensors: norms and biases of the layer."""
    prefix = "layers.0.self_attn."
    bias = {name: f"{prefix}{name}.bias" in tensors.shapes for name in ("q_proj", "o_proj")}
    if bias["o_proj"] and not bias["q_proj"]:
        raise LoadError(f"{tensors.origin}: {prefix}o_proj has a bias, but q_proj none")
    normed = f"{prefix}q_norm.weight" in tensors.shapes
    return {**flat, "use_qk_norm": normed, "attention_bias": bias["q_proj"]}


def eagle3_config_dict(cfg: Config) -> dict[str, Any]:
    """What ``config.json`` says of a drafter in the reference layout; inverse of
    :func:`eagle3_config`."""
    blocks = draft_blocks_of(cfg)
    switches = {"norm_before_residual": cfg.norm_residual, "norm_output": cfg.norm_output}
    return {
        **blocks.write(cfg),
        "architectures": [_architecture_of(blocks)],
        "draft_num_hidden_layers": 1,
        "ttt_length": cfg.block_size,
        **{name: True for name, on in switches.items() if on},
    }


def check_reference(cfg: Config) -> None:
    """Check that the reference layout, as others read it, says what a drafter computes.

    Raises:
        ValueError: names what it cannot say.
    """
    for what, there in (
        ("no norms of q and k", not cfg.blocks and not cfg.qk_norm),
        ("norm_before_residual", cfg.norm_residual),
        ("norm_output", cfg.norm_output),
    ):
        if there:
            raise ValueError(
                f"the drafter has {what}, and the reference layout has no such drafters: choose "
                "the format speculators"
            )


def _architecture_of(blocks: DraftBlocks) -> str:
    return blocks.architecture.replace("DSpark", METHOD)


_BLOCKS = {_architecture_of(blocks): blocks for blocks in DRAFT_BLOCKS.values()}
