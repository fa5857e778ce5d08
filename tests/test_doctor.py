"""The doctor: what it predicts from costs and samples, and that its check is fair."""

import json
import types

import numpy as np
import pytest

from dspark_jax.cli import command as cli
from dspark_jax.engine.reader import Generation
from dspark_jax.engine.request import Request
from dspark_jax.evaluation import doctor
from dspark_jax.evaluation.doctor import PAIRS, PROMPTS, Stretch, predict_speedups
from dspark_jax.evaluation.rounds import RecordedRequest
from dspark_jax.scheduler.budget import WINDOW, RoundCosts
from tests.tiny_model import BLOCK, write_drafter, write_target

pytestmark = pytest.mark.usefixtures("own_cache")


def sample(accepted_N, confidence):
    logit_NG = np.full((len(accepted_N), BLOCK), np.log(confidence / (1 - confidence)))
    verified_N = np.full(len(accepted_N), BLOCK)
    return RecordedRequest("p", "rejection", 0.0, logit_NG, verified_N, np.array(accepted_N))


def costs(draft_s, row_s, requests=2):
    """Rounds that cost 1 second and something for each row beyond the anchors."""
    buckets = tuple(requests * multiple for multiple in (2, 3, 4))
    verify_s = tuple(1 + row_s * (rows - requests) for rows in buckets)
    return RoundCosts(buckets, verify_s, draft_s, undrafted_s=1.0)


def test_fixed_lengths_are_predicted_by_what_they_accept_and_cost():
    samples = [sample([0, 1, 2, 3], 0.5), sample([3, 3, 3, 3], 0.9)]
    found = predict_speedups(samples, 2, costs(0.25, 0.125), plain_s=0.9, calibration=None)
    for length, drafts in ((1, 0.75 + 1), (2, 1.25 + 2), (3, 1.5 + 3)):
        tokens_per_s = (2 + drafts) / (0.25 + 1 + 0.125 * 2 * length)
        assert found[f"fixed:{length}"] == pytest.approx(tokens_per_s * 0.9 / 2)
    assert set(found) == {"fixed:1", "fixed:2", "fixed:3", "delayed"}


def test_drafts_that_are_good_and_cheap_are_all_verified():
    samples = [sample([BLOCK] * 5, 0.99)] * 2
    found = predict_speedups(samples, 2, costs(0.1, 0.01), plain_s=1.0, calibration=None)
    assert found["delayed"] == pytest.approx(found["fixed:3"])
    assert found["fixed:3"] > max(3, found["fixed:2"], found["fixed:1"])


def test_drafts_that_are_bad_or_dear_are_hardly_made():
    samples = [sample([0] * 5, 0.05)] * 2
    for expensive in (costs(0.5, 0.01), costs(0.1, 0.5)):
        found = predict_speedups(samples, 2, expensive, plain_s=1.0, calibration=None)
        fixed = max(speedup for policy, speedup in found.items() if policy != "delayed")
        assert fixed < 0.92
        assert 0.9 < found["delayed"] <= 1  # the rest are probes


def test_a_mixture_is_better_than_any_fixed_length():
    """Whose drafts are good gets the rows of whose are not."""
    samples = [sample([BLOCK] * 40, 0.97), sample([0] * 40, 0.03)]
    found = predict_speedups(samples, 2, costs(0.05, 0.2), plain_s=1.0, calibration=None)
    assert found["delayed"] > 1.1 * max(v for k, v in found.items() if k != "delayed")


def test_the_scheduler_of_a_prediction_has_seen_the_whole_sample():
    """Of the texts that come first alone, it would think too much or too little of drafts."""
    texts = [sample([BLOCK] * 50, 0.97), sample([0] * 150, 0.03)]
    switch = doctor._experienced(texts, None)
    survival_N = np.array(switch.seen)[:, 0]
    assert len(survival_N) == WINDOW
    assert np.mean(survival_N > 0.5) == pytest.approx(0.25, abs=0.02)
    few = doctor._experienced(texts[:1], None)
    assert len(few.seen) == 50


@pytest.mark.parametrize("concurrency", [1, 5, 8, 12, 32])
def test_groups_take_the_prompts_in_turn(concurrency):
    groups = doctor._groups(len(PROMPTS), concurrency)
    assert all(len(group) == concurrency for group in groups)
    flat = [index for group in groups for index in group]
    assert flat == [index % len(PROMPTS) for index in range(len(flat))]
    assert set(flat) == set(range(len(PROMPTS)))
    assert len(flat) < len(PROMPTS) + concurrency


class FakeEngine:
    """Commits so many tokens a round to each request, and keeps a record of its rounds."""

    def __init__(self, speed, record):
        self.speed, self.record, self.streams, self.settled = speed, record, [], True

    def submit(self, request):
        stream = types.SimpleNamespace(result=Generation(1), cancelled=False)
        stream.cancel = lambda: setattr(stream, "cancelled", True)
        self.streams.append(stream)
        return stream

    def step(self):
        self.record.append(self)
        self.settled = False
        for stream in self.streams:
            stream.result.token_ids += [0] * self.speed
        return True

    def settle(self):
        self.settled = True


