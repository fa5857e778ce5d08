"""The speed benchmark: what it reports and how it counts; never how fast anything is."""

import dataclasses
import json
from functools import partial

import pytest

from dspark_jax.checkpoints.tokenizer import chat_prompt_ids
from dspark_jax.cli import command as cli
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.reader import Generation
from dspark_jax.engine.request import Request
from dspark_jax.evaluation import speed
from dspark_jax.evaluation.prompts import Prompt, make_requests
from dspark_jax.evaluation.results import accept_rates
from dspark_jax.evaluation.speed import Pair, Timed, summarise
from tests.tiny_model import BLOCK, few_sizes

RESULTS = {
    "autoregressive",
    "dspark",
    "speedup",
    "accepted_length",
    "accept_rate_by_position",
    "same_text",
    "prompts",
}
SETTING = {
    "step_seconds",
    "break_even_accepted_length",
    "max_new_tokens",
    "temperature",
    "repeats",
    "device",
    "jax",
    "target",
    "drafter",
}


@pytest.mark.usefixtures("own_cache")
def test_bench_speed_reports_everything(models, tmp_path, capsys, monkeypatch):
    # One slot, as the bench times rounds of one.
    monkeypatch.setattr("tests.tiny_model.SLOTS", 1)
    monkeypatch.setattr(speed, "config_for", few_sizes)
    files = []
    for name, prompts in (("a", ("hello", "one", "left out")), ("b", ("two",))):
        files += ["--prompts", str(tmp_path / f"{name}.jsonl")]
        lines = [json.dumps({"turns": [prompt]}) + "\n" for prompt in prompts]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    # Whole blocks: whether drafts of a random drafter pay is a matter of this machine's seconds.
    words = ["--max-new-tokens", "16", "--repeats", "2", "--limit", "2", "--policy", "block"]
    command = ["bench", "speed", *models, *files, *words]
    assert cli.main([*command, "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == ""
    assert set(report) == RESULTS | SETTING | {"sets"}
    assert {name: set(row) for name, row in report["sets"].items()} == {"a": RESULTS, "b": RESULTS}
    assert [report["sets"][name]["prompts"] for name in "ab"] == [2, 1]
    assert (report["prompts"], report["max_new_tokens"], report["repeats"]) == (3, 16, 2)
    assert (report["target"], report["drafter"]) == ("target", "drafter")
    assert report["same_text"] == 1
    assert report["accepted_length"] > 1
    assert len(report["accept_rate_by_position"]) == BLOCK
    assert set(report["step_seconds"]) == {"plain", "verify", "draft"}
    seconds = report["step_seconds"]
    assert min(seconds["plain"], seconds["verify"]) > 0
    assert seconds["draft"] >= 0  # costs are monotone: noise may leave nothing of so small a draft
    ratio = (seconds["verify"] + seconds["draft"]) / seconds["plain"]
    assert report["break_even_accepted_length"] == pytest.approx(ratio, abs=1e-3)
    table = speed.format_report(report)
    for name in ("a", "b", "all"):
        assert any(line.startswith(f"{name} ") for line in table.splitlines())


def generation(*rounds, tokens=8):
    """A result of (accepted length, verified drafts, accepted drafts) rounds."""
    lengths, verified, accepted = (list(column) for column in zip(*rounds, strict=True))
    return Generation(4, [1] * tokens, "text", lengths, verified, accepted, "length")


def test_rates_count_what_was_decided_about():
    one = generation((1, 3, 0), (4, 3, 3), (2, 1, 1))
    # Slot 1 of three was accepted in two; slots 2 and 3 were decided about once.
    assert accept_rates([one], 4) == [round(2 / 3, 4), 1.0, 1.0, None]
    # The second draft is the stop token: the third was never decided about.
    assert accept_rates([generation((2, 3, 2))], 3) == [1.0, 1.0, None]
    assert accept_rates([generation((1, 0, 0))], 2) == [None, None]
    assert accept_rates([], 0) == []


def test_the_speedup_is_the_median_ratio_of_tokens_per_second():
    plain = Timed(generation((1, 0, 0), tokens=10), 1.0)
    seconds = (0.5, 1.0, 20.0)  # once the machine was busy with something else
    pairs = [Pair(plain, Timed(generation((3, 3, 2), tokens=20), s)) for s in seconds]
    found = summarise(pairs, BLOCK, greedy=False)
    assert found["speedup"] == 2.0
    assert found["autoregressive"] == {"tokens_per_s": 10.0}
    assert found["dspark"] == {"tokens_per_s": round(60 / 21.5, 2)}
    assert found["accepted_length"] == 3.0
    assert found["same_text"] is None  # texts differ by chance above temperature 0
    assert summarise(pairs, BLOCK, greedy=True)["same_text"] == 1


class Clockwork:
    """An engine that takes a second for each token, and two to settle."""

    def __init__(self, monkeypatch, result):
        self.now, self.result, self.requests = 0.0, result, []
        monkeypatch.setattr(speed.time, "perf_counter", lambda: self.now)

    def submit(self, request):
        self.requests.append(request)
        return self

    def wait(self):
        self.now += len(self.result.token_ids)
        return self.result

    def settle(self):
        self.now += 2

    def compile(self):
        self.now += 100


def test_the_ways_take_turns_and_only_their_own_time_counts(monkeypatch):
    plain = Clockwork(monkeypatch, generation((1, 0, 0), tokens=8))
    drafting = Clockwork(monkeypatch, generation((1, 0, 0), tokens=4))
    monkeypatch.setattr(speed.time, "perf_counter", lambda: plain.now + drafting.now)
    sets = {"a": ["a1", "a2"], "b": ["b1"]}
    pairs = speed._measure({"plain": plain, "dspark": drafting}, sets, repeats=2)
    assert {name: len(found) for name, found in pairs.items()} == {"a": 4, "b": 2}
    for pair in (*pairs["a"], *pairs["b"]):
        assert (pair.plain.seconds, pair.dspark.seconds) == (8, 4)
    warm, flat = ["a1", "a2", "b1"], ["a1", "a2", "b1"]
    assert len(warm) == speed.WARM_UP
    assert plain.requests == drafting.requests == [*warm, *flat, *flat]


def test_logits_that_are_not_finite_are_no_measurement(monkeypatch):
    error = FloatingPointError("the target's logits are not finite")
    engine = Clockwork(monkeypatch, Generation(3, finish_reason="error", error=error))
    with pytest.raises(FloatingPointError, match="not finite"):
        speed._timed(engine, Request([1]))


def test_a_prompt_that_does_not_fit_is_named(models):
    from dspark_jax.checkpoints.load import load_target

    target = load_target(models[1])
    decoder = make_decoder((target.cfg, target.params), None, target.tokenizer)
    decoder = dataclasses.replace(decoder, encode=partial(chat_prompt_ids, target.tokenizer))
    prompts = [Prompt("short", "p.jsonl:1"), Prompt("x" * 600, "p.jsonl:2")]
    with pytest.raises(ValueError, match=r"p\.jsonl:2: the prompt has 603 tokens"):
        make_requests(prompts, decoder, Request((0,)), 0)
