"""Answers by the target: turn by turn, resumed, split. Most by an engine that decodes nothing."""

import contextlib
import dataclasses
import fcntl
import heapq
import itertools
import json
import logging
import math
import random
import re
import signal
import subprocess
import sys
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from dspark_jax.checkpoints import load
from dspark_jax.checkpoints.conversations import read_answered, read_questions
from dspark_jax.checkpoints.tokenizer import chat_prompt_ids, load_tokenizer
from dspark_jax.cli import command as cli
from dspark_jax.config import TrainConfig
from dspark_jax.engine.reader import Generation
from dspark_jax.engine.request import Request
from dspark_jax.evaluation.prepare import Share, prepare
from dspark_jax.training import data
from pallas_kernels import random as keys
from tests.tiny_model import CONTEXT, write_target

ROWS = [
    {"prompt": "one"},
    {"turns": ["two", "and more", "and more again"]},
    {"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "three"}]},
    {
        "conversations": [
            {"from": "human", "value": "four"},
            {"from": "gpt", "value": "somebody else's answer"},
            {"from": "human", "value": "and then"},
        ]
    },
    *({"prompt": f"number {i}"} for i in range(5, 12)),
]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("prepare") / "target")


@pytest.fixture(scope="module")
def decoder(target):
    sizes = SimpleNamespace(max_positions=CONTEXT, vocab_size=1000)
    tokenizer = load_tokenizer(target)
    encode = partial(chat_prompt_ids, tokenizer)
    return SimpleNamespace(tokenizer=tokenizer, target=sizes, encode=encode)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS))
    return path


class FakeEngine:
    """Answers by a function of the request; a step is four tokens for each that has a slot."""

    def __init__(self, decoder, slots, stop_after):
        self.config = SimpleNamespace(slots=slots, positions=CONTEXT)
        self.decoder, self.stop_after, self.answers = decoder, stop_after, 0
        self.requests, self.waiting, self.running = [], [], []
        self.taken = []  # of every step: slots, and who waits for one
        self.arrivals = itertools.count()

    def submit(self, request, priority=0):
        self.requests.append(request)
        result = reply(self.decoder, request)
        stream = SimpleNamespace(result=result, finished=False, left=len(result.token_ids))
        heapq.heappush(self.waiting, (-priority, next(self.arrivals), stream))
        return stream

    def step(self):
        if self.answers >= self.stop_after:
            raise KeyboardInterrupt
        while self.waiting and len(self.running) < self.config.slots:
            self.running.append(heapq.heappop(self.waiting)[-1])
        self.taken.append((len(self.running), len(self.waiting)))
        for stream in self.running:
            stream.left -= 4
            stream.finished = stream.left <= 0
        self.answers += sum(stream.finished for stream in self.running)
        self.running = [stream for stream in self.running if not stream.finished]


@pytest.fixture
def run(decoder, source, tmp_path):
    """Answers ``source`` into ``out.jsonl``; returns the engine that did."""

    def run_it(stop_after=math.inf, slots=2, conversations=None, recipe=None, **options):
        engine = FakeEngine(decoder, slots, stop_after)
        conversations = conversations or read_questions(source)
        limits = Request((0,), max_new_tokens=20, temperature=0.5, stop_ids=(7,))
        arguments = (conversations, limits, tmp_path / "out.jsonl", recipe or {"target": "t"})
        with contextlib.suppress(KeyboardInterrupt):
            prepare(engine, decoder, *arguments, seed=3, **options)
        return engine

    return run_it


def reply(decoder, request):
    """What the request alone determines; one in eight is cut."""
    draw = np.random.default_rng([1, *request.key.tolist(), *request.prompt_ids])
    ids = draw.integers(0, 90, draw.integers(8, 20)).tolist()
    text = decoder.tokenizer.decode(ids)
    finish = "length" if draw.random() < 1 / 8 else "stop"
    return Generation(len(request.prompt_ids), ids, text, finish_reason=finish)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def keys_of(engine):
    return [tuple(request.key.tolist()) for request in engine.requests]


# What is asked, and what is written.


