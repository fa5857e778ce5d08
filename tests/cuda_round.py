"""A whole decoding round compiled for an H100 that is not there: what it moves against the floor.

    python -m tests.cuda_round --slots 8 --positions 1024 --layers 36 --tensor 8

prints one line of JSON, with ``--top N`` after the N largest items; ``--record`` does so for all of
``ROUNDS`` and keeps the figures in ``tests/data/cuda_rounds.json``. The models have the sizes of
Qwen3-8B and of its released drafter, in bfloat16; ``--layers`` takes fewer. The program is the
engine's own, with the form of the weights and of the state that the engine has on a GPU. All
figures are those of one device.

Without a GPU XLA does not tune: most matrix products become untuned Triton fusions, where a GPU
would choose cuBLAS for some. Bytes and launches differ then, usually downwards.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from dspark_jax.axes import abstract_buffers, abstract_params, make_mesh
from dspark_jax.engine import programs
from dspark_jax.engine.decoder import Decoder, make_decoder, state_config
from dspark_jax.engine.inputs import RoundConfig, RoundInput
from dspark_jax.engine.pages import Pages
from dspark_jax.engine.plan import HostPlan, round_input
from dspark_jax.engine.state import declare_state
from dspark_jax.models.drafters.dspark import declare_drafter
from dspark_jax.models.targets.llama import declare as declare_target
from dspark_jax.scheduler.shape import Shape, Sizes
from pallas_kernels import dispatch
from tests import cuda_compile, hlo_bytes
from tests.round_floor import ROUNDS, Case, floor, kernel_bytes

RECORD = Path(__file__).parent / "data" / "cuda_rounds.json"


def measure(case: Case, top: int = 0) -> dict[str, Any]:
    """Compiles a round in a process of its own and counts.

    Args:
        case: the round.
        top: so many of the largest items are listed under ``items``.

    Raises:
        RuntimeError: this machine cannot compile, or the round does not.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
        asked = "--child", json.dumps(dataclasses.asdict(case)), folder, str(top)
        said = cuda_compile.said_by_child("tests.cuda_round", *asked, flags=flags)
    found: dict[str, Any] = json.loads(said)
    return found


def compile_round(case: Case, dump: Path, top: int) -> dict[str, Any]:
    """What :func:`measure` gives, in a process of its own; XLA writes to ``dump``."""
    # Nothing here runs: what the product asks of its device is asked of the H100s.
    dispatch.device_problem = lambda device=None: None
    jax.default_backend = lambda: "gpu"
    devices = cuda_compile.topology(case.tensor)
    mesh = make_mesh(tensor=case.tensor, devices=devices) if case.tensor > 1 else None
    decoder = abstract_decoder(case, mesh)
    form = state_config(decoder, case.slots, case.positions, case.config)
    state = abstract_buffers(declare_state(form), mesh)
    cfg = RoundConfig(case.target, case.drafter, case.draft, kernels=case.kernels, asks=case.asks)
    rows = case.chunk_rows if case.chunks else 0
    program = programs.round_program(cfg, form, case.num_rows, rows, mesh)
    arguments = decoder.weights, state, _given(case, mesh)
    if mesh is None:
        arguments = jax.tree.map(
            lambda x: _abstract(x, SingleDeviceSharding(devices[0])), arguments
        )
    start = time.perf_counter()
    compiled = program.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    parsed = hlo_bytes.parse(compiled.as_text())
    items = hlo_bytes.Program(*parsed, kernel_bytes(case, form)).items
    collectives = [item for item in items if item.kind == "collective"]
    moved, least = hlo_bytes.total_bytes(items), floor(case, mesh)
    thunks = hlo_bytes.read_thunks(dump)
    result = {
        "gb": round(moved / 1e9, 3),
        "floor_gb": round(least / 1e9, 3),
        "ratio": round(moved / least, 3),
        "kernels": sum(item.kernels * item.times for item in items),
        "command_buffers": hlo_bytes.outside(thunks, "CommandBuffer"),
        "conditionals": sum(kind == "Conditional" for kind, _ in thunks),
        "conditionals_outside": hlo_bytes.outside(thunks, "Conditional"),
        "loops": sum(kind == "While" for kind, _ in thunks),
        "loops_outside": hlo_bytes.outside(thunks, "While"),
        "collectives": hlo_bytes.count(items, "collective"),
        "collective_mb": round(hlo_bytes.total_bytes(collectives) / 1e6, 3),
        "temporary_mb": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1),
        "compile_s": round(seconds, 1),
    }
    if top:
        result["items"] = hlo_bytes.largest(items, top)
    return result


