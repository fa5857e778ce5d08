"""Drafters of methods that have no files but our own: blockwise ones and early exits.

``config.json`` names the architecture and the sizes; the tensors have the names of the declaration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dspark_jax.config import DrafterConfig
from dspark_jax.models.drafters import blockwise, early_exit
from dspark_jax.models.targets.config_json import field


@dataclass(frozen=True)
class OwnLayout:
    """The files of a method.

    Attributes:
        architecture: in ``config.json``.
        of_recipe: makes the configuration, of fields of a ``DrafterConfig``.
    """

    architecture: str
    of_recipe: Callable[[Mapping[str, Any]], DrafterConfig]

    def recognises(self, config: Mapping[str, Any]) -> bool:
        """Whether a ``config.json`` is of such a drafter."""
        return config.get("architectures") == [self.architecture]

    def flat(
        self, config: Mapping[str, Any], num_target_layers: int | None = None
    ) -> dict[str, Any]:
        """The configuration, its number of the target's layers included."""
        layers = config.get("num_target_layers")
        return {**config, "num_target_layers": num_target_layers if layers is None else layers}

    def config(self, flat: Mapping[str, Any]) -> DrafterConfig:
        """The configuration of a drafter, of :meth:`flat`.

        Raises:
            ValueError: a field is missing or wrong.
        """
        reduced = flat.get("draft_vocab_size")
        numbers = {name: field(flat, key, int) for name, key in _NUMBERS.items()}
        return self.of_recipe(
            {
                **numbers,
                "rms_norm_eps": field(flat, "rms_norm_eps", float),
                "target_layer_ids": tuple(field(flat, "target_layer_ids", list)),
                "draft_vocab_size": None
                if reduced is None
                else field(flat, "draft_vocab_size", int),
                "owns_vocab": False,
            }
        )

    def config_dict(self, cfg: DrafterConfig) -> dict[str, Any]:
        """The content of ``config.json``; inverse of :meth:`config`."""
        numbers = {key: getattr(cfg, name) for name, key in _NUMBERS.items()}
        named = {"architectures": [self.architecture], "rms_norm_eps": cfg.rms_norm_eps}
        return {**numbers, **named}


_NUMBERS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "block_size": "block_size",
    "max_positions": "max_position_embeddings",
    "num_target_layers": "num_target_layers",
}

BLOCKWISE = OwnLayout("BlockwiseModel", blockwise.of_recipe)
EARLY_EXIT = OwnLayout("EarlyExitModel", early_exit.of_recipe)
