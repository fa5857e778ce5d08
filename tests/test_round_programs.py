"""What the program of a round holds: no condition that a GPU's host would wait for, few collectives
on a mesh; and which of its kinds an engine takes."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from dspark_jax.axes import abstract_buffers, make_mesh
from dspark_jax.engine import compiled, programs
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.inputs import ASKS, RoundConfig, RoundInput
from dspark_jax.engine.plan import asked_by
from dspark_jax.engine.request import Request
from dspark_jax.engine.shaping import no_masks, shaping_of
from dspark_jax.engine.state import StateConfig, declare_state
from dspark_jax.scheduler.shape import Sizes
from tests import test_engine
from tests.test_generate import DRAFTER, TARGET, drafter_of, target_of

LAYERS, BLOCK = TARGET.num_layers + DRAFTER.num_layers, DRAFTER.block_size


def lower(asks, acceptance, num_slots, rows_per_slot=BLOCK + 1, mesh=None, **config):
    """A round lowered for GPUs, or over the devices of a mesh; its layers are unrolled."""
    target = target_of(dataclasses.replace(TARGET, vocab_size=64))
    drafter = drafter_of(target, vocab_size=64)
    weights = make_decoder(target, drafter, mesh=mesh).weights
    dtypes = (weights.target.norm_D.dtype,) * 2
    form = StateConfig(target[0], drafter[0], num_slots, 64, 8, 2, dtypes, (False, False))
    cfg = RoundConfig(target[0], drafter[0], BLOCK, acceptance=acceptance, asks=asks, **config)
    program = programs.round_program(cfg, form, num_slots * rows_per_slot, 0, mesh)
    given = RoundInput(np.ones(num_slots, bool), None, np.ones((num_slots, BLOCK), np.float32))
    state = abstract_buffers(declare_state(form), mesh)
    if asks == "shaped":
        block, _ = programs.draft_program(cfg, form, mesh).eval_shape(weights, state, given, None)
        masks = no_masks(num_slots, BLOCK + 1, 64)
        given = given.replace(block=block, shaping=shaping_of({}, num_slots), masks=masks)
    traced = program.trace(weights, state, given)
    return traced.lower(lowering_platforms=None if mesh else ("cuda",))


@pytest.fixture
def control_flow(monkeypatch):
    """Of a round, as XLA for GPUs sees it once it has dropped what is for CPUs."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, default, **_: default(*args))
    return lambda *args, **config: re.findall(
        r"stablehlo\.(?:case|if|while)", lower(*args, **config).as_text()
    )


@pytest.mark.parametrize(
    ("asks", "acceptance"),
    [
        ("greedy", "rejection"),
        ("shaped", "rejection"),
        pytest.param("filtered", "rejection", marks=pytest.mark.full),
        pytest.param("sampled", "rejection", marks=pytest.mark.full),
        pytest.param("filtered", "coupled", marks=pytest.mark.full),
    ],
)
def test_a_round_of_a_known_kind_has_no_control_flow(asks, acceptance, control_flow):
    """Not even where rows are given to the best drafts, or a gate may leave them all out."""
    assert not control_flow(asks, acceptance, num_slots=2, rows_per_slot=2)
    if asks == "greedy":
        assert not control_flow(asks, acceptance, num_slots=1, gate=0.5)
        assert control_flow("any", acceptance, num_slots=1)


# Two a layer, one a slot of the block; judging takes one, or rejection two and log-probabilities
# one. The embedding, which is not the LM head here, takes none.
@pytest.mark.parametrize(
    ("asks", "judging"), [("greedy", 1), pytest.param("sampled", 3, marks=pytest.mark.full)]
)
def test_collectives_of_a_round(emulated_devices, asks, judging):
    lowered = lower(asks, "rejection", num_slots=2, mesh=make_mesh(tensor=2))
    text = lowered.compile().as_text()
    found = re.findall(r" (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", text)
    assert len(found) == 2 * LAYERS + BLOCK + judging
    assert set(found) == {"all-reduce", "all-gather"}


def test_what_requests_ask_for():
    ways = {
        "greedy": {"temperature": 0.0, "top_k": 5, "top_p": 0.5, "min_p": 0.1},
        "sampled": {"temperature": 0.5},
        "filtered": {"temperature": 0.5, "top_p": 0.9},
    }
    made = {name: Request([1], **way) for name, way in ways.items()}
    assert asked_by([]) == "greedy"
    assert [asked_by([request]) for request in made.values()] == list(ways)
    assert asked_by([made["sampled"], made["greedy"]]) == "sampled"
    assert asked_by([made["sampled"], made["filtered"], made["greedy"]]) == "filtered"
    assert asked_by([Request([1], logprobs=True)]) == "sampled"
    for way in ({"top_logprobs": 1}, {"repetition_penalty": 1.1}, {"logit_bias": {3: 1}}):
        assert asked_by([made["filtered"], Request([1], **way)]) == "shaped"
    for limit in ({"top_k": 3}, {"min_p": 0.1}):
        assert asked_by([Request([1], temperature=1.0, **limit)]) == "filtered"


@pytest.fixture
def by_kinds(monkeypatch):
    """An engine as on a GPU; and the kinds of the rounds that it ran."""
    monkeypatch.setattr(compiled, "_kinds", lambda: ASKS)
    served, ran = Engine(test_engine.decoder(), test_engine.CONFIG), []
    find = served._programs.round

    def find_and_note(shape, kind):
        ran.append(kind)
        return find(shape, kind)

    object.__setattr__(served._programs, "round", find_and_note)
    return served, ran


@pytest.mark.full
def test_an_engine_takes_the_least_kind_and_texts_are_the_same(by_kinds):
    served, ran = by_kinds
    every = test_engine.requests()
    for number, asked in ((0, "greedy"), (1, "filtered")):
        ran.clear()
        stream = served.submit(every[number])
        served.run()
        assert set(ran) == {asked}
        assert stream.result.token_ids == test_engine.expected()[number]
    streams = [served.submit(request) for request in every]
    served.run()
    assert test_engine.texts(stream.result for stream in streams) == test_engine.expected()


@pytest.mark.full
def test_a_wider_program_serves_until_there_is_the_right_one(by_kinds):
    served, ran = by_kinds
    first, second = test_engine.requests()[:2]
    assert served.submit(second).wait().token_ids == test_engine.expected()[1]
    for asked in ("filtered", "greedy"):
        ran.clear()
        stream = served.submit(first)
        served.run()
        assert set(ran) == {asked}
        assert stream.result.token_ids == test_engine.expected()[0]
        for shape in served._programs.shapes(Sizes(4, 64)):
            if served._programs._has(shape, "filtered"):
                served._programs.round(shape, "greedy")


@pytest.mark.full
def test_log_probabilities_are_those_of_a_cpus_program(by_kinds):
    served, ran = by_kinds
    request = dataclasses.replace(test_engine.requests()[0], logprobs=True)
    streams = [engine.submit(request) for engine in (served, test_engine.engine())]
    found, expected = (stream.wait() for stream in streams)
    assert set(ran) == {"sampled"}
    assert found.token_ids == expected.token_ids
    np.testing.assert_allclose(found.logprobs, expected.logprobs, rtol=1e-6)
    assert min(found.logprobs) < 0
