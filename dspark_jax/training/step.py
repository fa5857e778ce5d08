"""One training step: frozen target, drafter, loss, AdamW (paper, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from dspark_jax.config import DrafterConfig, TargetConfig, TrainConfig
from dspark_jax.models.drafters.table import drafter_of
from dspark_jax.models.stacks import is_whole
from dspark_jax.models.targets.table import family_of
from dspark_jax.training.anchors import BlockLabels, sample_lessons, taught_positions
from dspark_jax.training.loss_terms import Loss, loss_of
from dspark_jax.training.losses import LossTotals, draft_blocks, dspark_loss, loss_totals
from dspark_jax.training.state import Batch, Frozen, Layout, TrainState
from dspark_jax.training.teacher import Teacher, laws_pay, make_teacher, spell_out

# What the target says of some sequences: its features, and its distributions.
TargetOutputs = tuple[jax.Array, Teacher]


def anchors_of(recipe: TrainConfig, length: int) -> int:
    """Blocks a sequence in a bucket of this length."""
    return max(1, recipe.num_anchors * length // recipe.max_length)


@struct.dataclass
class Blocks:
    """The training blocks of some sequences, with all that the target has to say of them.

    Attributes:
        batch: the sequences, where the target has yet to read them; None where it has.
        feature_BSFD: the target's features; None before.
        teacher: its distributions; None before.
        anchor_BA: anchors.
        keep_BA: False for dummy blocks.
        labels: what the slots are trained towards.
    """

    batch: Any
    feature_BSFD: Any
    teacher: Any
    anchor_BA: jax.Array
    keep_BA: jax.Array
    labels: BlockLabels


def choose_blocks(
    batch: Batch,
    target: TargetOutputs | None,
    key: jax.Array,
    turn: jax.Array | float,
    cfg: DrafterConfig,
    recipe: TrainConfig,
) -> Blocks:
    """Random blocks of a batch; ``turn`` as in :func:`sample_anchors`. Without the target's outputs
    they are yet to be read."""
    sizes = anchors_of(recipe, batch.token_BS.shape[1]), cfg.block_size
    given = batch.token_BS, batch.loss_mask_BS, key, turn, sizes, drafter_of(cfg).lessons
    anchor_BA, keep_BA, labels = sample_lessons(*given)
    if target is None:
        return Blocks(batch, None, None, anchor_BA, keep_BA, labels)
    return Blocks(None, *target, anchor_BA, keep_BA, labels)


def blocks_loss(
    params: Any,
    frozen: Frozen,
    blocks: Blocks,
    totals: LossTotals,
    cfg: DrafterConfig,
    recipe: TrainConfig,
    layout: Layout | None = None,
    law_TU: jax.Array | None = None,
    loss: Loss | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics of some blocks, as shares of a batch with these totals; of the recipe's
    loss, unless another is given.

    The forward pass runs in ``recipe.dtype``; gradients and divergences are float32. ``law_TU``
    comes with a teacher of :func:`~dspark_jax.training.losses.spell_out`.
    """
    params = jax.tree.map(lambda x: x.astype(recipe.dtype), params)
    if layout is not None:
        params = jax.lax.with_sharding_constraint(params, layout.params)
    outputs = draft_blocks(
        params, frozen.vocab, blocks.feature_BSFD, blocks.labels, blocks.anchor_BA, blocks.keep_BA,
        cfg, kernels=recipe.kernels,
    )  # fmt: skip
    return dspark_loss(
        params,
        frozen.vocab,
        outputs,
        blocks.teacher,
        blocks.labels,
        totals,
        frozen.t2d_V,
        loss=loss or loss_of(recipe),
        law_TU=law_TU,
    )


