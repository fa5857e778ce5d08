"""Seconds of rounds by replaying an engine's own programs at forced lengths.

The programs of one size of the state take turns, so that a machine that slows down slows all of
them, and the median of each counts. As in the engine, a round is launched before the one before it
is read: its time is that between the ends of the two.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from dspark_jax.engine.compiled import Programs
from dspark_jax.engine.config import EngineConfig, make_ladder
from dspark_jax.engine.decoder import Decoder
from dspark_jax.engine.inputs import RoundInput, Weights
from dspark_jax.engine.memory import check_sizes
from dspark_jax.engine.plan import Chunk, HostPlan, Shape, Sizes
from dspark_jax.engine.policy import make_policy
from dspark_jax.engine.profile import Profile, make_profile, setting_of
from dspark_jax.engine.programs import BY_SLOT, num_shards
from dspark_jax.engine.state import DecodeState

REPLAYS, START_REPLAYS = 20, 3  # of a profile that is kept, and of one that an engine starts with
WARM_REPLAYS = 1

# A program with all but the state filled in.
Step = Callable[[DecodeState], tuple[DecodeState, Any]]


def profile_for(programs: Programs, weights: Weights, given: Profile | None) -> Profile:
    """The profile that an engine works with: the given one, or else a short one of its own.

    Raises:
        ValueError: the given one belongs to something else.
    """
    if given is None:
        return _measure(programs, weights, START_REPLAYS)
    shapes = [shape for sizes in programs.sizes() for shape in programs.shapes(sizes)]
    return given.part(setting_of(programs.decoder, programs.config.chunk_rows), shapes)


def measure_profile(
    decoder: Decoder,
    config: EngineConfig,
    replays: int = REPLAYS,
    names: Mapping[str, str] | None = None,
) -> Profile:
    """Time all rounds of an engine, with a progress bar.

    The requests are greedy, without filters: the noise of sampling costs a little more.

    Args:
        decoder: models and mesh; without a drafter if the policy is ``"none"``.
        config: of the engine; the profile serves all policies that verify up to as many drafts.
        replays: how often every round is timed.
        names: of the models, ``target`` and ``drafter``, to be noted in the profile.

    Raises:
        ValueError: the sizes do not fit the models, the mesh or the memory.
    """
    policy = make_policy(config.policy, decoder.drafter)
    ladder = make_ladder(config, policy, num_shards(decoder.mesh))
    check_sizes(decoder, config, ladder)
    found = _measure(Programs(decoder, config, policy, ladder), decoder.weights, replays)
    return replace(found, setting={**(names or {}), **found.setting})


def _measure(programs: Programs, weights: Weights, replays: int) -> Profile:
    round_s: dict[Shape, float] = {}
    draft_s: dict[Sizes, float] = {}
    drafts, ahead = programs.policy.num_draft > 0, programs.policy.kind == "causal"
    for sizes in tqdm(programs.sizes(), desc="profile", unit="size", disable=None):
        shapes = programs.shapes(sizes)
        steps = [_round_step(programs, weights, shape) for shape in shapes]
        if drafts:
            steps.append(_draft_step(programs, weights, sizes))
        seconds = _replay(programs, sizes, steps, replays)
        if drafts:
            draft_s[sizes] = seconds.pop()
        for shape, value in zip(shapes, seconds, strict=True):
            made_ahead = ahead and shape.num_draft  # so that the program of the round has no draft
            round_s[shape] = value + (draft_s[sizes] if made_ahead else 0.0)
    return make_profile(setting_of(programs.decoder, programs.config.chunk_rows), round_s, draft_s)


def _round_step(programs: Programs, weights: Weights, shape: Shape) -> Step:
    run, given = programs.round(shape), _busy_input(programs, shape)
    return lambda state: run(weights, state, given)


def _draft_step(programs: Programs, weights: Weights, sizes: Sizes) -> Step:
    run, given = programs.draft(sizes, 0), _busy_input(programs, Shape(sizes, 0, sizes.slots, 0))
    most = programs.ladder.drafted_rows(sizes.slots, 0)[-1]
    steps_per_s_T = programs.put(np.ones(most + 1, np.float32))
    return lambda state: (state, run(weights, state, given, steps_per_s_T))


def _busy_input(programs: Programs, shape: Shape) -> RoundInput:
    """What a round is told of which every slot and every chunk is in use."""
    num_slots, shards = shape.sizes.slots, num_shards(programs.decoder.mesh)
    count = min(programs.config.chunk_rows, shape.sizes.positions)
    chunks = tuple(Chunk(i % num_slots, 0, count, False) for i in range(shape.num_chunks))
    occupied = frozenset(range(num_slots * shards))
    plan = HostPlan(0, (), (), occupied, (chunks,) * shards, shape)
    idle = programs.idle_input(shape)
    given = idle.temperature_BG
    temperature_BG = None if given is None else np.ones(given.shape, given.dtype)
    return programs.round_input(plan, temperature_BG).replace(block=idle.block)  # type: ignore[attr-defined]


def _replay(programs: Programs, sizes: Sizes, steps: Sequence[Step], replays: int) -> list[float]:
    """Median seconds of each step, with a request in every slot that stays where it is."""
    num_slots = sizes.slots * num_shards(programs.decoder.mesh)
    length = min(3 * sizes.positions // 4, sizes.positions - programs.policy.num_draft - 1)
    fixed = {
        "length_B": np.full(num_slots, length, np.int32),
        "stop_at_B": np.full(num_slots, sizes.positions, np.int32),
        "active_B": np.ones(num_slots, bool),
    }
    state = programs.new_state(sizes)
    seconds: list[list[float]] = [[] for _ in steps]
    in_flight: deque[tuple[int, Any]] = deque()
    ended = time.perf_counter()
    for turn in [*list(range(len(steps))) * (WARM_REPLAYS + replays), None]:
        if turn is not None:
            state = state.replace(**programs.put(fixed, BY_SLOT))  # type: ignore[attr-defined]
            state, out = steps[turn](state)
            in_flight.append((turn, out))
        if len(in_flight) == 2 or turn is None:
            done, out = in_flight.popleft()
            jax.block_until_ready(out)
            began, ended = ended, time.perf_counter()
            seconds[done].append(ended - began)
    return [statistics.median(values[WARM_REPLAYS:]) for values in seconds]
