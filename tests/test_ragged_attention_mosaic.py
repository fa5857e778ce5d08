"""The Mosaic GPU kernel without a GPU: interpreted against XLA, split over a mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dspark_jax.axes import unstacked
from dspark_jax.models.cache import Room, Rows
from dspark_jax.models.drafters.dspark import declare_context, declare_drafter, slot_hidden
from dspark_jax.models.merged import single_layers
from dspark_jax.models.targets.llama import declare as declare_target
from dspark_jax.models.targets.llama import declare_cache, extend
from pallas_kernels import dispatch
from pallas_kernels.ragged_attention.api import ragged_attention
from pallas_kernels.ragged_attention.cases import CASES, Case
from pallas_kernels.ragged_attention.groups import group_by_slot, group_runs
from tests import cuda_compile
from tests.tiny_model import DRAFTER, TARGET, random_params

pytestmark = [
    pytest.mark.smoke,
    pytest.mark.skipif(
        dispatch.version_problem() is not None, reason=str(dispatch.version_problem())
    ),
]
# Weights and results are rounded to the 8 bits of a bfloat16.
CLOSE = {"rtol": 2**-7, "atol": 2**-7}


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def interpreted(detect_races=False, **given):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    params = plgpu.InterpretGPUParams(detect_races=detect_races)
    with plgpu.force_gpu_interpret_mode(params):
        out = ragged_attention(**given, implementation="mosaic_gpu")
        return np.asarray(out, np.float32)


def expected(**given):
    return np.asarray(jax.jit(functools.partial(ragged_attention, **given))(), np.float32)


def arguments(case, **changes):
    return case.arguments() | {"groups": case.grouping, "window": case.window} | changes


@by_name([case for case in CASES if case.name.startswith(("verify 8 of 32", "draft", "verify 5"))])
def test_interpreted_kernel_is_the_xla_form(case):
    given = arguments(case.small())
    np.testing.assert_allclose(interpreted(**given), expected(**given), **CLOSE)


def test_no_race_while_splits_and_stages_overlap():
    case = Case("two splits of four blocks, two stages", 1, 2, 512, 2, 1, 128)
    given = arguments(case)
    np.testing.assert_allclose(interpreted(detect_races=True, **given), expected(**given), **CLOSE)


def test_flat_rows_with_padding_in_one_layer_of_many():
    """Rows in any order, of some slots alone; what nobody may see is not a number."""
    case = Case("", 3, 2, 128, 2, 1, 64)
    given = arguments(case)
    slot_T = jnp.array([2, 0, 3, 2, 0, 2], jnp.int32)
    position_T = jnp.array([101, 7, 50, 100, 6, 102], jnp.int32)
    limit_T = jnp.where(slot_T < 3, position_T + 1, 0)
    hidden_S = jnp.arange(128) >= 103
    k_BKSH = jnp.where(hidden_S[:, None], jnp.nan, given["k_BKSH"])
    given |= {
        "k_BKSH": jnp.stack([k_BKSH * 2, k_BKSH]),
        "v_BKSH": jnp.stack([given["v_BKSH"]] * 2),
        "layer": jnp.int32(1),
        "limit_T": limit_T,
        "groups": group_by_slot(slot_T, position_T, 3, 3),
    }
    out = interpreted(**given)
    np.testing.assert_allclose(out, expected(**given), **CLOSE)
    assert not out[2].any()


def test_chunks_name_their_slots_and_may_be_empty():
    """More rows than a tile has, and a chunk of padding alone."""
    case = Case("", 3, 40, 128, 2, 1, 64)
    given = arguments(case)
    limit_T = jnp.where(jnp.arange(120) < 80, given["limit_T"], 0)
    given |= {"limit_T": limit_T, "groups": group_runs(jnp.array([1, 1, 3]), 3, 40)}
    out = interpreted(**given)
    np.testing.assert_allclose(out, expected(**given), **CLOSE)
    assert not out[80:].any()


def by_slot(mesh):
    """A step whose slots are split over one axis of the mesh by hand, as in the engine."""

    def attend(q_TNH, k_BKSH, v_BKSH, limit_T):
        return ragged_attention(
            q_TNH,
            k_BKSH,
            v_BKSH,
            group_runs(None, 1, 2),
            limit_T,
            heads_axis="tensor",
            implementation="mosaic_gpu",
        )

    return jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(P("data"),) * 4,
        out_specs=P("data"),
        axis_names={"data"},
        check_vma=False,
    )


@pytest.fixture
def stand_in(monkeypatch):
    """The XLA form in place of the kernel, and the key/value heads and layers of its calls: for
    what the interpreter is too slow for, or knows no way to run, like several devices."""
    from pallas_kernels.ragged_attention import mosaic_gpu, xla

    calls = []

    def attend_groups(q_PCNH, k_LBKSH, v_LBKSH, layer, slot_P, limit_PC, page_BX, own, window):
        assert page_BX is None
        calls.append((k_LBKSH.shape[2], k_LBKSH.shape[0]))
        caches = k_LBKSH[layer], v_LBKSH[layer]
        return xla.attend_groups(q_PCNH, *caches, slot_P, limit_PC, own, None, window)

    monkeypatch.setattr(mosaic_gpu, "attend_groups", attend_groups)
    return calls


@pytest.mark.parametrize(("kv_heads", "each"), [(2, 1), (1, 1), (4, 2)])
def test_every_device_attends_for_its_own_heads(emulated_devices, stand_in, kv_heads, each):
    given = arguments(Case("", 2, 2, 128, 4, kv_heads, 64))
    mesh = jax.sharding.Mesh(np.array(emulated_devices[:4]).reshape(2, 2), ("data", "tensor"))
    rows = given["q_TNH"], given["k_BKSH"], given["v_BKSH"], given["limit_T"]
    out = jax.jit(by_slot(mesh))(*rows)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected(**given), **CLOSE)
    assert {heads for heads, _ in stand_in} == {each}


@pytest.mark.parametrize("stacked", [True, False])
def test_models_hand_their_caches_to_the_kernel(stand_in, stacked):
    target, drafter = (
        jax.device_put(random_params(seed, declare(cfg)))
        for seed, (declare, cfg) in enumerate(
            [(declare_target, TARGET), (declare_drafter, DRAFTER)]
        )
    )
    if not stacked:
        target, drafter = (
            dataclasses.replace(model, layers=tuple(single_layers(stack) for stack in model.layers))
            for model in (target, drafter)
        )
    room = Room(2, 64, 8, jnp.float32)
    cache, context = (
        jax.tree.map(lambda b: jnp.ones(b.shape), declared if stacked else unstacked(declared))
        for declared in (declare_cache(TARGET, room), declare_context(DRAFTER, room))
    )
    rows = Rows(*(jnp.array(x, jnp.int32) for x in ([5, 6, 7], [1, 0, 1], [8, 3, 9])))
    chunks = Rows(*(jnp.array([x], jnp.int32) for x in ([1, 2], [0, 0], [10, 11])))
    anchor_B, position_B = jnp.array([3, 4]), jnp.array([6, 0])

    def run(kernels):
        read = extend(target, cache, rows, TARGET, rows_per_slot=2, chunks=chunks, kernels=kernels)
        vocab = target.vocab
        drafted = slot_hidden(
            drafter, vocab, anchor_B, position_B, context, DRAFTER, kernels=kernels
        )
        return read[0], drafted

    for out, reference in zip(run("mosaic_gpu"), run("xla"), strict=True):
        np.testing.assert_allclose(out, reference, rtol=1e-5, atol=1e-6)
    layers = (1, 1) if not stacked else (TARGET.num_layers, DRAFTER.num_layers)
    assert {count for _, count in stand_in} == set(layers)


def test_kernel_lowers_for_the_heads_of_one_of_several_gpus():
    given = Case("", 2, 2, 128, 8, 4, 64).shapes()
    rows = given["q_TNH"], given["k_BKSH"], given["v_BKSH"], given["limit_T"]
    mesh = cuda_compile.mesh_of_gpus(data=2, tensor=2)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(by_slot(mesh)).trace(*rows).lower(lowering_platforms=("cuda",))
    # One slot and two key heads; the two rows of their two query heads lie in a tile.
    assert re.search(r"mosaic_gpu.*tensor<1x2x64x64xbf16>", lowered.as_text())


@pytest.mark.parametrize("change", [{"positions": 100}, {"width": 32}], ids=["positions", "width"])
def test_a_shape_without_a_kernel_is_refused(change):
    case = dataclasses.replace(Case("", 2, 2, 128, 2, 1, 64), **change)
    with pytest.raises(ValueError, match=re.escape("choose xla")):
        ragged_attention(**arguments(case), implementation="mosaic_gpu")


def test_float32_is_refused():
    case = Case("", 2, 2, 128, 2, 1, 64)
    given = case.arguments(jnp.float32) | {"groups": case.grouping}
    with pytest.raises(ValueError, match="float32, 64 and 128: choose xla"):
        ragged_attention(**given, implementation="mosaic_gpu")
