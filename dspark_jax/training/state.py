"""What training steps read and change, and where it lies on a mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dspark_jax.axes import abstract_params, declared_shardings, partition
from dspark_jax.config import DrafterConfig, TargetConfig
from dspark_jax.models.drafters.table import drafter_of
from dspark_jax.models.targets.family import TargetParams
from dspark_jax.models.targets.table import family_of
from dspark_jax.models.vocab import Vocab


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
    params: Any
    optimizer: Any
    average: Any = None

    @property
    def result(self) -> Any:
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
        feature_BSFD: bfloat16 outputs of the target out of a cache; None where the step is to run
            the target.
        hidden_BSD: likewise.
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
    declared = drafter_of(cfg).declare_drafter(cfg)
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
        params: in the form of the drafter's weights.
        frozen: in the form of ``Frozen``; but the target's layers stay as they lie.
        layer: of one of these, gathered when its turn comes; for every stack.
    """

    params: Any
    frozen: Any
    layer: Any


def make_layout(target_cfg: TargetConfig, cfg: DrafterConfig, mesh: Mesh) -> Layout:
    """The layout of a step on a mesh."""
    params = declared_shardings(drafter_of(cfg).declare_drafter(cfg), mesh, unused=("fsdp",))
    frozen = frozen_shardings(target_cfg, cfg, mesh, unused=("fsdp",))
    layers = frozen.target.layers
    layer = jax.tree.map(lambda s: NamedSharding(mesh, PartitionSpec(*s.spec[1:])), layers)
    stored = declared_shardings(family_of(target_cfg).declare(target_cfg).layers, mesh)
    target = frozen.target.replace(layers=stored)  # type: ignore[attr-defined]
    return Layout(params, frozen.replace(target=target), layer)  # type: ignore[attr-defined]


def on_mesh(step: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """A step that is traced under a mesh, whose axes the kernels look for."""

    def run(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*arguments)

    return run
