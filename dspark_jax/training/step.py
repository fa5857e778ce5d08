"""One training step: frozen target, drafter, loss, AdamW (spec section 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dspark_jax.axes import abstract_params, declared_shardings, partition
from dspark_jax.config import DrafterConfig, TargetConfig, TrainConfig
from dspark_jax.models.drafters.dspark import DrafterParams, declare_drafter
from dspark_jax.models.stacks import is_whole
from dspark_jax.models.targets.family import TargetParams
from dspark_jax.models.targets.table import family_of
from dspark_jax.models.vocab import Vocab
from dspark_jax.training.anchors import BlockLabels, block_labels, sample_anchors
from dspark_jax.training.losses import LossTotals, draft_blocks, dspark_loss, loss_totals
from dspark_jax.training.teacher import Teacher, laws_pay, make_teacher, spell_out


@struct.dataclass
class TrainState:
    """Everything that the steps change.

    Attributes:
        step: int32, batches done, of ``updates_per_batch`` optimiser updates each.
        params: trainable weights, float32.
        optimizer: state of the optimiser.
        average: running mean of the weights; None where the recipe has no ``average_decay``.
    """

    step: jax.Array
    params: DrafterParams
    optimizer: Any
    average: Any = None

    @property
    def result(self) -> DrafterParams:
        """The weights to evaluate and to export."""
        return self.params if self.average is None else self.average


@struct.dataclass
class Frozen:
    """What every step reads: the target, the drafter's vocabulary, and (reduced vocabulary) the
    place of every target token in it, ``t2d_V``."""

    target: TargetParams
    vocab: Vocab
    t2d_V: Any


@struct.dataclass
class Batch:
    """Sequences of one length bucket, with padding at the end.

    Attributes:
        token_BS: int32 ids.
        loss_mask_BS: bool, the supervised tokens.
        feature_BSFD, hidden_BSD: bfloat16 outputs of the target out of a cache; None where the
            step is to run the target.
    """

    token_BS: Any
    loss_mask_BS: Any
    feature_BSFD: Any = None
    hidden_BSD: Any = None


def step_shardings(
    target_cfg: TargetConfig,
    cfg: DrafterConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    averaged: bool,
) -> tuple[Any, Any, NamedSharding]:
    """Shardings in the form of a ``TrainState`` and a ``Frozen``, and that of a batch's arrays.

    Weights and the optimiser's moments are split by :data:`dspark_jax.axes.MESH_RULES`, sequences
    over the data and fsdp axes.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    declared = declare_drafter(cfg)
    params = declared_shardings(declared, mesh)
    moments = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, abstract_params(declared)),
        params,
        transform_non_params=lambda _: replicated,
    )
    frozen = frozen_shardings(target_cfg, cfg, mesh)
    sequences = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    state: Any = TrainState(replicated, params, moments, params if averaged else None)  # type: ignore[arg-type]
    return state, frozen, sequences


def frozen_shardings(
    target_cfg: TargetConfig, cfg: DrafterConfig, mesh: Mesh, unused: Sequence[str] = ()
) -> Frozen:
    """Shardings in the form of a ``Frozen``; ``unused`` mesh axes split nothing."""
    target = declared_shardings(family_of(target_cfg).declare(target_cfg), mesh, unused)
    head = places = None
    if cfg.draft_vocab_size is None:
        head = target.vocab.unembed_VD
    else:
        places = NamedSharding(mesh, PartitionSpec())
        shape = (cfg.draft_vocab_size, cfg.hidden_size)
        head = NamedSharding(mesh, partition("UD", shape, mesh, unused))
    return Frozen(target, target.vocab.replace(unembed_VD=head, d2t_U=places), places)


@dataclass(frozen=True)
class Layout:
    """Shardings of weights while they are read: the fsdp axis splits sequences alone.

    Without it the compiler would rather hold all sequences on every device of that axis than
    gather the weights.

    Attributes:
        params: in the form of ``DrafterParams``.
        frozen: in the form of ``Frozen``; but the target's layers stay as they lie.
        layer: of one of these, gathered when its turn comes; for every stack.
    """

    params: Any
    frozen: Any
    layer: Any


def make_layout(target_cfg: TargetConfig, cfg: DrafterConfig, mesh: Mesh) -> Layout:
    """The layout of a step on a mesh."""
    params = declared_shardings(declare_drafter(cfg), mesh, unused=("fsdp",))
    frozen = frozen_shardings(target_cfg, cfg, mesh, unused=("fsdp",))
    layers = frozen.target.layers
    layer = jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec(*s.spec[1:])), layers)
    stored = declared_shardings(family_of(target_cfg).declare(target_cfg).layers, mesh)
    target = frozen.target.replace(layers=stored)  # type: ignore[attr-defined]
    return Layout(params, frozen.replace(target=target), layer)  # type: ignore[attr-defined]


