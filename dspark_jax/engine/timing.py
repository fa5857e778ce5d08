"""Seconds of rounds by replaying an engine's own programs at forced lengths.

The programs of one size of the state take turns, those of several engines too, so that a machine
that slows down slows all of them; the median of each counts. As in the engine, a round is launched
before the one before it is read: its time is that between the ends of the two.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from dspark_jax.engine.compiled import Programs
from dspark_jax.engine.config import EngineConfig, make_ladder
from dspark_jax.engine.decoder import Decoder, without_drafter
from dspark_jax.engine.inputs import RoundInput, Weights
from dspark_jax.engine.memory import check_sizes, complete
from dspark_jax.engine.plan import Chunk, HostPlan
from dspark_jax.engine.programs import BY_SLOT, num_shards
from dspark_jax.engine.setting import setting_of
from dspark_jax.engine.state import DecodeState
from dspark_jax.progress import progress
from dspark_jax.scheduler.policy import make_policy
from dspark_jax.scheduler.profile import Profile, make_profile
from dspark_jax.scheduler.shape import Shape, Sizes

REPLAYS = 20
WARM_REPLAYS = 1

# A program with all but the state filled in.
Step = Callable[[DecodeState], tuple[DecodeState, Any]]


def measure_profile(
    decoder: Decoder,
    config: EngineConfig,
    replays: int = REPLAYS,
    names: Mapping[str, str] | None = None,
) -> Profile:
    """Time all rounds of an engine, with a progress bar.

    The requests are greedy, without filters: the noise of sampling costs a little more.

    Args:
        decoder: models and mesh.
        config: of the engine; the profile serves all policies that verify up to as many drafts.
        replays: how often every round is timed.
        names: of the models, ``target`` and ``drafter``, to be noted in the profile.

    Raises:
        ValueError: the sizes do not fit the models, the mesh or the memory.
    """
    (found,) = measure_profiles([(decoder, config)], replays)
    return replace(found, setting={**(names or {}), **found.setting})


def measure_profiles(
    engines: Sequence[tuple[Decoder, EngineConfig]], replays: int = REPLAYS
) -> list[Profile]:
    """Profiles that can be compared: the engines take turns. Arguments, and what they raise, are
    those of :func:`measure_profile`; all engines have the same numbers of slots and positions."""
    measured = []
    for decoder, asked in engines:
        config = complete(decoder, asked)
        policy = make_policy(config.policy, decoder.drafter)
        if policy.kind == "none":
            decoder = without_drafter(decoder)
        ladder = make_ladder(config, policy, num_shards(decoder.mesh))
        check_sizes(decoder, config, ladder)
        measured.append((Programs(decoder, config, policy, ladder), decoder.weights))
    return _measure(measured, replays)


def _measure(engines: Sequence[tuple[Programs, Weights]], replays: int) -> list[Profile]:
    medians: list[dict[Sizes, list[float]]] = [{} for _ in engines]
    for sizes in progress(engines[0][0].sizes(), desc="profile", unit="size"):
        lanes = [_passes(programs, weights, sizes) for programs, weights in engines]
        turns = [[next(lane) for lane in lanes] for _ in range(WARM_REPLAYS + replays)]
        for found, passes in zip(medians, zip(*turns[WARM_REPLAYS:], strict=True), strict=True):
            found[sizes] = [statistics.median(times) for times in zip(*passes, strict=True)]
    return [
        _profile(programs, found) for (programs, _), found in zip(engines, medians, strict=True)
    ]


def _profile(programs: Programs, seconds: Mapping[Sizes, list[float]]) -> Profile:
    """The profile of an engine from the seconds of its steps."""
    round_s: dict[Shape, float] = {}
    draft_s: dict[Sizes, float] = {}
    for sizes, values in seconds.items():
        shapes, ahead_s = programs.shapes(sizes), 0.0
        if programs.policy.num_draft:
            draft_s[sizes] = values[-1]
        if programs.policy.kind == "causal":  # the programs of its rounds have no draft
            ahead_s = draft_s[sizes]
        for shape, value in zip(shapes, values, strict=False):
            round_s[shape] = value + (ahead_s if shape.num_draft else 0.0)
    return make_profile(setting_of(programs.decoder, programs.config), round_s, draft_s)


def _steps(programs: Programs, weights: Weights, sizes: Sizes) -> list[Step]:
    """The rounds of a state, and behind them the draft by itself, if there are any."""
    steps = [_round_step(programs, weights, shape) for shape in programs.shapes(sizes)]
    if programs.policy.num_draft:
        steps.append(_draft_step(programs, weights, sizes))
    return steps


def _round_step(programs: Programs, weights: Weights, shape: Shape) -> Step:
    run, given = programs.round(shape, programs.kind(shape)), _busy_input(programs, shape)
    return lambda state: run(weights, state, given)


def _draft_step(programs: Programs, weights: Weights, sizes: Sizes) -> Step:
    run, given = programs.draft(sizes, 0), _busy_input(programs, Shape(sizes, 0, sizes.slots, 0))
    steps_per_s_T = None
    if programs.policy.kind == "causal":
        most = programs.ladder.drafted_rows(sizes.slots, 0)[-1]
        steps_per_s_T = programs.put(np.ones(most + 1, np.float32))
    return lambda state: (state, run(weights, state, given, steps_per_s_T))


def _busy_input(programs: Programs, shape: Shape) -> RoundInput:
    """What a round is told of which every slot and every chunk is in use."""
    num_slots, shards = shape.sizes.slots, num_shards(programs.decoder.mesh)
    count = min(programs.config.chunk_rows, shape.sizes.positions)
    chunks = tuple(Chunk(i % num_slots, 0, count, False) for i in range(shape.num_chunks))
    occupied = frozenset(range(num_slots * shards))
    pages = programs.any_pages(shape.sizes)
    plan = HostPlan(0, (), (), occupied, (chunks,) * shards, shape, pages)
    idle = programs.idle_input(shape)
    given = idle.temperature_BG
    temperature_BG = None if given is None else np.ones(given.shape, given.dtype)
    return programs.round_input(plan, temperature_BG).replace(block=idle.block)  # type: ignore[attr-defined]


def _passes(programs: Programs, weights: Weights, sizes: Sizes) -> Iterator[list[float]]:
    """Seconds of each step, again and again; every slot has a request that stays where it is."""
    num_slots = sizes.slots * num_shards(programs.decoder.mesh)
    length = min(3 * sizes.positions // 4, sizes.positions - programs.policy.num_draft - 1)
    fixed = {
        "length_B": np.full(num_slots, length, np.int32),
        "stop_at_B": np.full(num_slots, sizes.positions, np.int32),
        "active_B": np.ones(num_slots, bool),
    }
    steps, state = _steps(programs, weights, sizes), programs.new_state(sizes)
    while True:
        ends, in_flight = [], None
        for step in (steps[0], *steps, None):  # the first is there to be followed
            launched = None
            if step is not None:
                state = state.replace(**programs.put(fixed, BY_SLOT))  # type: ignore[attr-defined]
                state, launched = step(state)
            if in_flight is not None:
                jax.block_until_ready(in_flight)
                ends.append(time.perf_counter())
            in_flight = launched
        yield [ended - began for began, ended in itertools.pairwise(ends)]