def blocks_gradient(
    params: Any,
    frozen: Frozen,
    blocks: Blocks,
    cfg: DrafterConfig,
    recipe: TrainConfig,
    layout: Layout | None = None,
    law_TU: jax.Array | None = None,
    read: Callable[[Batch], TargetOutputs] | None = None,
    loss: Loss | None = None,
) -> tuple[Any, dict[str, jax.Array]]:
    """Gradient and metrics, ``micro_batches`` parts of the sequences one after the other.

    ``read`` gives the target's outputs of a part, where they are yet to be read.
    """
    totals = _totals(blocks, frozen, cfg, recipe, loss)
    loss_of_part = partial(blocks_loss, layout=layout, law_TU=law_TU, loss=loss)
    gradient_of = jax.grad(loss_of_part, has_aux=True)

    def gradient(part: Blocks) -> Any:
        return gradient_of(params, frozen, with_target(part, read), totals, cfg, recipe)

    return sum_over_parts(gradient, blocks, recipe.micro_batches)


def _totals(
    blocks: Blocks, frozen: Frozen, cfg: DrafterConfig, recipe: TrainConfig, loss: Loss | None
) -> LossTotals:
    """Of a whole batch."""
    lessons, slot_weights = drafter_of(cfg).lessons, (loss or loss_of(recipe)).slot_weights
    return loss_totals(blocks.labels, frozen.t2d_V, slot_weights, lessons)


def with_target(blocks: Blocks, read: Callable[[Batch], TargetOutputs] | None) -> Blocks:
    """The blocks with the target's outputs, read now if they are yet to be read."""
    if blocks.batch is None or read is None:
        return blocks
    feature_BSFD, teacher = read(blocks.batch)
    return blocks.replace(batch=None, feature_BSFD=feature_BSFD, teacher=teacher)  # type: ignore[attr-defined]


def fewest_parts(least: int, num_sequences: int, shards: int = 1) -> int:
    """How many parts of one size, at least so many, the sequences fall into: the fewest, of which
    ``shards`` devices have equal shares. A part of one sequence a device is the smallest."""
    share = num_sequences // shards
    return next(count for count in range(min(least, share), share + 1) if share % count == 0)


def parts_of(recipe: TrainConfig, num_sequences: int) -> int:
    """In how many parts the target reads a batch: where an update has several micro-batches, none
    is larger than one of these."""
    if recipe.micro_batches == 1:
        return 1
    update = min(recipe.sequences_per_update or num_sequences, num_sequences)
    least = -(-num_sequences * recipe.micro_batches // update)
    return fewest_parts(least, num_sequences, recipe.data_parallel * recipe.fsdp)


def _split(sequences: Any, count: int) -> Any:
    """[count, B / count, ...]: every count-th sequence, so that a part of a batch that is split
    over devices is split too."""
    return jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), sequences)


def sum_over_parts(function: Callable[[Any], Any], sequences: Any, count: int) -> Any:
    """The sum of ``function(part)`` over the parts of a tree of [B, ...], one after the other."""
    if count == 1:
        return function(sequences)
    parts = _split(sequences, count)
    forms = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), forms)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    return jax.lax.scan(add, nothing, parts)[0]


def in_parts(function: Callable[[Any], Any], sequences: Any, count: int) -> Any:
    """``function`` of a tree of [B, ...], to a tree of [B, ...], one part after the other."""
    if count == 1:
        return function(sequences)
    parts = jax.lax.map(function, _split(sequences, count))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), parts)


