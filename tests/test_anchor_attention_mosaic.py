"""The Mosaic GPU kernels without a GPU: interpreted against XLA, split over a mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.axes import MESH_RULES, abstract_params, make_mesh
from dspark_jax.config import DrafterConfig, TrainConfig
from dspark_jax.models.cache import of_sequences
from dspark_jax.models.drafters.dspark import block_hidden, declare_drafter
from dspark_jax.models.targets.llama import declare as declare_target
from dspark_jax.models.vocab import Vocab
from dspark_jax.training import programs as compiled
from dspark_jax.training.optimizer import learning_rate
from dspark_jax.training.state import Batch, Frozen, TrainState
from pallas_kernels import dispatch
from pallas_kernels.anchor_attention.api import anchor_attention
from pallas_kernels.anchor_attention.cases import CASES, Case, make_inputs
from tests import cuda_compile
from tests.tiny_model import DRAFTER, TARGET

pytestmark = [
    pytest.mark.smoke,
    pytest.mark.skipif(
        dispatch.version_problem() is not None, reason=str(dispatch.version_problem())
    ),
]
KERNEL_CASES = [case for case in CASES if case.dtype == "bfloat16"]
# Scores, weights and results are rounded to the 8 bits of a bfloat16.
CLOSE = {"rtol": 2**-7, "atol": 2**-6}


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def with_gradients(arguments, implementation="xla", **options):
    """The result and the gradients of queries, context and own keys and values."""
    values, places = arguments[:4], arguments[4:]
    weight_BAGNH = jax.random.normal(jax.random.key(5), values[0].shape).astype(values[0].dtype)

    def total(*values):
        out = anchor_attention(*values, *places, implementation=implementation, **options)
        return jnp.sum((out * weight_BAGNH).astype(jnp.float32)), out

    gradients, out = jax.grad(total, argnums=(0, 1, 2, 3), has_aux=True)(*values)
    return out, *gradients


def to_float32(tree):
    return jax.tree.map(
        lambda x: x if x.dtype in (jnp.bool_, jnp.int32) else x.astype(jnp.float32), tree
    )


def interpreted(arguments, detect_races=False):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    params = plgpu.InterpretGPUParams(detect_races=detect_races)
    with plgpu.force_gpu_interpret_mode(params):
        return jax.tree.map(np.asarray, to_float32(with_gradients(arguments, "mosaic_gpu")))


def expected(arguments):
    """In float32, of the same numbers."""
    return jax.jit(with_gradients)(to_float32(arguments))


def assert_close(found, wanted):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **CLOSE), found, wanted)


def inputs_of(case, anchors, dropped=()):
    values = make_inputs(case)[:4]
    anchor_BA = jnp.array(anchors, jnp.int32)
    keep_BA = jnp.ones(anchor_BA.shape, bool)
    for place in dropped:
        keep_BA = keep_BA.at[place].set(False)
    return *values, anchor_BA, keep_BA


def test_interpreted_kernels_are_the_xla_form():
    """Several tiles whose blocks begin anywhere; anchors at 0 and at block borders, dropped blocks;
    positions that are no whole blocks of keys, and some behind every anchor."""
    case = Case(2, 6, 3, 180, 8, 2, 64)
    anchors = [[0, 3, 64, 65, 100, 128], [0, 0, 1, 63, 120, 180]]
    arguments = inputs_of(case, anchors, dropped=[(0, 2), (1, 5)])
    found = interpreted(arguments)
    assert_close(found, expected(arguments))
    out, dq, dk, _, own = found
    for x_BAGXH in (out, dq, *own):
        assert not x_BAGXH[0, 2].any()
        assert not x_BAGXH[1, 5].any()
    assert not dk[0, 128:].any()
    assert not dk[1, 120:].any()


def test_the_order_of_anchors_does_not_matter_to_the_result():
    """Heads of 128, one query head a key head, and more context than the copies run ahead of."""
    case = Case(1, 10, 7, 256, 1, 1, 128)
    anchors = [[250, 3, 64, 0, 200, 70, 10, 129, 5, 80]]
    arguments = inputs_of(case, anchors, dropped=[(0, 9)])
    assert_close(interpreted(arguments, detect_races=True), expected(arguments))


def test_blocks_of_context_behind_all_anchors_are_not_touched():
    case = Case(1, 4, 3, 256, 2, 1, 64)
    q, k, v, *rest = inputs_of(case, [[5, 20, 100, 128]])
    wanted = expected((q, k, v, *rest))
    k, v = k.at[:, 128:].set(jnp.nan), v.at[:, 128:].set(jnp.nan)
    assert_close(interpreted((q, k, v, *rest)), wanted)


@by_name(KERNEL_CASES)
def test_work_is_proportional_to_what_is_seen(case):
    """Pairs of rows and keys that the kernels multiply, beside those that see each other."""
    from pallas_kernels.anchor_attention import mosaic_gpu

    anchor_BA = jnp.asarray(case.anchors_of())
    rows = case.slots * case.heads // case.kv_heads
    limit_BM = mosaic_gpu._limits(anchor_BA, anchor_BA >= 0, rows, case.positions)
    ends_BX = mosaic_gpu._ends(limit_BM)
    step = mosaic_gpu.TILE * mosaic_gpu.BLOCK
    seen = int(limit_BM.sum())
    most = 1 + 2 * mosaic_gpu.BLOCK / case.positions
    assert seen <= int(ends_BX.sum()) * step <= most * seen
    viewers_BY2 = mosaic_gpu._viewers(ends_BX, case.positions // mosaic_gpu.BLOCK)
    assert int((viewers_BY2[..., 1] - viewers_BY2[..., 0]).sum()) == int(ends_BX.sum())


def test_a_block_of_keys_reaches_all_tiles_that_see_it_in_any_order():
    from pallas_kernels.anchor_attention import mosaic_gpu

    viewers_BY2 = mosaic_gpu._viewers(jnp.array([[0, 2, 1, 3, 0], [0, 0, 0, 0, 0]]), 4)
    assert viewers_BY2[0].tolist() == [[1, 4], [1, 4], [3, 4], [5, 5]]
    assert viewers_BY2[1].tolist() == [[5, 5]] * 4


SPLIT = {"sequences_axes": MESH_RULES["B"], "heads_axis": MESH_RULES["K"][0]}


@pytest.fixture
def stand_in(monkeypatch):
    """The XLA form in place of the kernels, and sequences and key/value heads of its calls: the
    interpreter knows no several devices."""
    from pallas_kernels.anchor_attention import mosaic_gpu, xla

    sizes = set()

    def attend_blocks(q_BAGNH, k_BSKH, *rest):
        sizes.add((k_BSKH.shape[0], k_BSKH.shape[2]))
        return xla.attend_blocks(q_BAGNH, k_BSKH, *rest)

    monkeypatch.setattr(mosaic_gpu, "attend_blocks", attend_blocks)
    return sizes


@pytest.mark.parametrize(
    ("batch", "kv_heads", "each"), [(4, 2, (1, 1)), (3, 1, (3, 1)), (4, 3, (1, 3))]
)
def test_every_device_attends_for_its_own(emulated_devices, stand_in, batch, kv_heads, each):
    """Where the sizes divide; gradients are those of one device."""
    arguments = make_inputs(Case(batch, 3, 2, 16, 2 * kv_heads, kv_heads, 8, dtype="float32"))
    with jax.set_mesh(make_mesh(2, 2, 2, devices=emulated_devices)):
        split = functools.partial(with_gradients, implementation="mosaic_gpu", **SPLIT)
        found = jax.jit(split)(arguments)
    wanted = jax.jit(with_gradients)(arguments)
    close = {"rtol": 1e-5, "atol": 1e-5}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **close), found, wanted)
    assert stand_in == {each}


def test_a_training_step_splits_the_kernels_over_its_mesh(emulated_devices, stand_in, monkeypatch):
    from pallas_kernels.ragged_attention import mosaic_gpu, xla

    def attend_groups(q_PCNH, k_LBKSH, v_LBKSH, layer, slot_P, limit_PC, page_BX, own, window):
        caches = k_LBKSH[layer], v_LBKSH[layer]
        return xla.attend_groups(q_PCNH, *caches, slot_P, limit_PC, own, None, window)

    monkeypatch.setattr(mosaic_gpu, "attend_groups", attend_groups)  # of the target's pass
    target_cfg, cfg = (dataclasses.replace(cfg, num_kv_heads=2) for cfg in (TARGET, DRAFTER))
    recipe = TrainConfig(
        kernels="mosaic_gpu", num_anchors=4, block_size=cfg.block_size, max_length=16,
        length_buckets=(16,), tokens_per_batch=8 * 16, data_parallel=2, fsdp=2, tensor_parallel=2,
    )  # fmt: skip
    programs = compiled.programs_of(target_cfg, cfg, recipe)
    target = abstract_params(declare_target(target_cfg))
    params = abstract_params(declare_drafter(cfg))
    state = TrainState(jnp.int32(0), params, jax.eval_shape(programs.init, params))
    frozen = Frozen(target, Vocab(target.vocab.embed_VD, target.vocab.unembed_VD), None)
    batch = Batch(jax.ShapeDtypeStruct((8, 16), jnp.int32), jax.ShapeDtypeStruct((8, 16), bool))
    programs.step.trace(state, frozen, batch, learning_rate(recipe, 10))
    assert stand_in == {(2, 1)}


def drafter_gradient(cfg, positions, anchors):
    """(function, shapes...): the gradient of a drafter's weights and context from its blocks."""

    def total(params, embed_VD, k_LBSKH, v_LBSKH, position_BA):
        context = (of_sequences(k_LBSKH, v_LBSKH),)
        vocab = Vocab(embed_VD, None, None)
        hidden_BAGD = block_hidden(
            params, vocab, position_BA, position_BA, context, cfg, kernels="mosaic_gpu"
        )
        return hidden_BAGD.astype(jnp.float32).sum()

    batch = 4
    context = jax.ShapeDtypeStruct(
        (cfg.num_layers, batch, positions, cfg.num_kv_heads, cfg.head_dim), jnp.bfloat16
    )
    embed_VD = jax.ShapeDtypeStruct((cfg.vocab_size, cfg.hidden_size), jnp.bfloat16)
    position_BA = jax.ShapeDtypeStruct((batch, anchors), jnp.int32)
    params = abstract_params(declare_drafter(cfg), jnp.bfloat16)
    return jax.grad(total, argnums=(0, 2, 3)), params, embed_VD, context, context, position_BA