def test_every_turn_is_answered_after_the_answers_before_it(run, decoder, tmp_path):
    engine = run(slots=3)
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == list(range(len(ROWS)))
    asked = dict(zip(keys_of(engine), engine.requests, strict=True))
    root, seen = keys.seed_key(3), 0
    for row in rows:
        system = row["conversations"][0]["role"] == "system"
        turns, text = row["conversations"][system:], "be > " if system else ""
        for number, (question, answer) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
            text += question["content"] + " > "
            request = asked[tuple(np.asarray(keys.fold_in(root, row["id"], number)).tolist())]
            assert list(request.prompt_ids) == decoder.tokenizer.encode(text)
            assert (request.temperature, request.max_new_tokens) == (0.5, 20)
            expected = reply(decoder, request)
            assert answer == {"role": "assistant", "content": expected.text}
            text += answer["content"] + "<end>"
            seen += 1
        assert (row["response_ids"], row["finish"]) == (expected.token_ids, expected.finish_reason)
        assert row["end_id"] == expected.end_id
        assert row["temperature"] == 0.5
    assert seen == len(asked) == len(engine.requests)
    assert [len(row["conversations"]) for row in rows[:4]] == [2, 6, 3, 4]
    assert rows[3]["conversations"][1]["content"] != "somebody else's answer"


@pytest.mark.parametrize("slots", [1, 3, 4])
def test_all_slots_stay_taken(run, slots):
    """Whoever is over makes room at once, for the next question of the same conversation too."""
    taken = run(slots=slots).taken
    filled = [number for number, waiting in taken if waiting]
    assert len(filled) > len(taken) / 2
    assert set(filled) == {slots}
    rest = [number for number, _ in taken[len(filled) :]]  # nobody is left to begin
    assert rest == sorted(rest, reverse=True)


def test_an_answer_that_was_cut_ends_its_conversation(run, decoder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys.modules[__name__],
        "reply",
        lambda *_: Generation(3, [1, 2], "!", finish_reason="length"),
    )
    run(slots=4)
    rows = rows_of(tmp_path / "out.jsonl")
    assert [len(row["conversations"]) for row in rows[:4]] == [2, 2, 3, 2]
    assert all(row["finish"] == "length" for row in rows)


def test_training_reads_what_was_written(run, decoder, tmp_path):
    run(slots=4)
    conversations = read_answered(tmp_path / "out.jsonl")
    recipe = TrainConfig(max_length=CONTEXT, tokens_per_batch=CONTEXT)
    end = decoder.tokenizer.eos_token_id
    sequences, dropped = data.tokenize(conversations, decoder.tokenizer, end, recipe)
    assert (len(sequences), dropped) == (len(ROWS), 0)
    for row, one in zip(rows_of(tmp_path / "out.jsonl"), sequences, strict=True):
        answers = [turn["content"] for turn in row["conversations"] if turn["role"] == "assistant"]
        ends = ["<end>"] * (len(answers) - 1) + ["<end>" * (row["finish"] == "stop")]
        text = "".join(map(str.__add__, answers, ends))
        assert decoder.tokenizer.decode(one.token_S[one.loss_mask_S]) == text


def test_a_prompt_that_fills_the_context_is_left_out(run, decoder, source, tmp_path, caplog):
    long = "x" * CONTEXT
    rows = ({"prompt": long}, {"turns": ["a", long]}, {"prompt": long})
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run()
    (row,) = rows_of(tmp_path / "out.jsonl")
    assert (row["id"], len(row["conversations"])) == (1, 2)
    assert f"2 left out; the first: {source}:1: the prompt has " in caplog.text
    source.write_text(json.dumps({"prompt": long}))
    (tmp_path / "out.jsonl").unlink()
    with pytest.raises(ValueError, match=r"out\.jsonl: none of the 1 conversations could be"):
        run()


def test_a_conversation_that_the_template_refuses_is_left_out(run, decoder, tmp_path, caplog):
    before = decoder.tokenizer.chat_template
    refusal = "{{ raise_exception('no system') if messages[0].role == 'system' }}"
    try:
        decoder.tokenizer.chat_template = refusal + before
        run()
    finally:
        decoder.tokenizer.chat_template = before
    assert [row["id"] for row in rows_of(tmp_path / "out.jsonl")] == [0, 1, *range(3, len(ROWS))]
    assert re.search(r"1 left out; the first: .*in\.jsonl:5: .*refuses.*no system", caplog.text)


def test_logits_that_are_not_finite_end_the_run_and_keep_the_rest(
    run, source, tmp_path, monkeypatch
):
    whole = reply

    def spoil(decoder, request):
        result = whole(decoder, request)
        last = tuple(request.key.tolist()) == tuple(np.asarray(key).tolist())
        error = FloatingPointError("the target's logits are not finite")
        return dataclasses.replace(result, finish_reason="error", error=error) if last else result

    key = keys.fold_in(keys.seed_key(3), len(ROWS) - 1)
    monkeypatch.setattr(sys.modules[__name__], "reply", spoil)
    with pytest.raises(FloatingPointError, match=rf"{source}:{2 * len(ROWS) - 1}: .*not finite"):
        run(slots=1)
    assert len(rows_of(tmp_path / "out.jsonl")) == len(ROWS) - 1


# Resuming and splitting.


