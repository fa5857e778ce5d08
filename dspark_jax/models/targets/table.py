"""Which family a target is of."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

from dspark_jax.config import DrafterConfig, TargetConfig
from dspark_jax.models.draft_blocks import DraftBlocks
from dspark_jax.models.targets import (
    deepseek_v4,
    deepseek_v4_names,
    deepseek_v4_text,
    gemma,
    gemma_drafter,
    llama,
    qwen3_moe,
)
from dspark_jax.models.targets.family import TargetFamily
from dspark_jax.models.targets.gemma_config import DRAFT_LAYERS

# ``model_type`` of a config.json -> its family.
FAMILIES: Mapping[str, TargetFamily] = {
    "deepseek_v4": deepseek_v4,
    "llama": llama,
    "mistral": llama,
    "qwen2": llama,
    "qwen3": llama,
    "qwen3_moe": qwen3_moe,
    "gemma2": gemma,
    "gemma3_text": gemma,
    "gemma4_text": gemma,
    "gemma4_unified_text": gemma,
    "smollm3": llama,
}

# The layers of drafters' blocks, by ``DrafterConfig.blocks``.
DRAFT_BLOCKS: Mapping[str, DraftBlocks] = {
    "": llama.DRAFT_BLOCKS,
    DRAFT_LAYERS: gemma_drafter.DRAFT_BLOCKS,
}

# Families whose tensors have several names in files -> the declared one of a tensor, None for one
# that is not the target's.
_NAMES: Mapping[type[TargetConfig], Callable[[str], str | None]] = {
    deepseek_v4.Config: deepseek_v4_names.declared_name,
}

_BY_CONFIG = {family.Config: family for family in FAMILIES.values()}


def draft_blocks_of(cfg: DrafterConfig) -> DraftBlocks:
    """The layers of a drafter's blocks."""
    return DRAFT_BLOCKS[cfg.blocks]


def family_of(cfg: TargetConfig) -> TargetFamily:
    """The family of a configuration."""
    return _BY_CONFIG[type(cfg)]


def declared_name(cfg: TargetConfig, name: str) -> str | None:
    """The name that a target's family declares for a tensor of a file; None for a tensor that is
    not the target's."""
    of_family = _NAMES.get(type(cfg))
    return name if of_family is None else of_family(name)


def chat_template(cfg: TargetConfig, tokens: Container[str]) -> str | None:
    """The template of a family whose checkpoints have none; None where they have, or where its
    special tokens are not among those of the tokenizer."""
    if type(cfg) is not deepseek_v4.Config:
        return None
    known = all(token in tokens for token in deepseek_v4_text.SPECIAL_TOKENS)
    return deepseek_v4_text.CHAT_TEMPLATE if known else None
