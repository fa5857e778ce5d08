"""dspark calibrate: from prompts to tables beside the drafter, and their use in the engine."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dspark_jax
from dspark_jax.checkpoints.deepspec import bind_vocab
from dspark_jax.cli import command as cli
from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.generate import generate
from dspark_jax.engine.reader import Generation
from dspark_jax.engine.request import Request
from dspark_jax.evaluation import confidence, pictures, rounds
from dspark_jax.evaluation.rounds import RecordedRequest, read_record, recorded_request
from dspark_jax.models.drafters.dspark import declare_drafter
from dspark_jax.models.targets.llama import declare as declare_target
from dspark_jax.scheduler.calibration import (
    FILE_NAME,
    Calibration,
    CalibrationTable,
    read_calibration,
)
from tests.tiny_model import (
    BLOCK,
    DRAFTER,
    TARGET,
    few_sizes,
    random_params,
    write_drafter,
    write_target,
)


@pytest.mark.usefixtures("own_cache")
def test_prompts_become_tables_that_generation_uses(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rounds, "config_for", few_sizes)
    target, drafter = write_target(tmp_path / "target"), write_drafter(tmp_path / "drafter")
    models = ["--target", str(target), "--drafter", str(drafter)]
    prompts, record = tmp_path / "prompts.jsonl", tmp_path / "rounds.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in range(1, 7)))
    words = ["--max-new-tokens", "24", "--batch", "6", "--record", str(record), "--json"]
    words += ["--plot", str(tmp_path / "reliability.png")]
    assert cli.main(["calibrate", *models, "--prompts", str(prompts), *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["out"] == str(drafter / FILE_NAME)
    found = read_calibration(drafter / FILE_NAME, BLOCK)
    assert [str(table) for table in found.tables] == [
        "rejection, temperature 0",
        "rejection, temperature 1",
    ]
    requests = read_record(record)
    assert len(requests) == 12
    for number, (table, shown) in enumerate(zip(found.tables, report["tables"], strict=True)):
        assert shown["confidence_temperatures"] == list(table.confidence_temperatures)
        sizes = [len(r.accepted_N) for r in requests if r.temperature == number]
        assert shown["rounds_held_out"] == sum(sizes[1::2])
        assert 0 < shown["rounds_fitted"] <= sum(sizes[::2])
        for when in ("before", "after"):
            assert [row["position"] for row in shown[when]["positions"]] == [1, 2, 3]
            low, high = shown[when]["ece_mean_low"], shown[when]["ece_mean_high"]
            assert 0 <= low <= shown[when]["ece_mean"] <= high <= 1
    assert (tmp_path / "reliability.png").read_bytes().startswith(b"\x89PNG")

    # Killed in the middle of a line, and begun again.
    whole = record.read_bytes()
    record.write_bytes(whole[: 2 * len(whole) // 3])
    out = tmp_path / "elsewhere.json"
    again = ["calibrate", *models, "--prompts", str(prompts), "--out", str(out), *words]
    assert cli.main(again) == 0
    assert json.loads(capsys.readouterr().out)["tables"] == report["tables"]
    assert record.read_bytes() == whole
    assert cli.main([*again, "--seed", "1"]) == 2
    assert "another recipe (seed: 0 -> 1)" in capsys.readouterr().err
    assert cli.main([*again, "--system", "be"]) == 2
    assert "another recipe (system: None -> 'be')" in capsys.readouterr().err

    assert cli.main(["calibrate", "--from", str(record), "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("mean") == 2
    assert read_calibration(out, BLOCK) == found

    assert dspark_jax.load(target, drafter).decoder.calibration == found
    (drafter / FILE_NAME).write_text("{}")
    assert cli.main(["generate", *models, "hello"]) == 2
    assert "no calibration of format 1" in capsys.readouterr().err


def test_a_drafter_that_cannot_be_written_beside_needs_an_output(tmp_path, capsys):
    command = ["calibrate", "--from", str(tmp_path / "r.jsonl"), "--drafter", "owner/name"]
    assert cli.main(command) == 2
    assert "give" not in capsys.readouterr().out
    assert cli.main([*command, "--out", str(tmp_path / "c.json")]) == 2
    assert "r.jsonl: no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["calibrate"])


def test_what_is_known_of_a_round():
    logit = np.array([1.0, 2.0, 3.0], np.float32)
    result = Generation(
        4,
        accepted_lengths=[4, 2, 2, 1, 1, 3],
        verified_lengths=[3, 3, 3, 0, 3, 2],
        accepted_drafts=[3, 1, 2, 0, 0, 2],
        confidence_logits=[logit, logit, logit, None, logit * np.nan, logit],
    )
    found = recorded_request("p:1", "coupled", 0.5, result)
    # Everything accepted; a rejection, which settles the rest; a stop token, which does not; no
    # draft; logits that are not finite; two drafts that were verified and accepted.
    assert found.verified_N.tolist() == [3, 3, 2, 2]
    assert found.accepted_N.tolist() == [3, 1, 2, 2]
    assert found.logit_NG.tolist() == [[1, 2, 3]] * 4
    assert len(recorded_request("p:1", "coupled", 0.5, Generation(4)).accepted_N) == 0


def overconfident(count=200, rounds=40):
    """Requests whose logits are twice what is true, in two ways of sampling."""
    rng, requests = np.random.default_rng(0), []
    for number in range(2 * count):
        logit = rng.normal(0.5, 1.5, (rounds, 2))
        accepted = np.cumprod(rng.random(logit.shape) < 1 / (1 + np.exp(-logit)), axis=1).sum(1)
        whole = np.full(rounds, 2)
        way = ("rejection", 1.0) if number % 2 else ("coupled", 0.5)
        scale = 2 if number % 2 else 0.5
        requests.append(RecordedRequest(f"p:{number // 2}", *way, scale * logit, whole, accepted))
    return requests


def test_each_way_of_sampling_gets_its_temperatures():
    tables, report = confidence.fit_calibration(overconfident())
    coupled, rejection = tables.tables
    assert (coupled.acceptance, coupled.sampling_temperature) == ("coupled", 0.5)
    np.testing.assert_allclose(coupled.confidence_temperatures, 0.5, rtol=0.2)
    np.testing.assert_allclose(rejection.confidence_temperatures, 2, rtol=0.2)
    for shown in report["tables"]:
        assert (shown["rounds_fitted"], shown["rounds_held_out"]) == (4000, 4000)
        assert shown["after"]["ece_mean_high"] < shown["before"]["ece_mean_low"]
    panels = pictures.draw_reliability(report).axes
    assert len(panels) == 4
    assert [line.get_label() for line in panels[0].lines[1:]] == ["before", "after"]
    table = confidence.format_calibration(report)
    assert "coupled, temperature 0.5: 4000 rounds fitted, 4000 held out" in table


def test_rounds_that_are_none_or_few_fit_nothing():
    with pytest.raises(ValueError, match="nothing to fit"):
        confidence.fit_calibration([])
    few = [
        dataclasses.replace(
            request,
            logit_NG=request.logit_NG[:1],
            verified_N=request.verified_N[:1],
            accepted_N=request.accepted_N[:1],
        )
        for request in overconfident(3)
    ]
    with pytest.raises(ValueError, match="rounds are too few to"):
        confidence.fit_calibration(few)


def test_one_conversation_cannot_judge_itself():
    requests = [dataclasses.replace(request, prompt="p:1") for request in overconfident(3)]
    with pytest.raises(ValueError, match="only one conversation"):
        confidence.fit_calibration(requests)


# The engine.

TABLES = Calibration(
    (
        CalibrationTable("coupled", 0.0, (1000.0,) * BLOCK),  # every confidence is a half
        CalibrationTable("coupled", 1.0, (0.01,) * BLOCK),  # all or nothing
    )
)


def calibrated_decoder():
    target, drafter = (
        jax.tree.map(jnp.asarray, random_params(seed, declared))
        for seed, declared in ((20, declare_target(TARGET)), (21, declare_drafter(DRAFTER)))
    )
    vocab = bind_vocab(DRAFTER, None, TARGET, target.vocab)
    head = drafter.confidence.replace(bias_O=jnp.full(1, 9.0))  # so that all logits are positive
    bound = DRAFTER, drafter.replace(confidence=head), vocab
    return make_decoder((TARGET, target), bound, calibration=TABLES)


@pytest.mark.full
def test_every_request_has_the_temperatures_of_its_way_of_sampling():
    decoder = calibrated_decoder()
    requests = [Request((1, 2, 3), 24, temperature=t) for t in (0.1, 1.0)]
    config = EngineConfig(
        slots=2,
        positions=40,
        policy="threshold:0.9",
        acceptance="coupled",
        chunk_rows=4,
        chunk_buckets=(1,),
        slot_buckets=(2,),
        row_buckets=(2,),
        position_buckets=(64,),
    )
    with Engine(decoder, config) as engine:
        streams = [engine.submit(request) for request in requests]
        served = [stream.wait() for stream in streams]
    unsure, sure = served
    assert set(unsure.verified_lengths) == {0}
    assert sum(sure.verified_lengths) > 0
    plain = generate(decoder, requests, policy="none", acceptance="coupled")
    assert [a.token_ids for a in served] == [b.token_ids for b in plain]
