"""Training on cached features: the same run as with online ones, whole or in turns."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from dspark_jax.checkpoints import load
from dspark_jax.checkpoints.load import load_target
from dspark_jax.cli import command as cli
from dspark_jax.config import TrainConfig
from dspark_jax.models.vocab import Vocab
from dspark_jax.training import (
    cache_writer,
    data,
    features,
    fit,
    programs,
    run,
    step,
    utilisation,
    write_cache,
)
from dspark_jax.training.cache import BFLOAT16, INDEX, MANIFEST, CacheReader, CacheSpec
from dspark_jax.training.state import Frozen
from tests.tiny_model import TARGET, write_drafter, write_target

GOLDEN = Path(__file__).parent / "data" / "target_cache" / "cache"
ANSWERS = ("one two three", "abcabcabcabcabcabc", "yes yes yes")
STEPS = 12
PIECE_GB = 2e-5


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Batches of one or two buckets, ten an epoch; target and drafter in bfloat16."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        {
            "conversations": [
                {"role": "user", "content": f"say it {i}"},
                {"role": "assistant", "content": ANSWERS[i % 3]},
            ]
        }
        for i in range(20)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TrainConfig(
        target=str(write_target(folder / "target")),
        data=str(folder / "data.jsonl"),
        out=str(folder / "online"),
        num_layers=1,
        block_size=3,
        markov_rank=4,
        draft_vocab_size=40,
        target_layer_ids=(-1, 0),
        mask_token_id=TARGET.vocab_size - 1,
        max_length=32,
        length_buckets=(32,),
        tokens_per_batch=64,
        num_anchors=8,
        steps=STEPS,
        learning_rate=3e-3,
        eval_sequences=4,
        eval_every=6,
        log_every=1,
        dtype="bfloat16",
    )


@pytest.fixture(scope="module")
def written(recipe, tmp_path_factory):
    """A cache that two processes have written one after the other."""
    folder = tmp_path_factory.mktemp("cache") / "whole"
    assert not write_cache.write_cache(recipe, folder, process=1, processes=2)
    assert write_cache.write_cache(recipe, folder, process=0, processes=2)
    return folder


def run_of(drafter):
    """Weights and log of a run, but for its speed."""
    log = (drafter.parent / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) | {"blocks_per_s": 0, "tokens_per_s": 0} for line in log]
    return load_file(drafter / "model.safetensors"), rows


def assert_same_run(found, expected):
    for name, value in expected[0].items():
        np.testing.assert_array_equal(found[0][name], value, err_msg=name)
    assert found[1] == expected[1]


def bytes_in(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def files_in(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# A whole cache.


def test_cached_batches_are_online_batches(recipe, written):
    """All that the loss reads of the target is the same, bit for bit; the target is not asked."""
    recipe = dataclasses.replace(recipe, length_buckets=())
    target = load_target(recipe.target, jnp.bfloat16)
    cfg = run.drafter_config(recipe, target)
    frozen = Frozen(target.params, Vocab(None, None, np.arange(40)), None)
    outputs = jax.jit(partial(step.target_outputs, target_cfg=target.cfg, cfg=cfg))
    recipes = recipe, dataclasses.replace(recipe, cache=str(written), data="gone.jsonl")
    sets = [run.load_sequences(run.open_source(one), target, cfg, one)[0] for one in recipes]
    recipe, other = (data.with_buckets(recipe, sequences) for sequences in sets)
    assert other == recipe
    online, cached = (next(data.batches_from(sequences, recipe, 0)) for sequences in sets)
    expected, found = outputs(frozen, online), outputs(frozen, cached)
    assert (online.feature_BSFD, found[0].dtype) == (None, BFLOAT16)
    real_BS = np.cumsum(online.loss_mask_BS[:, ::-1], axis=1)[:, ::-1] > 0  # not the padding
    np.testing.assert_array_equal(cached.token_BS, online.token_BS)
    np.testing.assert_array_equal(cached.loss_mask_BS, online.loss_mask_BS)
    np.testing.assert_array_equal(found[0][real_BS], expected[0][real_BS])
    for name in ("hidden_BSD", "log_norm_BS"):
        arrays = (getattr(teacher, name)[real_BS] for _, teacher in (found, expected))
        np.testing.assert_array_equal(*arrays, err_msg=name)
    assert not cached.feature_BSFD[~real_BS].any()
    flops = [utilisation.step_flops(target.cfg, cfg, recipe, batch) for batch in (online, cached)]
    size, length = online.token_BS.shape
    layers = utilisation.target_flops(target.cfg, length, reduced=False, cached=False)
    assert flops[0] - flops[1] == size * layers


@pytest.mark.full
def test_cached_training_is_online_training(recipe, written, tmp_path):
    """The whole run, held-out sequences included."""
    online = run_of(fit.fit(dataclasses.replace(recipe, out=str(tmp_path / "online"))))
    settings = {"out": str(tmp_path / "c"), "cache": str(written), "data": "gone.jsonl"}
    assert_same_run(run_of(fit.fit(dataclasses.replace(recipe, **settings))), online)
    turns = {"out": str(tmp_path / "t"), "cache": str(tmp_path / "p"), "cache_gb": PIECE_GB}
    assert_same_run(run_of(fit.fit(dataclasses.replace(recipe, **turns))), online)


@pytest.mark.full
@pytest.mark.parametrize("cache_gb", [0.0, PIECE_GB])
def test_a_mesh_trains_on_a_cache(recipe, written, tmp_path, emulated_devices, cache_gb):
    """Whole or in turns, held-out sequences included: nearly what one device computes."""
    cache = str(tmp_path / "piece" if cache_gb else written)
    few = dataclasses.replace(recipe, steps=2, eval_every=2, cache=cache, cache_gb=cache_gb)
    mesh = {"data_parallel": 2, "tensor_parallel": 2}
    logs = [
        run_of(fit.fit(dataclasses.replace(few, out=str(tmp_path / name), **sizes)))[1]
        for name, sizes in (("one", {}), ("mesh", mesh))
    ]
    assert [row.get("split") for row in logs[1]] == [None, None, "held-out"]
    for row, expected in zip(logs[1], logs[0], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=2e-3)


def test_a_whole_cache_is_left_as_it_is(recipe, written):
    before = files_in(written)
    assert write_cache.write_cache(recipe, written)
    assert files_in(written) == before


def test_a_killed_write_goes_on_to_the_same_cache(recipe, written, tmp_path, monkeypatch):
    """Killed while its third batch is read; the batches before are not read again."""
    target_reader, calls = write_cache.target_reader, []

    def fragile_reader(*arguments):
        read = target_reader(*arguments)

        def count(token_BS):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return read(token_BS)

        return count

    monkeypatch.setattr(write_cache, "target_reader", fragile_reader)
    with pytest.raises(KeyboardInterrupt):
        write_cache.write_cache(recipe, tmp_path, 0, 2)
    assert not write_cache.write_cache(recipe, tmp_path, 0, 2)
    assert write_cache.write_cache(recipe, tmp_path, 1, 2)
    assert len(calls) == 1 + 2 * 5
    assert files_in(tmp_path) == files_in(written)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_layer_ids": (0,)}, r"target_layer_ids \(-1, 0\), but the configuration has \(0,"),
        ({"eval_sequences": 20}, "20 usable conversations"),
        ({"cache_gb": 1.0}, "holds a whole cache: set cache_gb to 0"),
        ({"cache": "nowhere"}, "nowhere is no target cache"),
    ],
)
def test_a_cache_that_does_not_suit_is_refused(recipe, written, tmp_path, changes, message):
    settings = {"cache": str(written), "out": str(tmp_path / "out")} | changes
    with pytest.raises(ValueError, match=message):
        fit.fit(dataclasses.replace(recipe, **settings))
    assert not (tmp_path / "out").exists()


def test_a_cache_of_another_target_or_other_data_is_refused(recipe, written, tmp_path):
    manifest = json.loads((written / MANIFEST).read_text())
    (tmp_path / "cache").mkdir()
    for path in written.iterdir():
        (tmp_path / "cache" / path.name).symlink_to(path)
    other = manifest | {"target_model_name_or_path": "other/model"}
    (tmp_path / "cache" / MANIFEST).unlink()
    (tmp_path / "cache" / MANIFEST).write_text(json.dumps(other))
    with pytest.raises(ValueError, match="written with target other/model, but the config"):
        fit.fit(dataclasses.replace(recipe, out=str(tmp_path), cache=str(tmp_path / "cache")))
    fewer = dataclasses.replace(recipe, min_loss_tokens=15)
    with pytest.raises(ValueError, match="cache of 20 samples, but the data has 7"):
        write_cache.write_cache(fewer, written)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_gb": 1.0}, "cache_gb is 1.0, but cache is empty"),
        ({"cache": "c", "cache_gb": -1.0}, "cache_gb is -1.0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(recipe, **changes)


# Another's cache: masks with gaps, long and short samples.


def test_samples_of_a_foreign_cache_as_sequences_and_batches():
    recipe = TrainConfig(max_length=12, length_buckets=(12,), min_loss_tokens=5)
    reader = CacheReader(GOLDEN)
    sequences, dropped = features.cached_sequences(reader, 200, recipe)
    assert dropped == 3
    assert [len(sequence.token_S) for sequence in sequences] == [12, 12, 12]
    assert [int(sequence.loss_mask_S.argmax()) for sequence in sequences] == [1, 2, 2]
    assert [len(sequence.token_S) for sequence in sequences[1:]] == [12, 12]
    batch = data.make_batch(sequences, [2, 0], 14, 3)
    for row, sample in ((0, reader[5]), (1, reader[1])):
        np.testing.assert_array_equal(batch.token_BS[row, :12], sample.token_S[:12])
        np.testing.assert_array_equal(batch.loss_mask_BS[row, :12], sample.loss_mask_S[:12])
        np.testing.assert_array_equal(batch.feature_BSFD[row, :12], sample.feature_SFD[:12])
        np.testing.assert_array_equal(batch.hidden_BSD[row, :12], sample.hidden_SD[:12])
    assert (batch.loss_mask_BS.dtype, batch.feature_BSFD.dtype) == (bool, BFLOAT16)
    for array in (batch.token_BS, batch.loss_mask_BS, batch.feature_BSFD, batch.hidden_BSD):
        assert array.shape[:2] == (3, 14)
        assert not array[:, 12:].any()
        assert not array[2].any()
    with pytest.raises(ValueError, match=r"has the token \d+, but those of the target are 0\.\.49"):
        features.cached_sequences(reader, 50, recipe)


# In turns.

PIECE_SPEC = CacheSpec("some/target", (-1, 0), 16)


def fake_read(token_BS):
    """Features and hidden states that tell the token."""
    value_BS1 = token_BS[..., None].astype(BFLOAT16)
    hidden_BSD = np.repeat(value_BS1, 16, axis=-1)
    return -hidden_BSD, np.stack([hidden_BSD, hidden_BSD], axis=2)


def some_sequences(count=16):
    random = np.random.default_rng(0)
    tokens = [random.integers(1, 99, random.integers(9, 33)).astype(np.int32) for _ in range(count)]
    return [data.TokenSequence(token_S, np.arange(len(token_S)) >= 4) for token_S in tokens]


def deleted_but_mapped(folder):
    """Files that still take room on the disk; none where the system does not tell."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return [line for line in lines if str(folder) in line and "(deleted)" in line]


