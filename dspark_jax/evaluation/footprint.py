"""What models and requests take on a device, said before anything is read or computed.

All of it follows from declarations: weights from those of the families, states from those of their
caches, both split over a mesh whose devices need not be there. What a program needs besides is an
estimate: logits, with the copies that XLA may make of them, and the widest activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from dspark_jax.axes import MESH_AXES, device_bytes, map_params
from dspark_jax.checkpoints.deepspec import open_drafter
from dspark_jax.checkpoints.default import default_drafter_path, default_target_path
from dspark_jax.checkpoints.gguf import gguf_config, is_gguf, open_gguf
from dspark_jax.checkpoints.hf import CONFIG_FILE, model_directory, open_hf_target, target_config
from dspark_jax.checkpoints.inside import open_inside
from dspark_jax.checkpoints.load import is_model
from dspark_jax.checkpoints.runs import drafter_directory
from dspark_jax.checkpoints.tensors import LoadError, Tensors, declare_stored, read_json
from dspark_jax.config import TargetConfig
from dspark_jax.drafting import AnyDrafterConfig
from dspark_jax.engine.config import EngineConfig, round_up
from dspark_jax.engine.memory import LOGIT_COPIES, SHARE
from dspark_jax.engine.state import StateConfig, declare_state
from dspark_jax.models.drafters.table import drafter_of, of_draft_model
from dspark_jax.models.quantised import PLAIN, check_kind, declare_quantised
from dspark_jax.models.targets.table import family_of

CHUNK_ROWS = 256  # of a round on a GPU that reads prompts
ACTIVATIONS = 4  # arrays of a layer that are there at once
MOST_SLOTS = 2**16


@dataclass(frozen=True)
class Models:
    """A target and a drafter whose weights have not been read.

    Attributes:
        target: its sizes.
        drafter: its sizes; None for none.
        declared: of all weights that decoding holds, as they are stored.
        names: of target and drafter.
    """

    target: TargetConfig
    drafter: AnyDrafterConfig | None
    declared: Any
    names: tuple[str, str]


def open_models(target: str, drafter: str = "none", *, own_vocab: bool = False) -> Models:
    """Models by their configurations and the headers of their files.

    Args:
        target: ``"default"``, a GGUF file, a directory or hub id. A directory may hold a
            ``config.json`` alone.
        drafter: ``"none"``, ``"default"``, a directory or hub id, of a smaller model, too.
        own_vocab: whether to draft with the drafter's own embedding and head, where it has them.

    Raises:
        LoadError: a source is not there, broken or not supported.
    """
    source = default_target_path() if target == "default" else target
    inside = None
    if is_gguf(source):
        cfg = gguf_config(open_gguf(source), source)
        held = family_of(cfg).declare(cfg)
    else:
        directory = model_directory(source)
        if any(directory.glob("*.safetensors")):
            cfg, tensors = open_hf_target(directory)
            held = _as_stored(family_of(cfg).declare(cfg), tensors)
            inside = open_inside(directory) if drafter == "default" else None
        else:
            cfg = _configured(directory)
            held = family_of(cfg).declare(cfg)
    name = Path(source).resolve().name
    if drafter == "none":
        return Models(cfg, None, held, (name, drafter))
    if inside is not None:
        draft_cfg, tensors = inside
        drafts = _as_stored(drafter_of(draft_cfg).declare_drafter(draft_cfg), tensors)
        return Models(cfg, draft_cfg, (held, drafts), (name, name))
    path = default_drafter_path() if drafter == "default" else drafter_directory(drafter)
    if path is None:
        raise LoadError("this installation has no default drafter: name one, or use none")
    if drafter != "default" and is_model(path):
        model = open_models(str(path))
        draft_cfg, _ = of_draft_model(model.target, None, cfg)
        return Models(cfg, draft_cfg, (held, model.declared), (name, model.names[0]))
    draft_cfg, vocab, *_ = open_drafter(path, num_target_layers=cfg.num_layers)
    drafts = drafter_of(draft_cfg).declare_drafter(draft_cfg)
    # Decoding holds the matrices of keys and values a second time, as one of all layers.
    blocks = drafter_of(draft_cfg).lessons == "blocks"
    context = [(stack.k_DKH, stack.v_DKH) for stack in drafts.layers if blocks]
    own = vocab if own_vocab or draft_cfg.draft_vocab_size else None
    every = held, drafts, context, own
    return Models(cfg, draft_cfg, every, (name, Path(path).resolve().name))


def _as_stored(declared: Any, tensors: Tensors) -> Any:
    """A declaration in which matrices have the form that they have in a checkpoint."""
    return map_params(lambda param: declare_stored(param, tensors), declared)


def _configured(directory: Path) -> TargetConfig:
    """A target of which there is the configuration alone."""
    path = directory / CONFIG_FILE
    try:
        return target_config(read_json(path))
    except ValueError as error:
        raise LoadError(f"{path}: {error}") from None


def plan(
    models: Models,
    mesh: Mapping[str, int],
    *,
    slots: int,
    positions: int,
    memory_bytes: int,
    dtype: Any = "bfloat16",
    weights: str = PLAIN,
) -> dict[str, Any]:
    """Bytes on each device of a mesh, and what fits.

    Args:
        models: of :func:`open_models`.
        mesh: sizes of ``data``, ``expert`` and ``tensor``; empty for one device.
        slots: requests that are decoded at once, over all data shards.
        positions: of each request.
        memory_bytes: of a device.
        dtype: of weights and caches.
        weights: the kind of values that matrices are turned into; those that are stored as values
            with scales stay as they are.

    Returns:
        ``weight_bytes``, ``state_bytes`` and ``temporary_bytes`` of a device, their
        ``total_bytes``, whether that ``fits``, the ``most_slots`` that would (0 for none), and what
        was asked. JSON values.

    Raises:
        ValueError: the target has fewer positions, or slots do not divide over the data shards.
    """
    check_kind(weights)
    shards = mesh.get("data", 1)
    if positions > models.target.max_positions:
        raise ValueError(
            f"positions is {positions}, but the target's context ends at "
            f"{models.target.max_positions}: give at most that"
        )
    if slots % shards:
        raise ValueError(f"slots is {slots}: it must be a multiple of the {shards} data shards")
    sizes = tuple(mesh.get(axis, 1) for axis in MESH_AXES)
    over, kind = AbstractMesh(sizes, MESH_AXES), jnp.dtype(dtype)
    weight_bytes = device_bytes(declare_quantised(models.declared, weights), over, kind)

    def parts(slots: int) -> tuple[int, int]:
        state = declare_state(_state_config(models, slots, positions, kind))
        return device_bytes(state, over), _temporary_bytes(models, slots // shards, mesh)

    def fits(slots: int) -> bool:
        return weight_bytes + sum(parts(slots)) <= SHARE * memory_bytes

    state_bytes, temporary_bytes = parts(slots)
    return {
        "target": models.names[0],
        "drafter": models.names[1],
        "mesh": dict(mesh),
        "dtype": kind.name,
        "weights": weights,
        "slots": slots,
        "positions": positions,
        "weight_bytes": weight_bytes,
        "state_bytes": state_bytes,
        "temporary_bytes": temporary_bytes,
        "total_bytes": weight_bytes + state_bytes + temporary_bytes,
        "memory_bytes": memory_bytes,
        "fits": fits(slots),
        "most_slots": _most(fits, shards),
    }


def _most(fits: Any, step: int) -> int:
    """The largest multiple of a step that fits, up to ``MOST_SLOTS``; 0 for none."""
    low, high = 0, MOST_SLOTS // step + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def _state_config(models: Models, slots: int, positions: int, dtype: Any) -> StateConfig:
    """Of a state with room for all positions of every slot."""
    columns = _columns(models)
    config = EngineConfig()
    return StateConfig(
        models.target,
        models.drafter,
        slots,
        round_up(positions + columns, CHUNK_ROWS),
        max(columns, CHUNK_ROWS * config.chunk_buckets[-1]),
        config.stop_ids,
        (dtype, dtype),
        (False, False),
    )


def _columns(models: Models) -> int:
    return 1 if models.drafter is None else models.drafter.block_size + 1


def _temporary_bytes(models: Models, slots: int, mesh: Mapping[str, int]) -> int:
    """Of the largest round of a data shard, on one of its devices, in float32."""
    cfg, tensor = models.target, mesh.get("tensor", 1)
    rows = slots * _columns(models)
    logits = LOGIT_COPIES * rows * -(-cfg.vocab_size // tensor)
    read = rows + CHUNK_ROWS * EngineConfig().chunk_buckets[-1]
    widest = max(cfg.intermediate_size, cfg.num_heads * cfg.head_dim) // tensor
    return 4 * (logits + ACTIVATIONS * read * (cfg.hidden_size + widest))


def format_plan(report: Mapping[str, Any]) -> str:
    """A plan as a short table for people."""
    devices = " x ".join(f"{axis}={size}" for axis, size in report["mesh"].items()) or "one device"
    lines = [
        f"{report['target']} + {report['drafter']} in {report['dtype']}, weights "
        f"{report['weights']}, {devices}",
        f"{report['slots']} slots of {report['positions']} positions",
        "",
    ]
    for name in ("weight", "state", "temporary", "total", "memory"):
        what = {"memory": "memory of a device", "temporary": "temporaries, about"}.get(name, name)
        lines.append(f"{what:<20}{report[f'{name}_bytes'] / 1e9:>10.2f} GB")
    verdict = "fits" if report["fits"] else "does not fit"
    most = f"{report['most_slots']} slots would" if report["most_slots"] else "no slot would"
    return "\n".join([*lines, "", f"{verdict} into {SHARE:.0%} of the memory; {most}"])