def _abstract(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def abstract_decoder(case: Case, mesh: Mesh | None) -> Decoder:
    """The decoder that the engine makes of these models on GPUs, its weights as shapes alone."""
    declared = declare_target(case.target), declare_drafter(case.drafter)
    target, drafter = (abstract_params(each, jnp.bfloat16) for each in declared)
    models = (case.target, target), (case.drafter, drafter, target.vocab)
    with (
        mock.patch.object(jax, "device_put", _put_shapes),
        mock.patch.object(jax, "jit", _shapes_of),
    ):
        return make_decoder(*models, mesh=mesh)


def _put_shapes(tree: Any, where: Any = None) -> Any:
    """``jax.device_put`` of shapes."""
    if where is None or isinstance(where, NamedSharding):
        return jax.tree.map(lambda leaf: _abstract(leaf, where), tree)
    return jax.tree.map(_abstract, tree, where)


def _shapes_of(function: Any, out_shardings: Any = None, **options: Any) -> Any:
    """``jax.jit`` of a function of shapes, which gives shapes."""

    def run(*arguments: Any, **static: Any) -> Any:
        found = jax.eval_shape(functools.partial(function, **static), *arguments)
        return _put_shapes(found, out_shardings)

    return run


def _given(case: Case, mesh: Mesh | None) -> RoundInput:
    """What the engine tells a round."""
    shape = Shape(Sizes(case.slots, case.positions), case.draft, case.num_rows, case.chunks)
    pages = Pages(case.config.pages, case.draft + 1).table((), shape.sizes, 1)
    plan = HostPlan(0, (), (), frozenset(), ((),), shape, pages)
    temperature_BG = np.zeros((case.slots, case.drafter.block_size), np.float32)
    given = round_input(plan, temperature_BG)
    if mesh is None:
        return given
    place = NamedSharding(mesh, programs.BY_SLOT)
    return jax.tree.map(lambda leaf: _abstract(leaf, place), given)


def arguments() -> argparse.Namespace:
    """Of the command line; one for every field of :class:`Case`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for field in dataclasses.fields(Case):
        if isinstance(field.default, bool):
            parser.add_argument(f"--{field.name}", action="store_true")
        else:
            parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--top", type=int, default=0, help="list so many of the largest items")
    parser.add_argument("--record", action="store_true", help="all of ROUNDS, and keep them")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def recorded() -> dict[str, Any]:
    """The last record."""
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


def record() -> None:
    """Compiles all of ``ROUNDS`` and writes the record."""
    found = {}
    for name, case in ROUNDS.items():
        found[name] = measure(case)
        print(name, json.dumps(found[name]), flush=True)
        del found[name]["compile_s"]  # of this machine
    versions = {"jax": jax.__version__, "ptxas": cuda_compile.ptxas_version()}
    about = {"architecture": "sm_90a", **versions, "rounds": found}
    RECORD.write_text(json.dumps(about, indent=1) + "\n")


def main() -> None:
    """The command of the module's docstring; a child compiles and tells its parent."""
    problem = cuda_compile.problem()
    if problem:
        sys.exit(problem)
    given = vars(arguments())
    child, top, all_rounds = (given.pop(name) for name in ("child", "top", "record"))
    if child is not None:
        case, dump = json.loads(child[0]), Path(child[1])
        print(json.dumps(compile_round(Case(**case), dump, int(child[2]))))
    elif all_rounds:
        record()
    else:
        found = measure(Case(**given), top)
        for line in found.pop("items", ()):
            print(line)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
