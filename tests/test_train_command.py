"""``dspark train``: recipes by name, what is said before a training, and saves that fail."""

import dataclasses
import json
import re
import resource
import shutil
import signal
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dspark_jax.checkpoint import Checkpoints
from dspark_jax.cli import arguments, recipes
from dspark_jax.cli import command as cli
from dspark_jax.config import TrainConfig
from dspark_jax.files import SaveError
from dspark_jax.training import fit, needs, run, trackers
from tests.tiny_model import write_letters, write_target

pytestmark = pytest.mark.usefixtures("own_cache")

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@pytest.fixture
def dspark(capsys):
    """Runs the command: (exit code, stdout, lines on stderr)."""

    def call(*words):
        code = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return call


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    return TrainConfig(
        target=str(write_target(folder / "target")),
        data=str(write_letters(folder / "data.jsonl", 12)),
        out=str(folder / "run"),
        num_layers=1,
        block_size=3,
        markov_rank=4,
        draft_vocab_size=40,
        target_layer_ids=(-1, 0),
        max_length=40,
        length_buckets=(40,),
        tokens_per_batch=160,
        num_anchors=8,
        updates_per_batch=2,
        average_decay=0.9,
        steps=6,
        eval_sequences=2,
        eval_every=3,
        checkpoint_every=2,
        log_every=1,
    )


def write_recipe(path, recipe):
    path.write_text(f"from dspark_jax.config import TrainConfig\nconfig = {recipe!r}\n")
    return path


# Recipes by name.


def test_recipes_have_names(dspark):
    code, out, err = dspark("train", "--list")
    assert (code, err) == (0, [])
    assert [line.split()[0] for line in out.splitlines()] == NAMES
    assert all(line.rstrip().endswith(".") for line in out.splitlines())
    code, out, _ = dspark("train", "--show", "qwen3_4b_dspark")
    assert (code, out) == (0, (ROOT / "configs" / "qwen3_4b_dspark.py").read_text())


def test_a_name_stands_for_its_file(dspark, monkeypatch):
    seen = []
    monkeypatch.setattr(fit, "fit", lambda recipe, **_: seen.append(recipe) or "somewhere")
    for word in ("smollm2_135m_dflash", ROOT / "configs" / "smollm2_135m_dflash.py"):
        assert dspark("train", word, "--set", "seed=3") == (0, "somewhere\n", [])
    assert seen[0] == seen[1]
    assert (seen[0].seed, seen[0].out) == (3, "runs/smollm2_135m_dflash")
    for words, said in (
        (("train",), "no recipe: give the name of one"),
        (("train", "smollm3"), "smollm3: no such file and no such recipe; dspark train --list"),
        (("train", "--show", "x.py"), "x.py: no such file"),
    ):
        code, out, err = dspark(*words)
        assert (code, out, len(err)) == (2, "", 1)
        assert said in err[0]


def test_a_wheel_has_the_recipes_where_they_are_looked_for():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    place = wheel["targets"]["wheel"]["force-include"]["configs"]
    assert recipes.FOLDERS[0] == ROOT / place
    assert not recipes.FOLDERS[0].exists()  # of which there is one copy


def test_help_says_what_every_setting_means(capsys):
    fields = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    said = {name: text for names, _ in recipes.settings() for name, text in names.items()}
    assert {name: repr(value) for name, value in fields.items()} == said
    assert all(len(text) > 5 for _, text in recipes.settings())
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    out = capsys.readouterr().out
    assert all(f"{name}={value}" in " ".join(out.split()) for name, value in said.items())
    assert max(map(len, out.splitlines())) <= 100


def test_trackers_are_those_that_there_are():
    assert set(arguments.TRACKERS) == set(trackers.TRACKERS)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(trackers.TRACKERS) <= set(extras["optional-dependencies"])


# What a training takes.


