"""The dialects in which others describe drafters, turned into that of the reference layout.

Every ``config.json`` comes in here: DeepSpec's own, speculators', DFlash's as its authors publish
it, and what serving engines make of these. It comes out flat, in the reference layout's words. The
facts:

- Layers: ``target_layer_ids`` counts outputs (l is the stream after decoder layer l, as here),
  ``aux_hidden_state_layer_ids`` and ``eagle_aux_hidden_state_layer_ids`` count inputs (l + 1).
- Slots: whether the anchor's predicts the first draft has three names. Without any of them DFlash
  and speculators' files have a block of 1 + N slots whose first predicts nothing.
- Settings may be nested: ``transformer_layer_config`` describes the layers, ``dflash_config`` and
  ``dspark_config`` the method.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from typing import Any

from dspark_jax.checkpoints.tensors import LoadError
from dspark_jax.models.targets.config_json import BLOCK_TYPE, field
from dspark_jax.models.targets.table import DRAFT_BLOCKS

KIND = "speculators_model_type"
LAYERS = "transformer_layer_config"
METHODS = ("dflash_config", "dspark_config")
ANCHOR_PREDICTS = ("sample_from_anchor", "query_zero_predicts_next", "shift_label")
OUTPUTS, INPUTS = (
    "target_layer_ids",
    (
        "aux_hidden_state_layer_ids",
        "eagle_aux_hidden_state_layer_ids",
    ),
)
LAYER_ID_OFFSET = 1

# Other names of settings.
ALIASES = {
    "use_confidence_head": "enable_confidence_head",
    "noise_token_id": "mask_token_id",
    "head_type": "markov_head_type",
}
# What changes the numbers, and the values under which they are those computed here. A setting that
# is missing or null has such a value everywhere.
UNDERSTOOD: Mapping[str, tuple[Any, ...]] = {
    "use_aux_hidden_state": (True,),
    "projector_type": ("dflash", "dspark"),
    "draft_arch": ("dflash", "dspark"),
    "markov_output_mode": ("additive",),
    "markov_order": (1, 0),
    "is_neox_style": (True,),
    "use_qk_norm": (True,),
    "qk_norm": (True,),
    **dict.fromkeys(
        ("logit_scale", "logits_scaling", "logit_multiplier", "embedding_scale", "embed_scale",
         "embedding_multiplier", "scale_emb", "residual_multiplier", "attention_multiplier",
         "markov_scale", "num_diffusion_steps"),
        (1,),
    ),
    **dict.fromkeys(
        ("causal", "is_causal", "block_causal", "causal_block", "attention_sink_bias",
         "attention_sinks", "attention_sink", "fc_norm", "fc_layernorm", "norm_before_fc",
         "norm_before_residual", "norm_output", "include_embedding_chs", "local_position",
         "left_shift", "rope_interleave", "rope_interleaved", "mlp_bias", "use_swa",
         "dspark_backbone_conv_enabled", "draft_adapter_rank", "selector_top_k", "selector_rank",
         "conv_kernel_size", "attn_logit_softcapping", "attention_chunk_size"),
        (False, 0),
    ),
}  # fmt: skip
# Other settings of the method are named like this.
PREFIXED = re.compile("(markov|dspark|dflash|anchor|drafter|confidence_head)_")
# Of the method, without bearing on the numbers; in part they belong to other methods.
BOOKKEEPING = (
    "num_anchors", "max_anchors", "num_speculative_tokens", "pure_draft_prefix_len", "emb_dim",
    "gru_hidden_dim", "swa_window_size", "lambda_base_start", "lambda_base_decay_ratio", "auf",
)  # fmt: skip
TRAINING = re.compile("loss|train|alpha|name|path|version|seed")
# Of the method, and read.
READ = (
    "block_size", "mask_token_id", "noise_token_id", "mask_token", "markov_rank",
    "markov_head_type", "head_type", "enable_confidence_head", "use_confidence_head",
    "confidence_head_with_markov", "draft_vocab_size", "target_hidden_size",
    "num_target_layers", "target_num_hidden_layers", "layer_id_offset",
    "sliding_window", "layer_types", "use_sliding_window", "sliding_window_non_causal",
    OUTPUTS, *INPUTS, *ANCHOR_PREDICTS,
)  # fmt: skip


def flat_config(
    config: Mapping[str, Any],
    num_target_layers: int | None = None,
    token_id: Callable[[str], int | None] | None = None,
) -> dict[str, Any]:
    """The configuration of a drafter in the words of the reference layout.

    Args:
        config: the content of ``config.json``, in any dialect.
        num_target_layers: layers of the target, for files that do not say.
        token_id: the target's id of a token, for files that spell the mask token.

    Returns:
        One level: ``architectures`` names the layers, ``target_layer_ids`` counts outputs,
        ``sample_from_anchor`` is there.

    Raises:
        ValueError: a setting is wrong, contradicts another, or bears a meaning that is not
            understood; names it.
    """
    method = _method(config)
    flat = _flattened(config)
    for key, name in ALIASES.items():
        if flat.get(key) is not None:
            _put(flat, name, flat.pop(key), key)
    refuse_other_meanings(config, flat)
    ids = layer_ids(flat)
    blocks = _architecture(flat, method)
    said = {key: field(flat, key, bool) for key in ANCHOR_PREDICTS if flat.get(key) is not None}
    if len(set(said.values())) > 1:
        raise LoadError(f"{' and '.join(said)} contradict each other: remove one of them")
    anchor = next(iter(said.values()), method == "dspark" and KIND not in flat)
    layers = flat.get("target_num_hidden_layers")  # beside it the other counts those that are read
    layers = flat.get("num_target_layers") if layers is None else layers
    mask = flat.get("mask_token") if flat.get("mask_token_id") is None else flat["mask_token_id"]
    if isinstance(mask, str) and token_id is not None:
        if token_id(mask) is None:
            raise LoadError(f"the mask token {mask!r} is none of the target's: give mask_token_id")
        mask = token_id(mask)
    whole = flat.get("draft_vocab_size") == flat.get("vocab_size")
    return flat | {
        "architectures": [blocks],
        "sample_from_anchor": anchor,
        OUTPUTS: ids,
        "num_target_layers": num_target_layers if layers is None else layers,
        "mask_token_id": mask,
        "draft_vocab_size": None if whole else flat.get("draft_vocab_size"),
    }


def _method(config: Mapping[str, Any]) -> str:
    """``"dspark"`` or ``"dflash"``, by what the configuration names, or else by its settings."""
    if KIND in config:
        if config[KIND] not in ("dspark", "dflash"):
            raise LoadError(
                f"{KIND} {config[KIND]!r} is not supported: only 'dspark', 'dflash' and 'eagle3'"
            )
        return str(config[KIND])
    nested = config.get("dflash_config")
    projector = nested.get("projector_type") if isinstance(nested, dict) else None
    named = _named_architecture(config)
    if named is not None:
        return "dspark" if projector == "dspark" else named[1].lower()
    if config.get("architectures") or not (nested or config.get("block_size")):
        every = ", ".join(
            [*(blocks.architecture for blocks in DRAFT_BLOCKS.values()),
             "DSparkDraftModel", "DFlashDraftModel", "Eagle3DraftModel"]
        )  # fmt: skip
        raise LoadError(
            f"architectures {config.get('architectures')!r:.80} is not supported: only one of "
            f"{every}"
        )
    markov = config.get("markov_rank") or "dspark_config" in config or projector == "dspark"
    return "dspark" if markov or not nested else "dflash"


def names_a_model(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of a model and not of a drafter, by its architecture."""
    names = config.get("architectures")
    if names is None:
        return "model_type" in config and "block_size" not in config
    name = names[0] if isinstance(names, list) and len(names) == 1 else ""
    of_model = re.fullmatch(r"\w+(ForCausalLM|ForConditionalGeneration)", str(name))
    drafts = KIND in config or any(method in config for method in METHODS)
    return of_model is not None and not drafts and _named_architecture(config) is None


