"""What a training needs, said before its first step: steps, blocks, memory, and room on a disk."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.axes import abstract_params
from dspark_jax.checkpoints.deepspec import bind_vocab
from dspark_jax.checkpoints.load import open_target
from dspark_jax.config import DrafterConfig, TargetConfig, TrainConfig
from dspark_jax.models.drafters.table import drafter_of
from dspark_jax.models.targets.table import family_of
from dspark_jax.models.vocab import Vocab
from dspark_jax.training import data
from dspark_jax.training.optimizer import learning_rate
from dspark_jax.training.programs import UNREAD, programs_of
from dspark_jax.training.run import (
    check_kernels,
    draft_places,
    drafter_config,
    load_sequences,
    open_source,
    total_steps,
)
from dspark_jax.training.state import Batch, Frozen, TrainState
from dspark_jax.training.step import anchors_of

DRAFTERS = 3  # that a run holds besides its checkpoints: before, best, after
LOG_BYTES = 10**7  # the log, the curves, and what else is small


@dataclass(frozen=True)
class Needs:
    """What a training needs.

    Attributes:
        sequences: conversations to train on.
        held_out: conversations that are held out.
        steps: batches.
        updates: of the optimiser, in all of them.
        blocks: training blocks in all of them, at most.
        device_bytes: of the largest step on one device, as the compiler counts them: weights of
            target and drafter, optimiser, batch and temporaries; None where it does not say.
        checkpoint_bytes: of one checkpoint.
        disk_bytes: of all that is written.
    """

    sequences: int
    held_out: int
    steps: int
    updates: int
    blocks: int
    device_bytes: int | None
    checkpoint_bytes: int
    disk_bytes: int


def needs_of(recipe: TrainConfig) -> Needs:
    """What a recipe's training needs on these devices; reads the data, but no weights.

    Compiles the step for the longest sequences, which the training finds again where compiled
    programs are kept.

    Raises:
        ValueError: bad data or configuration; the message names the field and the remedy.
    """
    check_kernels(recipe)
    target, _ = open_target(recipe.target)
    cfg = drafter_config(recipe, target)
    train_set, held_out = load_sequences(open_source(recipe), target, cfg, recipe)
    recipe = data.with_buckets(recipe, train_set)
    plans = data.epoch_batches(train_set, recipe, 0)
    steps = total_steps(recipe, train_set)
    blocks = sum(_blocks(recipe, bucket) for bucket, _ in plans) / len(plans)
    state, device_bytes = _compiled(target.cfg, cfg, recipe)
    return Needs(
        sequences=len(train_set),
        held_out=len(held_out),
        steps=steps,
        updates=steps * recipe.updates_per_batch,
        blocks=round(steps * blocks),
        device_bytes=device_bytes,
        checkpoint_bytes=tree_bytes(state),
        disk_bytes=disk_bytes(recipe, state),
    )


def _blocks(recipe: TrainConfig, bucket: int) -> int:
    """Training blocks of a step, at most."""
    size = data.batch_size(recipe, bucket)
    share = min(recipe.sequences_per_update or size, size)
    return recipe.updates_per_batch * share * anchors_of(recipe, bucket)


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, which may be abstract."""
    return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def disk_bytes(recipe: TrainConfig, state: TrainState) -> int:
    """Bytes that a run writes: the checkpoints that are kept and the one that is being written,
    drafters, and features that are kept for a while."""
    checkpoints = (recipe.keep_checkpoints + 1) * tree_bytes(state)
    return round(checkpoints + DRAFTERS * tree_bytes(state.params) + LOG_BYTES)


