"""Where an engine runs, and with what: all that the seconds of its rounds depend on."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax

from dspark_jax import __version__
from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.decoder import Decoder
from dspark_jax.engine.memory import complete


def setting_of(decoder: Decoder, config: EngineConfig) -> dict[str, Any]:
    """What the seconds of a round depend on, apart from its size, as flat JSON values.

    Of the models that is their sizes: other weights of the same sizes cost the same.
    """
    config = complete(decoder, config)
    setting: dict[str, Any] = {
        "device": device_name(),
        "mesh": None if decoder.mesh is None else str(dict(decoder.mesh.shape)),
        "dtype": _dtypes_of(decoder),
        "jax": jax.__version__,
        "dspark_jax": __version__,
        "chunk_rows": config.chunk_rows,
        "kernels": config.kernels,
    }
    for model in ("target", "drafter"):
        cfg = getattr(decoder, model)
        fields = {} if cfg is None else json.loads(json.dumps(dataclasses.asdict(cfg)))
        setting |= {f"{model}.{field}": value for field, value in fields.items()}
    return setting


def _dtypes_of(decoder: Decoder) -> str:
    """Of all weights, that of the activations first: quantised weights have others besides."""
    own, weights = str(decoder.weights.target.norm_D.dtype), decoder.weights
    others = {str(leaf.dtype) for leaf in jax.tree.leaves((weights.target, weights.drafter))}
    return ", ".join([own, *sorted(others - {own, "float32"})])


def device_name() -> str:
    """The device that computes; of a CPU, also how many cores this process may use."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return str(device.device_kind)
    affinity = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    cores = len(affinity(0)) if affinity is not None else os.cpu_count()
    return f"cpu {_processor()}, {cores} cores"


def _processor() -> str:
    """The name of the CPU, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