@pytest.fixture
def whole(run, tmp_path):
    """The output of an undisturbed run, which is then gone."""
    run()
    text = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    (tmp_path / "out.jsonl.recipe.json").unlink()
    return text


def test_a_run_killed_at_any_byte_loses_and_repeats_nothing(run, whole, tmp_path):
    path, lines = tmp_path / "out.jsonl", whole.splitlines(keepends=True)
    run()
    draw = random.Random(0)
    for size in (0, 1, len(lines[0]) - 1, len(lines[0]), *draw.sample(range(len(whole)), 8)):
        path.write_bytes(whole[:size])
        asked = keys_of(run())
        assert path.read_bytes() == whole
        kept = whole[:size].count(b"\n")
        turns = sum(line.count(b'"assistant"') for line in lines[kept:])
        assert len(asked) == len(set(asked)) == turns
    assert keys_of(run()) == []


@pytest.mark.parametrize("slots", [1, 3, 100])
def test_interrupted_again_and_again_it_ends_the_same(run, whole, tmp_path, slots):
    times = 0
    while run(stop_after=4, slots=slots).requests:
        times += 1
    assert times > 1
    assert (tmp_path / "out.jsonl").read_bytes() == whole


def test_however_it_is_split_the_result_is_the_same(run, whole, tmp_path):
    run(share=Share(0, 3))
    run(stop_after=3, slots=1, share=Share(1, 3))  # killed; the third has never begun
    names = ["out.jsonl.part-0-of-3", "out.jsonl.part-1-of-3"]
    parts = [tmp_path / name for name in names]
    assert [[row["id"] % 3 for row in rows_of(part)] for part in parts] == [[0] * 4, [1]]
    parts[0].write_bytes(parts[0].read_bytes() + b'{"id": 1, "conv')
    engine = run(slots=4)
    assert (tmp_path / "out.jsonl").read_bytes() == whole
    assert len(engine.requests) == sum(
        line.count(b'"assistant"')
        for number, line in enumerate(whole.splitlines())
        if number % 3 and number != 1
    )
    assert sorted(p.name for p in tmp_path.glob("out*")) == ["out.jsonl", "out.jsonl.recipe.json"]
    assert run(share=Share(2, 5)).requests == []  # nothing is left for anybody


def test_a_bad_line_moves_no_other(run, source, whole, tmp_path):
    rows = whole.splitlines(keepends=True)
    lines = source.read_text().splitlines(keepends=True)
    source.write_text("".join(["{\n", *lines[1:]]))
    run(stop_after=2, slots=1)
    run(share=Share(1, 2))
    run()
    assert (tmp_path / "out.jsonl").read_bytes() == b"".join(rows[1:])


def test_a_larger_limit_goes_on(run, source, whole, tmp_path):
    run(conversations=read_questions(source, limit=4))
    assert len(rows_of(tmp_path / "out.jsonl")) == 4
    run()
    assert (tmp_path / "out.jsonl").read_bytes() == whole


# What is refused.


def test_an_output_of_another_recipe_is_refused(run, tmp_path):
    run(conversations=None, recipe={"target": "t"})
    with pytest.raises(ValueError, match=r"another recipe \(target: 't' -> 'other'\)"):
        run(recipe={"target": "other"})
    (tmp_path / "out.jsonl.recipe.json").write_text("[1]")
    with pytest.raises(ValueError, match="not the recipe"):
        run()
    (tmp_path / "out.jsonl.recipe.json").unlink()
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"out\.jsonl exists, .*choose another output"):
        run()
    assert (tmp_path / "out.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "line", ["{}", "[1]", '{"id": "1"}', '{"id": true}', "\udcff", "[" * 10**5]
)
def test_a_damaged_line_is_named(run, tmp_path, line):
    path = tmp_path / "out.jsonl"
    run(stop_after=2)
    damaged = path.read_bytes() + line.encode(errors="surrogateescape") + b"\n"
    path.write_bytes(damaged)
    number = damaged.count(b"\n")
    with pytest.raises(ValueError, match=rf"out\.jsonl:{number}: damaged"):
        run()
    assert path.read_bytes() == damaged


def test_two_processes_do_not_write_the_same_file(run, tmp_path):
    run(stop_after=1, share=Share(0, 2))
    with (tmp_path / "out.jsonl.part-0-of-2").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for share in (Share(0, 2), Share()):
            with pytest.raises(ValueError, match=r"part-0-of-2 is being written by another"):
                run(share=share)
    for process, processes in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"process is {process}"):
            Share(process, processes)


# The command, on a model as small as can be.


