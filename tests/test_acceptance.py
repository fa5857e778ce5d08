"""The acceptance benchmark: what it reports, how it counts and what may be compared."""

import json

import pytest

from dspark_jax.checkpoints import load
from dspark_jax.cli import command as cli
from dspark_jax.engine.reader import Generation
from dspark_jax.evaluation import acceptance, results
from dspark_jax.evaluation.acceptance import compare, summarise
from dspark_jax.evaluation.prompts import read_prompt_sets
from tests.tiny_model import BLOCK

ROW = {
    "set",
    "temperature",
    "prompts",
    "tokens",
    "rounds",
    "accepted_length",
    "accept_rate_by_position",
}


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def files(tmp_path):
    """Two sets of prompts as arguments: three prompts and one."""
    words = []
    for name, prompts in (("a", ("hello", "one", "two")), ("b", ("three",))):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"turns": [prompt]}) + "\n" for prompt in prompts))
        words += ["--prompts", str(path)]
    return words


def test_texts_without_a_round_measure_nothing():
    silent, told = Generation(4), Generation(4, accepted_lengths=[1])
    results.require_drafts([silent, told], "here")
    with pytest.raises(ValueError, match="here: no text has a round behind its first token"):
        results.require_drafts([silent], "here")


def bench(*words):
    return cli.main(["bench", "acceptance", *words])


@pytest.mark.full
def test_every_set_is_measured_at_every_temperature(models, files, capsys):
    words = [*models, *files, "--max-new-tokens", "16", "--batch", "2"]
    assert bench(*words, "--json") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == ""
    assert set(report) == {*acceptance.SETTING, "drafter", "rows", "mean"}
    assert (report["target"], report["drafter"]) == ("target", "drafter")
    assert (report["prompts"], report["max_new_tokens"], report["seed"]) == (4, 16, 0)
    assert all(set(row) == ROW for row in report["rows"])
    assert [(row["set"], row["temperature"], row["prompts"]) for row in report["rows"]] == [
        ("a", 0, 3),
        ("b", 0, 1),
        ("a", 1, 3),
        ("b", 1, 1),
    ]
    for row in report["rows"]:
        # The first token of a text comes without a round, the last round may overshoot.
        committed = row["tokens"] - row["prompts"]
        assert row["tokens"] == 16 * row["prompts"]
        assert 1 < row["accepted_length"] <= BLOCK + 1
        assert 0 <= row["accepted_length"] * row["rounds"] - committed < BLOCK * row["prompts"] + 1
        assert len(row["accept_rate_by_position"]) == BLOCK
    lengths = [row["accepted_length"] for row in report["rows"]]
    assert [row["temperature"] for row in report["mean"]] == [0, 1]
    assert [row["accepted_length"] for row in report["mean"]] == [
        pytest.approx(sum(lengths[:2]) / 2, abs=1e-4),
        pytest.approx(sum(lengths[2:]) / 2, abs=1e-4),
    ]
    table = acceptance.format_report(report).splitlines()
    assert [line.split()[:2] for line in table[4:8]] == [
        ["a", "0"],
        ["b", "0"],
        ["a", "1"],
        ["b", "1"],
    ]


def test_every_option_reaches_the_engine(models, files, capsys, monkeypatch):
    calls = []

    def served(engine, requests, _):
        calls.append((engine.config, requests))
        round_ = {"accepted_lengths": [1], "verified_lengths": [0], "accepted_drafts": [0]}
        return [Generation(len(request.prompt_ids), **round_) for request in requests]

    monkeypatch.setattr(acceptance, "served", served)
    words = "--temperature 0.5 --temperature 0.5 --limit 2 --seed 7 --max-new-tokens 9 "
    words += "--acceptance coupled --batch 2"
    assert bench(*models, *files, *words.split()) == 0
    assert [len(requests) for _, requests in calls] == [2, 1]
    for config, requests in calls:
        assert (config.policy, config.acceptance, config.slots) == ("block", "coupled", 2)
        assert {(request.temperature, request.max_new_tokens) for request in requests} == {(0.5, 9)}
    assert "mean of sets" in capsys.readouterr().out


def test_rounds_weigh_the_same_whatever_text_they_are_of():
    long = Generation(4, [1] * 9, "", [4, 4, 1], [3, 3, 3], [3, 3, 0])
    short = Generation(4, [1] * 2, "", [1], [3], [0])
    found = summarise([long, short, Generation(4, [1], "")], 3)
    assert found == {
        "tokens": 12,
        "rounds": 4,
        "accepted_length": 2.5,
        "accept_rate_by_position": [0.5, 1.0, 1.0],
    }


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--temperature", "0", "--temperature", "-1"], "temperature is -1"),
        (["--temperature", "hot"], "--temperature"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--batch", "0"], "--batch"),
        (["--limit", "none"], "--limit"),
        (["--policy", "none"], "--policy"),
        (["--drafter", "none"], "--drafter"),
        (["--prompts", "missing.jsonl"], "missing.jsonl"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_loaded(
    models, files, capsys, monkeypatch, words, expected
):
    monkeypatch.setattr(load, "load_target", None)
    try:
        code = bench(*models, *files, *words)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert expected in err


def test_logits_that_are_not_finite_are_no_measurement(models, files, capsys, monkeypatch):
    spoilt = Generation(3, error=FloatingPointError("the target's logits are not finite"))
    monkeypatch.setattr(results, "serve", lambda _, requests: [spoilt] * len(requests))
    assert bench(*models, *files) == 1
    assert "not finite" in capsys.readouterr().err


def test_files_of_one_name_are_told_apart_by_their_paths(tmp_path):
    paths = [tmp_path / folder / "p.jsonl" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_text('{"prompt": "hello"}\n')
    assert list(read_prompt_sets([str(paths[0])])) == ["p"]
    assert list(read_prompt_sets([str(path) for path in paths])) == [str(path) for path in paths]


def report_of(length, **changes):
    row = {"set": "a", "temperature": 0.0, "prompts": 2, "accepted_length": length}
    setting = dict.fromkeys(acceptance.SETTING, 1)
    return {**setting, "drafter": "d", "rows": [row], "mean": [row], **changes}


def test_a_comparison_holds_what_was_measured_and_how_training_went():
    line = {"step": 1, "accepted_length": 1.1, "ce": 5.0, "loss": 3.0}
    held_out = {"step": 1, "split": "held-out", "accepted_length": 1.2, "ce": 4.0}
    logs = {"x": [line, held_out], "y": [line]}
    found = compare({"x": report_of(1.5), "y": report_of(1.25)}, logs)
    assert set(found) == {*acceptance.SETTING, "drafters"}
    assert list(found["drafters"]) == ["x", "y"]
    assert found["drafters"]["y"]["mean"][0]["accepted_length"] == 1.25
    assert found["drafters"]["x"]["curve"] == [
        {"step": 1, "accepted_length": 1.1, "ce": 5.0},
        held_out,
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"target": "another"}, "target is 1 with x and 'another' with y"),
        ({"max_new_tokens": 7}, "max_new_tokens is 1 with x and 7 with y"),
        ({"rows": []}, "other prompts or temperatures"),
    ],
)
def test_what_was_measured_otherwise_is_not_compared(changes, expected):
    with pytest.raises(ValueError, match=expected):
        compare({"x": report_of(1.5), "y": report_of(1.2, **changes)}, {"x": [], "y": []})
