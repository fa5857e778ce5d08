"""The program of a quarter of an hour: its time, its parts and its answers, on tiny models."""

import argparse
import dataclasses
import io
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import smollm2_135m_gpu as gpu
from dspark_jax.checkpoints.conversations import read_answered
from dspark_jax.checkpoints.load import Target, load_target, read_drafter
from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.request import Request
from dspark_jax.evaluation.answers import (
    TEMPERATURES,
    Sizes,
    answer_together,
    make_programs,
    questions,
    temperature_of,
)
from dspark_jax.evaluation.prompts import read_prompts
from tests.tiny_model import DRAFTER, TARGET, write_drafter, write_target

PROMPTS = [f"what is {number}" for number in range(7)]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("gpu") / "target")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return path


@pytest.fixture
def args(target, prompts, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    return argparse.Namespace(
        work=str(work),
        prompts=str(prompts),
        answered=[],
        limit=None,
        slots=2,
        positions=63,
        max_new_tokens=10,
        seed=0,
        dtype="float32",
        kernels="xla",
        set=[f"target={target}", "min_loss_tokens=2"],
    )


def rows_of(args):
    lines = (Path(args.work) / "answers.jsonl").read_text().splitlines()
    return {row["id"]: row for row in map(json.loads, lines)}


def test_the_time_is_split_so_that_the_last_stage_gets_the_rest():
    assert gpu.stage_seconds("bench", 700, last=False) == pytest.approx(210)
    assert gpu.stage_seconds("answers", 600, last=False) == pytest.approx(300)
    assert gpu.stage_seconds("check", 700, last=False) == 700
    for stage in gpu.STAGES:
        assert gpu.stage_seconds(stage, 123, last=True) == 123


def test_steps_fill_the_time_that_evaluating_leaves():
    steps = gpu.plan_steps(240, step_s=0.5, evaluation_s=5, every=50)
    assert 0.8 * 240 < steps * (0.5 + 5 / 50) <= gpu.MARGIN * 240
    assert gpu.plan_steps(-10, step_s=0.5, evaluation_s=0, every=50) == 1


def test_a_temperature_is_a_function_of_the_prompt():
    assert [temperature_of(prompt) for prompt in PROMPTS] == [0.0, 0.0, 0.0, 0.6, 1.0, 0.6, 1.0]
    drawn = [temperature_of(f"prompt {number}") for number in range(3000)]
    assert all(abs(drawn.count(value) - 1000) < 100 for value in TEMPERATURES)


def test_prompts_that_have_an_answer_are_left_out(prompts, tmp_path):
    answered = tmp_path / "answered.jsonl"
    turns = [{"role": "user", "content": PROMPTS[2]}, {"role": "assistant", "content": "two"}]
    answered.write_text(json.dumps({"conversations": turns}) + "\n")
    found = questions(read_prompts(prompts), {0, 5}, read_answered(answered))
    assert [dialogue.number for dialogue in found] == [1, 3, 4, 6]


def test_answers_go_on_behind_half_a_line(args):
    out = Path(args.work) / "answers.jsonl"
    gpu.answers(args, time.time() + 100)
    whole = rows_of(args)
    assert sorted(whole) == list(range(len(PROMPTS)))
    for number, row in whole.items():
        assert row["temperature"] == temperature_of(PROMPTS[number])
        assert row["finish"] in ("stop", "length")
        assert len(row["response_ids"]) <= 10
        question, answer = row["conversations"]
        assert (question["content"], answer["role"]) == (PROMPTS[number], "assistant")
        assert len(answer["content"]) == len(row["response_ids"])  # a token is a character
    lines = out.read_bytes().splitlines(keepends=True)
    out.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    gpu.answers(args, time.time())  # no time at all
    assert out.read_bytes() == b"".join(lines[:3])
    gpu.answers(args, time.time() + 100)
    assert out.read_bytes().startswith(b"".join(lines[:3]))
    assert rows_of(args) == whole


@pytest.mark.parametrize("rows", [3, 128])
def test_many_prompts_at_once_have_the_answers_of_an_engine(target, rows):
    found = load_target(target, np.float32)
    decoder = make_decoder((found.cfg, found.params), tokenizer=found.tokenizer)
    limits = Request((0,), max_new_tokens=40, stop_ids=found.stop_ids)
    requests = [
        dataclasses.replace(limits, prompt_ids=ids, temperature=value, key=np.uint32([5, place]))
        for place, (ids, value) in enumerate(
            [((7,), 1.0), ((3, 4, 5, 6), 0.0), (tuple(range(9, 15)), 0.6), ((3, 4, 5, 6, 7), 1.0)]
        )
    ]
    wanted = [one.result for one in run_all(decoder, requests)]
    sizes = Sizes(5, 63, chunk_rows=rows)
    programs = make_programs(decoder, sizes, limits)
    answers = answer_together(decoder, programs, sizes, requests, time.time() + 100)
    for one, other in zip(answers, wanted, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        assert one.end_id == other.end_id
    assert answer_together(decoder, programs, sizes, requests, 0.0) is None


def run_all(decoder, requests):
    config = EngineConfig(slots=4, positions=63)
    with Engine(dataclasses.replace(decoder, tokenizer=None), config) as engine:
        streams = [engine.submit(request) for request in requests]
        for stream in streams:
            stream.wait()
        return streams


def test_a_prompt_leaves_room_for_its_answer(args, prompts):
    rows = [{"prompt": "long " * size} for size in (1, 11, 14)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    gpu.answers(args, time.time() + 100)
    found = rows_of(args)
    assert sorted(found) == [0, 1]
    assert len(found[1]["response_ids"]) <= 63 - len("long " * 11 + " > ")


def test_old_answers_come_last_in_the_data(args, tmp_path):
    work, old = Path(args.work), tmp_path / "old.jsonl"
    with pytest.raises(ValueError, match="no answers to train on"):
        gpu.write_data(work, [])
    old.write_text('{"old": 1}')
    lines = [json.dumps({"id": number}) + "\n" for number in (2, 0, 1)]
    (work / "answers.jsonl").write_text("".join(lines) + '{"id": 3')
    gpu.write_data(work, [str(old)])
    data = [json.loads(line) for line in (work / "data.jsonl").read_text().splitlines()]
    assert data == [{"id": 0}, {"id": 1}, {"id": 2}, {"old": 1}]


def test_results_come_back_in_parts(args, tmp_path, monkeypatch):
    work, out = Path(args.work), tmp_path / "out"
    content = np.random.default_rng(0).bytes(5000)
    (work / "answers.jsonl").write_bytes(content)
    (work / "data.jsonl").write_bytes(content)
    write_drafter(work / "drafter")
    target = Target(TARGET, None, None, "tiny", ())
    cfg, params, own, _ = read_drafter(target, work / "drafter")
    gpu.save_rounded(work, cfg, params, own)
    monkeypatch.setattr(gpu, "PART_BYTES", 3000)
    paths = gpu.pack(work, out)
    assert len(paths) > 2
    assert all(path.stat().st_size <= 3000 for path in paths)
    with tarfile.open(fileobj=io.BytesIO(b"".join(map(Path.read_bytes, paths)))) as archive:
        archive.extractall(tmp_path / "back", filter="data")
    back = tmp_path / "back"
    assert {path.name for path in back.iterdir()} == {"answers.jsonl", "drafter_bfloat16"}
    assert (back / "answers.jsonl").read_bytes() == content
    assert read_drafter(target, back / "drafter_bfloat16")[0] == cfg == DRAFTER
    for name, tensor in load_file(work / "drafter" / "model.safetensors").items():
        rounded = load_file(back / "drafter_bfloat16" / "model.safetensors")[name]
        np.testing.assert_allclose(rounded.astype(np.float32), tensor, rtol=2**-8)
    monkeypatch.setattr(gpu, "PART_BYTES", 10**6)
    assert gpu.pack(work, out) == list(out.iterdir())


def test_what_machine_it_is_stays_beside_the_results(args):
    for _ in range(2):
        gpu.check(args, 0.0)
    runs = json.loads((Path(args.work) / "machine.json").read_text())
    assert [run["device"] for run in runs] == ["cpu", "cpu"]
    assert runs[0].keys() >= {"date", "driver", "jax", "python", "arguments", "stages"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kernels": "mosaic_gpu", "dtype": "bfloat16"}, "kernels is 'mosaic_gpu'"),
        ({"prompts": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"answered": ["nowhere.jsonl"]}, "nowhere.jsonl: no such file"),
        ({"set": ["step=3"]}, "unknown configuration key 'step'"),
        ({"seed": 1}, r"another recipe \(seed: 0 -> 1\)"),
    ],
)
def test_wrong_input_is_refused_before_time_is_spent(args, wrong, message):
    if "seed" in wrong:
        gpu.check(args, 0.0)
    vars(args).update(wrong)
    with pytest.raises(ValueError, match=message):
        gpu.check(args, 0.0)


def test_wrong_input_is_one_line(prompts, tmp_path):
    words = ("--work", tmp_path / "work", "--prompts", prompts, "--model-parts", "nowhere.aa")
    command = [sys.executable, gpu.__file__, *map(str, words)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert "nowhere.aa: no such part of the default model" in refused.stderr