@pytest.fixture
def sizes(tmp_path, monkeypatch):
    """Bytes in the directory whenever something was written, and how many pieces there were."""
    seen, pieces = [], []

    def watch(owner, name):
        function = getattr(owner, name)

        def watched(*arguments, **options):
            result = function(*arguments, **options)
            seen.append(bytes_in(tmp_path))
            assert not deleted_but_mapped(tmp_path)
            return result

        monkeypatch.setattr(owner, name, watched)

    watch(features.CacheWriter, "add")
    watch(cache_writer, "write_atomically")
    watch(Path, "replace")
    finish = features.finish
    monkeypatch.setattr(features, "finish", lambda *a: pieces.append(1) or finish(*a))
    return seen, pieces


@pytest.mark.parametrize(("cache_gb", "num_pieces"), [(1.2e-5, 9), (PIECE_GB, 5), (1.0, 1)])
def test_turns_keep_the_order_and_their_bytes(recipe, tmp_path, sizes, cache_gb, num_pieces):
    recipe = dataclasses.replace(recipe, cache=str(tmp_path), cache_gb=cache_gb)
    sequences, start, end = some_sequences(), 3, 20
    turns = features.bounded_batches(sequences, recipe, range(start, end), PIECE_SPEC, fake_read)
    plain = data.batches_from(sequences, recipe, start)
    seen_steps = 0
    for seen_steps, batch in enumerate(turns, 1):  # noqa: B007
        expected = next(plain)
        np.testing.assert_array_equal(batch.token_BS, expected.token_BS)
        np.testing.assert_array_equal(batch.loss_mask_BS, expected.loss_mask_BS)
        np.testing.assert_array_equal(batch.hidden_BSD[..., 3], -expected.token_BS)
        np.testing.assert_array_equal(batch.feature_BSFD[..., 1, 5], expected.token_BS)
        assert bytes_in(tmp_path) <= cache_gb * 1e9
    assert seen_steps == end - start
    seen, pieces = sizes
    assert max(seen) <= cache_gb * 1e9
    assert len(pieces) == num_pieces
    if num_pieces > 1:
        assert max(seen) > 0.6 * cache_gb * 1e9
    assert not any(tmp_path.iterdir())