def test_a_dry_run_says_what_the_training_then_takes(dspark, recipe, tmp_path):
    words = "train", "--dry-run", write_recipe(tmp_path / "mine.py", recipe)
    code, out, _ = dspark(*words)
    assert code == 0
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert lines["data"] == "10 sequences, 2 held out"
    assert lines["steps"] == "6, 12 updates of the optimiser"
    assert lines["blocks"] == f"at most {12 * 4 * 8}"
    assert re.match(r"0\.\d+ GB on a device", lines["memory"])
    assert not Path(recipe.out).exists()

    found = needs.needs_of(recipe)
    state = run.start_run(recipe, run.open_source(recipe)).state
    assert found.checkpoint_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params))
    assert found.checkpoint_bytes > 4 * weights  # two moments and the mean
    assert found.device_bytes > found.checkpoint_bytes
    assert fit.fit(recipe) == Path(recipe.out) / "drafter"
    blocks = [json.loads(line)["blocks"] for line in open_log(recipe)]
    assert max(blocks) == found.blocks / 6  # smaller batches are padded
    written = sum(path.stat().st_size for path in Path(recipe.out).rglob("*") if path.is_file())
    assert written < found.disk_bytes


def open_log(recipe):
    lines = (Path(recipe.out) / "metrics.jsonl").read_text().splitlines()
    return [line for line in lines if "held-out" not in line]


def test_a_disk_without_room_is_refused_before_anything_is_written(
    dspark, recipe, tmp_path, monkeypatch
):
    other = dataclasses.replace(recipe, out=str(tmp_path / "a" / "b"))
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda path: full)
    config = write_recipe(tmp_path / "mine.py", other)
    for words in (("train", "--dry-run", config), ("train", config)):
        code, _, err = dspark(*words)
        assert code == 2
        assert re.search(r"out .*b: the run takes .* GB are missing on the disk: lower", err[-1])
    assert not (tmp_path / "a").exists()


def test_a_run_that_goes_on_needs_no_room_twice(recipe, tmp_path, monkeypatch):
    held = dataclasses.replace(recipe, out=str(tmp_path))
    (tmp_path / "old").write_bytes(bytes(5000))
    nothing = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(needs.shutil, "disk_usage", lambda path: nothing)
    needs.check_room(held, 1000, 5000)
    with pytest.raises(ValueError, match="are missing"):
        needs.check_room(held, 1000, 5001)


# Saves that fail.


@pytest.fixture
def small_files():
    """No file may become larger than 30 kB, as on a disk that is full."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, kept[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    signal.signal(signal.SIGXFSZ, handler)


STATE = {"a": jnp.asarray(jax.random.normal(jax.random.key(0), (300, 300)))}


@pytest.mark.skipif(sys.platform != "linux", reason="limits of files are Linux's")
def test_a_save_that_fails_in_the_background_is_said_when_one_looks(tmp_path, small_files):
    def looks():
        with Checkpoints(tmp_path / "c", 2) as saved:
            saved.save(1, {"a": jnp.zeros(3)})
            saved.wait()
            small_files()
            saved.save(2, STATE)
            with pytest.raises(SaveError) as said:
                saved.wait()
            saved.check()  # was said
        return str(said.value)

    message = looks()
    assert "\n" not in message
    assert re.search(r"could not be written to .*c \(.*\): make room .* from step 1$", message)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of files are Linux's")
def test_leaving_says_it_too(tmp_path, small_files):
    def leaves():
        with Checkpoints(tmp_path / "c", 2) as saved:
            small_files()
            saved.save(2, STATE)

    with pytest.raises(SaveError, match="could not be written"):
        leaves()


def test_a_training_stops_at_the_step_behind_a_failed_save(recipe, tmp_path, monkeypatch, dspark):
    """The failure is Orbax's, as it tells it: by raising when one looks."""
    other = dataclasses.replace(recipe, out=str(tmp_path / "out"))
    config = write_recipe(tmp_path / "mine.py", other)
    saves = []
    save, check = Checkpoints.save, Checkpoints.check

    def noted(self, step, state):
        saves.append(step)
        save(self, step, state)

    def failing(self):
        def look():
            if saves == [2, 4]:
                raise OSError(28, "No space left on device")

        self._said(look)
        check(self)

    monkeypatch.setattr(Checkpoints, "save", noted)
    monkeypatch.setattr(Checkpoints, "check", failing)
    code, out, err = dspark("train", config)
    assert (code, out) == (3, "")
    assert "No space left on device" in err[-1]
    assert json.loads(open_log(other)[-1])["step"] == 4
    assert not (tmp_path / "out" / "drafter").exists()
