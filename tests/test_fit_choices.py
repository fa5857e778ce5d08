"""What can be put in the places of the optimiser, its schedule and the loss; and who listens."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from dspark_jax.config import TrainConfig
from dspark_jax.tracing import Trace
from dspark_jax.training import run, trackers
from dspark_jax.training.fit import fit
from dspark_jax.training.loss_terms import Decay, Loss, l1_distance, reverse_kl
from dspark_jax.training.records import Report, described
from tests.tiny_model import write_letters, write_target

LOSS = Loss(((l1_distance, 0.9), (reverse_kl, 0.1)), slot_weights=Decay(0.0))
MOMENTUM = partial(optax.sgd, momentum=0.9)


def halves(count):
    """A schedule as one writes it."""
    return 0.5 ** (count + 1.0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("choices")
    return TrainConfig(
        target=str(write_target(folder / "target")),
        data=str(write_letters(folder / "data.jsonl", 12)),
        out=str(folder / "run"),
        num_layers=1,
        block_size=3,
        markov_rank=4,
        target_layer_ids=(-1, 0),
        max_length=40,
        length_buckets=(40,),
        tokens_per_batch=160,
        num_anchors=8,
        steps=3,
        eval_sequences=2,
        eval_every=2,
        checkpoint_every=3,
        log_every=1,
    )


@pytest.fixture(scope="module")
def trained(recipe):
    """A run with choices of its own, and what a callback heard."""
    heard = []
    choices = {"optimizer": MOMENTUM, "schedule": halves, "loss": LOSS}
    with Trace(Path(recipe.out) / "trace", 1, skip=1) as trace:
        fit(recipe, **choices, callbacks=[heard.append], trace=trace)
    return heard, choices


def test_a_schedule_an_optimiser_and_a_loss_of_ones_own(trained):
    heard, _ = trained
    steps = [report.values for report in heard if report.split == "training"]
    assert [values["learning_rate"] for values in steps] == [0.5, 0.25, 0.125]
    assert all("reverse_kl" in values and "ce" not in values for values in steps)
    last = steps[-1]
    expected = 0.9 * last["l1"] + 0.1 * last["reverse_kl"] + last["confidence"]
    assert last["loss"] == pytest.approx(expected, rel=1e-4)


def test_callbacks_hear_every_line_of_the_log(trained, recipe):
    heard, _ = trained
    text = (Path(recipe.out) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [
        {"step": report.step}
        | ({} if report.split == "training" else {"split": report.split})
        | report.values
        for report in heard
    ] == lines
    assert [report.split for report in heard] == [
        "training", "training", "held-out", "training", "held-out",
    ]  # fmt: skip
    assert heard[0].recipe is recipe


def test_the_optimiser_updates_as_it_would_by_itself(recipe, tmp_path):
    """Where the schedule is 0, nothing moves."""
    still = dataclasses.replace(recipe, out=str(tmp_path), steps=1, eval_sequences=0)
    start = run.start_run(still, run.open_source(still)).state.params
    before = [np.array(leaf) for leaf in jax.tree.leaves(start)]
    after = []
    fit(
        still,
        optimizer=MOMENTUM,
        schedule=lambda count: 0.0 * count,
        loss=LOSS,
        callbacks=[lambda report: after.append(jax.tree.map(np.array, report.params))],
    )
    for found, expected in zip(jax.tree.leaves(after[-1]), before, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_some_steps_are_traced_on_request(trained, recipe):
    assert list(Path(recipe.out).glob("trace/plugins/profile/*/*.xplane.pb"))


def test_a_run_goes_on_with_what_it_began_with(trained, recipe):
    _, choices = trained
    weights = load_file(Path(recipe.out) / "drafter" / "model.safetensors")
    fit(recipe, **choices)  # is only exported again
    again = load_file(Path(recipe.out) / "drafter" / "model.safetensors")
    for name, value in weights.items():
        np.testing.assert_array_equal(again[name], value)
    message = r"another recipe \(optimizer: '.*sgd\(momentum=0.9\)' -> ''\)"
    with pytest.raises(ValueError, match=message):
        fit(recipe, **choices | {"optimizer": None})


def test_what_is_no_optimiser_is_refused(recipe, tmp_path):
    other = dataclasses.replace(recipe, out=str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"optimizer is a GradientTransf.* such as optax\.lion"):
        fit(other, optimizer=optax.adamw(1e-3))
    with pytest.raises(ValueError, match=r"weight_decay is 0\.1, which is AdamW"):
        fit(dataclasses.replace(other, weight_decay=0.1), optimizer=optax.lion)
    assert not (tmp_path / "out").exists()


def test_functions_have_names_in_records():
    assert described(None) == ""
    assert described(halves).endswith("test_fit_choices.halves")
    assert described(LOSS) == "0.9 l1 + 0.1 reverse_kl + 1 confidence, Decay(constant=0.0)"


# Trackers.


class Recorder:
    """In the place of a tracker's library: what it was asked for."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*arguments, **options):
            self.calls.append((name, arguments, options))
            return self

        return call

    def __enter__(self):
        self.calls.append(("enter", (), {}))

    def __exit__(self, *_):
        self.calls.append(("exit", (), {}))


REPORTS = [
    Report(TrainConfig(out="runs/mine"), 1, "training", {"loss": 1.5, "rate": [0.5, 0.25]}, None),
    Report(TrainConfig(out="runs/mine"), 2, "held-out", {"loss": 1.25}, None),
]
ROWS = [
    ({"training/loss": 1.5, "training/rate/1": 0.5, "training/rate/2": 0.25}, 1),
    ({"held-out/loss": 1.25}, 2),
]


@pytest.mark.parametrize("name", ["wandb", "trackio", "mlflow"])
def test_a_tracker_opens_logs_and_closes(name, monkeypatch):
    library = Recorder()
    monkeypatch.setattr(trackers.importlib, "import_module", lambda _: library)
    with trackers.TRACKERS[name]() as track:
        assert not library.calls  # another process may write
        for report in REPORTS:
            track(report)
    words = {
        "wandb": ("init", "log", "finish"),
        "trackio": ("init", "log", "finish"),
        "mlflow": ("start_run", "log_metrics", "exit"),
    }[name]
    assert library.calls[0][0] == words[0]
    assert "mine" in library.calls[0][2].values()
    assert any(
        options.get("config", arguments and arguments[0])["out"] == "runs/mine"
        for call, arguments, options in library.calls
        if call in ("init", "log_params")
    )
    logged = [(a, o) for call, a, o in library.calls if call == words[1]]
    for (arguments, options), (values, step) in zip(logged, ROWS, strict=True):
        expected = values | {"step": step} if name == "wandb" else values
        assert arguments == (expected,)
        assert options == ({} if name == "wandb" else {"step": step})
    assert library.calls[-1][0] == words[2]


def test_a_tracker_is_closed_when_the_training_fails(monkeypatch):
    library = Recorder()
    monkeypatch.setattr(trackers.importlib, "import_module", lambda _: library)

    def training():
        with trackers.wandb() as track:
            track(REPORTS[0])
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        training()
    assert library.calls[-1][0] == "finish"


def test_event_files_of_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    with trackers.tensorboard(tmp_path) as track:
        for report in REPORTS:
            track(report)
    (events,) = tmp_path.iterdir()
    content = events.read_bytes()
    assert all(name.encode() in content for values, _ in ROWS for name in values)


def test_a_tracker_without_its_library_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(trackers.importlib, "import_module", missing)
    for name, tracker in trackers.TRACKERS.items():
        with pytest.raises(ValueError, match=rf"pip install 'dspark-jax\[{name}\]'"):
            tracker()
