"""Drafters of other methods than DSpark, by what their ``config.json`` says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dspark_jax.checkpoints import eagle3, medusa, mtp
from dspark_jax.checkpoints.own_layouts import BLOCKWISE, EARLY_EXIT, OwnLayout
from dspark_jax.checkpoints.tensors import Tensors
from dspark_jax.config import DrafterConfig
from dspark_jax.models.drafters.blockwise import Config as BlockwiseConfig
from dspark_jax.models.drafters.eagle3 import Config as Eagle3Config
from dspark_jax.models.drafters.early_exit import Config as EarlyExitConfig
from dspark_jax.models.drafters.medusa import Config as MedusaConfig
from dspark_jax.models.drafters.mtp import Config as MtpConfig


@dataclass(frozen=True)
class Method:
    """How the files of a method are read and written.

    Attributes:
        Config: of its drafters.
        recognises: ``(config)``: whether a ``config.json``, flat or not, is of the method.
        flat: ``(config, num_target_layers)``: the settings on one level.
        names: ``(tensors)``: the tensors under the declared names.
        completed: ``(flat, tensors)``: with the settings that the tensors tell.
        config: ``(flat)``: the configuration.
        config_dict: ``(cfg)``: what ``config.json`` says of the drafter alone.
    """

    Config: type[DrafterConfig]
    recognises: Callable[[Mapping[str, Any]], bool]
    flat: Callable[[Mapping[str, Any], int | None], dict[str, Any]]
    names: Callable[[Tensors], Tensors]
    completed: Callable[[Mapping[str, Any], Tensors], dict[str, Any]]
    config: Callable[[Mapping[str, Any]], DrafterConfig]
    config_dict: Callable[[Any], dict[str, Any]]


def _own(Config: type[DrafterConfig], layout: OwnLayout) -> Method:
    """A method whose files are ours alone."""
    return Method(
        Config,
        layout.recognises,
        layout.flat,
        lambda tensors: tensors,
        lambda flat, tensors: dict(flat),
        layout.config,
        layout.config_dict,
    )


METHODS = (
    Method(
        Eagle3Config,
        eagle3.is_eagle3,
        eagle3.flat_eagle3,
        lambda tensors: tensors,
        eagle3.completed_eagle3,
        eagle3.eagle3_config,
        eagle3.eagle3_config_dict,
    ),
    Method(
        MedusaConfig,
        medusa.is_medusa,
        medusa.flat_medusa,
        medusa.medusa_names,
        medusa.completed_medusa,
        medusa.medusa_config,
        medusa.medusa_config_dict,
    ),
    Method(
        MtpConfig,
        mtp.is_mtp,
        mtp.flat_mtp,
        mtp.mtp_names,
        mtp.completed_mtp,
        mtp.mtp_config,
        mtp.mtp_config_dict,
    ),
    _own(BlockwiseConfig, BLOCKWISE),
    _own(EarlyExitConfig, EARLY_EXIT),
)


# Drafters that the layouts of others have no place for.
_OWN_LAYOUT: Mapping[type[DrafterConfig], str] = {
    MedusaConfig: "Medusa heads",
    MtpConfig: "MTP layers",
    BlockwiseConfig: "blockwise drafters",
    EarlyExitConfig: "early exits",
}


def method_of(config: Mapping[str, Any]) -> Method | None:
    """The method of a ``config.json``; None for DSpark and DFlash."""
    return next((method for method in METHODS if method.recognises(config)), None)


def check_layout(cfg: DrafterConfig, layout: str) -> None:
    """Check that a layout says what a drafter computes; arguments as for
    :func:`~dspark_jax.checkpoints.export.save_layout`.

    Raises:
        ValueError: it does not; names what it lacks.
    """
    for Config, what in _OWN_LAYOUT.items():
        if isinstance(cfg, Config) and layout != "dspark":
            raise ValueError(f"the format {layout} has no {what}: choose the format dspark")
    if isinstance(cfg, Eagle3Config) and layout == "deepspec":
        eagle3.check_reference(cfg)


def method_of_config(cfg: DrafterConfig) -> Method | None:
    """The method of a configuration; None for DSpark and DFlash."""
    return next((method for method in METHODS if isinstance(cfg, method.Config)), None)