WIDE = DrafterConfig(
    vocab_size=32, hidden_size=64, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=64, block_size=3, mask_token_id=1, target_layer_ids=(0,), num_target_layers=2,
)  # fmt: skip


@pytest.mark.parametrize("split", [False, True], ids=["one GPU", "four GPUs"])
def test_a_step_runs_each_kernel_once_a_layer(split):
    """Result and log-sum-exps are kept for the backward pass, on a mesh too."""
    mesh = cuda_compile.mesh_of_gpus(**({"data": 2, "fsdp": 1, "tensor": 2} if split else {}))
    function, *shapes = drafter_gradient(WIDE, 128, 8)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @mosaic_gpu.* -> (.*)", text)
    rows, row, keys = (
        ("2x1x64x64xbf16", "2x1x64xf32", "2x128x1x64xbf16")
        if split
        else ("4x2x64x64xbf16", "4x2x64xf32", "4x128x2x64xbf16")
    )
    forward, backward_q = f"(tensor<{rows}>, tensor<{row}>)", f"tensor<{rows}>"
    assert sorted(calls) == sorted([forward, backward_q, f"(tensor<{keys}>, tensor<{keys}>)"])


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"width": 32}], ids=["float32", "width"])
def test_a_shape_without_a_kernel_is_refused(change):
    case = dataclasses.replace(Case(1, 2, 3, 64, 2, 1, 64), **change)
    with pytest.raises(ValueError, match="choose xla"):
        anchor_attention(*make_inputs(case), implementation="mosaic_gpu")
