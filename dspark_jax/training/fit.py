"""The training loop, read top to bottom: load, resume, step, log, save, export."""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from dspark_jax.axes import gather, place
from dspark_jax.checkpoint import Checkpoints
from dspark_jax.checkpoints.export import save_own
from dspark_jax.checkpoints.provenance import RECIPE, provenance_of, write_provenance
from dspark_jax.checkpoints.runs import BEST, CHECKPOINTS, LAST, START
from dspark_jax.config import TrainConfig
from dspark_jax.files import write_atomically
from dspark_jax.progress import progress
from dspark_jax.tracing import Trace
from dspark_jax.training import data
from dspark_jax.training.curves import draw_curves
from dspark_jax.training.features import bounded_batches, cache_spec, target_reader
from dspark_jax.training.loss_terms import Loss
from dspark_jax.training.needs import check_room, disk_bytes, tree_bytes
from dspark_jax.training.optimizer import Optimizer
from dspark_jax.training.records import (
    MetricsLog,
    Report,
    best_length,
    check_finite,
    check_same_recipe,
    mean_metrics,
    plain,
    recipe_record,
)
from dspark_jax.training.run import Run, check_kernels, open_source, start_run
from dspark_jax.training.state import Batch, TrainState
from dspark_jax.training.utilisation import peak_flops, step_flops

Callback = Callable[[Report], None]
# A run and its weights, whole and float32 -> figures, ``decoded_length`` among them.
Decode = Callable[[Run, Any], dict[str, Any]]


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """A list that the first Ctrl-C or SIGTERM fills, so that the loop can save and leave.

    A second Ctrl-C interrupts at once.
    """
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def evaluate(run: Run, state: TrainState, remedy: str) -> dict[str, Any]:
    """Metrics of the held-out conversations.

    Raises:
        FloatingPointError: a number is not finite; the message ends with the remedy.
    """
    # Batches as small as an update's: the held-out set may be much smaller than a batch.
    few = run.recipe.sequences_per_update * run.recipe.max_length
    small = dataclasses.replace(
        run.recipe,
        tokens_per_batch=few or run.recipe.tokens_per_batch,
        micro_batches=1,
        data_parallel=1,
        fsdp=1,
    )
    plans, rows = data.epoch_batches(run.held_out, small, 0), []
    for bucket, indices in plans:
        batch = data.make_batch(run.held_out, indices, bucket, data.batch_size(small, bucket))
        placed = place(batch, run.programs.whole)
        rows.append(run.programs.evaluate(state.result, run.frozen, placed))
    when = f"step {int(state.step)}, held-out,"
    for plan, row in zip(plans, rows, strict=True):
        check_finite(when, plain(row), run.held_out, iter([plan]), remedy)
    return mean_metrics(rows)


def check_step(run: Run, step: int, values: dict[str, Any], remedy: str) -> None:
    """Stop at the first step whose metrics, as the step gives them, are not finite.

    Raises:
        FloatingPointError: see :func:`~dspark_jax.training.records.check_finite`.
    """
    updates, finite = run.recipe.updates_per_batch, values.pop("finite_updates")
    when = f"step {step}" + (f", update {finite + 1:.0f} of {updates}," if updates > 1 else "")
    plans = data.schedule_from(run.train_set, run.recipe, step - 1)
    check_finite(when, values, run.train_set, plans, remedy)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any of the processes, which all ask."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def batches_of(run: Run, start: int) -> Iterator[Batch]:
    """The batches after ``start`` steps, in the same order wherever features come from."""
    if not run.recipe.cache_gb:
        return data.batches_from(run.train_set, run.recipe, start)
    sequences = run.programs.sequences
    return bounded_batches(
        run.train_set,
        run.recipe,
        range(start, run.total),
        cache_spec(run.recipe, run.cfg),
        target_reader(run.frozen.target, run.target_cfg, run.cfg, run.recipe, sequences),
    )


class Meter:
    """Speed of a run, since it began or went on, compilation included."""

    def __init__(self, run: Run) -> None:
        """Start the clock."""
        self._run = run
        self._rate = run.rate
        devices = run.programs.sequences.mesh.devices.flatten()
        peak = peak_flops(devices[0], run.recipe.dtype)
        self._peak = None if peak is None else peak * len(devices)
        self._began = time.monotonic()
        self._blocks = self._tokens = self._flops = 0.0

    def read(self, step: int, batch: Batch, values: dict[str, Any]) -> dict[str, float]:
        """``learning_rate`` of the step's last update, ``blocks_per_s``, ``tokens_per_s`` and,
        where the device's peak is known, ``model_flop_utilisation`` (0 to 1)."""
        run = self._run
        self._blocks += values["blocks"]
        self._tokens += values["tokens"]
        self._flops += step_flops(run.target_cfg, run.cfg, run.recipe, batch)
        seconds = time.monotonic() - self._began
        rate = self._rate(jnp.float32(step * run.recipe.updates_per_batch - 1))
        speed = {
            "learning_rate": float(rate),
            "blocks_per_s": round(self._blocks / seconds, 2),
            "tokens_per_s": round(self._tokens / seconds, 2),
        }
        if self._peak is not None:
            speed["model_flop_utilisation"] = round(self._flops / seconds / self._peak, 4)
        return speed


