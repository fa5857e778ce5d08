"""Training over a mesh of devices: the same losses, and a share of the weights on each."""

import dataclasses
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dspark_jax.axes import declared_shardings, make_mesh, partition
from dspark_jax.checkpoints.conversations import read_answered
from dspark_jax.checkpoints.load import load_target
from dspark_jax.config import TrainConfig
from dspark_jax.models.targets.llama import declare as declare_target
from dspark_jax.overrides import override
from dspark_jax.training import data, fit, run
from tests.tiny_model import TARGET, write_letters, write_target

# What the tiny target has too few of, and an odd number of.
SHARED = dataclasses.replace(TARGET, num_kv_heads=2, vocab_size=128)
MESHES = {
    "data": {"data_parallel": 8},
    "fsdp": {"fsdp": 8},
    "all": {"data_parallel": 2, "fsdp": 2, "tensor_parallel": 2, "micro_batches": 2},
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Twenty steps of eight sequences, over a whole vocabulary that eight devices can share."""
    folder = tmp_path_factory.mktemp("sharded")
    data = write_letters(folder / "data.jsonl", 40)
    return TrainConfig(
        target=str(write_target(folder / "target", SHARED)),
        data=str(data),
        out=str(folder / "one"),
        num_layers=1,
        block_size=3,
        markov_rank=8,
        target_layer_ids=(-1, 0),
        max_length=48,
        length_buckets=(48,),
        tokens_per_batch=8 * 48,
        num_anchors=4,
        steps=20,
        learning_rate=3e-3,
        eval_sequences=8,
        eval_every=20,
        log_every=1,
    )


@pytest.fixture(scope="module")
def expected(recipe):
    return losses_of(recipe)


def losses_of(recipe):
    fit.fit(recipe)
    return read_losses(Path(recipe.out))


def read_losses(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    keys = ("loss", "ce", "l1", "confidence", "accepted_length", "gradient_norm")
    return [[row.get(key, 0.0) for key in keys] for row in map(json.loads, lines)]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("data", marks=pytest.mark.full),
        pytest.param("fsdp", marks=pytest.mark.full),
        "all",
    ],
)
def test_a_mesh_changes_no_loss(recipe, expected, tmp_path, emulated_devices, name):
    found = losses_of(dataclasses.replace(recipe, out=str(tmp_path), **MESHES[name]))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("method", ["eagle3", "mtp", "medusa", "blockwise", "early_exit"])
def test_a_mesh_changes_no_loss_of_other_methods(recipe, tmp_path, emulated_devices, method):
    lacks = {"markov_rank": 0, "confidence": False, "ce_weight": 0.0, "l1_weight": 0.0}
    lacks |= {"method": method, "soft_weight": 1.0, "num_anchors": 48}
    one = dataclasses.replace(recipe, **lacks, out=str(tmp_path / "one"))
    expected = losses_of(one)
    found = losses_of(dataclasses.replace(one, out=str(tmp_path / "all"), **MESHES["all"]))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [pytest.param("fsdp", marks=pytest.mark.full), "all"])
def test_devices_exchange_weights_and_gradients_but_no_logits(recipe, emulated_devices, name):
    """What the compiler's collectives carry along a (share of the) vocabulary is never wider than
    a weight; and the vocabulary stays shared out, but for the one table that all devices hold."""
    mesh = dataclasses.replace(recipe, **MESHES[name])
    ready = run.start_run(mesh, read_answered(mesh.data))
    batch = next(data.batches_from(ready.train_set, ready.recipe, 0))
    compiled = ready.programs.step.lower(ready.state, ready.frozen, batch, ready.rate).compile()
    share = SHARED.vocab_size // mesh.tensor_parallel
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    results = re.findall(rf"= (.*?) (?:{kinds})\(", compiled.as_text())
    shapes = [
        [int(size) for size in sizes.split(",")]
        for result in results
        for sizes in re.findall(r"\[([\d,]+)\]", result)
    ]
    assert len(shapes) > 20
    vocabulary = [sizes for sizes in shapes if {SHARED.vocab_size, share} & set(sizes)]
    assert vocabulary  # the LM head is gathered over fsdp
    for sizes in vocabulary:
        assert share in sizes or sizes[-1] <= recipe.markov_rank
        assert math.prod(sizes) <= share * SHARED.hidden_size, sizes


def test_the_optimisers_state_is_shared_out_under_fsdp(recipe, emulated_devices):
    def bytes_per_device(recipe):
        state = run.start_run(recipe, read_answered(recipe.data)).state
        leaves = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)

    whole = bytes_per_device(recipe)
    shared = bytes_per_device(dataclasses.replace(recipe, fsdp=8))
    # All but the norms of query and key and one bias, whose axes no rule names.
    assert whole / 8 <= shared < whole / 8 * 1.03


def test_the_targets_weights_are_read_onto_the_mesh(recipe, emulated_devices):
    expected, mesh = load_target(recipe.target).params, make_mesh(data=2, tensor=2, fsdp=2)
    found = load_target(recipe.target, mesh=mesh).params
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    shardings = declared_shardings(declare_target(SHARED), mesh)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, found, shardings)))
    frozen = run.start_run(
        dataclasses.replace(recipe, **MESHES["all"]), read_answered(recipe.data)
    ).frozen
    q_LDNH = frozen.target.layers[0].q_DNH
    assert q_LDNH.addressable_shards[0].data.nbytes == q_LDNH.nbytes / 4


def test_axes_that_share_a_mesh_axis_and_axes_that_do_not_divide(emulated_devices):
    mesh = make_mesh(data=2, tensor=2, fsdp=2)
    assert partition("BX", (8, 3), mesh) == PartitionSpec(("data", "fsdp"), None)
    assert partition("DNH", (16, 4, 8), mesh) == PartitionSpec(("fsdp",), ("tensor",), None)
    assert partition("VR", (97, 8), mesh) == PartitionSpec(None, ("fsdp",))
    assert partition("BD", (2, 16), mesh) == PartitionSpec(None, ("fsdp",))


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("data_parallel=3", r"data_parallel 3 x fsdp 1 must divide the 8 sequences"),
        ("tokens_per_batch=432", r"2 x fsdp 1 must divide the 9 sequences of a batch"),
        ("micro_batches=3", r"micro_batches 3 must divide the 8 sequences"),
        ("fsdp=0", r"fsdp 0 must be an integer in 1\.\.2"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(recipe, setting, expected):
    with pytest.raises(ValueError, match=expected):
        override(dataclasses.replace(recipe, data_parallel=2), [setting])


def test_more_devices_than_there_are(recipe, emulated_devices):
    many = dataclasses.replace(recipe, tokens_per_batch=64 * 48, fsdp=64)
    with pytest.raises(ValueError, match=r"fsdp=64 .* needs 64 devices, but 8 are here"):
        run.start_run(many, read_answered(many.data))


@pytest.mark.full
@pytest.mark.parametrize("cached", [False, True])
def test_two_processes_of_four_devices(recipe, expected, tmp_path, cached):
    """The command itself, once for each process; with all that is made of the target at first."""
    if cached:
        changes = {"cache_gb": 5e-5, "draft_vocab_size": 40, "local_init": True}
        one = {"cache": str(tmp_path / "cache-of-one"), "out": str(tmp_path / "one")}
        recipe = dataclasses.replace(recipe, **changes, **one)
        expected = losses_of(recipe)
    config = tmp_path / "config.py"
    fields = dataclasses.replace(recipe, out=str(tmp_path / "out"), **MESHES["all"])
    if cached:
        fields = dataclasses.replace(fields, cache=str(tmp_path / "cache"))
    config.write_text(f"from dspark_jax.config import TrainConfig\nconfig = {fields!r}\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    together = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process"]
    code = "import sys; from dspark_jax.cli.command import main; sys.exit(main(sys.argv[1:]))"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, "train", str(config), *together, str(process)],
            env=os.environ | flags,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    for process in started:
        _, err = process.communicate(timeout=500)
        assert process.returncode == 0, err[-3000:]
    found = np.array(read_losses(tmp_path / "out"))
    if cached:  # rounded to bfloat16, where the last float32 bit may decide
        np.testing.assert_allclose(found[:, 0], np.array(expected)[:, 0], rtol=2e-3)
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert (tmp_path / "out" / "drafter" / "model.safetensors").is_file()


@pytest.mark.full
def test_a_run_goes_on_with_another_number_of_devices(
    recipe, expected, tmp_path, monkeypatch, emulated_devices
):
    batches_from = data.batches_from

    def interrupted(sequences, recipe, start):
        for step, batch in enumerate(batches_from(sequences, recipe, start), start + 1):
            if step == 9:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    monkeypatch.setattr(data, "batches_from", interrupted)
    many = dataclasses.replace(recipe, out=str(tmp_path), **MESHES["all"])
    with pytest.raises(KeyboardInterrupt, match="saved step 9"):
        fit.fit(many)
    monkeypatch.setattr(data, "batches_from", batches_from)
    found = losses_of(dataclasses.replace(recipe, out=str(tmp_path), fsdp=8))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
