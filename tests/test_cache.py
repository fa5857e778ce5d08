"""Target caches: the recorded one, damaged ones, several writers, and writers that were killed."""

import contextlib
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from dspark_jax.training.cache import (
    BFLOAT16,
    INDEX,
    MANIFEST,
    RECORD,
    CacheReader,
    CacheSpec,
    check_values,
    estimate,
)
from dspark_jax.training.cache_writer import CacheWriter, finish, is_complete, part_folder

DATA = Path(__file__).parent / "data" / "target_cache"
GOLDEN = DATA / "cache"
MANIFEST_OF_GOLDEN = json.loads((GOLDEN / MANIFEST).read_text())
NOTES = ("chat_template", "exp_name", "git_sha", "max_length", "min_loss_tokens", "project_name")
SPEC = CacheSpec(
    target="tiny/random-target",
    layer_ids=(1, 3, 5),
    hidden_size=16,
    notes={key: MANIFEST_OF_GOLDEN[key] for key in (*NOTES, "source_jsonl_paths")},
)
LENGTHS = (7, 12, 5, 20, 9, 14)


@pytest.fixture(scope="module")
def expected():
    return np.load(DATA / "expected.npz")


def sample_of(expected, number):
    names = (
        "input_ids",
        "loss_mask",
        "source_target_hidden_states",
        "target_last_hidden_states",
    )
    return [expected[f"sample_{number}/{name}"] for name in names]


def write_part(directory, expected, rank, world=2, numbers=None):
    with CacheWriter(directory, SPEC, rank, world, max_shard_bytes=2400) as writer:
        for number in range(3 * rank, 3 * rank + 3) if numbers is None else numbers:
            if number not in writer.stored:
                writer.add(number, *sample_of(expected, number))


def files_of(directory):
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def damaged(tmp_path):
    return Path(shutil.copytree(GOLDEN, tmp_path / "cache"))


# The recorded cache.


def test_the_recorded_cache_is_decoded(expected):
    reader = CacheReader(GOLDEN)
    assert len(reader) == len(LENGTHS)
    assert reader.spec == dataclasses.replace(SPEC, notes={})
    records = np.array([list(record) for record in reader.record_N.tolist()])
    np.testing.assert_array_equal(records, expected["index_records"])
    for number, length in enumerate(LENGTHS):
        sample, name = reader[number], f"sample_{number}"
        np.testing.assert_array_equal(sample.token_S, expected[f"{name}/input_ids"])
        np.testing.assert_array_equal(sample.loss_mask_S, expected[f"{name}/loss_mask"])
        assert sample.feature_SFD.shape == (length, 3, 16)
        for found, key in (
            (sample.feature_SFD.reshape(length, -1), "target_hidden_states"),
            (sample.hidden_SD, "target_last_hidden_states"),
        ):
            assert found.dtype == BFLOAT16
            np.testing.assert_array_equal(found.astype(np.float32), expected[f"{name}/{key}"])
    assert list(check_values(reader)) == list(range(6))


def test_samples_are_views_of_the_mapped_files():
    for array in vars(CacheReader(GOLDEN)[1]).values():
        owner = array
        while isinstance(owner.base, np.ndarray):
            owner = owner.base
        assert isinstance(owner, np.memmap)
        assert not array.flags.writeable


def test_the_recorded_cache_is_written_byte_for_byte(expected, tmp_path):
    write_part(tmp_path, expected, 1)
    assert not finish(tmp_path, SPEC, 2)
    write_part(tmp_path, expected, 0)
    assert finish(tmp_path, SPEC, 2)
    assert files_of(tmp_path) == files_of(GOLDEN)


def test_the_estimate_is_what_is_written():
    written = sum(path.stat().st_size for path in GOLDEN.iterdir() if path.name != MANIFEST)
    assert estimate(sum(LENGTHS), len(LENGTHS), SPEC) == written
    assert CacheReader(GOLDEN).size_bytes == written


# What is refused on opening.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "version is 1, not 2"),
        ({"version": None}, "version is None, not 2"),
        ({"hidden_dtype": "float16"}, "hidden_dtype is 'float16', not 'bfloat16'"),
        ({"index_record_size": 48}, "index_record_size is 48"),
        ({"target_layer_ids": []}, "target_layer_ids is []"),
        ({"target_layer_ids": [1, "3"]}, "target_layer_ids is [1, '3']"),
        ({"hidden_size": "16"}, "hidden_size is '16'"),
        ({"num_samples": 7}, "records of 7 samples take 392"),
        ({"num_samples": -1}, "num_samples is -1"),
        ({"num_shards": 6}, "shards must name"),
        ({"num_shards": 4, "num_samples": 6}, "sample 5 lies in a shard"),
        ({"shards": 3}, "shards must name"),
        ({"shards": [{"shard_id": [], "file_name": "x"}]}, "shards must name"),
        ({"num_shards": 1, "shards": [{"shard_id": 0, "file_name": "../x"}]}, "'../x' is no file"),
        ({"num_shards": 1, "shards": [{"shard_id": 0, "file_name": "gone"}]}, "gone is missing"),
        ({"hidden_size": 17}, "is truncated"),
    ],
)
def test_a_foreign_manifest_is_refused(damaged, changes, message):
    (damaged / MANIFEST).write_text(json.dumps(MANIFEST_OF_GOLDEN | changes))
    with pytest.raises(ValueError, match=re.escape(message)):
        CacheReader(damaged)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\x00"])