@jax.named_scope("target")
def read_target(
    frozen: Frozen,
    batch: Batch,
    target_cfg: TargetConfig,
    cfg: DrafterConfig,
    layout: Layout | None = None,
    kernels: str = "xla",
) -> tuple[jax.Array, jax.Array]:
    """Features and last hidden states of the frozen target for a batch, which may bring them;
    ``kernels`` names the implementation of ``ragged_attention``."""
    state = drafter_of(cfg).reads == "state"
    if batch.feature_BSFD is not None:
        hidden_BSD = batch.hidden_BSD
        return hidden_BSD[:, :, None] if state else batch.feature_BSFD, hidden_BSD
    encode = partial(family_of(target_cfg).encode, kernels=kernels)
    layers = () if state else cfg.target_layer_ids
    read = partial(encode, frozen.target, batch.token_BS, target_cfg, layers)
    if layout is not None:

        def gather(layer: Any, stack: int) -> Any:
            def constrain(part: Any, sharding: Any) -> Any:
                if is_whole(part):  # which is gathered where a part of it is read
                    return part
                return jax.lax.with_sharding_constraint(part, sharding)

            shardings = layout.layer[stack]
            return jax.tree.map(constrain, layer, shardings, is_leaf=is_whole)

        read = partial(read, fetch=gather)
    hidden_BSD, feature_BSFD = read()
    return hidden_BSD[:, :, None] if state else feature_BSFD, hidden_BSD


def target_outputs(
    frozen: Frozen,
    batch: Batch,
    target_cfg: TargetConfig,
    cfg: DrafterConfig,
    layout: Layout | None = None,
    kernels: str = "xla",
) -> TargetOutputs:
    """Features and distributions of the frozen target for a batch that may bring its outputs."""
    feature_BSFD, hidden_BSD = read_target(frozen, batch, target_cfg, cfg, layout, kernels)
    reduced = frozen.vocab.d2t_U is not None
    return feature_BSFD, make_teacher(frozen.target.vocab, hidden_BSD, reduced)


def _teach(
    frozen: Frozen,
    batch: Batch,
    outputs: tuple[jax.Array, jax.Array],
    cfg: DrafterConfig,
    recipe: TrainConfig,
) -> tuple[TargetOutputs, jax.Array | None]:
    """The target's outputs for all updates of a batch, with ``law_TU`` where it pays;
    ``outputs`` are of :func:`read_target`."""
    feature_BSFD, hidden_BSD = outputs
    if laws_pay(cfg, recipe, batch.token_BS.size):
        supervised_BS = taught_positions(batch.loss_mask_BS, drafter_of(cfg).lessons)
        teacher, law_TU = spell_out(frozen.target.vocab, frozen.vocab, hidden_BSD, supervised_BS)
        return (feature_BSFD, teacher), law_TU
    reduced = frozen.vocab.d2t_U is not None
    return (feature_BSFD, make_teacher(frozen.target.vocab, hidden_BSD, reduced)), None


def running_mean(mean: Any, params: Any, count: jax.Array, decay: float) -> Any:
    """The exponential mean after update number ``count`` (from 0), over about 1 / (1 - decay) of
    them; over fewer in the beginning, so that the first weights are soon forgotten."""
    kept = jnp.minimum(decay, (1 + count) / (10 + count))
    return optax.incremental_update(params, mean, 1 - kept)


