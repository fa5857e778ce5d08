"""Cost profiles: what they promise, what they refuse, and how engines use them."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.axes import make_mesh
from dspark_jax.checkpoints.deepspec import bind_vocab
from dspark_jax.cli import command as cli
from dspark_jax.engine import timing
from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.generate import generate
from dspark_jax.engine.request import Request
from dspark_jax.engine.setting import setting_of
from dspark_jax.engine.timing import measure_profile
from dspark_jax.models.drafters.dspark import declare_drafter
from dspark_jax.models.targets.llama import declare as declare_target
from dspark_jax.scheduler.profile import (
    Profile,
    learnt_profile,
    make_profile,
    read_profile,
    write_profile,
)
from dspark_jax.scheduler.shape import Shape, Sizes
from tests.tiny_model import BLOCK, DRAFTER, TARGET, random_params, write_drafter, write_target

SMALL, LARGE = Sizes(2, 64), Sizes(2, 128)
ROWS, CHUNKS = (4, 6, 8), (0, 1, 4)
CONFIG = EngineConfig(
    slots=2,
    positions=40,
    policy="delayed",
    chunk_rows=8,
    chunk_buckets=(1,),
    slot_buckets=(2,),
    row_buckets=(4,),
    position_buckets=(64,),
)


@functools.cache
def models():
    target, drafter = random_params(20, declare_target(TARGET)), declare_drafter(DRAFTER)
    target, drafter = jax.tree.map(jnp.asarray, (target, random_params(21, drafter)))
    vocab = bind_vocab(DRAFTER, None, TARGET, target.vocab)
    return (TARGET, target), (DRAFTER, drafter, vocab)


@functools.cache
def decoder():
    return make_decoder(*models())


@functools.cache
def measured():
    return measure_profile(decoder(), CONFIG, replays=2)


def shapes():
    """Of an engine that drafts: all rows without chunks, the most of them with chunks."""
    for sizes in (SMALL, LARGE):
        for chunks in CHUNKS:
            yield Shape(sizes, 0, sizes.slots, chunks)
            for rows in ROWS[-1:] if chunks else ROWS:
                yield Shape(sizes, BLOCK, rows, chunks)


def steady(shape):
    """Seconds that grow with everything."""
    drafted = 0.25 if shape.num_draft else 0.0
    return shape.num_rows + shape.sizes.positions / 64 + shape.num_chunks + drafted


def example(seconds=steady, draft_s=0.5):
    drafts = {SMALL: draft_s, LARGE: draft_s}
    return make_profile({"device": "abacus"}, {shape: seconds(shape) for shape in shapes()}, drafts)


def test_costs_are_the_measured_seconds_of_whole_rounds():
    profile = example()
    costs = profile.costs(LARGE)
    assert costs.buckets == ROWS
    assert costs.draft_s == 0.5
    drafted = [costs.draft_s + verify for verify in costs.verify_s_K]
    assert drafted == [steady(Shape(LARGE, BLOCK, rows, 0)) for rows in ROWS]
    assert costs.undrafted_s == steady(Shape(LARGE, 0, 2, 0))
    with pytest.raises(KeyError):
        profile.costs(Sizes(3, 64))


def test_what_it_takes_to_read_prompts_is_left_out():
    costs = example().costs(SMALL, num_chunks=4, num_shards=2)
    assert costs.buckets == (2 * ROWS[-1],)
    assert costs.undrafted_s == steady(Shape(SMALL, 0, 2, 0))
    more = steady(Shape(SMALL, BLOCK, ROWS[-1], 4)) - steady(Shape(SMALL, 0, 2, 4))
    assert costs.draft_s + costs.verify_s_K[0] - costs.undrafted_s == pytest.approx(more)


@pytest.mark.parametrize("seed", range(10))
def test_a_larger_round_never_costs_less(seed):
    rng = np.random.default_rng(seed)
    noisy = example(lambda shape: steady(shape) * rng.lognormal(sigma=0.5), draft_s=20.0)
    for sizes in (SMALL, LARGE):
        costs = [noisy.costs(sizes, chunks) for chunks in CHUNKS]
        for cost in costs:
            seconds = [cost.undrafted_s, *(cost.draft_s + v for v in cost.verify_s_K)]
            assert seconds == sorted(seconds)
            assert min(cost.verify_s_K) >= costs[0].undrafted_s > 0
        assert len({cost.undrafted_s for cost in costs}) == 1
    for shape, seconds in noisy.round_s.items():
        if shape.sizes == SMALL:
            assert seconds <= noisy.round_s[dataclasses.replace(shape, sizes=LARGE)]
    assert make_profile(noisy.setting, noisy.round_s, noisy.draft_s) == noisy


def test_noise_is_spread_to_both_sides():
    """Neither the lucky nor the unlucky one of two rounds is believed."""
    low, high = Shape(SMALL, 0, 2, 0), Shape(SMALL, 0, 2, 1)
    profile = make_profile({}, {low: 3.0, high: 1.0}, {})
    assert profile.round_s == {low: 2.0, high: 2.0}


def test_a_profile_survives_its_file(tmp_path):
    path = tmp_path / "new" / "profile.json"
    rng = np.random.default_rng(0)
    for profile in (example(lambda shape: rng.random() + 1e-9), measured()):
        write_profile(path, profile)
        assert read_profile(path) == profile
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def broken_files():
    def change(*path, value=None, drop=False):
        def apply(content):
            for key in path[:-1]:
                content = content[key]
            if drop:
                del content[path[-1]]
            else:
                content[path[-1]] = value

        return apply

    yield change("format", value=2), "format"
    yield change("setting", value=[]), "setting"
    yield change("rounds", value={}), "rounds"
    yield change("rounds", 0, value=3), r"rounds\[0\]"
    yield change("rounds", 1, "num_rows", drop=True), r"rounds\[1\] needs"
    yield change("rounds", 1, "more", value=1), r"rounds\[1\] needs"
    for value in (-1, 1.5, True, "4", None, 2**40):
        yield change("rounds", 2, "num_rows", value=value), r"rounds\[2\]: num_rows"
    for value in (0, -1.0, "1", True, None, float("nan"), float("inf"), 10**400):
        yield change("rounds", 2, "seconds", value=value), r"rounds\[2\]: seconds"
    yield change("rounds", 2, "slots", value=0), r"rounds\[2\]: slots"
    yield change("rounds", 1, "num_draft", value=2), "several num_draft"
    yield change("drafts", 0, "seconds", value=-1e-9), r"drafts\[0\]: seconds"
    yield change("drafts", 0, drop=True), "same sizes"
    yield change("drafts", 0, "slots", value=9), "same sizes"
    yield change("drafts", 0, "positions", value=128), "two entries"
    yield change("rounds", 0, drop=True), "no undrafted"


@pytest.mark.parametrize("case", range(len(list(broken_files()))))
def test_a_damaged_file_is_refused(case, tmp_path):
    change, expected = list(broken_files())[case]
    path = tmp_path / "profile.json"
    write_profile(path, example())
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=expected) as refusal:
        read_profile(path)
    assert str(path) in str(refusal.value)
    assert "dspark profile" in str(refusal.value)


@pytest.mark.parametrize("text", ["", "[", "3", "null", "\0", "[" * 100_000, '{"format": 1}'])
def test_a_file_of_something_else_is_refused(text, tmp_path):
    (tmp_path / "profile.json").write_text(text)
    with pytest.raises(ValueError, match=r"profile\.json"):
        read_profile(tmp_path / "profile.json")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_profile(tmp_path / "profile.json")


def test_a_profile_of_something_else_is_refused():
    setting = setting_of(decoder(), CONFIG)
    seen = dict.fromkeys(("device", "mesh", "dtype", "jax", "dspark_jax", "chunk_rows", "kernels"))
    seen |= dict.fromkeys(("target.num_layers", "drafter.markov_rank"))
    assert seen.keys() <= setting.keys()
    profile = Profile(setting | {"target": "somebody"}, measured().round_s, measured().draft_s)
    assert profile.of(setting) == profile.round_s
    for field in seen:
        other = Profile(setting | {field: "other"}, profile.round_s, profile.draft_s)
        with pytest.raises(ValueError, match=rf"its {field} is 'other'.*dspark profile"):
            Engine(decoder(), CONFIG, other)
    with pytest.raises(ValueError, match="its target is 'somebody' and not 'me'"):
        profile.of({"target": "me"})


def test_what_an_engine_learnt_is_a_profile_of_its_whole_rounds(tmp_path):
    known_s = {shape: steady(shape) for shape in shapes() if shape != Shape(LARGE, 0, 2, 0)}
    learnt = learnt_profile({"device": "abacus"}, known_s)
    assert {shape.sizes for shape in learnt.round_s} == {SMALL}  # nobody saw plain rounds of LARGE
    assert learnt.round_s == {shape: known_s[shape] for shape in known_s if shape.sizes == SMALL}
    assert learnt.draft_s == {SMALL: 0.0}
    write_profile(tmp_path / "learnt.json", learnt)
    assert read_profile(tmp_path / "learnt.json") == learnt
    assert learnt_profile({}, {}) is None
    assert learnt_profile({}, {Shape(SMALL, BLOCK, 4, 0): 1.0}) is None


UNDRAFTED = {Shape(SMALL, 0, 2, chunks) for chunks in (0, 1)}
DRAFTED = {Shape(SMALL, BLOCK, 8, chunks) for chunks in (0, 1)}


def test_every_round_of_the_engine_is_measured():
    assert set(measured().round_s) == UNDRAFTED | DRAFTED
    assert measured().costs(SMALL).buckets == (8,)
    assert measured().setting == setting_of(decoder(), CONFIG)


@pytest.mark.parametrize(
    ("policy", "drafted"),
    [("none", set()), pytest.param("causal", DRAFTED, marks=pytest.mark.full)],
)
def test_other_policies_are_measured_by_their_own_programs(policy, drafted):
    found = measure_profile(decoder(), dataclasses.replace(CONFIG, policy=policy), replays=1)
    assert set(found.round_s) == UNDRAFTED | drafted
    assert set(found.draft_s) == {shape.sizes for shape in drafted}


def test_an_engine_works_with_a_profile_and_without():
    requests = [Request([1, 2, 3 + n], max_new_tokens=20) for n in range(3)]

    def serve(profile):
        with Engine(decoder(), CONFIG, profile) as engine:
            streams = [engine.submit(request) for request in requests]
            engine.run()
            return [stream.result.token_ids for stream in streams], engine.profile()

    texts, learnt = serve(measured())
    assert learnt.round_s.keys() == measured().round_s.keys()
    assert serve(None)[0] == serve(learnt)[0] == texts


def test_a_policy_that_does_not_ask_for_seconds_takes_no_profile():
    foreign = Profile({"device": "other"}, measured().round_s, measured().draft_s)
    with Engine(decoder(), dataclasses.replace(CONFIG, policy="block"), foreign) as engine:
        assert engine.profile() is None


@pytest.mark.full
@pytest.mark.parametrize("policy", ["delayed", "causal"])
def test_a_mesh_has_a_profile_of_its_own(policy, emulated_devices):
    one, sharded = decoder(), make_decoder(*models(), mesh=make_mesh(2, 2))
    config = dataclasses.replace(CONFIG, slots=4, policy=policy)
    found = measure_profile(sharded, config, replays=1)
    assert found.costs(Sizes(2, 64), 0, 2).buckets == (2 * 2 * (BLOCK + 1),)
    requests = [Request([1, 2, 3 + n], max_new_tokens=20) for n in range(4)]
    with Engine(sharded, config, found) as engine:
        streams = [engine.submit(request) for request in requests]
        engine.run()
    alone = generate(one, requests)
    assert [stream.result.token_ids for stream in streams] == [a.token_ids for a in alone]
    with pytest.raises(ValueError, match="its mesh is"):
        Engine(one, CONFIG, found)


@pytest.mark.usefixtures("own_cache")
def test_the_command_shows_and_writes_a_profile(tmp_path, monkeypatch, capsys):
    asked = []

    def measure(decoder, config, replays, names):
        asked.append((config.slots, config.positions, config.policy, replays))
        return dataclasses.replace(example(), setting={**names, "device": "abacus"})

    monkeypatch.setattr(timing, "measure_profile", measure)
    models = ["--target", str(write_target(tmp_path / "target"))]
    path = tmp_path / "profile.json"
    sizes = ["--slots", "3", "--positions", "50", "--replays", "4"]
    assert cli.main(["profile", *models, *sizes, "--out", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(path.read_text())
    assert read_profile(path).setting["target"] == "target"
    drafter = ["--drafter", str(write_drafter(tmp_path / "drafter"))]
    assert cli.main(["profile", *models, *drafter]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + len(CHUNKS) * 2
    assert table[1].split()[:4] == ["2", "64", "0", "500.00"]
    assert asked == [(3, 50, "", 4), (8, 1024, "", 20)]


def test_sizes_that_do_not_fit_are_refused_before_anything_is_measured():
    with pytest.raises(ValueError, match="context ends at 512"):
        measure_profile(decoder(), dataclasses.replace(CONFIG, positions=600, position_buckets=()))
