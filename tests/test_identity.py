"""A drafter records its target, and says so where it meets another one."""

import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dspark_jax.checkpoints.deepspec import save_drafter
from dspark_jax.checkpoints.identity import identity_of
from dspark_jax.checkpoints.load import load_drafter_for, load_target
from dspark_jax.evaluation import export
from dspark_jax.models.drafters.dspark import declare_drafter
from tests.test_checkpoints import edit_config
from tests.tiny_model import DRAFTER, TARGET, random_params, write_target


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("models") / "target", TARGET)


def edit_weights(directory, factor):
    tensors = load_file(directory / "model.safetensors")
    save_file({k: factor * v for k, v in tensors.items()}, directory / "model.safetensors")


def drafter_for(target, directory):
    params = random_params(1, declare_drafter(DRAFTER))
    save_drafter(directory, DRAFTER, params, trained_for=target.identity())
    return directory


def test_the_same_target_elsewhere_is_the_same(directory, tmp_path, caplog):
    target = load_target(directory)
    drafter = drafter_for(target, tmp_path / "drafter")
    again = load_target(shutil.copytree(directory, tmp_path / "moved"))
    assert again.identity() == target.identity() | {"target": "moved"}
    assert load_drafter_for(again, drafter).cfg == DRAFTER
    assert not caplog.messages


CHANGES = {
    "weights": lambda path: edit_weights(path, np.float32(1.001)),
    "template": lambda path: edit_tokenizer(path, chat_template="{{ messages[0].content }}!"),
}


def edit_tokenizer(directory, **changes):
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("part", CHANGES)
def test_another_target_is_said_and_not_refused(part, directory, tmp_path, caplog):
    drafter = drafter_for(load_target(directory), tmp_path / "drafter")
    other = shutil.copytree(directory, tmp_path / "other")
    for template in other.glob("chat_template*"):  # transformers prefers this file
        template.unlink()
    CHANGES[part](other)
    with caplog.at_level(logging.WARNING):
        load_drafter_for(load_target(other), drafter)
    (message,) = caplog.messages
    assert "trained for target" in message
    assert part in message
    assert "of other" in message


def test_a_drafter_that_records_nothing_is_silent(directory, tmp_path, caplog):
    drafter = drafter_for(load_target(directory), tmp_path / "drafter")
    edit_config(drafter, trained_for=None)
    load_drafter_for(load_target(directory), drafter)
    edit_config(drafter, trained_for={"weights": 7})
    load_drafter_for(load_target(directory), drafter)
    assert not caplog.messages


def test_the_record_survives_export(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "acceptance", lambda *_: np.ones(3))
    target = load_target(directory)
    source = drafter_for(target, tmp_path / "drafter")
    for layout in ("dspark", "deepspec", "speculators"):
        out = export.write_drafter(directory, source, layout, tmp_path / layout)
        assert json.loads((out / "config.json").read_text())["trained_for"] == target.identity()


def test_a_file_of_other_bytes_or_size_is_another(tmp_path, directory):
    tokenizer = load_target(directory).tokenizer
    data = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8)

    def digest(data):
        (tmp_path / "model.gguf").write_bytes(data.tobytes())
        return identity_of(tmp_path / "model.gguf", "m", tokenizer)["weights"]

    first = digest(data)
    assert digest(data) == first
    assert digest(data[:-1]) != first
    assert digest(data ^ 1) != first


def test_the_record_says_nothing_of_numbers(directory, tmp_path):
    with_record = drafter_for(load_target(directory), tmp_path / "one")
    save_drafter(tmp_path / "two", DRAFTER, random_params(1, declare_drafter(DRAFTER)))
    target = load_target(directory)
    assert (
        load_drafter_for(target, with_record).cfg == load_drafter_for(target, tmp_path / "two").cfg
    )
    assert replace(target, source=None).identity() == {}