def test_turns_write_a_piece_again_that_a_killed_run_left(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, cache=str(tmp_path), cache_gb=PIECE_GB)
    arguments = some_sequences(), recipe, range(4), PIECE_SPEC, fake_read
    (tmp_path / "piece-0").mkdir()
    for name in (MANIFEST, INDEX, "shard-00000.bin"):
        (tmp_path / "piece-0" / name).write_bytes((GOLDEN / name).read_bytes())
    assert len(list(features.bounded_batches(*arguments))) == 4
    stopped = features.bounded_batches(*arguments)
    next(stopped)
    assert (tmp_path / "piece-0").exists()
    stopped.close()
    assert not any(tmp_path.iterdir())


def test_a_batch_that_does_not_fit_is_an_error(recipe, tmp_path):
    recipe = dataclasses.replace(recipe, cache=str(tmp_path), cache_gb=1e-6)
    turns = features.bounded_batches(some_sequences(), recipe, range(4), PIECE_SPEC, fake_read)
    with pytest.raises(ValueError, match=r"cache_gb is 1e-06, but a batch takes [\d.e-]+ GB"):
        next(turns)


def check_sum(array):
    """A number that depends on every bit and its place."""
    bits = jax.lax.bitcast_convert_type(array, jnp.uint16).ravel().astype(jnp.uint32)
    return (bits * (1 + jnp.arange(bits.size, dtype=jnp.uint32))).sum()


