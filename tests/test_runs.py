"""Runs of training in the place of drafters, and evaluation by decoding."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from dspark_jax.checkpoints.load import load_drafter_for, load_target
from dspark_jax.checkpoints.provenance import read_provenance, write_card
from dspark_jax.checkpoints.runs import drafter_directory
from dspark_jax.cli.command import main
from dspark_jax.config import TrainConfig
from dspark_jax.engine.request import Request
from dspark_jax.evaluation import acceptance, decoded
from dspark_jax.evaluation.confidence import path_beside
from dspark_jax.evaluation.prompts import read_prompt_sets
from dspark_jax.model import load
from dspark_jax.training.fit import fit
from dspark_jax.training.run import open_source, start_run
from tests.tiny_model import few_sizes, write_letters, write_target

pytestmark = pytest.mark.usefixtures("own_cache")


def weights(directory):
    return load_file(Path(directory) / "model.safetensors")


def assert_same(found, expected):
    for name, value in weights(expected).items():
        np.testing.assert_array_equal(weights(found)[name], value, err_msg=name)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return TrainConfig(
        target=str(write_target(folder / "target")),
        data=str(write_letters(folder / "data.jsonl", 12)),
        out=str(folder / "mine"),
        num_layers=1,
        block_size=3,
        markov_rank=4,
        draft_vocab_size=40,
        target_layer_ids=(-1, 0),
        max_length=40,
        length_buckets=(40,),
        tokens_per_batch=160,
        num_anchors=8,
        average_decay=0.9,
        steps=6,
        learning_rate=3e-3,
        eval_sequences=2,
        eval_every=2,
        checkpoint_every=2,
        keep_checkpoints=3,
        log_every=1,
    )


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    for name in ("first", "second"):
        lines = "".join(json.dumps({"prompt": f"{name} {i}"}) + "\n" for i in range(3))
        (folder / f"{name}.jsonl").write_text(lines)
    return [str(folder / "first.jsonl"), str(folder / "second.jsonl")]


LENGTHS = (1.5, 2.5, 2.0)  # as decoded at the three evaluations


@pytest.fixture(scope="module")
def run(recipe):
    """A run whose second evaluation by decoding was the best."""
    lengths = iter(LENGTHS)
    fit(recipe, decode=lambda *_: {"decoded_length": next(lengths)})
    return Path(recipe.out)


def test_lengths_that_were_decoded_are_in_the_log(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row.get("split") == "decoded"]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert [row["decoded_length"] for row in rows] == [*LENGTHS]


def test_figures_of_texts_that_were_decoded():
    def row(temperature, length, name):
        return {"temperature": temperature, "accepted_length": length, "set": name}

    rows = [row(0.0, 3.0, "a"), row(0.0, 2.0, "b"), row(1.0, 2.0, "a"), row(1.0, 1.0, "b")]
    means = [row(0.0, 2.5, ""), row(1.0, 1.5, "")]
    overall = {"decoded_length_greedy": 2.5, "decoded_length_sampled": 1.5, "decoded_length": 2.0}
    parts = {
        "decoded_length_greedy_a": 3.0, "decoded_length_greedy_b": 2.0,
        "decoded_length_sampled_a": 2.0, "decoded_length_sampled_b": 1.0,
    }  # fmt: skip
    assert decoded.figures({"rows": rows, "mean": means}) == overall | parts
    assert decoded.figures({"rows": rows[::2], "mean": means}) == overall


@pytest.mark.full
def test_evaluation_decodes_as_the_benchmark_does(run, recipe, prompts, monkeypatch):
    """The weights of a step, as those of the drafter that was written of it."""
    monkeypatch.setattr(acceptance, "config_for", few_sizes)
    decode = decoded.decoding(prompts, limit=2, max_new_tokens=12, batch=4)
    going = dataclasses.replace(recipe, init_drafter=str(run))
    ready = start_run(going, open_source(going))
    found = decode(ready, jax.device_get(ready.state.params))
    decoder = load(recipe.target, run).decoder
    sets, limits = read_prompt_sets(prompts, 2), Request((0,), max_new_tokens=12)
    report = acceptance.bench_acceptance(decoder, sets, limits, batch=4)
    assert found == decoded.figures(report)
    assert all(1 <= length <= 4 for length in found.values())


def test_a_run_is_its_best_drafter_and_every_checkpoint_one(run):
    out = run
    assert drafter_directory(out) == out / "best"
    assert_same(drafter_directory(f"{out}@4"), out / "best")
    assert_same(drafter_directory(f"{out}@6"), out / "drafter")
    assert drafter_directory(f"{out}@0") == out / "start"
    assert not np.array_equal(
        weights(out / "start")["fc.weight"], weights(out / "drafter")["fc.weight"]
    )
    config = json.loads((out / "steps" / "4" / "config.json").read_text())
    assert config == json.loads((out / "best" / "config.json").read_text())
    for directory, step in ((out / "best", 4), (out / "steps" / "4", 4), (out / "start", 0)):
        provenance = read_provenance(directory)
        assert provenance["step"] == step
        assert provenance["recipe"]["num_layers"] == 1
        assert "out" not in provenance["recipe"]
        assert str(out.parent) not in json.dumps(provenance)
        assert set(provenance["figures"]) == (
            {"training", "held-out", "decoded"} if step else set()
        )
    for other in ("default", "lookup", "owner/name@main", str(out / "drafter"), "runs/none@3"):
        assert drafter_directory(other) == other


def test_a_run_that_did_not_decode_is_its_last_drafter(run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("best", "steps"))
    assert drafter_directory(out) == out / "drafter"
    shutil.rmtree(out / "drafter")  # not at its end yet
    assert drafter_directory(f"{out}/") == out / "steps" / "6"
    shutil.rmtree(out / "checkpoints")
    assert drafter_directory(f"{out}@6") == out / "steps" / "6"  # which stays
    with pytest.raises(ValueError, match="has no drafter and no checkpoint yet: train on"):
        drafter_directory(out)


@pytest.mark.parametrize("step", ["5", "last", "-2", "../../x"])
def test_a_step_that_is_not_there_names_those_that_are(run, step):
    with pytest.raises(ValueError, match=r"no such step; .*checkpoints holds 2, 4, 6$"):
        drafter_directory(f"{run}@{step}")


def test_a_damaged_checkpoint_is_one_error(run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("best", "steps"))
    for path in (out / "checkpoints" / "4").rglob("*"):
        if path.is_file():
            path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        drafter_directory(f"{out}@4")
    assert not (out / "steps" / "4").exists()


def test_everything_that_takes_a_drafter_takes_a_run(run, recipe, tmp_path, capsys):
    out = run
    target = load_target(recipe.target)
    drafter = load_drafter_for(target, f"{out}@4")
    assert (drafter.name, drafter.directory) == ("mine@4", out / "steps" / "4")
    assert load_drafter_for(target, f"{out}+lookup").name == "mine+lookup"
    assert path_beside(str(out), recipe.target).parent == out / "best"
    arguments = ["--target", recipe.target, "--drafter", f"{out}@4"]
    assert (
        main(["export", "--format", "speculators", "--out", str(tmp_path / "e"), *arguments]) == 0
    )
    card = (tmp_path / "e" / "README.md").read_text()
    digest = hashlib.sha256(Path(recipe.data).read_bytes()).hexdigest()
    for said in (
        "# e\n", "A drafter for target, in the layout `speculators`", f"| {digest} |",
        "| steps of training | 4 |", "| prompts, decoded | 4 | decoded_length | 2.5 |",
        "expected at temperature 1 | 4 | accepted_length |", '"num_layers": 1',
        f"| digest of its weights | {target.identity()['weights']} |", "acceptance by position",
    ):  # fmt: skip
        assert said in card, said
    assert read_provenance(tmp_path / "e") == read_provenance(out / "best")
    assert main(["plan", "--positions", "256", *arguments]) == 0
    capsys.readouterr()
    again = dataclasses.replace(recipe, init_drafter=str(out), out=str(tmp_path / "on"))
    state = start_run(again, open_source(again)).state
    np.testing.assert_array_equal(state.params.norm_D, weights(out / "best")["norm.weight"])


def test_a_run_that_goes_on_remembers_the_best(run, recipe):
    """Its log says how long the best one's drafts were."""
    out = run
    before = weights(out / "best")
    fit(recipe, decode=lambda *_: {"decoded_length": 9.0})  # at its end: nothing is decoded
    np.testing.assert_array_equal(weights(out / "best")["fc.weight"], before["fc.weight"])


def test_a_drafter_whose_training_nobody_recorded_has_a_card(tmp_path):
    write_card(tmp_path / "mine", {}, {"target": "owner/name"}, "deepspec")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: dspark-jax\n")
    assert "base_model: owner/name\n" in card
    assert "How it was trained is not recorded." in card
    assert "## Recipe" not in card


@pytest.mark.parametrize("text", ["{", "[]", '{"recipe": 3}', '{"figures": []}', "\udcff"])
def test_a_foreign_provenance_is_one_error(tmp_path, text):
    (tmp_path / "provenance.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"provenance\.json"):
        read_provenance(tmp_path)


def test_a_card_is_text_whatever_a_provenance_says(tmp_path):
    foreign = {
        "target": "a | b\n# no",
        "recipe": {"x": "```\n# no"},
        "figures": {"held-out": {"step": 1, "y": "|\n# no"}, "z": 3},
    }
    write_card(tmp_path, foreign, {}, "deepspec")
    assert "\n# no" not in (tmp_path / "README.md").read_text()