def _named_architecture(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """The layers and the method in the name of an architecture; None where it is none of ours."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    found = re.fullmatch(
        r"(\w*?)(DSpark|DFlash)(?:Model|DraftModel|Speculator|ForCausalLM)", str(name)
    )
    return (found[1], found[2]) if found else None


def _flattened(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is nested, beside the rest.

    Raises:
        LoadError: something nested that is not understood, or that is said twice, differently.
    """
    flat = {key: value for key, value in config.items() if key not in (LAYERS, *METHODS)}
    if KIND in config:
        layers = field(config, LAYERS, dict)
        flat = {**flat, **layers, "architectures": config.get("architectures")}
    for method in METHODS:
        nested = field(config, method, dict, {})
        for key, value in nested.items():
            if value is None or key in BOOKKEEPING or TRAINING.search(key):
                continue
            if key == "sliding_window" and "sliding_attention" not in str(
                config.get("layer_types")
            ):
                raise LoadError(
                    f"{method} has sliding_window {value!r}, but layer_types name no layer"
                )
            if key not in READ and key not in UNDERSTOOD and value is not False:
                raise LoadError(f"{method} has {key} {value!r}, which is not supported")
            _put(flat, key, value, f"{method}.{key}")
    return flat


def _put(flat: dict[str, Any], key: str, value: Any, origin: str) -> None:
    """Set a setting that may be there under another name.

    Raises:
        LoadError: it is there with another value.
    """
    if flat.get(key) not in (None, value):
        raise LoadError(f"{origin} {value!r} and {key} {flat[key]!r} contradict each other")
    flat[key] = value


def refuse_other_meanings(
    config: Mapping[str, Any], flat: Mapping[str, Any], but: Container[str] = ()
) -> None:
    """Settings that would change the numbers, of the drafter or, flattened, of its layers, too;
    ``but`` are understood.

    Raises:
        LoadError: names the first one.
    """
    for part in (config, flat):
        for key, right in UNDERSTOOD.items():
            value = part.get(key)
            if key not in but and value is not None and value not in right:
                raise LoadError(f"{key} {value!r} is not supported: only {right[0]!r}")
    known = {*READ, *UNDERSTOOD, *BOOKKEEPING, *METHODS}
    for key, value in flat.items():
        meant = PREFIXED.match(key) and not TRAINING.search(key) and key not in known
        if meant and value not in (None, False):
            raise LoadError(f"{key} {value!r} is not understood: it may change what is drafted")
    width = flat.get("target_hidden_size")
    if width not in (None, flat.get("hidden_size")):
        raise LoadError(
            f"target_hidden_size {width!r} is not supported: only the drafter's own hidden_size "
            f"{flat.get('hidden_size')!r}"
        )
    slides = "sliding_attention" in (flat.get("layer_types") or ()) or flat.get(
        "use_sliding_window"
    )
    if slides and flat.get("sliding_window_non_causal") is False:
        raise LoadError(
            "sliding_window_non_causal False is not supported: the slots of a block see each other "
            "in both directions here"
        )


def _architecture(flat: Mapping[str, Any], method: str) -> str:
    """The reference layout's name of a drafter with these layers.

    Raises:
        LoadError: there are no such layers.
    """
    known = {blocks.architecture for blocks in DRAFT_BLOCKS.values()}
    named = _named_architecture(flat)
    layers = f"{named[0] if named else ''}DSparkModel"
    if KIND not in flat and layers in known:
        return layers
    kind = flat.get("model_type")
    if KIND in flat and kind not in (None, BLOCK_TYPE):
        raise LoadError(f"model_type {kind!r} of the layers: only {BLOCK_TYPE} works")
    if kind in (None, BLOCK_TYPE, method):
        return DRAFT_BLOCKS[""].architecture
    if not isinstance(kind, str) or kind not in DRAFT_BLOCKS:
        raise LoadError(f"model_type {kind!r} of the layers is not supported")
    return DRAFT_BLOCKS[kind].architecture


def layer_ids(flat: Mapping[str, Any]) -> list[int]:
    """The feature layers, counted by their outputs.

    Raises:
        LoadError: there is no list, or two that contradict each other.
    """
    offset = LAYER_ID_OFFSET
    if flat.get("layer_id_offset") is not None:
        offset = flat["layer_id_offset"]
        if offset not in (0, LAYER_ID_OFFSET) or type(offset) is not int:
            raise LoadError(
                f"layer_id_offset is {offset!r}: only 0 and {LAYER_ID_OFFSET} are known"
            )
        if offset and not any(flat.get(key) for key in INPUTS):
            raise LoadError(
                f"layer_id_offset is {offset}, but {OUTPUTS} counts outputs: remove it, or name "
                f"the list {INPUTS[0]}"
            )
    found: dict[str, list[int]] = {}
    for key, lower in ((OUTPUTS, 0), *((key, offset) for key in INPUTS)):
        if flat.get(key) is None:
            continue
        listed = field(flat, key, list)
        if not all(type(layer) is int for layer in listed):
            raise LoadError(f"{key} {listed} must be a list of integers")
        found[key] = [layer - lower for layer in listed]
    if not found:
        raise LoadError(f"{INPUTS[0] if KIND in flat else OUTPUTS} is missing")
    first = next(iter(found.values()))
    if any(ids != first for ids in found.values()):
        said = " and ".join(f"{key} {flat[key]}" for key in found)
        raise LoadError(f"{said} contradict each other: remove one of them")
    return first