def test_training_in_turns_sees_what_training_on_a_whole_cache_sees(
    recipe, written, tmp_path, sizes, monkeypatch
):
    """Whole runs whose step is traced, but logs its batches instead of being compiled."""
    train_step = programs.train_step

    def log_batch(state, frozen, batch, **static):
        jax.eval_shape(partial(train_step, **static), state, frozen, batch)
        arrays = {"feature": batch.feature_BSFD, "hidden": batch.hidden_BSD}
        sums = {name: check_sum(array) for name, array in arrays.items()}
        names = ("loss", "accepted_length", "blocks", "tokens", "finite_updates")
        ones = dict.fromkeys(names, 1.0)
        return state, {**ones, **sums}

    monkeypatch.setattr(programs, "train_step", log_batch)
    drafter = str(write_drafter(tmp_path / "drafter"))
    changes = {"init_drafter": drafter, "draft_vocab_size": 0, "eval_sequences": 0}
    quick = dataclasses.replace(recipe, seed=1, **changes)
    whole = {"out": str(tmp_path / "whole"), "cache": str(written), "data": "gone.jsonl"}
    turns = {"out": str(tmp_path / "turns"), "cache": str(tmp_path / "c"), "cache_gb": PIECE_GB}
    logs = [run_of(fit.fit(dataclasses.replace(quick, **mode)))[1] for mode in (whole, turns)]
    assert logs[0] == logs[1]
    assert len({row["feature"] for row in logs[0]}) == len(logs[0]) == STEPS
    assert len(sizes[1]) > 3


@pytest.mark.full
def test_float32_training_on_a_cache_is_close(recipe, tmp_path):
    exact = dataclasses.replace(recipe, dtype="float32", out=str(tmp_path / "online"))
    write_cache.write_cache(exact, tmp_path / "cache")
    rounded = {"out": str(tmp_path / "cached"), "cache": str(tmp_path / "cache")}
    weights, log = run_of(fit.fit(exact))
    near_weights, near_log = run_of(fit.fit(dataclasses.replace(exact, **rounded)))
    assert any((near_weights[name] != value).any() for name, value in weights.items())
    for row, near in zip(log, near_log, strict=True):
        assert near["loss"] == pytest.approx(row["loss"], rel=2e-3)


# The command.


def test_the_command_says_how_large_a_cache_is_writes_and_checks_it(
    recipe, tmp_path, capsys, monkeypatch
):
    config = tmp_path / "config.py"
    config.write_text(f"from dspark_jax.config import TrainConfig\nconfig = {recipe!r}\n")
    folder = tmp_path / "cache"

    def dspark(*words):
        code = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    with monkeypatch.context() as patch:
        patch.setattr(load, "read_hf_weights", "unread".index)  # sizes need no weights
        code, out, _ = dspark("cache", "estimate", config, "--set", "min_loss_tokens=15")
    assert code == 0
    assert not folder.exists()
    words = ("cache", "write", config, "--out", folder, "--set", "length_buckets=", "--set")
    words = (*words, "min_loss_tokens=15")
    assert dspark(*words)[:2] == (0, f"{folder}\n")
    size = bytes_in(folder) - (folder / MANIFEST).stat().st_size
    assert out.startswith(f"{size} bytes (0.000 GB) for 7 sequences, ")
    code, out, _ = dspark("cache", "check", folder)
    assert code == 0
    assert out.startswith(f"{folder}: 7 samples, ")
    assert out.endswith(f" {size} bytes, layers -1,0 of {recipe.target}\n")
    code, _, err = dspark(*words[:-1], "min_loss_tokens=15", "--process", 1)
    assert (code, "process 1 must lie in 0..0" in err) == (2, True)
    assert dspark("cache", "check", tmp_path)[0] == 2
