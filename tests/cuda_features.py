"""The frozen target's pass of a training step compiled for an H100 that is not there.

    python -m tests.cuda_features --sequences 4 --length 4096 --layers 4 --kernels mosaic_gpu

prints one line of JSON: temporary memory and bytes moved, of the pass alone or, with ``--step``, of
a whole step. The models have the sizes of Qwen3-8B and of its drafter; layers are scanned, so that
memory does not depend on their number, and bytes grow with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from dspark_jax.axes import abstract_params, make_mesh
from dspark_jax.config import TrainConfig
from dspark_jax.models.drafters.dspark import declare_drafter
from dspark_jax.models.targets.llama import declare, encode
from dspark_jax.training.optimizer import learning_rate, make_optimizer
from dspark_jax.training.state import Batch, Frozen, TrainState, on_mesh
from dspark_jax.training.step import train_step
from tests import cuda_compile, hlo_bytes
from tests.cuda_round import Case as Models


@dataclass(frozen=True)
class Case:
    """One pass.

    Attributes:
        sequences, length: of the batch.
        layers: of the target.
        kernels: implementation of the operations.
        micro_batches: of the step.
        step: the whole step, and not the pass alone.
    """

    sequences: int = 4
    length: int = 4096
    layers: int = 4
    kernels: str = "mosaic_gpu"
    micro_batches: int = 1
    step: bool = False


def measure(case: Case) -> dict[str, Any]:
    """Compiles in a process of its own.

    Raises:
        RuntimeError: this machine cannot compile, or the program does not.
    """
    given = json.dumps(dataclasses.asdict(case))
    found: dict[str, Any] = json.loads(
        cuda_compile.said_by_child("tests.cuda_features", "--child", given)
    )
    return found


def compile_pass(case: Case) -> dict[str, Any]:
    """What :func:`measure` gives; in a process of its own."""
    devices = cuda_compile.topology(1)
    jax.default_backend = lambda: "gpu"
    models = Models(layers=case.layers)
    target_cfg, cfg = models.target, models.drafter
    target = abstract_params(declare(target_cfg), jnp.bfloat16)
    token_BS = jax.ShapeDtypeStruct((case.sequences, case.length), jnp.int32)
    if case.step:
        recipe = TrainConfig(
            dtype="bfloat16",
            kernels=case.kernels,
            micro_batches=case.micro_batches,
            max_length=case.length,
            length_buckets=(case.length,),
            tokens_per_batch=case.sequences * case.length,
            num_anchors=512,
        )
        optimizer = make_optimizer(recipe, learning_rate(recipe, 1))
        static = {"target_cfg": target_cfg, "cfg": cfg, "recipe": recipe, "optimizer": optimizer}
        params = abstract_params(declare_drafter(cfg))
        state = TrainState(
            jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params)
        )
        mask_BS = jax.ShapeDtypeStruct(token_BS.shape, jnp.bool_)
        arguments = state, Frozen(target, target.vocab, None), Batch(token_BS, mask_BS)
        program = functools.partial(train_step, **static)
        donated = 0
    else:
        read = functools.partial(
            encode, cfg=target_cfg, feature_layers=cfg.target_layer_ids, kernels=case.kernels
        )
        program, arguments, donated = read, (target, token_BS), ()
    program = on_mesh(program, make_mesh(devices=devices))
    place = SingleDeviceSharding(devices[0])
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments
    )
    compiled = jax.jit(program, donate_argnums=donated).lower(*arguments).compile()
    memory = compiled.memory_analysis()

    def once(operands: list[str], result: str) -> float:
        return sum(map(hlo_bytes.num_bytes, (*operands, result)))

    items = hlo_bytes.Program(*hlo_bytes.parse(compiled.as_text()), once).items
    for item in sorted(items, key=lambda i: -i.bytes * i.times)[:12]:
        print(
            f"{item.bytes * item.times / 1e9:8.3f} GB {item.times} x [{item.kind}] {item.label}",
            file=sys.stderr,
        )
    return {
        "gb": round(hlo_bytes.total_bytes(items) / 1e9, 3),
        "kernels": sum(item.kernels * item.times for item in items),
        "mosaic": hlo_bytes.count(items, "mosaic"),
        "temporary_gb": round(memory.temp_size_in_bytes / 1e9, 3),
        "output_gb": round(memory.output_size_in_bytes / 1e9, 3),
    }


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    for f in dataclasses.fields(Case):
        if f.type == "bool":
            p.add_argument(f"--{f.name}", action="store_true")
        else:
            p.add_argument(f"--{f.name}", type=type(f.default), default=f.default)
    p.add_argument("--child")
    a = vars(p.parse_args())
    child = a.pop("child")
    if child:
        print(json.dumps(compile_pass(Case(**json.loads(child)))))
    else:
        print(json.dumps(measure(Case(**a))))
