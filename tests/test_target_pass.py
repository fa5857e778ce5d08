"""The frozen target's pass over whole sequences: by a kernel, and a micro-batch at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.checkpoints.deepspec import bind_vocab
from dspark_jax.config import TrainConfig
from dspark_jax.models import sequences
from dspark_jax.models.drafters.dspark import declare_drafter
from dspark_jax.models.targets.llama import declare, encode
from dspark_jax.training import features, step
from dspark_jax.training.optimizer import learning_rate, make_optimizer
from dspark_jax.training.state import Batch, Frozen, TrainState
from pallas_kernels import dispatch
from tests import cuda_compile
from tests.tiny_model import DRAFTER, TARGET, random_params

needs_kernels = pytest.mark.skipif(
    dispatch.version_problem() is not None, reason=str(dispatch.version_problem())
)
# Weights and results are rounded to the 8 bits of a bfloat16.
CLOSE = {"rtol": 2**-6, "atol": 2**-6}
COUNT, LENGTH = 4, 20
RECIPE = TrainConfig(
    max_length=LENGTH, length_buckets=(LENGTH,), num_anchors=4, tokens_per_batch=COUNT * LENGTH
)
CFG = dataclasses.replace(DRAFTER, draft_vocab_size=None)


def interpreted(function, *arguments):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


# The kernel.


@pytest.mark.smoke
@needs_kernels
@pytest.mark.parametrize("window", [0, 70])
def test_the_kernel_attends_as_xla_does(window):
    """Two sequences whose length no block of keys divides."""
    shapes = (2, 100, 4, 64), (2, 100, 2, 64), (2, 100, 2, 64)
    keys = jax.random.split(jax.random.key(0), 3)
    qkv = [jax.random.normal(k, s, jnp.bfloat16) for k, s in zip(keys, shapes, strict=True)]
    attend = functools.partial(sequences.attend_causally, window=window, scale=0.2)
    found = interpreted(functools.partial(attend, kernels="mosaic_gpu"), *qkv)
    expected = jax.jit(attend)(*qkv)
    np.testing.assert_allclose(found.astype(np.float32), np.asarray(expected, np.float32), **CLOSE)


@pytest.mark.smoke
@needs_kernels
def test_features_by_the_kernel_are_those_of_xla():
    cfg = dataclasses.replace(TARGET, head_dim=64, windows=(0, 32))
    target = random_params(0, declare(cfg))
    target = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), target)
    token_BS = np.random.default_rng(0).integers(0, cfg.vocab_size, (1, 72)).astype(np.int32)
    read = functools.partial(encode, cfg=cfg, feature_layers=(0, 1))
    found = interpreted(functools.partial(read, kernels="mosaic_gpu"), target, token_BS)
    expected = jax.jit(read)(target, token_BS)
    for ours, theirs in zip(found, expected, strict=True):
        theirs = np.asarray(theirs, np.float32)
        np.testing.assert_allclose(ours.astype(np.float32), theirs, rtol=2**-5, atol=2**-5)


@pytest.mark.smoke
@needs_kernels
def test_on_a_mesh_a_device_reads_its_own_sequences_and_heads():
    """A quarter of the sequences, and half of the heads."""
    cfg = dataclasses.replace(TARGET, num_heads=4, num_kv_heads=2, head_dim=64)
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    attend = functools.partial(sequences.attend_causally, kernels="mosaic_gpu")
    arrays = shape((8, 128, cfg.num_heads, 64)), *[shape((8, 128, cfg.num_kv_heads, 64))] * 2
    with jax.sharding.use_abstract_mesh(cuda_compile.mesh_of_gpus(data=2, fsdp=2, tensor=2)):
        text = jax.jit(attend).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    assert len(calls) == 1
    assert "tensor<1x2x1x128x64xbf16>" in calls[0]  # the keys of two sequences and one head


# Micro-batches.


@pytest.fixture(scope="module")
def frozen():
    target = random_params(20, declare(TARGET))
    return Frozen(target, bind_vocab(CFG, None, TARGET, target.vocab), None)


@pytest.fixture(scope="module")
def batch():
    token_BS = np.random.default_rng(0).integers(0, TARGET.vocab_size, (COUNT, LENGTH))
    mask_BS = np.arange(LENGTH) >= [[4], [6], [9], [12]]
    return Batch(token_BS.astype(np.int32), mask_BS)


def read_sizes(monkeypatch):
    """A list of the numbers of sequences that the target reads at a time, as it is traced."""
    sizes, family = [], step.family_of

    def family_of(cfg):
        class Watched:
            def encode(self, target, token_BS, *arguments, **options):
                sizes.append(token_BS.shape[0])
                return family(cfg).encode(target, token_BS, *arguments, **options)

        return Watched()

    monkeypatch.setattr(step, "family_of", family_of)
    monkeypatch.setattr(features, "family_of", family_of)
    return sizes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"updates_per_batch": 3, "sequences_per_update": 2}, marks=pytest.mark.full),
    ],
)
def test_micro_batches_split_the_targets_pass_and_change_no_loss(
    frozen, batch, monkeypatch, changes
):
    sizes = read_sizes(monkeypatch)
    found = []
    for count in (1, 2):
        recipe = dataclasses.replace(RECIPE, micro_batches=count, **changes)
        optimizer = make_optimizer(recipe, learning_rate(recipe, 4))
        params = random_params(21, declare_drafter(CFG))
        state = TrainState(jnp.int32(0), params, optimizer.init(params))
        train = functools.partial(step.train_step, target_cfg=TARGET, cfg=CFG, recipe=recipe)
        found.append(jax.jit(functools.partial(train, optimizer=optimizer))(state, frozen, batch))
    whole, parts = found
    per_update = changes.get("sequences_per_update", COUNT)
    assert (sizes[0], set(sizes[1:])) == (COUNT, {per_update // 2})
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, parts[1], whole[1])
    # Adam divides by the gradient's size: where that is near 0, the last bits decide.
    jax.tree.map(functools.partial(close, atol=1e-4), parts[0].params, whole[0].params)


def test_micro_batches_change_no_metric_of_held_out_sequences(frozen, batch, monkeypatch):
    sizes = read_sizes(monkeypatch)
    params, found = random_params(21, declare_drafter(CFG)), []
    for count in (1, 3):  # which does not divide the sequences: four parts
        recipe = dataclasses.replace(
            RECIPE, micro_batches=count, tokens_per_batch=3 * COUNT * LENGTH
        )
        evaluate = functools.partial(
            step.evaluation_step, target_cfg=TARGET, cfg=CFG, recipe=recipe
        )
        found.append(jax.jit(evaluate)(params, frozen, batch))
    assert (sizes[0], set(sizes[1:])) == (COUNT, {1})
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, found[1], found[0])


def test_stored_features_are_read_in_micro_batches(frozen, batch, monkeypatch):
    sizes, found = read_sizes(monkeypatch), []
    for count in (1, 2):
        recipe = dataclasses.replace(RECIPE, micro_batches=count)
        read = features.target_reader(frozen.target, TARGET, CFG, recipe)
        found.append(read(batch.token_BS))
    assert sizes == [COUNT, COUNT // 2]
    for ours, theirs in zip(found[1], found[0], strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("least", "num_sequences", "shards", "expected"),
    [(1, 7, 1, 1), (2, 8, 1, 2), (3, 8, 1, 4), (3, 8, 4, 2), (9, 4, 2, 2), (2, 7, 1, 7)],
)
def test_parts_are_of_one_size_and_shared_out_evenly(least, num_sequences, shards, expected):
    assert step.fewest_parts(least, num_sequences, shards) == expected