def anchors_of(recipe: TrainConfig, length: int) -> int:
    """Blocks a sequence in a bucket of this length."""
    return max(1, recipe.num_anchors * length // recipe.max_length)


@struct.dataclass
class Blocks:
    """The training blocks of some sequences, with all that the target has to say of them.

    Attributes:
        feature_BSFD: the target's features.
        teacher: its distributions.
        anchor_BA, keep_BA: anchors, and False for dummy blocks.
        labels: what the slots are trained towards.
    """

    feature_BSFD: jax.Array
    teacher: Teacher
    anchor_BA: jax.Array
    keep_BA: jax.Array
    labels: BlockLabels


def choose_blocks(
    batch: Batch,
    target: tuple[jax.Array, Teacher],
    key: jax.Array,
    turn: jax.Array | float,
    cfg: DrafterConfig,
    recipe: TrainConfig,
) -> Blocks:
    """Random blocks of a batch; ``turn`` as in :func:`sample_anchors`."""
    num_anchors = anchors_of(recipe, batch.token_BS.shape[1])
    anchor_BA, keep_BA = sample_anchors(key, batch.loss_mask_BS, num_anchors, turn)
    labels = block_labels(batch.token_BS, batch.loss_mask_BS, anchor_BA, keep_BA, cfg.block_size)
    return Blocks(*target, anchor_BA, keep_BA, labels)


def blocks_loss(
    params: DrafterParams,
    frozen: Frozen,
    blocks: Blocks,
    totals: LossTotals,
    cfg: DrafterConfig,
    recipe: TrainConfig,
    layout: Layout | None = None,
    law_TU: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss and metrics of some blocks, as shares of a batch with these totals.

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
        blocks.keep_BA,
        totals,
        frozen.t2d_V,
        law_TU=law_TU,
        ce_weight=recipe.ce_weight,
        l1_weight=recipe.l1_weight,
        confidence_weight=recipe.confidence_weight,
        decay=recipe.loss_decay,
    )


def blocks_gradient(
    params: DrafterParams,
    frozen: Frozen,
    blocks: Blocks,
    cfg: DrafterConfig,
    recipe: TrainConfig,
    layout: Layout | None = None,
    law_TU: jax.Array | None = None,
) -> tuple[DrafterParams, dict[str, jax.Array]]:
    """Gradient and metrics, ``micro_batches`` parts of the sequences one after the other."""
    totals = loss_totals(blocks.labels, blocks.keep_BA, frozen.t2d_V, recipe.loss_decay)
    gradient_of = jax.grad(partial(blocks_loss, layout=layout, law_TU=law_TU), has_aux=True)
    count = recipe.micro_batches
    if count == 1:
        return gradient_of(params, frozen, blocks, totals, cfg, recipe)
    # Every count-th sequence, so that a part of a batch that is split over devices is split too.
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0), blocks)

    def add(total: Any, part: Blocks) -> tuple[Any, None]:
        return jax.tree.map(
            jnp.add, total, gradient_of(params, frozen, part, totals, cfg, recipe)
        ), None

    first, rest = jax.tree.map(lambda x: x[0], parts), jax.tree.map(lambda x: x[1:], parts)
    start = gradient_of(params, frozen, first, totals, cfg, recipe)
    return jax.lax.scan(add, start, rest)[0]


def read_target(
    frozen: Frozen,
    batch: Batch,
    target_cfg: TargetConfig,
    cfg: DrafterConfig,
    layout: Layout | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Features and last hidden states of the frozen target for a batch, which may bring them."""
    if batch.feature_BSFD is not None:
        return batch.feature_BSFD, batch.hidden_BSD
    encode = family_of(target_cfg).encode
    read = partial(encode, frozen.target, batch.token_BS, target_cfg, cfg.target_layer_ids)
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
    return feature_BSFD, hidden_BSD


def target_outputs(
    frozen: Frozen,
    batch: Batch,
    target_cfg: TargetConfig,
    cfg: DrafterConfig,
    layout: Layout | None = None,
) -> tuple[jax.Array, Teacher]:
    """Features and distributions of the frozen target for a batch that may bring its outputs."""
    feature_BSFD, hidden_BSD = read_target(frozen, batch, target_cfg, cfg, layout)
    reduced = frozen.vocab.d2t_U is not None
    return feature_BSFD, make_teacher(frozen.target.vocab, hidden_BSD, reduced)


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
    law_TU = None
    if laws_pay(cfg, recipe, batch.token_BS.size):
        feature_BSFD, hidden_BSD = read_target(frozen, batch, target_cfg, cfg, layout)
        teacher, law_TU = spell_out(
            frozen.target.vocab, frozen.vocab, hidden_BSD, batch.loss_mask_BS
        )
        target = feature_BSFD, teacher
    else:
        target = target_outputs(frozen, batch, target_cfg, cfg, layout)
    seen = (batch.replace(feature_BSFD=None, hidden_BSD=None), target)  # type: ignore[attr-defined]
    size = batch.token_BS.shape[0]
    share = min(recipe.sequences_per_update or size, size)
    laps = -(-recipe.updates_per_batch * share // size)

    def update(carry: tuple[DrafterParams, Any, Any], index: jax.Array) -> Any:
        params, optimizer_state, average = carry
        lap, part = index, seen
        if share < size:
            first = index * share
            lap = first // size
            order_B = jax.random.permutation(jax.random.fold_in(key, lap), size)
            chosen = order_B[(first + jnp.arange(share)) % size]
            part = jax.tree.map(lambda x: x[chosen], seen)
        blocks = choose_blocks(*part, key, lap / laps, cfg, recipe)
        gradient, metrics = blocks_gradient(params, frozen, blocks, cfg, recipe, layout, law_TU)
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
    params: DrafterParams,
    frozen: Frozen,
    batch: Batch,
    target_cfg: TargetConfig,
    cfg: DrafterConfig,
    recipe: TrainConfig,
) -> dict[str, jax.Array]:
    """Metrics of held-out sequences, always with the same anchors."""
    target = target_outputs(frozen, batch, target_cfg, cfg)
    blocks = choose_blocks(batch, target, jax.random.key(recipe.seed), 0.0, cfg, recipe)
    totals = loss_totals(blocks.labels, blocks.keep_BA, frozen.t2d_V, recipe.loss_decay)
    return blocks_loss(params, frozen, blocks, totals, cfg, recipe)[1]