def train_step(
    state: TrainState,
    frozen: Frozen,
    batch: Batch,
    target_cfg: TargetConfig,
    cfg: DrafterConfig,
    recipe: TrainConfig,
    optimizer: optax.GradientTransformation,
    layout: Layout | None = None,
    loss: Loss | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One batch; the target runs in the same program, unless the batch brings its outputs.

    The features serve ``updates_per_batch`` optimiser updates, each over
    ``sequences_per_update`` of the sequences in a shuffled order that starts again when all were
    used, then with other anchors. Many small updates over a large batch learn faster than few
    large ones, and the target's pass, most of the cost, is paid once. Everything depends on
    (seed, step) alone, so a resumed run draws the same.

    Returns:
        The next state and the metrics of this step, ``gradient_norm`` (before the clip) included;
        means over the updates, ``blocks`` their sum; ``tokens`` of the batch, padding aside.
        ``finite_updates`` came before the first with a number that is not finite: where there is
        one, everything is of that update alone, as it is in all that follow.
    """
    key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
    if layout is not None:
        frozen = jax.lax.with_sharding_constraint(frozen, layout.frozen)
    size = batch.token_BS.shape[0]
    source: dict[str, Any] = {"target_cfg": target_cfg, "cfg": cfg, "layout": layout}
    source["kernels"] = recipe.kernels
    later, law_TU = partial(target_outputs, frozen, **source), None
    if recipe.updates_per_batch == 1 < recipe.micro_batches:
        seen: tuple[Batch, Any] = (batch, None)  # each micro-batch is read where it is trained on
    else:
        read = partial(read_target, frozen, **source)
        count = parts_of(recipe, size) if batch.feature_BSFD is None else 1
        outputs = in_parts(read, batch, count)
        target, law_TU = _teach(frozen, batch, outputs, cfg, recipe)
        seen = (batch.replace(feature_BSFD=None, hidden_BSD=None), target)  # type: ignore[attr-defined]
    share = min(recipe.sequences_per_update or size, size)
    laps = -(-recipe.updates_per_batch * share // size)

    def update(carry: tuple[Any, Any, Any], index: jax.Array) -> Any:
        params, optimizer_state, average = carry
        lap, part = index, seen
        if share < size:
            first = index * share
            lap = first // size
            order_B = jax.random.permutation(jax.random.fold_in(key, lap), size)
            chosen = order_B[(first + jnp.arange(share)) % size]
            part = jax.tree.map(lambda x: x[chosen], seen)
        blocks = choose_blocks(*part, key, lap / laps, cfg, recipe)
        gradient, metrics = blocks_gradient(
            params, frozen, blocks, cfg, recipe, layout, law_TU, later, loss
        )
        with jax.named_scope("optimizer"):
            change, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        metrics["gradient_norm"] = optax.tree.norm(gradient)
        params = optax.apply_updates(params, change)
        if average is not None:
            count = state.step * recipe.updates_per_batch + index
            average = running_mean(average, params, count, recipe.average_decay)
        return (params, optimizer_state, average), metrics

    (params, optimizer_state, average), each = jax.lax.scan(
        update,
        (state.params, state.optimizer, state.average),
        jnp.arange(recipe.updates_per_batch),
    )
    finite_X = _are_finite(each)
    first = jnp.argmin(finite_X)
    metrics = {
        name: jnp.where(finite_X.all(), value.mean(0), value[first]) for name, value in each.items()
    }
    metrics["finite_updates"] = jnp.where(finite_X.all(), recipe.updates_per_batch, first)
    metrics["blocks"] = each["blocks"].sum()
    # An answer ends its sequence: what lies behind is padding.
    place_S = jnp.arange(1, batch.token_BS.shape[1] + 1)
    metrics["tokens"] = jnp.max(batch.loss_mask_BS * place_S, axis=1).sum()
    return TrainState(state.step + 1, params, optimizer_state, average), metrics


def _are_finite(each: dict[str, jax.Array]) -> jax.Array:
    """bool [X]: which of X updates have finite metrics alone."""
    rows = [jnp.isfinite(value).reshape(len(value), -1).all(1) for value in each.values()]
    return jnp.stack(rows).all(0)


def evaluation_step(
    params: Any,
    frozen: Frozen,
    batch: Batch,
    target_cfg: TargetConfig,
    cfg: DrafterConfig,
    recipe: TrainConfig,
    loss: Loss | None = None,
) -> dict[str, jax.Array]:
    """Metrics of held-out sequences, always with the same anchors."""
    read = partial(target_outputs, frozen, target_cfg=target_cfg, cfg=cfg, kernels=recipe.kernels)
    blocks = choose_blocks(batch, None, jax.random.key(recipe.seed), 0.0, cfg, recipe)
    totals = _totals(blocks, frozen, cfg, recipe, loss)
    loss_of_part = partial(blocks_loss, loss=loss)

    def metrics(part: Blocks) -> dict[str, jax.Array]:
        return loss_of_part(params, frozen, with_target(part, read), totals, cfg, recipe)[1]

    count = fewest_parts(recipe.micro_batches, batch.token_BS.shape[0])
    return sum_over_parts(metrics, blocks, count)
