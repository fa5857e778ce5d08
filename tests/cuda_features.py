"""A training step, or the frozen target's pass alone, compiled for an H100 that is not there.

    python -m tests.cuda_features --sequences 4 --length 4096 --layers 4 --kernels mosaic_gpu

prints one line of JSON: temporary memory and bytes moved. The models have the sizes of Qwen3-8B and
of its drafter, in bfloat16. Layers are scanned: memory hardly depends on their number, and bytes
grow with it.
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
from tests import cuda_compile, hlo_bytes, round_floor


@dataclass(frozen=True)
class Case:
    """What is compiled.

    Attributes:
        sequences, length: of the batch.
        layers: of the target.
        kernels: implementation of the operations.
        micro_batches: of a whole step; 0 is the target's pass alone.
    """

    sequences: int = 4
    length: int = 4096
    layers: int = 4
    kernels: str = "mosaic_gpu"
    micro_batches: int = 0

    @property
    def recipe(self) -> TrainConfig:
        """Of the step."""
        return TrainConfig(
            dtype="bfloat16",
            kernels=self.kernels,  # type: ignore[arg-type]
            micro_batches=self.micro_batches or 1,
            max_length=self.length,
            length_buckets=(self.length,),
            tokens_per_batch=self.sequences * self.length,
            num_anchors=512,
        )


def measure(case: Case) -> dict[str, Any]:
    """Compiles in a process of its own.

    Raises:
        RuntimeError: this machine cannot compile, or the program does not.
    """
    asked = "--child", json.dumps(dataclasses.asdict(case))
    found: dict[str, Any] = json.loads(cuda_compile.said_by_child("tests.cuda_features", *asked))
    return found


def program_of(case: Case) -> tuple[Any, tuple[Any, ...]]:
    """A function, and its arguments as shapes; the first one of a step is donated."""
    models = round_floor.Case(layers=case.layers)
    target = abstract_params(declare(models.target), jnp.bfloat16)
    token_BS = jax.ShapeDtypeStruct((case.sequences, case.length), jnp.int32)
    sizes = {"target_cfg": models.target, "cfg": models.drafter}
    if not case.micro_batches:
        layers = models.drafter.target_layer_ids
        options = {"cfg": models.target, "feature_layers": layers, "kernels": case.kernels}
        return functools.partial(encode, **options), (target, token_BS)
    optimizer = make_optimizer(case.recipe, learning_rate(case.recipe, 1))
    params = abstract_params(declare_drafter(models.drafter))
    step = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(step, params, jax.eval_shape(optimizer.init, params))
    batch = Batch(token_BS, jax.ShapeDtypeStruct(token_BS.shape, jnp.bool_))
    train = functools.partial(train_step, recipe=case.recipe, optimizer=optimizer, **sizes)
    return train, (state, Frozen(target, target.vocab, None), batch)


def compile_case(case: Case) -> dict[str, Any]:
    """What :func:`measure` gives, in a process of its own."""
    jax.default_backend = lambda: "gpu"
    devices = cuda_compile.topology(1)
    place = SingleDeviceSharding(devices[0])
    function, given = program_of(case)
    given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), given)
    program = jax.jit(
        on_mesh(function, make_mesh(devices=devices)),
        donate_argnums=0 if case.micro_batches else (),
    )
    compiled = program.lower(*given).compile()
    items = hlo_bytes.Program(*hlo_bytes.parse(compiled.as_text()), _once).items
    memory = compiled.memory_analysis()
    return {
        "gb": round(hlo_bytes.total_bytes(items) / 1e9, 3),
        "mosaic": hlo_bytes.count(items, "mosaic"),
        "temporary_gb": round(memory.temp_size_in_bytes / 1e9, 3),
        "output_gb": round(memory.output_size_in_bytes / 1e9, 3),
    }


def _once(operands: list[str], result: str) -> float:
    """What a kernel reads and writes, each once: what it reads again lies in L2."""
    return sum(map(hlo_bytes.num_bytes, (*operands, result)))


def main() -> None:
    """The command of the module's docstring; a child compiles and tells its parent."""
    problem = cuda_compile.problem()
    if problem:
        sys.exit(problem)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for field in dataclasses.fields(Case):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = vars(parser.parse_args())
    child = given.pop("child")
    if child is None:
        print(json.dumps(measure(Case(**given))))
    else:
        print(json.dumps(compile_case(Case(**json.loads(child)))))


if __name__ == "__main__":
    main()
