"""DSpark speculative decoding in JAX: block drafting, lossless verification, drafter training.

    model = dspark_jax.load()
    print(model.generate("Why is the sky blue?")[0].text)

The names of ``__all__`` are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspark_jax.axes import make_mesh
    from dspark_jax.config import DrafterConfig, TrainConfig
    from dspark_jax.engine.by_hand import read_prompts
    from dspark_jax.engine.config import EngineConfig
    from dspark_jax.engine.engine import Engine
    from dspark_jax.engine.grammar import Grammar
    from dspark_jax.engine.reader import Generation, RoundTrace
    from dspark_jax.engine.request import Request
    from dspark_jax.engine.round import decode_round, draft, plan_lengths, rank
    from dspark_jax.engine.stats import Stats
    from dspark_jax.engine.stream import Event
    from dspark_jax.engine.tokens import accept
    from dspark_jax.evaluation.confidence import calibrate
    from dspark_jax.model import Model, load
    from dspark_jax.rules import Rule
    from dspark_jax.training.fit import fit

__version__ = "0.1.0"

__all__ = [
    "DrafterConfig",
    "Engine",
    "EngineConfig",
    "Event",
    "Generation",
    "Grammar",
    "Model",
    "Request",
    "RoundTrace",
    "Rule",
    "Stats",
    "TrainConfig",
    "accept",
    "calibrate",
    "decode_round",
    "draft",
    "fit",
    "load",
    "make_mesh",
    "plan_lengths",
    "rank",
    "read_prompts",
]

_HOMES = {
    "axes": ("make_mesh",),
    "config": ("DrafterConfig", "TrainConfig"),
    "engine.by_hand": ("read_prompts",),
    "engine.config": ("EngineConfig",),
    "engine.engine": ("Engine",),
    "engine.grammar": ("Grammar",),
    "engine.reader": ("Generation", "RoundTrace"),
    "engine.request": ("Request",),
    "engine.round": ("decode_round", "draft", "plan_lengths", "rank"),
    "engine.stats": ("Stats",),
    "engine.stream": ("Event",),
    "engine.tokens": ("accept",),
    "evaluation.confidence": ("calibrate",),
    "model": ("Model", "load"),
    "rules": ("Rule",),
    "training.fit": ("fit",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"dspark_jax.{home}"), name)
    raise AttributeError(f"module 'dspark_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
