"""Times of implementations side by side: what every ``pallas_kernels.<op>.bench`` runs.

A floor is the time that the bytes and the FLOPs of a case take at the rates which this very device
reaches in a copy and in a matrix product: the larger of the two.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch

REPEATS = 9
CACHE_BYTES = 128 * 2**20  # more than any second-level cache of a GPU holds
CALLS = 16  # without a wait in between on a GPU, so that launches hide behind the device's work


@dataclass(frozen=True)
class Way:
    """One implementation of a case.

    Attributes:
        step: what is timed; it is jitted.
        inputs: the arguments of ``step`` from a seed. Ways that share this function share arrays.
    """

    step: Callable[..., Any]
    inputs: Callable[[int], tuple[Any, ...]]


@dataclass(frozen=True)
class Work:
    """A case with its implementations.

    Attributes:
        case: its name.
        least_bytes, least_flops: that nobody can do without.
        ways: by the names of the implementations, "xla" among them.
    """

    case: str
    least_bytes: int
    least_flops: int
    ways: Mapping[str, Way]


def on_gpu() -> bool:
    """Whether the default device is a GPU."""
    return jax.default_backend() == "gpu"


def left_out() -> str | None:
    """Why the kernels are not timed here; None where they are."""
    return dispatch.version_problem() or dispatch.device_problem()


def implementations() -> tuple[str, ...]:
    """The implementations that this machine can time."""
    return ("xla",) if left_out() else dispatch.IMPLEMENTATIONS


def median_seconds(steps: Mapping[str, Callable[[], Any]], calls: int = 1) -> dict[str, float]:
    """Median times of ``steps``, in turns, each after a first call that compiles.

    Args:
        steps: each starts ``calls`` calls and returns what they give.
        calls: by which the times are divided.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(1 + REPEATS):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step())
            if repeat:
                seconds[name].append((time.perf_counter() - start) / calls)
    return {name: statistics.median(times) for name, times in seconds.items()}


def copy_rate() -> float:
    """Bytes a second, read plus written, of a pass over an array that no cache holds."""
    x_X = jnp.zeros(2**28 if on_gpu() else 2**25, jnp.float32)
    copy = jax.jit(jnp.negative)
    return 2 * x_X.nbytes / median_seconds({"copy": lambda: copy(x_X)})["copy"]


def matmul_rate() -> float:
    """FLOPs a second of a square product: bfloat16 on a GPU, float32 on a CPU."""
    size, dtype = (8192, jnp.bfloat16) if on_gpu() else (1024, jnp.float32)
    x_XX = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    product = jax.jit(jnp.matmul)
    return 2 * size**3 / median_seconds({"product": lambda: product(x_XX, x_XX)})["product"]


def measure(work: Work, bytes_per_s: float, flops_per_s: float) -> Iterator[dict[str, Any]]:
    """The rows of one case.

    Args:
        work: the case.
        bytes_per_s, flops_per_s: rates of this device.

    Yields:
        One row an implementation: ``case, implementation, seconds, bytes, flops, floor_share``
        (the floor's time by the implementation's) and ``ratio_to_xla`` (XLA's time by it).
    """
    # A GPU is to find its inputs in memory, and not in a cache where the last call left them.
    copies = math.ceil(CACHE_BYTES / max(work.least_bytes, 1)) if on_gpu() else 1
    copies = min(copies, CALLS)
    rounds = -(-CALLS // copies) if on_gpu() else 1
    makers = {way.inputs for way in work.ways.values()}
    inputs = {maker: [maker(seed) for seed in range(copies)] for maker in makers}

    def all_calls(way: Way) -> Callable[[], list[Any]]:
        step = jax.jit(way.step)
        return lambda: [step(*args) for _ in range(rounds) for args in inputs[way.inputs]]

    steps = {name: all_calls(way) for name, way in work.ways.items()}
    floor_s = max(work.least_bytes / bytes_per_s, work.least_flops / flops_per_s)
    medians = median_seconds(steps, rounds * copies)
    for name, median in medians.items():
        yield {
            "case": work.case,
            "implementation": name,
            "seconds": median,
            "bytes": work.least_bytes,
            "flops": work.least_flops,
            "floor_share": floor_s / median,
            "ratio_to_xla": medians["xla"] / median,
        }


def report(works: Iterable[Work]) -> dict[str, Any]:
    """The measured cases with the device they were measured on, ready for JSON.

    ``left_out`` says why the kernels were not timed: XLA was, alone. It is None where they were.
    """
    rates = copy_rate(), matmul_rate()
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "bytes_per_s": rates[0],
        "flops_per_s": rates[1],
        "left_out": left_out(),
        "rows": [row for work in works for row in measure(work, *rates)],
    }


def table(found: dict[str, Any]) -> str:
    """A :func:`report` for people."""
    lines = [
        f"{found['device']}, jax {found['jax']}: copies {found['bytes_per_s'] / 1e9:.1f} GB/s, "
        f"multiplies {found['flops_per_s'] / 1e12:.2f} TFLOP/s"
    ]
    if found["left_out"]:
        lines.append(f"XLA alone: {found['left_out']}")
    lines += [
        f"{row['case']:54} {row['implementation']:12} {1e6 * row['seconds']:9.0f} us "
        f"{row['floor_share']:5.0%} of the floor, {row['ratio_to_xla']:.2f} x XLA's speed"
        for row in found["rows"]
    ]
    return "\n".join(lines)


def command(description: str, works: Iterable[Work], arguments: list[str] | None = None) -> str:
    """What a bench prints: a table, or with ``--json`` one JSON object.

    Args:
        description: of the command.
        works: the cases that this device is to run.
        arguments: of the command line; None for those of this process.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name has it")
    given = parser.parse_args(arguments)
    found = report(work for work in works if given.only in work.case)
    return json.dumps(found) if given.json else table(found)
