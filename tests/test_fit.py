"""The training loop on models as small as can be: its files, resuming, and what it refuses."""

import dataclasses
import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dspark_jax.checkpoint import Checkpoints
from dspark_jax.checkpoints.load import load_drafter_for, load_target
from dspark_jax.config import TrainConfig
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.generate import generate
from dspark_jax.engine.request import Request
from dspark_jax.training import data, fit, growth, records, run, step
from dspark_jax.training.anchors import block_labels
from dspark_jax.training.losses import draft_blocks
from dspark_jax.training.records import MetricsLog
from tests.tiny_model import TARGET, write_target

STEPS = 30
ANSWERS = ("one two three four", "abcabcabcabcabc", "yes yes yes yes yes")
METRICS = {
    "accept_rate",
    "accepted_length",
    "ce",
    "confidence",
    "confidence_abs_error",
    "confidence_bias",
    "l1",
    "loss",
    "survival_abs_error",
    "survival_bias",
}
SPEED = {"learning_rate", "blocks_per_s", "tokens_per_s"}


@pytest.fixture(scope="module")
def target_folder(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("fit") / "target")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, target_folder):
    """Ten batches an epoch, a reduced vocabulary, two updates a batch."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {
            "conversations": [
                {"role": "user", "content": f"say it {i}"},
                {"role": "assistant", "content": ANSWERS[i % 3]},
            ]
        }
        for i in range(24)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig(
        target=str(target_folder),
        data=str(folder / "data.jsonl"),
        out=str(folder / "whole"),
        num_layers=1,
        block_size=3,
        markov_rank=4,
        draft_vocab_size=40,
        target_layer_ids=(-1, 0),
        max_length=40,
        length_buckets=(40,),
        tokens_per_batch=80,
        num_anchors=8,
        updates_per_batch=2,
        steps=STEPS,
        learning_rate=3e-3,
        eval_sequences=4,
        eval_every=10,
        checkpoint_every=5,
        log_every=2,
    )


@pytest.fixture(scope="module")
def whole(recipe):
    """The directory of a run that nothing disturbed."""
    assert fit.fit(recipe) == Path(recipe.out) / "drafter"
    return Path(recipe.out)


def elsewhere(recipe, folder, **changes):
    return dataclasses.replace(recipe, out=str(folder), **changes)


def log_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().split("\n")[:-1]]


def weights_of(out):
    return load_file(out / "drafter" / "model.safetensors")


def assert_same_run(out, whole):
    """Bit-identical weights, and the same log but for the speed."""
    for name, value in weights_of(whole).items():
        np.testing.assert_array_equal(weights_of(out)[name], value, err_msg=name)
    timed = {"blocks_per_s": 0, "tokens_per_s": 0}
    logs = [[row | timed for row in log_of(folder)] for folder in (out, whole)]
    assert logs[0] == logs[1]


def sequences_for(recipe):
    """What ``run.load_sequences`` wants beside the source."""
    target = load_target(recipe.target)
    return target, run.drafter_config(recipe, target), recipe


def interrupt_at(monkeypatch, step, action):
    """Have ``action`` called while the batch of a step is made."""
    batches_from = data.batches_from

    def batches(sequences, recipe, start):
        for number, batch in enumerate(batches_from(sequences, recipe, start), start + 1):
            if number == step:
                action()
            yield batch

    monkeypatch.setattr(data, "batches_from", batches)


# A whole run.


def test_the_drafter_loads_and_generates(whole, target_folder):
    target = load_target(target_folder)
    drafter = load_drafter_for(target, whole / "drafter")
    assert drafter.cfg.draft_vocab_size == 40
    record = json.loads((whole / "drafter" / "config.json").read_text())["trained_for"]
    assert record == target.identity()
    bound = (drafter.cfg, drafter.params, drafter.vocab)
    decoder = make_decoder((target.cfg, target.params), bound, target.tokenizer)
    (result,) = generate(decoder, [Request(target.tokenizer.encode("say it"), max_new_tokens=12)])
    assert len(result.token_ids) == 12
    assert max(result.verified_lengths) == 3


def test_the_log_has_what_is_documented(whole):
    rows = log_of(whole)
    train = [row for row in rows if "split" not in row]
    held_out = [row for row in rows if "split" in row]
    assert [row["step"] for row in train] == list(range(2, STEPS + 1, 2))
    assert [row["step"] for row in held_out] == [10, 20, 30]
    assert all(
        set(row) == METRICS | {"step", "blocks", "tokens", "gradient_norm"} | SPEED for row in train
    )
    assert all(set(row) == METRICS | {"step", "split"} for row in held_out)
    assert all(row["split"] == "held-out" and len(row["accept_rate"]) == 3 for row in held_out)
    assert all(1 <= row["accepted_length"] <= 4 for row in rows)
    assert json.loads((whole / "recipe.json").read_text())["steps"] == STEPS
    assert train[-1]["learning_rate"] < train[3]["learning_rate"]
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_loss_falls_and_the_accepted_length_rises(whole):
    held_out = [row for row in log_of(whole) if "split" in row]
    assert held_out[-1]["ce"] < held_out[0]["ce"] - 0.1
    assert held_out[-1]["loss"] < held_out[0]["loss"]
    assert held_out[-1]["accepted_length"] > held_out[0]["accepted_length"]


def test_a_finished_run_is_only_exported_again(whole, recipe):
    before = weights_of(whole)
    (whole / "drafter" / "model.safetensors").unlink()
    fit.fit(recipe)
    for name, value in weights_of(whole).items():
        np.testing.assert_array_equal(value, before[name])


# Interrupted runs.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_resumed_run_ends_the_same(
    whole, recipe, tmp_path, monkeypatch, number
):
    stopped = elsewhere(recipe, tmp_path / "out")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7, lambda: signal.raise_signal(number))
        with pytest.raises(KeyboardInterrupt, match=f"saved step 7 of {STEPS}"):
            fit.fit(stopped)
    fit.fit(stopped)
    assert_same_run(tmp_path / "out", whole)


def test_signals_are_the_callers_again_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with fit.stop_on_signals() as received:
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):  # the second one does not wait for the step
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.full
def test_a_killed_run_resumes_to_the_same_end(recipe, tmp_path):
    """kill -9 at random moments, again and again."""

    def start(out):
        config = tmp_path / f"{out.name}.py"
        run = elsewhere(recipe, out, steps=40)
        config.write_text(f"from dspark_jax.config import TrainConfig\nconfig = {run!r}\n")
        code = "import sys; from dspark_jax.cli.command import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "train", str(config)]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert start(whole).wait(300) == 0
    for goal in sorted(random.sample(range(2, 36, 2), 5)):
        process, log, deadline = start(out), out / "metrics.jsonl", time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            text = log.read_text() if log.exists() else ""
            if f'"step": {goal}' in text:
                break
            time.sleep(0.002)
        time.sleep(random.random() * 0.05)
        process.kill()
        assert process.wait(60) == -signal.SIGKILL, "it ended before it could be killed"
    assert start(out).wait(300) == 0
    assert_same_run(out, whole)


def test_the_log_drops_repeated_and_torn_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "note": "a\u2028b\x85c"}, {"step": 2}, {"step": 3}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join([*lines, '"text"', '{"step": "2"}', '{"step": 1, "los']))
    MetricsLog(tmp_path, 2).write(3, loss=1.5)
    assert log_of(tmp_path) == [*rows[:2], {"step": 3, "loss": 1.5}]


# What is refused, and when.


def test_a_line_with_a_token_beyond_the_rows_of_the_target_is_left_out(recipe, tmp_path, caplog):
    rows = Path(recipe.data).read_text().split("\n")
    rows[2] = rows[2].replace("say it", "say <extra>")
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(rows))
    recipe = dataclasses.replace(recipe, data=str(path))
    target, cfg, recipe = sequences_for(recipe)
    cfg = dataclasses.replace(cfg, vocab_size=len(target.tokenizer))
    run.load_sequences(run.open_source(recipe), target, cfg, recipe)
    target.tokenizer.add_tokens(["<extra>"])
    train_set, held_out = run.load_sequences(run.open_source(recipe), target, cfg, recipe)
    assert f"beyond the target's, 0..{cfg.vocab_size - 1} (line 3)" in caplog.text
    assert all(not one.origin.endswith(":3") for one in (*train_set, *held_out))


def test_another_recipe_in_the_same_directory_is_refused(whole, recipe):
    other = dataclasses.replace(recipe, learning_rate=1.0, markov_rank=5)
    expected = r"another recipe \(markov_rank: 4 -> 5, learning_rate: 0.003 -> 1.0\)"
    with pytest.raises(ValueError, match=expected):
        fit.fit(other)


def test_other_data_in_the_same_directory_is_refused_but_may_move(whole, recipe, tmp_path):
    text = Path(recipe.data).read_text()
    moved = tmp_path / "moved.jsonl"
    moved.write_text(text)
    assert fit.fit(dataclasses.replace(recipe, data=str(moved))) == whole / "drafter"
    moved.write_text(text.replace("three", "seven"))
    with pytest.raises(ValueError, match=r"another recipe \(data_sha256"):
        fit.fit(dataclasses.replace(recipe, data=str(moved)))


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"lr": 3}', "\udcff"])
def test_a_foreign_or_damaged_recipe_is_refused(recipe, tmp_path, text):
    (tmp_path / "recipe.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"recipe\.json"):
        fit.fit(elsewhere(recipe, tmp_path))


def test_an_older_runs_recipe_has_the_defaults_of_newer_fields(recipe, tmp_path):
    now = records.recipe_record(recipe)
    older = {k: v for k, v in now.items() if k not in ("keep_checkpoints", "data_sha256")}
    (tmp_path / "recipe.json").write_text(json.dumps(older))
    records.check_same_recipe(tmp_path / "recipe.json", now)
    with pytest.raises(ValueError, match="keep_checkpoints: 2 -> 3"):
        records.check_same_recipe(tmp_path / "recipe.json", now | {"keep_checkpoints": 3})


def test_damaged_checkpoints_are_refused(tmp_path):
    like = {"a": jax.numpy.zeros(4), "b": jax.numpy.zeros((2, 3))}
    with Checkpoints(tmp_path / "c", 2) as saved:
        saved.save(1, like)
    with Checkpoints(tmp_path / "c", 2) as saved:
        np.testing.assert_array_equal(saved.restore(1, like)["a"], like["a"])
        with pytest.raises(ValueError, match="does not fit this configuration"):
            saved.restore(1, {"a": like["a"]})
    for path in (tmp_path / "c" / "1").rglob("_METADATA"):
        path.write_bytes(b"nothing")
    with Checkpoints(tmp_path / "c", 2) as saved, pytest.raises(ValueError, match="damaged"):
        saved.restore(1, like)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="not a directory of checkpoints"):
        Checkpoints(tmp_path / "file", 2)


def test_a_loss_that_is_not_finite_stops_the_run(recipe, tmp_path, monkeypatch):
    broken = elsewhere(recipe, tmp_path)
    plain, seen = fit.plain, []

    def spoil(metrics):
        seen.append(1)
        nan = {"l1": float("nan"), "loss": float("nan"), "finite_updates": 1}
        return plain(metrics) | (nan if len(seen) == 7 else {})

    monkeypatch.setattr(fit, "plain", spoil)
    with pytest.raises(FloatingPointError) as stopped:
        fit.fit(broken)
    train_set = run.load_sequences(run.open_source(broken), *sequences_for(broken))[0]
    _, indices = next(data.schedule_from(train_set, broken, 6))
    lines = ",".join(str(index + 1) for index in sorted(indices))  # of a file, every line is used
    assert str(stopped.value) == (
        "step 7, update 2 of 2, is not finite (l1 nan, loss nan) on the batch "
        f"{broken.data}:{lines}: the last good checkpoint in {tmp_path / 'checkpoints'} is 5"
    )
    with Checkpoints(tmp_path / "checkpoints", 2) as saved:
        assert saved.latest == 5
    assert not (tmp_path / "drafter").exists()


def test_a_held_out_loss_that_is_not_finite_stops_the_run(recipe, tmp_path, monkeypatch):
    broken, plain = elsewhere(recipe, tmp_path), fit.plain

    def spoil(metrics):
        values = plain(metrics)
        return values if "finite_updates" in values else values | {"ce": float("inf")}

    monkeypatch.setattr(fit, "plain", spoil)
    message = r"step 10, held-out, is not finite \(ce inf\) on the batch .*:2[\d,]+: .* is 5$"
    with pytest.raises(FloatingPointError, match=message):
        fit.fit(broken)


def test_a_gradient_that_is_not_finite_counts_too():
    sequences = [
        data.TokenSequence(np.ones(3), np.ones(3), origin=f"a:b:{line}") for line in (2, 10, 9)
    ]
    plans = iter([(16, [1, 0, 2])])
    fine = {"loss": 1.0, "accept_rate": [0.5, 1.0]}
    records.check_finite("step 3", fine, sequences, plans, "")
    lost = {"loss": 1.0, "gradient_norm": float("inf")}
    with pytest.raises(FloatingPointError, match=r"step 3 .*gradient_norm inf.* a:b:2,9,10: gone"):
        records.check_finite("step 3", lost, sequences, plans, "gone")


def test_nothing_is_loaded_or_written_before_the_data_is_read(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "open_target", None)
    missing = elsewhere(recipe, tmp_path / "out", data=str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"none\.jsonl: no such file"):
        fit.fit(missing)
    with pytest.raises(ValueError, match="not readable"):
        fit.fit(dataclasses.replace(missing, data=str(tmp_path)))
    with pytest.raises(ValueError, match=r"out .*data\.jsonl is a file: name a directory"):
        fit.fit(elsewhere(recipe, recipe.data))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"eval_sequences": 24}, "24 usable conversations .* eval_sequences takes 24"),
        ({"min_loss_tokens": 21}, r"0 usable conversations \(24 more"),
        ({"max_length": 600, "length_buckets": (600,)}, "max_length 600 .* at most 512"),
    ],
)
def test_data_that_does_not_suffice_leaves_no_recipe_behind(recipe, tmp_path, changes, expected):
    with pytest.raises(ValueError, match=expected):
        fit.fit(elsewhere(recipe, tmp_path, **changes))
    assert not (tmp_path / "recipe.json").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"l1_weight": -0.1}, "l1_weight is -0.1"),
        ({"ce_weight": 0.0, "l1_weight": 0.0}, "all 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"clip_norm": 0.0}, "clip_norm is 0.0"),
        ({"weight_decay": float("inf")}, "weight_decay is inf"),
        ({"loss_decay": -1.0}, "loss_decay is -1.0"),
        ({"num_layers": 0}, "num_layers 0"),
        ({"steps": 1.5}, "steps 1.5"),
        ({"seed": -1}, "seed -1"),
        ({"seed": 2**63}, "seed 9223372036854775808 must be an integer"),
        ({"eval_sequences": -1}, "eval_sequences -1"),
        ({"min_loss_tokens": 1}, "min_loss_tokens 1"),
        ({"mask_token_id": -2}, "mask_token_id -2"),
        ({"warmup_fraction": 1.0}, "warmup_fraction 1.0"),
        ({"length_buckets": (1, 40)}, "must be at least 2"),
        ({"length_buckets": (20,)}, "end with max_length"),
        ({"markov_head": "other"}, "markov_head is 'other'"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(recipe, changes, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        dataclasses.replace(recipe, **changes)


def test_a_run_without_held_out_sequences(recipe, tmp_path):
    out = fit.fit(elsewhere(recipe, tmp_path, eval_sequences=0, bigram_init=True))
    assert out == tmp_path / "drafter"
    assert not any("split" in row for row in log_of(tmp_path))


def test_feature_layers_of_shallow_targets():
    assert run.default_feature_layers(30) == (1, 8, 14, 20, 27)
    for layers in range(1, 12):
        ids = run.default_feature_layers(layers)
        assert list(ids) == sorted(set(ids))
        assert ids[0] >= 0
        assert layers < 3 or ids[-1] <= layers - 3
    assert TARGET.num_layers == 2


@pytest.mark.full
def test_a_run_starts_from_another_drafter(recipe, whole, tmp_path):
    source = str(whole / "drafter")
    again = elsewhere(recipe, tmp_path / "on", init_drafter=source, steps=2, learning_rate=1e-9)
    fit.fit(again)
    for name, value in weights_of(whole).items():
        np.testing.assert_allclose(weights_of(tmp_path / "on")[name], value, atol=1e-6)
    other = elsewhere(recipe, tmp_path / "other", init_drafter=source, markov_rank=2)
    with pytest.raises(ValueError, match=r"init_drafter .*markov_rank: 2 -> 4.*change"):
        fit.fit(other)
    with pytest.raises(ValueError, match=r"init_drafter .*bigram_init and local_init to false"):
        elsewhere(recipe, tmp_path, init_drafter=source, bigram_init=True)


@pytest.mark.full
def test_a_run_starts_from_a_shallower_drafter(recipe, whole, tmp_path):
    """New layers change nothing before they are trained; a shorter block is a part of it."""
    source, deep = str(whole / "drafter"), recipe.num_layers + 2
    changes = {"init_drafter": source, "num_layers": deep, "block_size": recipe.block_size - 1}
    grown = elsewhere(recipe, tmp_path / "on", **changes)
    before, after = (
        run.start_run(each, run.open_source(each))
        for each in (elsewhere(recipe, tmp_path, init_drafter=source), grown)
    )
    assert after.cfg.num_layers == deep
    first = next(fit.batches_of(before, 0))
    with pytest.raises(ValueError, match=r"num_layers: 1 -> "):
        growth.check_same_sizes("deep", before.cfg, after.cfg)
    blocks = []
    for ready in (before, after):
        feature_BSFD = step.target_outputs(ready.frozen, first, ready.target_cfg, ready.cfg)[0]
        anchor_BA = jnp.full((len(first.token_BS), 1), 3)
        keep_BA = jnp.ones_like(anchor_BA, bool)
        labels = block_labels(
            jnp.asarray(first.token_BS), jnp.asarray(first.loss_mask_BS), anchor_BA, keep_BA,
            after.cfg.block_size,
        )  # fmt: skip
        cfg = dataclasses.replace(ready.cfg, block_size=after.cfg.block_size)
        outputs = draft_blocks(
            ready.state.params, ready.frozen.vocab, feature_BSFD, labels, anchor_BA, keep_BA, cfg
        )
        blocks.append(np.asarray(outputs.hidden_BAGD))
    np.testing.assert_allclose(blocks[1], blocks[0], atol=1e-5)
    fit.fit(grown, after)
    assert float(
        np.abs(weights_of(tmp_path / "on")[f"layers.{deep - 1}.mlp.down_proj.weight"]).max()
    )


@pytest.mark.full
def test_bfloat16_trains_nearly_the_same(recipe, whole, tmp_path):
    """Target and forward pass in bfloat16; weights, gradients and divergences stay float32."""
    fit.fit(elsewhere(recipe, tmp_path, dtype="bfloat16"))
    exact, rounded = log_of(whole), log_of(tmp_path)
    assert rounded[0]["loss"] == pytest.approx(exact[0]["loss"], rel=0.02)
    assert rounded[0]["loss"] != exact[0]["loss"]
    assert rounded[-1]["loss"] == pytest.approx(exact[-1]["loss"], rel=0.05)
    weights = weights_of(tmp_path)
    assert all(weights[name].dtype == value.dtype for name, value in weights_of(whole).items())