def test_a_manifest_that_is_none_is_refused(damaged, text):
    (damaged / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        CacheReader(damaged)


def test_truncated_and_missing_files_are_refused(damaged):
    shard = damaged / "shard-00002.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(
        ValueError, match=r"shard-00002\.bin is truncated: it has 2679 bytes.*of sa"
    ):
        CacheReader(damaged)
    shard.unlink()
    with pytest.raises(ValueError, match=r"shard-00002\.bin is missing"):
        CacheReader(damaged)
    shard.write_bytes(whole)
    (damaged / INDEX).write_bytes((damaged / INDEX).read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"samples\.idx has 335 bytes"):
        CacheReader(damaged)
    (damaged / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"no target cache: it has no manifest\.json"):
        CacheReader(damaged)


@pytest.mark.parametrize("column", range(8))
@pytest.mark.parametrize("value", [2**64 - 1, 2**63, 0])
def test_no_index_leads_outside_the_shards(damaged, column, value):
    """Any number in place of any field is refused, or is a place within the shard."""
    reader = CacheReader(GOLDEN)
    record_N = reader.record_N.copy()
    name = record_N.dtype.names[column]
    record_N[name][3] = np.array(value, np.uint64).astype(record_N.dtype[name])
    record_N.tofile(damaged / INDEX)
    if value or name in ("sample_id", "shard_id", "seq_len"):
        with pytest.raises(ValueError, match=r"is truncated|is damaged: sample 3"):
            CacheReader(damaged)
    else:
        assert len(CacheReader(damaged)[3].token_S) == 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "other"}, "target tiny/random-target, but the configuration has other"),
        ({"layer_ids": (1, 3)}, "target_layer_ids (1, 3, 5), but the configuration has (1, 3)"),
        ({"hidden_size": 32}, "hidden_size 16, but the configuration has 32"),
        ({"notes": {"rendering": {"system": "be"}}}, "{}, but the configuration has {'system': "),
    ],
)
def test_a_cache_of_another_target_or_layers_is_refused(changes, message):
    CacheReader(GOLDEN).require(SPEC)
    with pytest.raises(ValueError, match=re.escape(message)):
        CacheReader(GOLDEN).require(dataclasses.replace(SPEC, **changes))


@pytest.mark.parametrize(
    ("array", "data", "message"),
    [
        (0, b"\xff\xff\xff\xff", "a negative token id"),
        (2, b"\x02", "neither 0 nor 1"),
        (3, b"\xc0\x7f", "features that are not finite"),
        (4, b"\x80\x7f", "hidden states that are not finite"),
    ],
)
def test_values_that_cannot_be_are_found(damaged, array, data, message):
    record = CacheReader(GOLDEN).record_N[2]
    path = damaged / "shard-00001.bin"
    content, start = bytearray(path.read_bytes()), int(record[3 + array])
    content[start : start + len(data)] = data
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"sample 2 has .*{message}"):
        list(check_values(CacheReader(damaged)))


def test_a_cache_without_answers_is_found(damaged):
    path = damaged / INDEX
    reader = CacheReader(GOLDEN)
    masks = {number: np.asarray(reader[number].loss_mask_S) for number in range(len(reader))}
    for number, record in enumerate(np.fromfile(path, RECORD)):
        shard = damaged / f"shard-{record['shard_id']:05d}.bin"
        content, start = bytearray(shard.read_bytes()), int(record[3 + 2])
        content[start : start + len(masks[number])] = bytes(len(masks[number]))
        shard.write_bytes(content)
    with pytest.raises(ValueError, match="two tokens of an answer in a row"):
        list(check_values(CacheReader(damaged)))


# Writers side by side.


def test_two_writers_at_once(expected, tmp_path):
    """Both publish as soon as they are done."""

    def work(rank):
        write_part(tmp_path, expected, rank)
        finish(tmp_path, SPEC, 2)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert finish(tmp_path, SPEC, 2)
    assert files_of(tmp_path) == files_of(GOLDEN)