@pytest.fixture
def dspark(target, capsys, own_cache):
    def call(*words, models=("--target", target, "--drafter", "none")):
        try:
            code = cli.main([str(word) for word in (*words, *models)])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_command_answers_as_generate_does(dspark, source, tmp_path, caplog):
    caplog.set_level(logging.INFO, "dspark_jax")
    out, plain = tmp_path / "new" / "out.jsonl", tmp_path / "plain.jsonl"
    words = ("--temperature", 0.8, "--top-k", 20, "--seed", 4, "--max-new-tokens", 12)
    command = ("prepare", source, "--out", out, "--limit", 3, "--batch", 3, *words)
    code, printed, err = dspark(*command)
    assert (code, printed) == (0, f"{out}\n")
    assert "3/3" in caplog.text
    assert "tokens/s" in caplog.text
    rows = rows_of(out)
    plain.write_text(
        "".join(json.dumps({"prompt": p}) + "\n" for p in ("one", "two", "be > three"))
    )
    _, texts, _ = dspark("generate", "--prompts", plain, "--json", "--batch", 3, *words)
    expected = [json.loads(line)["text"] for line in texts.splitlines()]
    first = [next(t for t in r["conversations"] if t["role"] == "assistant") for r in rows]
    assert [turn["content"] for turn in first] == expected
    assert [len(row["response_ids"]) for row in rows if row["finish"] == "length"]
    recipe = json.loads((tmp_path / "new" / "out.jsonl.recipe.json").read_text())
    assert recipe.pop("input_sha256")
    assert recipe == {
        "target": "target",
        "dtype": "float32",
        "max_new_tokens": 12,
        "temperature": 0.8,
        "top_k": 20,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": 4,
    }
    assert dspark(*command)[:2] == (0, f"{out}\n")
    code, _, err = dspark(*command[:-1], 13)
    assert code == 2
    assert "another recipe (max_new_tokens: 12 -> 13)" in err


def test_how_prompts_were_rendered_is_part_of_the_recipe(dspark, source, tmp_path):
    out = tmp_path / "out.jsonl"
    command = ("prepare", source, "--out", out, "--limit", 3, "--max-new-tokens", 3)
    rendered = ("--system", "do", "--template-arg", "tone=3")
    assert dspark(*command, *rendered)[:2] == (0, f"{out}\n")
    # Training renders the same without being told.
    systems = [row["conversations"][0] for row in rows_of(out)]
    assert systems == [{"role": "system", "content": text} for text in ("do", "do", "be")]
    recipe = json.loads((tmp_path / "out.jsonl.recipe.json").read_text())
    assert (recipe["system"], recipe["template_args"]) == ("do", {"tone": 3})
    assert dspark(*command, *rendered)[0] == 0
    for words, change in (
        ((), "system: 'do' -> None, template_args: {'tone': 3} -> None"),
        (("--no-chat-template",), "chat_template: None -> False"),
        ((*rendered[:3], "tone=4"), "template_args: {'tone': 3} -> {'tone': 4}"),
    ):
        code, _, err = dspark(*command, *words)
        assert code == 2
        assert change in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--process", 2, "--processes", 2), "process is 2"),
        (("--processes", 0), "--processes"),
        (("--temperature", -1), "temperature is -1"),
        (("--batch", 0), "--batch"),
        (("--stop", "x"), "--stop"),
    ],
)
def test_a_wrong_flag_is_refused_before_anything_is_loaded(
    dspark, source, tmp_path, monkeypatch, words, expected
):
    monkeypatch.setattr(load, "load_target", None)
    code, out, err = dspark("prepare", source, "--out", tmp_path / "out.jsonl", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert expected in err
    missing = dspark("prepare", tmp_path / "none.jsonl", "--out", tmp_path / "out.jsonl")
    assert missing[0] == 2
    assert re.search(r"none\.jsonl: no such file", missing[2])
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.full
def test_killed_processes_lose_nothing(target, source, tmp_path):
    """kill -9 at random moments, again and again."""

    def start(out):
        code = "import sys; from dspark_jax.cli.command import main; sys.exit(main(sys.argv[1:]))"
        words = ["prepare", source, "--out", out, "--target", target, "--temperature", "0.9"]
        command = [sys.executable, "-c", code, *map(str, words), "--batch", "1"]
        command += ["--max-new-tokens", "400"]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert start(whole).wait(300) == 0
    for goal in (1, 4, 8):
        process, deadline = start(out), time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            if out.exists() and out.read_bytes().count(b"\n") >= goal:
                break
            time.sleep(0.002)
        time.sleep(random.random() * 0.05)
        process.kill()
        assert process.wait(60) == -signal.SIGKILL, "it ended before it could be killed"
    assert start(out).wait(300) == 0
    assert out.read_bytes() == whole.read_bytes()
