"""Times of implementations side by side: what every ``pallas_kernels.<op>.bench`` runs.

A floor is the time that the bytes and the FLOPs of a case take at the rates which this very device
reaches in a copy and in a matrix product: the larger of the two.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch

REPEATS = 9
CACHE_BYTES = 128 * 2**20  # more than any second-level cache of a GPU holds
ERROR_CHARS = 500  # of a message that are kept
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
        least_bytes: that nobody can do without.
        least_flops: likewise.
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


def device_seconds(programs: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """Median times that a GPU itself counts for the kernels of programs, in turns.

    Args:
        programs: jitted functions with their argument.

    Nothing of the host is in them. Empty where CUPTI cannot be asked: the clock stands for it then.
    """
    if not on_gpu() or dispatch.version_problem():
        return {}
    from jax.experimental.mosaic.gpu import profiler

    milliseconds: dict[str, list[float]] = {name: [] for name in programs}
    try:
        for _ in range(REPEATS):
            for name, (program, argument) in programs.items():
                counted = profiler.measure(program)(argument)[1]
                if counted is None:
                    return {}
                milliseconds[name].append(counted)
    except (
        RuntimeError,
        ImportError,
        AttributeError,
    ):  # CUPTI may be missing, or forbidden to this user
        return {}
    return {name: statistics.median(times) / 1e3 for name, times in milliseconds.items()}


def measure(work: Work, bytes_per_s: float, flops_per_s: float) -> Iterator[dict[str, Any]]:
    """The rows of one case.

    Args:
        work: the case.
        bytes_per_s: of this device.
        flops_per_s: likewise.

    Yields:
        One row an implementation: ``case, implementation, seconds`` (those that the device counts
        if it does, else those of the clock), ``wall_seconds, bytes, flops, floor_share`` (the
        floor's time by the implementation's), ``ratio_to_xla`` (XLA's time by it) and
        ``difference`` (:func:`difference` to XLA's result; None for what is no implementation).
        An implementation that fails has ``case, implementation, error`` instead, so that the
        others are measured all the same.
    """
    # A GPU is to find its inputs in memory, and not in a cache where the last call left them: a
    # program goes over as many inputs as no cache holds.
    copies = math.ceil(CACHE_BYTES / max(work.least_bytes, 1)) if on_gpu() else 1
    copies = min(copies, CALLS)
    calls = -(-CALLS // copies) if on_gpu() else 1
    makers = {way.inputs for way in work.ways.values()}
    inputs = {maker: [maker(seed) for seed in range(copies)] for maker in makers}
    programs = {
        name: (_over_inputs(way.step), inputs[way.inputs]) for name, way in work.ways.items()
    }
    results, problems = {}, {}
    for name in list(programs):
        try:
            program, argument = programs[name]
            results[name] = jax.block_until_ready(program(argument))[0]
        except (RuntimeError, ValueError, NotImplementedError) as problem:  # the compiler's too
            problems[name] = " ".join(str(problem).split())[:ERROR_CHARS]
            del programs[name]
    wall = median_seconds(
        {name: _repeated(*program, calls) for name, program in programs.items()}, calls
    )
    found = device_seconds(programs) or wall
    seconds, wall_s = (
        {name: value / copies for name, value in times.items()} for times in (found, wall)
    )
    floor_s = max(work.least_bytes / bytes_per_s, work.least_flops / flops_per_s)
    for name in work.ways:
        if name in problems:
            yield {"case": work.case, "implementation": name, "error": problems[name]}
            continue
        compared = name in dispatch.IMPLEMENTATIONS and "xla" in results
        yield {
            "case": work.case,
            "implementation": name,
            "seconds": seconds[name],
            "wall_seconds": wall_s[name],
            "bytes": work.least_bytes,
            "flops": work.least_flops,
            "floor_share": floor_s / seconds[name],
            "ratio_to_xla": seconds["xla"] / seconds[name] if "xla" in seconds else None,
            "difference": difference(results[name], results["xla"]) if compared else None,
        }


def _over_inputs(step: Callable[..., Any]) -> Callable[[list[tuple[Any, ...]]], Any]:
    once = jax.jit(step)  # traced and lowered once for all inputs
    return jax.jit(lambda inputs: [once(*arguments) for arguments in inputs])


def _repeated(program: Callable[[Any], Any], argument: Any, calls: int) -> Callable[[], Any]:
    return lambda: [program(argument) for _ in range(calls)]


def difference(found: Any, wanted: Any) -> float:
    """How far a result is from another: of floats the largest difference by the largest magnitude,
    of integers and booleans the share that differs; the largest of the arrays of a tree."""

    def of_leaf(one: jax.Array, other: jax.Array) -> float:
        if not jnp.issubdtype(one.dtype, jnp.floating):
            return float(jnp.mean(one != other))
        one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        return float(jnp.max(jnp.abs(one - other)) / jnp.maximum(jnp.max(jnp.abs(other)), 1e-30))

    return max(map(of_leaf, jax.tree.leaves(found), jax.tree.leaves(wanted)))


def reports(works: Iterable[Work]) -> Iterator[dict[str, Any]]:
    """The cases measured so far with the device they were measured on, ready for JSON.

    ``left_out`` says why the kernels were not timed: XLA was, alone. It is None where they were.
    """
    rates = copy_rate(), matmul_rate()
    found: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "bytes_per_s": rates[0],
        "flops_per_s": rates[1],
        "left_out": left_out(),
        "rows": [],
    }
    yield found
    for work in works:
        found["rows"] += measure(work, *rates)
        yield found


def table(found: dict[str, Any]) -> str:
    """The last of :func:`reports` for people."""
    lines = [
        f"{found['device']}, jax {found['jax']}: copies {found['bytes_per_s'] / 1e9:.1f} GB/s, "
        f"multiplies {found['flops_per_s'] / 1e12:.2f} TFLOP/s"
    ]
    if found["left_out"]:
        lines.append(f"XLA alone: {found['left_out']}")
    return "\n".join([*lines, *map(line, found["rows"])])


def line(row: dict[str, Any]) -> str:
    """A row of :func:`measure` for people."""
    said = f"{row['case']:54} {row['implementation']:12} "
    if "error" in row:
        return said + f"failed: {row['error']}"
    said += f"{1e6 * row['seconds']:9.0f} us {row['floor_share']:5.0%} of the floor"
    if row["ratio_to_xla"] is not None:
        said += f", {row['ratio_to_xla']:.2f} x XLA's speed"
    return said if row["difference"] is None else f"{said}, difference {row['difference']:.1e}"


def command(description: str, works: Iterable[Work], arguments: list[str] | None = None) -> str:
    """What a bench prints: a table, or with ``--json`` one JSON object.

    ``--out`` has that object after each case, so that nothing measured is lost.

    Args:
        description: of the command.
        works: the cases that this device is to run.
        arguments: of the command line; None for those of this process.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", metavar="FILE", help="the JSON object, written after each case")
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="cases whose name has it (or another)"
    )
    given = parser.parse_args(arguments)
    wanted = given.only or [""]
    chosen = (work for work in works if any(text in work.case for text in wanted))
    for found in reports(chosen):
        if given.out:
            part = Path(f"{given.out}.part")
            part.write_text(json.dumps(found))
            os.replace(part, given.out)
    return json.dumps(found) if given.json else table(found)
