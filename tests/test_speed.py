"""The speed benchmark: what it reports and how it counts; never how fast anything is."""

import json

import pytest

from dspark_jax.cli import command as cli
from dspark_jax.engine import generate as engine
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.inputs import RoundConfig
from dspark_jax.engine.reader import Generation
from dspark_jax.engine.request import Request
from dspark_jax.evaluation import speed
from dspark_jax.evaluation.prompts import Prompt
from dspark_jax.evaluation.speed import Pair, Timed, accept_rates, summarise
from tests.tiny_model import BLOCK, DRAFTER, TARGET, write_drafter, write_target

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


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    target, drafter = write_target(folder / "target"), write_drafter(folder / "drafter")
    return ["--target", str(target), "--drafter", str(drafter)]


@pytest.mark.usefixtures("own_cache")
def test_bench_speed_reports_everything(models, tmp_path, capsys, monkeypatch):
    files = []
    for name, prompts in (("a", ("hello", "one", "left out")), ("b", ("two",))):
        files += ["--prompts", str(tmp_path / f"{name}.jsonl")]
        lines = [json.dumps({"turns": [prompt]}) + "\n" for prompt in prompts]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    words = ["--max-new-tokens", "16", "--repeats", "2", "--limit", "2"]
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
    assert all(value > 0 for value in report["step_seconds"].values())
    seconds = report["step_seconds"]
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
    cfg = RoundConfig(TARGET, DRAFTER, num_draft=BLOCK)
    plain = Timed(generation((1, 0, 0), tokens=10), 1.0)
    seconds = (0.5, 1.0, 20.0)  # once the machine was busy with something else
    pairs = [Pair(plain, Timed(generation((3, 3, 2), tokens=20), s)) for s in seconds]
    found = summarise(pairs, cfg)
    assert found["speedup"] == 2.0
    assert found["autoregressive"] == {"tokens_per_s": 10.0}
    assert found["dspark"] == {"tokens_per_s": round(60 / 21.5, 2)}
    assert found["accepted_length"] == 3.0
    assert found["same_text"] is None  # texts differ by chance above temperature 0


def test_warming_up_takes_the_shapes_of_the_real_request_and_few_steps():
    made = []

    def decode(requests):
        made.append(requests)
        return []

    for length, kept in ((5, 5), (128, 128), (129, 129), (130, 130), (300, 172), (513, 129)):
        speed.warm_up(decode, [Request(list(range(length)), 40), Request([1, 2], 40)])
        long, short = made[-1]
        unread, short_unread = length - 1, len(long.prompt_ids) - 1
        assert len(long.prompt_ids) == kept
        assert short_unread % engine.PREFILL_ROWS == unread % engine.PREFILL_ROWS
        assert (short_unread >= engine.PREFILL_ROWS) == (unread >= engine.PREFILL_ROWS)
        assert len(long.prompt_ids) + long.max_new_tokens == length + 40
        assert len(short.prompt_ids) + short.max_new_tokens <= length + 40
        assert "a" in long.stop_strings


def test_logits_that_are_not_finite_are_no_measurement():
    with pytest.raises(FloatingPointError, match="not finite"):
        speed._timed(lambda _: [Generation(3, finish_reason="error")], Request([1]))


def test_a_prompt_that_does_not_fit_is_named(models):
    from dspark_jax.checkpoints.load import load_target

    target = load_target(models[1])
    decoder = make_decoder((target.cfg, target.params), None, target.tokenizer)
    prompts = [Prompt("short", "p.jsonl:1"), Prompt("x" * 600, "p.jsonl:2")]
    with pytest.raises(ValueError, match=r"p\.jsonl:2: the prompt has 603 tokens"):
        speed.make_requests(prompts, decoder, Request((0,)), 0)
