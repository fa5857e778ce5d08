"""Which files of a directory hold the weights, and what is said of those that do not."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dspark_jax.checkpoints.hf import load_hf_target
from dspark_jax.checkpoints.tensors import LoadError

SOURCE = Path(__file__).parent / "data" / "hf_targets" / "llama_tied" / "checkpoint"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1f\nsize 5\n"
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def whole():
    """The weights as they lie in one file."""
    return load_hf_target(SOURCE, jnp.float32)[1]


@pytest.fixture
def directory(tmp_path):
    """A copy of the checkpoint, to be changed."""
    return Path(shutil.copytree(SOURCE, tmp_path / "target"))


def refusal(source):
    """The message with which a target is refused: one line, an error of our own."""
    with pytest.raises(LoadError) as caught:
        load_hf_target(source, jnp.float32)
    message = str(caught.value)
    assert "\n" not in message
    assert str(source) in message
    return message


def assert_whole(source, whole):
    _, params = load_hf_target(source, jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, params, whole)


def shard(directory):
    """Split the file into two, with an index; returns which tensor lies where."""
    tensors = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    places = {name: SHARDS[index % 2] for index, name in enumerate(tensors)}
    for file in SHARDS:
        part = {name: value for name, value in tensors.items() if places[name] == file}
        save_file(part, directory / file)
    write_index(directory, places)
    return places


def write_index(directory, places):
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.smoke
def test_shards_give_the_same_weights_as_one_file(directory, whole):
    places = shard(directory)
    assert_whole(directory, whole)
    write_index(directory, {name: SHARDS[file == SHARDS[0]] for name, file in places.items()})
    assert_whole(directory, whole)  # an index that names the other of the two
    (directory / INDEX).unlink()
    assert_whole(directory, whole)


def test_a_whole_file_beside_an_index_of_absent_shards_is_used(directory, whole, caplog):
    write_index(directory, dict.fromkeys(load_file(directory / WEIGHTS), SHARDS[0]))
    assert_whole(directory, whole)
    assert f"{INDEX} is not used: {WEIGHTS} holds the model" in caplog.text


def test_a_shard_under_another_name_is_found(directory, whole, caplog):
    shard(directory)
    (directory / SHARDS[1]).rename(directory / "model-2.safetensors")
    assert_whole(directory, whole)
    assert f"names {SHARDS[1]}, which is not there: model-2.safetensors holds" in caplog.text


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "pytorch_model.safetensors"])
def test_the_only_file_is_used_whatever_it_is_called(name, directory, whole, caplog):
    (directory / WEIGHTS).rename(directory / name)
    assert_whole(directory, whole)
    assert f"{name} is taken for {WEIGHTS}" in caplog.text
    shutil.copy(directory / name, directory / "second.safetensors")
    assert f"might be meant ({name}, second.safetensors)" in refusal(directory)


def test_files_that_hold_the_same_under_other_names_are_left_alone(directory, whole):
    for name in ("consolidated.safetensors", "adapter_model.safetensors", ".part.safetensors"):
        (directory / name).write_bytes(b"not even looked at")
    assert_whole(directory, whole)


def test_incomplete_shards_are_refused(directory):
    places = shard(directory)
    (directory / SHARDS[1]).unlink()
    assert f"{SHARDS[1]}: no such file, but {INDEX} names it" in refusal(directory)
    (directory / INDEX).unlink()
    assert "1 of 2 shards are there" in refusal(directory)
    for file in (f"../target/{SHARDS[0]}", "/etc/passwd", "", "..", "part.bin"):
        write_index(directory, places | {"x": file})
        assert f"{file!r} is not the plain name of a safetensors file" in refusal(directory)
    (directory / INDEX).write_text('{"weight_map": ["x"]}')
    assert "weight_map must map" in refusal(directory)


def test_a_tensor_in_two_shards_is_that_which_the_index_names(directory, whole):
    places = shard(directory)
    name = next(name for name, file in places.items() if file == SHARDS[0])
    other = load_file(directory / SHARDS[1])
    other[name] = load_file(directory / SHARDS[0])[name] + 1
    save_file(other, directory / SHARDS[1])
    assert_whole(directory, whole)
    (directory / INDEX).unlink()
    assert f"both hold {name}" in refusal(directory)


def test_links_as_in_the_cache_of_the_hub_are_followed(directory, whole):
    shard(directory)
    snapshot = directory / "snapshots" / "1f"
    snapshot.mkdir(parents=True)
    (directory / "blobs").mkdir()
    for number, path in enumerate([path for path in directory.iterdir() if path.is_file()]):
        path.rename(directory / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert_whole(snapshot, whole)
    assert "snapshots is a folder of the hub's cache: name a directory in it" in refusal(directory)
    shutil.rmtree(directory / "blobs")
    assert "config.json: a link to ../../blobs/" in refusal(snapshot)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pytorch_model.bin", "pickled, and not read: convert it to safetensors"),
        ("consolidated.00.pth", "pickled, and not read"),
        ("model-Q4_K.gguf", "model-Q4_K.gguf is a GGUF file: name it itself"),
        ("consolidated.safetensors", "another layout"),
        ("adapter_model.safetensors", "an adapter: merge it"),
        ("notes.txt", "is this a model directory"),
    ],
)
def test_what_lies_there_in_place_of_weights_is_named(name, expected, directory):
    (directory / WEIGHTS).rename(directory / name)
    assert expected in refusal(directory)
    (directory / "config.json").unlink()
    message = refusal(directory)
    assert "config.json: no such file" in message
    assert expected in message


def header(**entries):
    """A safetensors file of nothing but this header and a few bytes."""
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(12)


CONTENTS = {
    "nothing": (b"", "broken or truncated"),
    "half": (SOURCE.joinpath(WEIGHTS).read_bytes()[:50_000], "broken or truncated"),
    "a header beyond the file": ((2**60).to_bytes(8, "little") + b"{}", "broken or truncated"),
    "a header of text": ((5).to_bytes(8, "little") + b"hello", "broken or truncated"),
    "overlapping tensors": (
        header(
            a={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            b={"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        ),
        "broken or truncated",
    ),
    "sizes beyond numbers": (
        header(a={"dtype": "F32", "shape": [2**63, 2**63], "data_offsets": [0, 12]}),
        "broken or truncated",
    ),
    "a pointer": (POINTER, "a Git LFS pointer, not the file: fetch it with `git lfs pull`"),
    "a page": (b"<!DOCTYPE html><html></html>", "an HTML page"),
    "an archive": (b"PK\x03\x04" + bytes(90), "a zip archive"),
    "a GGUF file": (b"GGUF" + bytes(90), "a GGUF file"),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_files_that_are_no_safetensors_are_named(case, directory):
    content, expected = CONTENTS[case]
    (directory / WEIGHTS).write_bytes(content)
    message = refusal(directory)
    assert expected in message
    assert WEIGHTS in message


INTEGERS = np.zeros((96, 48), np.int8)
QUANTISED = {
    "GPTQ or AWQ": {"qweight": np.zeros((6, 96), np.int32), "qzeros": np.zeros((1, 12), np.int32)},
    "bitsandbytes": {"weight": INTEGERS, "SCB": np.ones(96, np.float32)},
    "(fp8)": {
        "weight": np.zeros((96, 48), ml_dtypes.float8_e4m3fn),
        "weight_scale_inv": np.ones((1, 1), np.float32),
    },
    "compressed-tensors": {"weight_packed": np.zeros((96, 6), np.int32)},
    "has dtype int8, but weights must be floats": {"weight": INTEGERS},
}


@pytest.mark.parametrize("expected", QUANTISED)
def test_tensors_of_quantised_weights_are_named(expected, directory):
    tensors = load_file(directory / WEIGHTS)
    del tensors[f"{LAYER}.weight"]
    tensors |= {f"{LAYER}.{name}": value for name, value in QUANTISED[expected].items()}
    save_file(tensors, directory / WEIGHTS)
    message = refusal(directory)
    assert expected in message
    assert LAYER in message
    assert "take the unquantised checkpoint" in message


def test_a_kind_of_numbers_that_nobody_knows_is_named(directory):
    entry = {"dtype": "F4", "shape": [24], "data_offsets": [0, 12]}
    (directory / WEIGHTS).write_bytes(header(a=entry))
    assert "a has dtype F4" in refusal(directory)


CONFIG = (SOURCE / "config.json").read_text()
TEXTS = {
    "UTF-8 with a mark": CONFIG.encode("utf-8-sig"),
    "UTF-16": CONFIG.encode("utf-16"),
    "UTF-16 without a mark": CONFIG.encode("utf-16-be"),
    "a key said twice": CONFIG.replace("{", '{"hidden_size": 7,', 1).encode(),
}


@pytest.mark.parametrize("case", TEXTS)
def test_configurations_in_any_unicode_are_read(case, directory, whole):
    (directory / "config.json").write_bytes(TEXTS[case])
    assert_whole(directory, whole)


NO_CONFIG = {
    "bytes that are no UTF-8": CONFIG.encode()[:-3] + b', "x": "\xff"}',
    "comments": b"// tiny\n" + CONFIG.encode(),
    "a list": b"[]",
    "nothing": b"",
    "deep nesting": b"[" * 100_000,
    "a number of many digits": b'{"vocab_size": ' + b"9" * 5000 + b"}",
    "no finite number": b'{"model_type": "llama", "rms_norm_eps": NaN}',
    "a pointer": POINTER,
}


@pytest.mark.parametrize("case", NO_CONFIG)
def test_configurations_that_are_none_are_refused(case, directory):
    (directory / "config.json").write_bytes(NO_CONFIG[case])
    assert "config.json" in refusal(directory)
    (directory / "config.json").unlink()
    (directory / "config.json").mkdir()
    assert "config.json" in refusal(directory)
