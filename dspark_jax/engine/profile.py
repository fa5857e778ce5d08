"""Seconds of every round of an engine, measured."""

from __future__ import annotations

import statistics
import time
from typing import Any

import jax
from tqdm import tqdm

from dspark_jax.engine.compiled import Programs
from dspark_jax.engine.plan import Shape

REPLAYS, WARM_REPLAYS = 5, 1


def measure_rounds(programs: Programs, weights: Any, replays: int = REPLAYS) -> dict[Shape, float]:
    """Median seconds of whole rounds, of steady replays.

    All slots are free: a program computes the same rows whoever they belong to, and the length of a
    request does not matter either. Sampling costs a little more than is measured.

    Args:
        programs: of the engine; what is not compiled yet will be.
        weights: of the models.
        replays: how often each round is timed.
    """
    todo = [(size, programs.shapes(size)) for size in programs.sizes()]
    seconds = {}
    with tqdm(total=sum(len(shapes) for _, shapes in todo), desc="measure", disable=None) as bar:
        for size, shapes in todo:
            state = programs.new_state(size)
            for shape in shapes:
                run, given = programs.round(shape), programs.idle_input(shape)
                times = []
                for _ in range(WARM_REPLAYS + replays):
                    began = time.perf_counter()
                    state, _ = jax.block_until_ready(run(weights, state, given))
                    times.append(time.perf_counter() - began)
                seconds[shape] = statistics.median(times[WARM_REPLAYS:])
                bar.update()
    return seconds