def save_result(run: Run, params: Any, directory: Path, step: int) -> None:
    """Write the drafter of a step and where it comes from, in the process that writes."""
    if jax.process_index() == 0:
        save_own(directory, (run.cfg, params, run.own), run.recipe.target, run.trained_for)
        write_provenance(directory, provenance_of(directory.parent, step))


def fit(
    recipe: TrainConfig,
    run: Run | None = None,
    *,
    optimizer: Optimizer | None = None,
    schedule: optax.Schedule | None = None,
    loss: Loss | None = None,
    callbacks: Sequence[Callback] = (),
    decode: Decode | None = None,
    trace: Trace | None = None,
) -> Path:
    """Train a drafter, or go on where an interrupted run stopped.

    Args:
        recipe: what to train, and on what.
        run: of ``dspark_jax.training.run.start_run`` for this recipe and with the same
            optimizer, schedule and loss, whose state is used up; None makes it ready here.
        optimizer: makes an optax transformation of a schedule, as ``optax.lion`` does, in the place
            of AdamW. The recipe's clip of the gradient stays in front of it.
        schedule: learning rate by the number of the update, in the place of the recipe's.
        loss: in the place of the recipe's; its weights of terms are not read then.
        callbacks: functions of a ``dspark_jax.training.records.Report``, called in this order
            with every line of ``metrics.jsonl``, in the process that writes it. What one raises
            ends the training.
        decode: asked at every evaluation, as ``dspark_jax.evaluation.decoded.decoding`` makes
            it; the drafter of the largest ``decoded_length`` is kept in ``out/best``.
        trace: records some of the steps.

    Returns:
        The directory of the exported drafter, ``out/drafter``.

    Raises:
        ValueError: bad data or configuration; the message names the field and the remedy.
        FloatingPointError: the loss is not finite; the last good checkpoint stays.
        SaveError: a checkpoint could not be written; said at the step behind it.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after the state was saved.

    Source: section 3.3 of the paper; ``notebooks/concepts/training.md``.

    >>> sizes = {"max_length": 64, "tokens_per_batch": 128, "num_anchors": 8, "block_size": 3}
    >>> recipe = TrainConfig(data="answers.jsonl", out="mine", steps=2, eval_sequences=2, **sizes)
    >>> fit(recipe).name
    'drafter'
    """
    out = Path(recipe.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out {out} is a file: name a directory")
    check_kernels(recipe)
    ready = open_source(recipe) if run is None else run
    record = recipe_record(recipe, optimizer, schedule, loss)
    check_same_recipe(out / RECIPE, record)
    if not isinstance(ready, Run):
        ready = start_run(recipe, ready, optimizer=optimizer, schedule=schedule, loss=loss)
    run = ready
    state, total = run.state, run.total
    check_room(recipe, tree_bytes(state), disk_bytes(recipe, state))
    # Every process takes every step; one of them writes, and the checkpoints are everybody's.
    writes = jax.process_index() == 0
    if writes:
        write_atomically(out / RECIPE, json.dumps(record, indent=2) + "\n")
    with (
        Checkpoints(out / CHECKPOINTS, recipe.keep_checkpoints) as saved,
        stop_on_signals() as stop,
        progress(total=total, unit="step", desc="train", disable=not writes) as bar,
    ):
        start = saved.latest or 0
        if start:
            state = saved.restore(start, state)
            bar.update(start)
        else:
            save_result(run, gather(state.result), out / START, 0)
        log = MetricsLog(out, start) if writes else None
        best = best_length(out / "metrics.jsonl") if writes else 0.0

        def report(split: str, values: dict[str, Any]) -> None:
            if log is None:
                return
            part = {} if split == "training" else {"split": split}
            log.write(step, **part, **values)
            for callback in callbacks:
                callback(Report(recipe, step, split, values, state.result))

        batches = batches_of(run, start)
        meter = Meter(run)
        for step in range(start + 1, total + 1):
            saved.check()
            if trace is not None:
                trace.turn()
            batch = next(batches)
            state, metrics = run.programs.step(
                state, run.frozen, place(batch, run.programs.sequences), run.rate
            )
            values = plain(metrics)
            remedy = (
                f"the last good checkpoint in {saved.directory} is {saved.latest or 'none yet'}"
            )
            check_step(run, step, values, remedy)
            values |= meter.read(step, batch, values)
            bar.update()
            bar.set_postfix(
                loss=values["loss"],
                expected_length=values["accepted_length"],
                blocks_s=values["blocks_per_s"],
            )
            if step % recipe.log_every == 0 or step == total:
                report("training", values)
            if run.held_out and (step % recipe.eval_every == 0 or step == total):
                report("held-out", evaluate(run, state, remedy))
            if decode is not None and (step % recipe.eval_every == 0 or step == total):
                params = gather(state.result)
                if writes:
                    figures = decode(run, params)
                    report("decoded", figures)
                    if figures["decoded_length"] > best:
                        best = figures["decoded_length"]
                        save_result(run, params, out / BEST, step)
            stopped = any_process(bool(stop))
            if step % recipe.checkpoint_every == 0 or step == total or stopped:
                saved.save(step, state)
            if stopped and step < total:
                saved.wait()
                raise KeyboardInterrupt(f"saved step {step} of {total}: run again to go on")
    if writes:
        draw_curves(out / "metrics.jsonl", out / "curves.png")
    save_result(run, gather(state.result), out / LAST, total)
    return out / LAST
