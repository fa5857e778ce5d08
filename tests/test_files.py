"""Writing leaves the whole of a file or what was there before; JSON is read as it comes."""

import errno
from pathlib import Path

import numpy as np
import pytest

from dspark_jax.checkpoints.hf import read_checkpoint, write_checkpoint
from dspark_jax.cli.command import main
from dspark_jax.files import read_json, write_atomically, write_together
from tests import tiny_model


def test_what_is_written_replaces_what_was_there(tmp_path):
    path = tmp_path / "new" / "file"
    write_atomically(path, "ä")
    write_atomically(path, b"\xff")
    assert path.read_bytes() == b"\xff"
    assert list(path.parent.iterdir()) == [path]


def fill_disk(monkeypatch, after):
    """Let the disk have no room left for files after so many."""
    write = Path.write_bytes
    written = []

    def refuse(path, content):
        written.append(path)
        if len(written) > after:
            write(path, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", refuse)


def refuse_renames(monkeypatch):
    def refuse(path, target):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "replace", refuse)


@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk_leaves_what_was_there(after, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    write_together({first: "old", second: "old"})
    fill_disk(monkeypatch, after)
    with pytest.raises(OSError, match="No space left") as caught:
        write_together({first: "new", second: "new"})
    assert caught.value.filename == str((first, second)[after])
    assert [path.read_text() for path in (first, second)] == ["old", "old"]
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_a_rename_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    refuse_renames(monkeypatch)
    with pytest.raises(PermissionError) as caught:
        write_atomically(tmp_path / "file", "new")
    assert caught.value.filename == str(tmp_path / "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("after", [0, 1])
def test_a_checkpoint_is_replaced_whole_or_not_at_all(after, tmp_path, monkeypatch):
    write_checkpoint(tmp_path, {"a": 1}, {"x": np.zeros(2, np.float32)})
    with monkeypatch.context() as patch:
        fill_disk(patch, after)
        with pytest.raises(OSError, match="No space left"):
            write_checkpoint(tmp_path, {"a": 2}, {"x": np.ones(2, np.float32)})
    config, tensors = read_checkpoint(tmp_path, dict)
    assert config == {"a": 1}
    assert not tensors.read("x").any()
    assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of a target and its drafter."""
    root = tmp_path_factory.mktemp("models")
    return tiny_model.write_target(root / "target"), tiny_model.write_drafter(root / "drafter")


def test_a_command_says_a_full_disk_in_one_line(models, tmp_path, monkeypatch, capsys):
    target, drafter = map(str, models)
    fill_disk(monkeypatch, 0)
    out = tmp_path / "out"
    command = ["export", "--target", target, "--drafter", drafter]
    assert main([*command, "--format", "speculators", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "model.safetensors: No space left on device\n" in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_json_that_is_none_names_the_file(tmp_path):
    path = tmp_path / "profile.json"
    with pytest.raises(ValueError, match=r"cost profile .*profile\.json does not exist"):
        read_json(path, "cost profile")
    with pytest.raises(ValueError, match=r"is not readable: Is a directory"):
        read_json(tmp_path)
    path.write_bytes(b"<html></html>")
    with pytest.raises(ValueError, match=r"profile\.json is an HTML page"):
        read_json(path)
    path.write_bytes("{}".encode("utf-16"))
    assert read_json(path) == {}
