"""Programs of the kernels at real shapes, and what ptxas said of them.

``python -m tests.cuda_programs`` compiles all of them for sm_90a, prints a line a kernel and keeps
registers and spills in ``tests/data/cuda_programs.json``. Tests compile them again and compare.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.accept_block import cases as accept_cases
from pallas_kernels.accept_block import rule as accept_rule
from pallas_kernels.anchor_attention import cases as anchor_cases
from pallas_kernels.anchor_attention.api import anchor_attention
from pallas_kernels.ragged_attention import cases as ragged_cases
from pallas_kernels.ragged_attention.api import ragged_attention
from tests import cuda_compile

RECORD = Path(__file__).parent / "data" / "cuda_programs.json"


@dataclass(frozen=True)
class Program:
    """A function of abstract arrays whose kernels have the given names."""

    name: str
    function: Callable[..., Any]
    shapes: tuple[Any, ...]
    kernels: frozenset[str]


def programs() -> list[Program]:
    """Those of all operations. Nothing of them needs a newer jax before they are traced."""
    return [
        *map(_accept_program, ACCEPT_CASES),
        *map(_ragged_program, ragged_cases.CASES),
        *(_anchor_program(case) for case in anchor_cases.CASES if case.dtype == "bfloat16"),
    ]


# Verification. It is asked for past `api.py`, which refuses a machine without a GPU.

_Accept = accept_cases.Case
ACCEPT_CASES = (
    *(_Accept(7, 7, vocabulary) for vocabulary in (32000, 49152, 151936, 262144)),
    *(
        _Accept(32, 7, vocabulary, dtype="float32", rule="coupled")
        for vocabulary in (32000, 49152, 151936, 262144)
    ),
    _Accept(1, 0, 151936),
    _Accept(8, 7, 151936, 32768, dtype="float32"),
    _Accept(512, 7, 32001, rule="greedy"),
    _Accept(32, 7, 151936, one_hot=True),
    _Accept(7, 7, 151936 // 2),  # a shard, in lanes of 64 tokens
    _Accept(7, 7, 151936 // 8),  # in lanes of 16
)


def _accept_program(case: accept_cases.Case) -> Program:
    made = jax.eval_shape(functools.partial(accept_cases.make_inputs, case))
    leaves, structure = jax.tree.flatten(made)

    def accept(*leaves: Any) -> tuple[Any, ...]:
        from pallas_kernels.accept_block import mosaic_gpu

        kernels = mosaic_gpu.statistics, mosaic_gpu.draw, mosaic_gpu.sample
        passes = accept_rule.Passes(*kernels, mosaic_gpu.sample_rest)
        return tuple(
            accept_rule.accept_block(*jax.tree.unflatten(structure, leaves), case.rule, passes)
        )

    kernels = {"accept_sample"}
    if case.rule == "rejection" and case.slots:
        kernels = {"accept_statistics", "accept_sample" if case.one_hot else "accept_draw"}
    return Program(f"accept_block {case.name}", accept, tuple(leaves), frozenset(kernels))


# Serving attention, of one layer of a stacked cache.


def _ragged_program(case: ragged_cases.Case) -> Program:
    shapes = case.shapes()
    layers = jax.ShapeDtypeStruct((2, *shapes["k_BKSH"].shape), shapes["k_BKSH"].dtype)

    def attend(
        q_TNH: Any, k_LBKSH: Any, v_LBKSH: Any, limit_T: Any, layer: Any, own: Any, page_BX: Any
    ) -> jax.Array:
        return ragged_attention(
            q_TNH,
            k_LBKSH,
            v_LBKSH,
            case.grouping,
            limit_T,
            layer=layer,
            page_BX=page_BX,
            own=own,
            window=case.window,
            implementation="mosaic_gpu",
        )

    layer = jax.ShapeDtypeStruct((), jnp.int32)
    given = shapes["q_TNH"], layers, layers, shapes["limit_T"], layer, shapes["own"]
    given += (shapes["page_BX"],)
    return Program(f"ragged_attention {case.name}", attend, given, frozenset({"ragged_attention"}))


# Training attention, forward and backward.


def _anchor_program(case: anchor_cases.Case) -> Program:
    def attend(*arguments: Any) -> Any:
        def total(*values: Any) -> jax.Array:
            out = anchor_attention(*values, *arguments[4:], implementation="mosaic_gpu")
            return jnp.sum(out.astype(jnp.float32))

        return jax.value_and_grad(total, argnums=(0, 1, 2, 3))(*arguments[:4])

    given = jax.eval_shape(functools.partial(anchor_cases.make_inputs, case))
    names = ("anchor_attention", "anchor_attention_backward_q", "anchor_attention_backward_kv")
    return Program(f"anchor_attention {case.name}", attend, given, frozenset(names))


def kernels_of(program: Program) -> dict[str, cuda_compile.Kernel]:
    """Registers and spills of its kernels, compiled now, by their own names."""
    found = cuda_compile.compile_to_sass(program.function, *program.shapes)
    return {name: found[f"{name}_mosaic_gpu_kernel"] for name in sorted(program.kernels)}


def recorded() -> dict[str, Any]:
    """The last record."""
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


def main() -> None:
    """Compiles everything and writes the record."""
    found: dict[str, Any] = {}
    for program in programs():
        found[program.name] = {}
        for name, kernel in kernels_of(program).items():
            found[program.name][name] = vars(kernel)
            print(
                f"{program.name}: {name}: {kernel.registers} registers, "
                f"{kernel.spill_bytes} bytes spilled",
                flush=True,
            )
    record = {
        "architecture": "sm_90a",
        "jax": jax.__version__,
        "ptxas": cuda_compile.ptxas_version(),
        "programs": found,
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    problem = cuda_compile.problem()
    if problem:
        sys.exit(problem)
    main()
