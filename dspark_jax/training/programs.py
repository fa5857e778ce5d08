"""The compiled steps of a recipe, and where their arguments lie."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dspark_jax.axes import make_mesh
from dspark_jax.config import DrafterConfig, TargetConfig, TrainConfig
from dspark_jax.training.loss_terms import Loss
from dspark_jax.training.optimizer import Optimizer, learning_rate, make_optimizer
from dspark_jax.training.state import Frozen, TrainState, make_layout, on_mesh, step_shardings
from dspark_jax.training.step import evaluation_step, train_step

# Settings that no compiled step reads: runs that differ in nothing else share programs.
UNREAD: dict[str, Any] = {
    "target": "",
    "data": "",
    "out": "",
    "system": "",
    "chat_template": True,
    "template_args": (),
    "eval_sequences": 0,
    "bigram_init": False,
    "local_init": False,
    "init_drafter": "",
    "cache": "",
    "cache_gb": 0.0,
    "steps": 0,
    "epochs": 1.0,
    "learning_rate": 1.0,
    "warmup_fraction": 0.0,
    "eval_every": 1,
    "checkpoint_every": 1,
    "log_every": 1,
    "keep_checkpoints": 1,
}


def mesh_of(recipe: TrainConfig) -> Mesh:
    """The device mesh of a recipe.

    Raises:
        ValueError: it has more devices than there are, or leaves some of several processes'
            devices out.
    """
    mesh = make_mesh(recipe.data_parallel, recipe.tensor_parallel, recipe.fsdp)
    if jax.process_count() > 1 and mesh.size != jax.device_count():
        raise ValueError(
            f"data_parallel {recipe.data_parallel} x fsdp {recipe.fsdp} x tensor_parallel "
            f"{recipe.tensor_parallel} is {mesh.size} devices, but the {jax.process_count()} "
            f"processes have {jax.device_count()}: use them all"
        )
    return mesh


@dataclass(frozen=True)
class Programs:
    """The jitted steps of a recipe, and where their arguments live.

    Attributes:
        step: takes state, frozen, batch and the run's learning rate.
        evaluate: takes weights, frozen and batch.
        init: the optimiser's state for weights.
        state: shardings of the state.
        frozen: of the target.
        sequences: of sequences.
        whole: of what is on every device.
    """

    step: Any
    evaluate: Any
    init: Any
    state: Any
    frozen: Any
    sequences: NamedSharding
    whole: NamedSharding


@cache
def programs_of(
    target_cfg: TargetConfig,
    cfg: DrafterConfig,
    recipe: TrainConfig,
    optimizer: Optimizer | None = None,
    loss: Loss | None = None,
) -> Programs:
    """The programs of a recipe, in which ``UNREAD`` settings do not matter.

    Raises:
        ValueError: see :func:`mesh_of`.
    """
    mesh = mesh_of(recipe)
    some = make_optimizer(recipe, learning_rate(recipe, 1), optimizer)  # for the form of its state
    whole = NamedSharding(mesh, PartitionSpec())
    state, frozen, sequences = step_shardings(
        target_cfg, cfg, some, mesh, averaged=recipe.average_decay > 0
    )
    layout = make_layout(target_cfg, cfg, mesh) if recipe.fsdp > 1 else None
    static: dict[str, Any] = {"target_cfg": target_cfg, "cfg": cfg, "recipe": recipe, "loss": loss}

    def train(state: TrainState, frozen: Frozen, batch: Any, rate: optax.Schedule) -> Any:
        updates = make_optimizer(recipe, rate, optimizer)
        return train_step(state, frozen, batch, optimizer=updates, layout=layout, **static)

    step = jax.jit(
        on_mesh(train, mesh),
        donate_argnums=0,
        in_shardings=(state, frozen, sequences, whole),
        out_shardings=(state, whole),
    )
    # A held-out batch may have fewer sequences than the mesh has parts.
    evaluate = jax.jit(
        on_mesh(partial(evaluation_step, **static), mesh),
        in_shardings=(state.params, frozen, whole),
        out_shardings=whole,
    )
    init = jax.jit(some.init, out_shardings=state.optimizer)
    return Programs(step, evaluate, init, state, frozen, sequences, whole)
