"""Runs of training in the place of drafters: ``RUN``, the best or the last of it, or ``RUN@STEP``.

A run's directory holds drafters in ``start`` (before the first step), ``best`` (of those that were
decoded with, the one with the longest drafts accepted) and ``drafter`` (after the last step). The
state at a step lies in ``checkpoints``; the drafter in it is written to ``steps/STEP`` when it is
first asked for, where a calibration can lie beside it, and from where others can read it.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from dspark_jax.checkpoints.deepspec import load_drafter
from dspark_jax.checkpoints.export import save_own
from dspark_jax.checkpoints.hf import CONFIG_FILE
from dspark_jax.checkpoints.identity import trained_for
from dspark_jax.checkpoints.inside import open_inside, read_inside
from dspark_jax.checkpoints.provenance import RECIPE, provenance_of, write_provenance
from dspark_jax.checkpoints.tensors import LoadError, read_json

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
START, BEST, LAST, STEPS = "start", "best", "drafter", "steps"


def drafter_directory(source: str | Path) -> str | Path:
    """Where the drafter lies that a run stands for; other sources as they are.

    Args:
        source: of a drafter; ``RUN`` is the best one where the training decoded with some, else
            what it ended with or has reached; ``RUN@STEP`` is the one after so many steps.

    Raises:
        LoadError: the run has no such drafter; the message says which there are.
    """
    path, at, step = str(source).rpartition("@")
    if not at or Path(source).exists():
        path, step = str(source), ""
    run = Path(path)
    if not (run / RECIPE).is_file() or (run / CONFIG_FILE).exists():
        return source
    if at and step:
        return _at_step(run, step)
    for name in (BEST, LAST):
        if (run / name / CONFIG_FILE).is_file():
            return run / name
    steps = _saved(run)
    if not steps:
        raise LoadError(f"{run} has no drafter and no checkpoint yet: train on")
    return _at_step(run, str(steps[-1]))


def _at_step(run: Path, step: str) -> Path:
    """The drafter after a step, written out where it is not yet."""
    if step == "0" and (run / START / CONFIG_FILE).is_file():
        return run / START
    out = run / STEPS / step
    if (out / CONFIG_FILE).is_file():
        return out
    steps = _saved(run)
    if not step.isdecimal() or int(step) not in steps:
        raise LoadError(
            f"{run}@{step}: no such step; {run / CHECKPOINTS} holds "
            f"{', '.join(map(str, steps)) or 'none'}"
        )
    form = next((run / name for name in (START, LAST) if (run / name).is_dir()), None)
    if form is None:
        raise LoadError(f"{run}@{step}: {run / START} is missing, which says what its weights are")
    inside = open_inside(form)
    if inside is None:
        cfg, params, own = load_drafter(form)
    else:
        cfg, own = inside[0], None
        params = read_inside(*inside)
    params = _restored(run, int(step), params)
    out.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{step}-", dir=out.parent) as folder:
        written = Path(folder) / step
        save_own(written, (cfg, params, own), form, trained_for(form))
        write_provenance(written, provenance_of(run, int(step)))
        written.rename(out)
    logger.info("the drafter after step %s is now in %s", step, out)
    return out


def _saved(run: Path) -> list[int]:
    """Steps of the complete checkpoints; Orbax names what is being written otherwise."""
    found = (run / CHECKPOINTS).glob("*") if (run / CHECKPOINTS).is_dir() else ()
    return sorted(int(path.name) for path in found if path.is_dir() and path.name.isdecimal())


def _restored(run: Path, step: int, like: Any) -> Any:
    """The weights to evaluate and to export, in a checkpoint."""
    from dspark_jax.checkpoint import Checkpoints  # Orbax takes long to import

    recipe = read_json(run / RECIPE)
    averaged = isinstance(recipe, dict) and bool(recipe.get("average_decay"))
    part = "average" if averaged else "params"
    with Checkpoints(run / CHECKPOINTS, max(len(_saved(run)), 1)) as saved:
        return saved.restore_part(step, {part: like})[part]
