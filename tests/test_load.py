"""Policies under load: what is counted and compared; never how fast anything is."""

import functools
import json

import numpy as np
import pytest

from dspark_jax.cli import command as cli
from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.reader import Generation
from dspark_jax.engine.request import Request
from dspark_jax.evaluation import load, pictures
from dspark_jax.evaluation.latency import median_interval
from dspark_jax.evaluation.load import Run
from tests.tiny_model import BLOCK

ROW = {
    "concurrency",
    "policy",
    "tokens_per_s",
    "tokens_per_s_low",
    "tokens_per_s_high",
    "tokens_per_s_user",
    "accepted_length",
    "verification_length",
    "undrafted_share",
    "first_token_s",
    "between_tokens_s",
}
RATIO = {"concurrency", "policy", "over", "ratio", "ratio_low", "ratio_high"}


@pytest.mark.usefixtures("own_cache")
def test_bench_load_reports_every_policy_at_every_concurrency(
    models, tmp_path, capsys, monkeypatch
):
    # Compilation takes all of the time: as few programs as will do.
    few = functools.partial(EngineConfig, chunk_buckets=(1,), chunk_rows=16, row_buckets=(4,))
    monkeypatch.setattr(load, "EngineConfig", few)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in (1, 9, 4)))
    words = ["--concurrency", "2", "--policies", "none,threshold:0.5", "--repeats", "2"]
    words += ["--requests", "1", "--max-new-tokens", "10", "--plot", str(tmp_path / "load.png")]
    assert cli.main(["bench", "load", *models, "--prompts", str(prompts), *words, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(row["concurrency"], row["policy"]) for row in report["rows"]] == [
        (2, "none"),
        (2, "threshold:0.5"),
    ]
    for row in report["rows"]:
        assert set(row) == ROW
        assert 0 < row["tokens_per_s_low"] <= row["tokens_per_s"] <= row["tokens_per_s_high"]
        assert row["tokens_per_s_user"] > 0
        for name in ("first_token_s", "between_tokens_s"):
            assert 0 < row[name]["p50"] <= row[name]["p95"] <= row[name]["p99"]
    plain, threshold = report["rows"]
    assert (plain["accepted_length"], plain["verification_length"]) == (1, 0)
    assert (plain["undrafted_share"], threshold["undrafted_share"]) == (1, 0)
    assert 0 <= threshold["verification_length"] <= BLOCK
    assert all(set(row) == RATIO for key in ("to_none", "to_best") for row in report[key])
    assert [row["policy"] for row in report["to_none"]] == ["threshold:0.5"]
    assert [row["policy"] for row in report["to_best"]] == ["threshold:0.5"]
    assert list(report["mean_to_none"]) == ["threshold:0.5"]
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")
    table = load.format_load(report).splitlines()
    assert len([line for line in table if line.split()[:1] == ["2"]]) == 2


def test_fixed_lengths_beyond_the_block_are_the_block():
    names = "none", "fixed:2", "fixed:4", "fixed:7", "delayed"
    assert load.fitting_policies(names, 4) == ("none", "fixed:2", "fixed:4", "delayed")
    assert load.fitting_policies(names, 7) == names


class Clockwork:
    """An engine whose every step gives each request a token; those of request n end after n."""

    def __init__(self, monkeypatch):
        self.now, self.streams, self.most = 0.0, [], 0
        monkeypatch.setattr(load.time, "perf_counter", lambda: self.now)

    def submit(self, request):
        stream = FakeStream(Generation(1), request.max_new_tokens)
        self.streams.append(stream)
        return stream

    def step(self):
        self.now += 0.5
        running = [stream for stream in self.streams if not stream.finished]
        self.most = max(self.most, len(running))
        for stream in running:
            stream.step()
        return bool(running)

    def run(self):
        assert all(stream.finished for stream in self.streams)


class FakeStream:
    def __init__(self, result, limit):
        self.result, self.limit = result, limit

    @property
    def finished(self):
        return bool(self.result.finish_reason)

    def step(self):
        result = self.result
        result.token_ids += [1, 1]
        result.accepted_lengths.append(2)
        result.verified_lengths.append(3)
        result.undrafted_rounds += len(result.token_ids) > 4
        if len(result.token_ids) >= self.limit:
            result.finish_reason = "length"

    def cancel(self):
        self.result.finish_reason = "cancelled"


def test_clients_send_their_next_request_when_the_last_is_over(monkeypatch):
    engine = Clockwork(monkeypatch)
    lengths = iter([2, 6, 4, 8, 8, 8, 8])
    requests = (Request((1,), max_new_tokens=length) for length in lengths)
    run = load.serve(engine, requests, clients=2, count=3)
    # One client ends requests after 1 and 3 steps, the other one after 3.
    assert engine.most == 2
    assert len(engine.streams) == 5
    assert run.tokens_per_s == 12 / 1.5
    assert run.tokens_per_s_user == (2 + 6 + 4) / (0.5 + 1.5 + 1.0)
    assert (run.accepted_length, run.verification_length) == (2, 3)
    assert run.undrafted_share == 1 / 6
    # Every request had news with every step, the first of them after one.
    assert {watch.first_s - watch.began_s for watch in run.watches if watch.tokens} == {0.5}
    assert [watch.tokens for watch in run.watches] == [2, 6, 4, 0, 0]
    assert [watch.between_s for watch in run.watches] == [[], [0.5, 0.5], [0.5], [], []]


def test_logits_that_are_not_finite_are_no_measurement(monkeypatch):
    engine = Clockwork(monkeypatch)

    def fail(stream):
        stream.result.finish_reason = "error"
        stream.result.error = FloatingPointError("the target's logits are not finite")

    monkeypatch.setattr(FakeStream, "step", fail)
    with pytest.raises(FloatingPointError, match="not finite"):
        load.serve(engine, iter([Request((1,))] * 4), clients=2, count=1)


def runs(*speeds):
    return [Run(speed, speed / 2, 2.0, 3.0, 0.5) for speed in speeds]


def test_policies_are_compared_within_repeats():
    # The machine is half as fast in the second repeat: the ratios do not see it.
    found = load.compare(
        {
            "none": runs(10, 5, 10),
            "fixed:2": runs(12, 6, 12),
            "fixed:4": runs(8, 4, 9),
            "delayed": runs(15, 7.5, 18),
        }
    )
    assert [(row["policy"], row["ratio"]) for row in found["to_none"]] == [
        ("fixed:2", 1.2),
        ("fixed:4", 0.8),
        ("delayed", 1.5),
    ]
    (best,) = found["to_best"]
    assert (best["policy"], best["over"], best["ratio"]) == ("delayed", "fixed:2", 1.25)
    assert (best["ratio_low"], best["ratio_high"]) == (1.25, 1.5)
    rows = [{"policy": "a", "ratio": 1.0}, {"policy": "b", "ratio": 3}, {"policy": "a", "ratio": 2}]
    assert load.mean_ratios(rows) == {"a": 1.5, "b": 3}


def test_without_anything_to_compare_to_there_are_no_ratios():
    assert load.compare({"delayed": runs(1.0)}) == {"to_none": [], "to_best": []}


def test_the_interval_holds_the_true_median():
    assert median_interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    rng, held = np.random.default_rng(0), 0
    for _ in range(1000):
        _, low, high = median_interval(rng.exponential(1, 20).tolist())
        held += low <= np.log(2) <= high
    assert held >= 950
    assert median_interval(list(range(20)))[1:] == (5, 14)


def test_the_picture_has_a_line_a_policy():
    rows = [
        {"concurrency": clients, **load.summarise(name, runs(clients))}
        for name in ("none", "delayed")
        for clients in (1, 4)
    ]
    speed, length = pictures.draw_load({"rows": rows}).axes
    assert [line.get_label() for line in speed.lines] == ["none", "delayed"]
    assert speed.lines[0].get_xydata().tolist() == [[0.5, 1], [2, 4]]
    assert length.lines[1].get_xydata().tolist() == [[1, 3], [4, 3]]
