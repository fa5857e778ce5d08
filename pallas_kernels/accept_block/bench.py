"""Times of verification: ``python -m pallas_kernels.accept_block.bench [--json]``.

The implementation ``composition`` is what the operation replaces, put together in the usual way:
both laws by log-softmax, the chance of every draft, the residual of every slot, a draw from each.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, random
from pallas_kernels.accept_block import xla
from pallas_kernels.accept_block.api import accept_block
from pallas_kernels.accept_block.cases import CASES, Case, make_inputs
from pallas_kernels.accept_block.rule import (
    Drafts,
    Requests,
    VerifyPlan,
    acceptance_chance,
    leading,
)


def composition(
    logits_TV: jax.Array, floor_T: jax.Array, plan: VerifyPlan, drafts: Drafts, requests: Requests
) -> tuple[jax.Array, jax.Array]:
    """int32 accepted_B and next_B of rejection at temperatures above 0; every law is written out.

    Takes what ``accept_block`` takes.
    """
    assert drafts.logits_BGU is not None
    num_requests, num_slots = drafts.index_BG.shape
    kept_TV = jnp.where(logits_TV >= floor_T[:, None], logits_TV, -jnp.inf).astype(jnp.float32)
    temperature_B11 = requests.temperature_B[:, None, None]
    target_BCV = jax.nn.log_softmax(kept_TV[plan.row_BC] / temperature_B11)
    draft_BGU = jax.nn.log_softmax(drafts.logits_BGU.astype(jnp.float32) / temperature_B11)
    target_BG1 = jnp.take_along_axis(target_BCV[:, :-1], drafts.token_BG[..., None], axis=-1)
    draft_BG1 = jnp.take_along_axis(draft_BGU, drafts.index_BG[..., None], axis=-1)
    chance_BG = acceptance_chance(target_BG1, draft_BG1)[..., 0]

    key_B12, anchor_B1 = requests.key_B2[:, None], requests.anchor_position_B[:, None]
    column_C = jnp.arange(num_slots + 1)
    accept_key_BG2 = random.stream_key(key_B12, random.ACCEPT, anchor_B1, column_C[:-1])
    accepted_B = leading(random.uniform(accept_key_BG2, 1)[..., 0] < chance_BG, plan.length_B)

    excess_BGV = xla.excess(target_BCV[:, :-1], draft_BGU, drafts.d2t_U)
    mass_BG1 = jnp.sum(excess_BGV, axis=-1, keepdims=True)
    residual_BGV = jnp.log(excess_BGV / mass_BG1)
    fallen_BG1 = (column_C[:-1] < plan.length_B[:, None])[..., None] & (mass_BG1 > xla.LEAST_MASS)
    law_BGV = jnp.where(fallen_BG1, residual_BGV, target_BCV[:, :-1])
    law_BCV = jnp.concatenate([law_BGV, target_BCV[:, -1:]], axis=1)
    next_key_BC2 = random.stream_key(key_B12, random.RESIDUAL, anchor_B1, column_C)
    token_BC = jnp.argmax(law_BCV + random.gumbel(next_key_BC2, law_BCV.shape[-1]), axis=-1)
    return accepted_B, token_BC[jnp.arange(num_requests), accepted_B].astype(jnp.int32)


REPEATS = 9
CACHE_BYTES = 128 * 2**20  # more than any second-level cache holds: inputs are rotated past it


def measure(case: Case, bytes_per_s: float) -> Iterator[dict[str, Any]]:
    """The rows of one case: medians of calls in turns, after a call that compiles."""
    ways: dict[str, Callable[..., Any]] = {"xla": accept_block}
    if not (dispatch.version_problem() or dispatch.device_problem()):
        ways["mosaic_gpu"] = functools.partial(accept_block, implementation="mosaic_gpu")
    ways = {name: functools.partial(way, rule=case.rule) for name, way in ways.items()}
    if case.rule == "rejection":
        ways["composition"] = composition
    jitted = {name: jax.jit(way) for name, way in ways.items()}
    on_gpu = jax.default_backend() == "gpu"
    copies = math.ceil(CACHE_BYTES / case.least_bytes) if on_gpu else 1
    inputs = [make_inputs(case, seed) for seed in range(copies)]
    seconds: dict[str, list[float]] = {name: [] for name in jitted}
    for repeat in range(1 + REPEATS):
        for name, step in jitted.items():
            start = time.perf_counter()
            jax.block_until_ready([step(*args) for args in inputs])
            if repeat:
                seconds[name].append((time.perf_counter() - start) / copies)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        yield {
            "case": case.name,
            "implementation": name,
            "seconds": median,
            "bytes": case.least_bytes,
            "floor_share": case.least_bytes / bytes_per_s / median,
            "ratio_to_xla": medians["xla"] / median,
        }


def copy_bandwidth() -> float:
    """Bytes a second, read plus written, of a copy of an array that no cache holds."""
    x_V = jnp.zeros(2**27 if jax.default_backend() == "gpu" else 2**25, jnp.float32)
    copy = jax.jit(jnp.negative)
    jax.block_until_ready(copy(x_V))
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(copy(x_V))
        seconds.append(time.perf_counter() - start)
    return 2 * x_V.nbytes / statistics.median(seconds)


def main() -> None:
    """Measures the cases and prints them."""
    parser = argparse.ArgumentParser(description="Times of accept_block on this device.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    as_json = parser.parse_args().json
    problem = dispatch.version_problem() or dispatch.device_problem()
    on_gpu = jax.default_backend() == "gpu"
    bytes_per_s = copy_bandwidth()
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "bytes_per_s": bytes_per_s,
        "left_out": problem,
        # A processor serves in float32, and the others would take minutes there.
        "rows": [
            row
            for case in CASES
            if on_gpu or case.dtype == "float32"
            for row in measure(case, bytes_per_s)
        ],
    }
    if as_json:
        print(json.dumps(report))
        return
    print(f"{report['device']}, jax {jax.__version__}, copies {bytes_per_s / 1e9:.1f} GB/s")
    if problem:
        print(f"XLA alone: {problem}")
    for row in report["rows"]:
        print(
            f"{row['case']:48} {row['implementation']:12} {1e6 * row['seconds']:9.0f} us "
            f"{row['floor_share']:5.0%} of the floor, {row['ratio_to_xla']:.2f} x XLA's speed"
        )


if __name__ == "__main__":
    main()