def check_room(recipe: TrainConfig, checkpoint_bytes: int, needed_bytes: int) -> None:
    """Refuse a run that its disk has no room for, what it wrote before aside.

    Args:
        recipe: of the run.
        checkpoint_bytes: of one checkpoint.
        needed_bytes: of :func:`disk_bytes`.

    Raises:
        ValueError: says how much is missing.
    """
    out = Path(recipe.out).absolute()
    place = next(path for path in (out, *out.parents) if path.is_dir())
    held = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    missing = needed_bytes - held - shutil.disk_usage(place).free
    if missing > 0:
        raise ValueError(
            f"out {recipe.out}: the run takes {needed_bytes / 1e9:.3g} GB "
            f"({recipe.keep_checkpoints} + 1 checkpoints of {checkpoint_bytes / 1e9:.3g} GB), and "
            f"{missing / 1e9:.3g} GB are missing on the disk: lower keep_checkpoints, make room, "
            "or set another out"
        )


def _compiled(
    target_cfg: TargetConfig, cfg: DrafterConfig, recipe: TrainConfig
) -> tuple[TrainState, int | None]:
    """The form of the state, and the bytes of the largest step on one device."""
    programs = programs_of(target_cfg, cfg, dataclasses.replace(recipe, **UNREAD))
    params = abstract_params(drafter_of(cfg).declare_drafter(cfg))
    average = params if recipe.average_decay else None
    step = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(step, params, jax.eval_shape(programs.init, params), average)  # type: ignore[arg-type]
    target = abstract_params(family_of(target_cfg).declare(target_cfg), jnp.dtype(recipe.dtype))
    own = places = None
    if cfg.draft_vocab_size is not None:
        own = Vocab(None, None, jnp.arange(cfg.draft_vocab_size, dtype=jnp.int32))
        places = jax.eval_shape(partial(draft_places, cfg.vocab_size, np.arange(1)))
    vocab = jax.eval_shape(lambda held: bind_vocab(cfg, own, target_cfg, held), target.vocab)
    rate = learning_rate(recipe, 1)
    frozen = Frozen(target, vocab, places)
    compiled = programs.step.lower(state, frozen, _longest_batch(cfg, recipe), rate).compile()
    usage = compiled.memory_analysis()
    if usage is None:
        return state, None
    total = usage.argument_size_in_bytes + usage.output_size_in_bytes + usage.temp_size_in_bytes
    return state, total - usage.alias_size_in_bytes


def _longest_batch(cfg: DrafterConfig, recipe: TrainConfig) -> Batch:
    """The form of a batch of the longest sequences, with its features where they are cached."""
    length = recipe.length_buckets[-1]
    shape = data.batch_size(recipe, length), length
    token_BS = jax.ShapeDtypeStruct(shape, jnp.int32)
    mask_BS = jax.ShapeDtypeStruct(shape, jnp.bool_)
    if not recipe.cache:
        return Batch(token_BS, mask_BS)
    feature = (*shape, len(cfg.target_layer_ids), cfg.hidden_size)
    return Batch(
        token_BS,
        mask_BS,
        jax.ShapeDtypeStruct(feature, jnp.bfloat16),
        jax.ShapeDtypeStruct((*shape, cfg.hidden_size), jnp.bfloat16),
    )


def format_needs(needs: Needs, recipe: TrainConfig) -> str:
    """The needs as a few lines for people."""
    memory = "unknown here"
    if needs.device_bytes is not None:
        memory = f"{needs.device_bytes / 1e9:.3g} GB on a device, as compiled for this machine"
    checkpoint = needs.checkpoint_bytes / 1e9
    rows = {
        "data": f"{needs.sequences} sequences, {needs.held_out} held out",
        "steps": f"{needs.steps}, {needs.updates} updates of the optimiser",
        "blocks": f"at most {needs.blocks}",
        "memory": memory,
        "disk": f"{needs.disk_bytes / 1e9:.3g} GB in {recipe.out}: {recipe.keep_checkpoints} + 1 "
        f"checkpoints of {checkpoint:.3g} GB, and drafters",
    }
    return "\n".join(f"{name:<8}{text}" for name, text in rows.items())
