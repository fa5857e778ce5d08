"""Which family a drafter is of, and which targets have one of their own form."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from dspark_jax.config import DrafterConfig, TargetConfig
from dspark_jax.drafting import AnyDrafterConfig
from dspark_jax.models.cache import Beside
from dspark_jax.models.drafters import (
    assistant,
    blockwise,
    deepseek_v4,
    deepseek_v4_mtp,
    draft_model,
    dspark,
    eagle3,
    early_exit,
    hybrid,
    lookahead,
    lookup,
    medusa,
    mtp,
)
from dspark_jax.models.drafters.family import DrafterFamily
from dspark_jax.models.targets import deepseek_v4 as deepseek_v4_target
from dspark_jax.models.targets.family import TargetParams
from dspark_jax.models.vocab import Vocab

Window = Callable[[Any, Any, Any], Beside]

DRAFTERS: tuple[DrafterFamily, ...] = (
    dspark,
    deepseek_v4,
    deepseek_v4_mtp,
    eagle3,
    mtp,
    medusa,
    blockwise,
    early_exit,
    draft_model,
    lookup,
    lookahead,
    hybrid,
    assistant,
)

# Targets whose checkpoints may hold a drafter, by ``model_type``: ``(config.json, configuration of
# the target, names of the drafter's tensors)`` -> its configuration, or None where there is none.
INSIDE: Mapping[str, Callable[[Mapping[str, Any], Any, Collection[str]], DrafterConfig | None]] = {
    "deepseek_v4": deepseek_v4_mtp.inside,
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3"), mtp.inside),
}
# Methods of training -> the configurations of their drafters, of fields of a ``DrafterConfig``.
_METHODS: Mapping[str, Callable[[Mapping[str, Any]], DrafterConfig]] = {
    "dspark": lambda fields: DrafterConfig(**fields),
    "eagle3": eagle3.of_recipe,
    "mtp": mtp.of_recipe,
    "medusa": medusa.of_recipe,
    "blockwise": blockwise.of_recipe,
    "early_exit": early_exit.of_recipe,
}
# Targets whose drafters are trained in their own form: ``(fields of a DrafterConfig, target)``.
_FORMS: Mapping[type[TargetConfig], Callable[[Mapping[str, Any], Any], DrafterConfig]] = {
    deepseek_v4_target.Config: deepseek_v4.of_recipe,
}
# Drafters of such a form -> their settings in a target's ``config.json``.
_SETTINGS: Mapping[type[DrafterConfig], Callable[[Any], dict[str, Any]]] = {
    deepseek_v4.Config: deepseek_v4.config_dict,
}

# Drafters that have the target read rows beside the text in every round that drafts.
_WINDOWS: Mapping[type[AnyDrafterConfig], Window] = {lookahead.Config: lookahead.window}

_BY_CONFIG = {family.Config: family for family in DRAFTERS}


def drafter_of(cfg: AnyDrafterConfig) -> DrafterFamily:
    """The family of a configuration."""
    return _BY_CONFIG[type(cfg)]


def window_of(cfg: AnyDrafterConfig) -> Window | None:
    """What a drafter has the target read beside the text: ``(context, position_B, cfg)``, with the
    positions of the anchors; None for most."""
    return _WINDOWS.get(type(cfg))


def rows_beside(cfg: AnyDrafterConfig) -> int:
    """How many rows of every slot that are."""
    return cfg.rows_beside if isinstance(cfg, lookahead.Config) else 0


def trained_form(method: str, fields: Mapping[str, Any], target: TargetConfig) -> DrafterConfig:
    """The configuration of a drafter that is trained for a target.

    Args:
        method: of ``TrainConfig``.
        fields: of a ``DrafterConfig``, as a recipe and the sizes of the target say.
        target: sizes of the target.

    Raises:
        ValueError: fields are wrong, or the drafters of such a target have no choice there.
    """
    form = _FORMS.get(type(target))
    if form is None:
        return _METHODS[method](fields)
    if method != "dspark":
        raise ValueError(f"method is {method!r}, but for this target only 'dspark' can be trained")
    return form(fields, target)


def inside_settings(cfg: DrafterConfig) -> dict[str, Any] | None:
    """What ``config.json`` says of a drafter that has the form of those inside checkpoints of its
    target; None for all others."""
    settings = _SETTINGS.get(type(cfg))
    return None if settings is None else settings(cfg)


def without_checkpoint(
    source: str, target: TargetConfig, params: TargetParams
) -> tuple[AnyDrafterConfig, Any] | None:
    """Configuration and parameters of a drafter that has a name in the place of files; None for
    other sources.

    Args:
        source: the name.
        target: sizes of the target.
        params: its weights.

    Raises:
        ValueError: the name has numbers that make no sense.
    """
    for family in (lookup, lookahead):
        cfg = family.named(source, target)
        if cfg is not None:
            return cfg, family.declare_drafter(cfg)
    return early_exit.named(source, target, params)


def beside(source: str, target: TargetConfig) -> tuple[str, lookup.Config] | None:
    """What ``DRAFTER+lookup`` names: the drafter, and lookup beside it; None for other sources.

    Raises:
        ValueError: the lengths of lookup make no sense.
    """
    drafter, _, name = source.rpartition("+")
    found = lookup.named(name, target) if drafter else None
    return None if found is None else (drafter, found)


def with_lookup(
    cfg: AnyDrafterConfig, params: Any, other: lookup.Config
) -> tuple[AnyDrafterConfig, Any]:
    """Configuration and parameters of a drafter with lookup beside it.

    Raises:
        ValueError: there is no such pair.
    """
    if not isinstance(cfg, DrafterConfig):
        raise ValueError("lookup goes with a drafter that has weights: name one before the +")
    return hybrid.with_lookup(cfg, params, other)


def of_draft_model(model: TargetConfig, own: Vocab | None, target: TargetConfig) -> tuple[Any, Any]:
    """Configuration and vocabulary of a smaller model as drafter.

    Args:
        model: its sizes.
        own: its embedding and LM head; None gives none.
        target: sizes of the target.
    """
    cfg = draft_model.Config(model, target.vocab_size)
    return cfg, None if own is None else draft_model.common_vocab(cfg, own)