def test_engines_take_turns_over_the_same_stretches():
    record = []
    engines = FakeEngine(1, record), FakeEngine(3, record)
    pairs = doctor._decode_in_turns(engines, ["a", "b"], max_new_tokens=12)
    assert len(pairs) == PAIRS
    for slow, fast in pairs:
        assert (slow.tokens, fast.tokens) == (6, 6)  # a stretch of 3 tokens for each request
        assert min(slow.seconds, fast.seconds) > 0
    turns = [engines.index(engine) for engine in record]
    slow, fast = [0] * 3, [1]  # rounds of a stretch
    assert turns == fast + slow + slow + fast + fast + slow + slow + fast
    for engine in engines:
        assert engine.settled
        assert all(stream.cancelled for stream in engine.streams)


def test_a_turn_counts_the_stretches_of_all_groups():
    turn = [[Stretch(10, 1.0), Stretch(10, 2.0)], [Stretch(20, 5.0), Stretch(21, 8.0)]]
    assert doctor._total(turn) == (30 / 6, 31 / 10)


def row(speedup):
    predicted = {"fixed:1": speedup / 2, "delayed": speedup}
    pairs = [(10.0, 10.0 * speedup), (20.0, 20.0 * speedup), (1.0, 100.0)]
    return doctor._row(4, predicted, pairs)


def test_the_verdict_says_which_policy_pays():
    good, bad = row(1.5), row(0.9)
    assert (good["verdict"], good["policy"]) == ("use", "delayed")
    assert (bad["verdict"], bad["policy"]) == ("do not use", "none")
    assert good["measured_speedup"] == 1.5  # one pair was disturbed
    assert (good["none_tokens_per_s"], good["delayed_tokens_per_s"]) == (10.0, 30.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return ["--target", str(write_target(folder / "target"))], [
        "--drafter",
        str(write_drafter(folder / "drafter")),
    ]


def test_the_report_is_a_table_or_json(models, monkeypatch, capsys):
    asked = []

    def diagnose(decoder, concurrencies, max_new_tokens):
        asked.append((concurrencies, max_new_tokens))
        facts = {"max_new_tokens": max_new_tokens, "device": "abacus", "jax": "1"}
        return {"verdict": "use", "rows": [row(1.5), row(0.9)], "accepted_length": 2.0} | facts

    monkeypatch.setattr(doctor, "diagnose", diagnose)
    command = ["doctor", *models[0], *models[1], "--concurrency", "4,2", "--max-new-tokens", "9"]
    assert cli.main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["target"], report["drafter"]) == ("target", "drafter")
    assert report["rows"][0] == row(1.5)
    assert cli.main(command) == 0
    table = capsys.readouterr().out
    assert "drafts on this machine: use" in table
    lines = [line.split() for line in table.splitlines() if line.startswith("4")]
    assert lines[0] == ["4", "use", "delayed", "1.50x", "1.50x", "1.50x", "10.0", "30.0"]
    assert lines[1][:5] == ["4", "do", "not", "use", "none"]
    assert asked == [([4, 2], 9)] * 2


def test_what_cannot_be_diagnosed_is_refused(models, capsys):
    assert cli.main(["doctor", *models[0]]) == 2
    assert "give --drafter" in capsys.readouterr().err
    assert cli.main(["doctor", *models[0], *models[1], "--max-new-tokens", "7"]) == 2
    assert "max_new_tokens is 7: give at least 8" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["doctor", "--concurrency", "1,x"])
    assert "'x' is not a whole number" in capsys.readouterr().err


def test_a_limit_beyond_the_context_is_cut_and_said(caplog):
    requests = [Request((1,) * length) for length in (10, 70)]
    assert doctor._within_context(requests, 100, 10) == 10
    assert not caplog.records
    assert doctor._within_context(requests, 100, 11) == 10
    assert "max_new_tokens is 11, and the target's context of 100" in caplog.text
    with pytest.raises(ValueError, match="context of 90 leaves room for 20 tokens"):
        doctor._within_context(requests, 90, 8)


@pytest.mark.full
def test_the_doctor_examines_a_tiny_model(models, capsys):
    words = ["--concurrency", "2,1", "--max-new-tokens", "12", "--json"]
    assert cli.main(["doctor", *models[0], *models[1], *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["concurrency"] for row in report["rows"]] == [1, 2]
    for found in report["rows"]:
        assert set(found["predicted_speedup"]) == {"fixed:1", "fixed:2", "fixed:3", "delayed"}
        assert all(speedup > 0 for speedup in found["predicted_speedup"].values())
        assert found["measured_speedup"] > 0
    assert report["accepted_length"] > 1