def test_two_writers_of_one_part_are_refused(expected, tmp_path):
    with CacheWriter(tmp_path, SPEC) as writer:
        with pytest.raises(ValueError, match="another process"):
            CacheWriter(tmp_path, SPEC)
        writer.add(0, *sample_of(expected, 0))
        with pytest.raises(ValueError, match="sample 0 is empty or was written"):
            writer.add(0, *sample_of(expected, 0))
        with pytest.raises(ValueError, match="different lengths"):
            writer.add(1, *sample_of(expected, 1)[:3], np.zeros((5, 16)))
    assert finish(tmp_path, SPEC)
    assert len(CacheReader(tmp_path)) == 1


def test_a_part_without_samples_is_fine(expected, tmp_path):
    write_part(tmp_path, expected, 0, numbers=())
    write_part(tmp_path, expected, 1, numbers=range(6))
    assert finish(tmp_path, SPEC, 2)
    assert len(list(check_values(CacheReader(tmp_path)))) == 6


def test_a_missing_sample_is_noticed(expected, tmp_path):
    write_part(tmp_path, expected, 0, world=1, numbers=(0, 2))
    with pytest.raises(ValueError, match="lacks samples"):
        finish(tmp_path, SPEC)
    assert not (tmp_path / MANIFEST).exists()


# Writers that were killed.


def test_a_killed_writer_leaves_no_cache_and_goes_on(expected, tmp_path):
    """kill -9 of a real process, behind its second sample."""
    write_part(tmp_path, expected, 1)
    code = (
        "import os, sys; from pathlib import Path; import numpy as np\n"
        "from tests.test_cache import CacheWriter, DATA, SPEC, sample_of\n"
        "expected = np.load(DATA / 'expected.npz')\n"
        "writer = CacheWriter(Path(sys.argv[1]), SPEC, 0, 2, max_shard_bytes=2400)\n"
        "for number in range(2): writer.add(number, *sample_of(expected, number))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parent.parent, timeout=100
    )
    assert killed.returncode == -9
    assert not finish(tmp_path, SPEC, 2)
    with pytest.raises(ValueError, match="no target cache"):
        CacheReader(tmp_path)
    write_part(tmp_path, expected, 0)
    assert finish(tmp_path, SPEC, 2)
    assert files_of(tmp_path) == files_of(GOLDEN)


@pytest.mark.parametrize("shard_lost", [0, 1, 2000])
@pytest.mark.parametrize("index_lost", [0, 1, 56, 100])
def test_torn_files_of_a_part_are_cut(expected, tmp_path, shard_lost, index_lost):
    """Whatever was lost at the end of either file, the part goes on from what is whole."""
    with contextlib.suppress(ZeroDivisionError), CacheWriter(tmp_path, SPEC, 0, 2, 2400) as writer:
        for number in range(3):
            writer.add(number, *sample_of(expected, number))
        1 / 0  # noqa: B018
    assert not is_complete(tmp_path, 0, 2)
    for name, lost in (("shard-00001.bin", shard_lost), (INDEX, index_lost)):
        path = part_folder(tmp_path, 0, 2) / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size - lost])
    for rank in range(2):
        write_part(tmp_path, expected, rank)
    assert finish(tmp_path, SPEC, 2)
    assert files_of(tmp_path) == files_of(GOLDEN)


@pytest.mark.parametrize("steps", range(8))
def test_publishing_that_is_killed_anywhere_is_repeated(expected, tmp_path, monkeypatch, steps):
    """Five shards are moved, then index and manifest; until then there is no cache."""
    for rank in range(2):
        write_part(tmp_path, expected, rank)
    replace, done = Path.replace, []

    def replace_or_die(source, goal):
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(goal)
        return replace(source, goal)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_or_die)
        if steps < 7:
            with pytest.raises(KeyboardInterrupt):
                finish(tmp_path, SPEC, 2)
            with pytest.raises(ValueError, match="no target cache"):
                CacheReader(tmp_path)
            with pytest.raises(ValueError, match="written already"):
                CacheWriter(tmp_path, SPEC, 0, 2)
        else:
            assert finish(tmp_path, SPEC, 2)
    assert finish(tmp_path, SPEC, 2)
    assert files_of(tmp_path) == files_of(GOLDEN)


def test_beginnings_of_another_cache_are_refused(expected, tmp_path):
    write_part(tmp_path, expected, 0)
    other = dataclasses.replace(SPEC, layer_ids=(1, 3, 4))
    for spec, world in ((other, 2), (SPEC, 3)):
        with pytest.raises(ValueError, match="unfinished cache of another configuration"):
            CacheWriter(tmp_path, spec, 1, world)
    write_part(tmp_path, expected, 1)
    with pytest.raises(ValueError, match="unfinished cache of another configuration"):
        finish(tmp_path, other, 2)
    assert finish(tmp_path, SPEC, 2)
    with pytest.raises(ValueError, match="written already"):
        CacheWriter(tmp_path, SPEC)
