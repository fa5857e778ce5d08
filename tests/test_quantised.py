"""Weights that stay quantised: what they stand for, their products, and reading them."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from dspark_jax.axes import declare, declared_shardings, make_mesh
from dspark_jax.checkpoints.quantised import with_scales
from dspark_jax.checkpoints.tensors import LoadError, Tensors, read_params
from dspark_jax.checkpoints.weight_files import map_safetensors
from dspark_jax.models import quantised as form
from dspark_jax.models.layers import matmul
from dspark_jax.models.merged import join_context, single_layers
from dspark_jax.models.moe import Experts, mix_experts
from dspark_jax.models.quantised import InBlocks, PerOutput, dequantise, quantise
from dspark_jax.models.targets.table import family_of
from tests.test_families import CONFIGS, MOST
from tests.tiny_model import TARGET, random_params

# One tensor of each stored kind, and what it stands for, out of DeepSeek's program.
GOLDEN = Path(__file__).parent / "data" / "deepseek_v4_quant"
BLOCKS, PACKED = "layers.0.attn.wq_a.weight", "layers.0.ffn.experts.0.w1.weight"
DECLARED = {
    BLOCKS: declare("DN", {"D": 200, "N": 160}, BLOCKS, out="N"),
    PACKED: declare(
        "LEDM",
        {"D": 96, "M": 24, "E": 1},
        "layers.{layer}.ffn.experts.{expert}.w1.weight",
        out="M",
        layers=range(1),
    ),
}


def golden_tensors():
    views = map_safetensors(GOLDEN / "weights.safetensors")
    shapes = {name: view.shape for name, view in views.items() if name.startswith("layers.0")}
    shapes.pop("layers.0.ffn.gate.tid2eid")
    return Tensors("golden", shapes, views.__getitem__)


@pytest.fixture(scope="module")
def expected():
    return np.load(GOLDEN / "expected.npz")


@pytest.fixture(scope="module")
def golden():
    return read_params(DECLARED, with_scales(golden_tensors()))


@pytest.mark.smoke
def test_stored_matrices_stand_for_exactly_what_they_should(golden, expected):
    assert golden[BLOCKS].value_OI.dtype == jnp.float8_e4m3fn
    assert golden[PACKED].value_OI.nbytes == 24 * 96 // 2
    assert golden[PACKED].shape == (1, 1, 96, 24)
    np.testing.assert_array_equal(dequantise(golden[BLOCKS]), expected[BLOCKS].T)
    np.testing.assert_array_equal(dequantise(golden[PACKED])[0, 0], expected[PACKED].T)


def test_plain_tensors_beside_them_are_read_as_ever(expected):
    views = map_safetensors(GOLDEN / "weights.safetensors")
    for name in "norm.weight", "hc_head_fn", "layers.0.ffn.gate.tid2eid":
        np.testing.assert_array_equal(np.asarray(views[name], expected[name].dtype), expected[name])


def test_stored_matrices_are_multiplied_as_what_they_stand_for(golden, expected, monkeypatch):
    x_XD = np.random.default_rng(0).normal(size=(2, 3, 200)).astype(np.float32)
    found_XO = jax.jit(matmul)(x_XD, golden[BLOCKS])
    np.testing.assert_allclose(found_XO, x_XD @ expected[BLOCKS].T, rtol=1e-5, atol=1e-5)
    for panel in form.PANEL, 5 * 96:  # one panel, and several
        monkeypatch.setattr(form, "PANEL", panel)
        one = golden[PACKED][0, 0]
        found_XO = jax.jit(lambda x, w: matmul(x, w))(x_XD[..., :96], one)  # traced anew
        np.testing.assert_allclose(
            found_XO, x_XD[..., :96] @ expected[PACKED].T, rtol=1e-5, atol=1e-5
        )


def test_scales_are_powers_of_two_and_the_last_is_none(golden):
    one = golden[PACKED][0, 0]
    codes_OI = np.arange(256, dtype=np.uint8)[None].repeat(2, 0)
    scales_OI = np.array([[3, 127, 254, 255] * 4] * 2, np.uint8).view(jnp.float8_e8m0fnu)
    every = InBlocks(jnp.asarray(codes_OI), jnp.asarray(scales_OI), (512, 2), one.block)
    plain_IO = np.asarray(dequantise(every))
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = np.array([*magnitudes, *(-value for value in magnitudes)])
    low, high = values[codes_OI[0] & 15], values[codes_OI[0] >> 4]
    scales = np.repeat([2.0**-124, 1, 2.0**127, np.nan] * 4, 32)
    with np.errstate(over="ignore"):
        expected_I = (np.stack([low, high], -1).reshape(-1) * scales).astype(np.float32)
    np.testing.assert_array_equal(plain_IO[:, 1], expected_I)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({BLOCKS: np.zeros((160, 200), np.float32)}, "has dtype float32"),
        ({BLOCKS.replace("weight", "scale"): np.zeros((2, 2), np.float32)}, "in e8m0"),
        ({PACKED: np.zeros((24, 64), np.int8)}, "[24, 4] blocks"),
        ({BLOCKS: np.zeros(160, jnp.float8_e4m3fn)}, "1 axes"),
    ],
)
def test_values_and_scales_that_do_not_belong_together_are_refused(change, reason):
    given = golden_tensors()
    shapes = dict(given.shapes) | {name: value.shape for name, value in change.items()}
    broken = Tensors(
        "file", shapes, lambda name: change[name] if name in change else given.read(name)
    )
    with pytest.raises(LoadError) as refused:
        with_scales(broken)
    assert reason in str(refused.value)
    assert next(iter(change)).removesuffix("weight").removesuffix("scale") in str(refused.value)


def test_layers_that_are_stored_in_two_ways_are_refused():
    given = golden_tensors()
    shapes = dict(given.shapes) | {PACKED.replace("layers.0", "layers.1"): (24, 96)}
    mixed = Tensors("file", shapes, lambda name: given.read(name.replace("layers.1", "layers.0")))
    declared = dataclasses.replace(DECLARED[PACKED], layers=range(2), shape=(2, 1, 96, 24))
    with pytest.raises(LoadError, match=r"layers\.1.*is not stored as"):
        read_params({PACKED: declared, BLOCKS: DECLARED[BLOCKS]}, with_scales(mixed))


@pytest.mark.smoke
@pytest.mark.parametrize(("kind", "most"), [("int8", 127), ("fp8", 448)])
def test_matrices_are_rounded_to_nearest_with_a_scale_for_every_output(kind, most):
    w_DNH = np.random.default_rng(1).normal(size=(64, 3, 8)).astype(np.float32)
    w_DNH[:, 1, 2] = 0
    held = quantise(jnp.asarray(w_DNH), (0,), kind)
    assert held.value.dtype.itemsize == 1
    assert held.scale.shape == (1, 3, 8)
    largest_NH = np.abs(w_DNH).max(0)
    np.testing.assert_array_equal(
        np.abs(np.asarray(held.value, np.float32)).max(0), most * (largest_NH > 0)
    )
    error_DNH = np.abs(dequantise(held) - w_DNH)
    step_DNH = held.scale / 2 if kind == "int8" else np.abs(w_DNH) / 16 + held.scale * 2.0**-10
    assert (error_DNH <= step_DNH * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", ["llama", MOST, "qwen3_moe"])
def test_quantised_layers_are_joined_as_plain_ones_are(name):
    """Matrices of the layers are quantised, and nothing else is."""
    cfg = CONFIGS[name]
    declared = family_of(cfg).declare(cfg)
    plain = random_params(2, declared)
    held = form.quantise_params(declared, plain, "int8")

    def rounded(tree):
        return jax.tree.map(lambda w: dequantise(w) if isinstance(w, PerOutput) else w, tree,
                            is_leaf=lambda w: isinstance(w, PerOutput))  # fmt: skip

    kept = [held.vocab, held.norm_D, held.extra]
    jax.tree.map(np.testing.assert_array_equal, kept, [plain.vocab, plain.norm_D, plain.extra])
    for stack in held.layers:
        stack = jax.tree.map(jnp.asarray, stack)
        found, expected = single_layers(stack), single_layers(rounded(stack))
        dtypes = [leaf.dtype for leaf in jax.tree.leaves(found)]
        assert dtypes.count(jnp.int8) >= 3 * len(found)
        jax.tree.map(np.testing.assert_array_equal, rounded(found), expected)
        if stack.k_DKH is not None:
            np.testing.assert_array_equal(
                dequantise(join_context(stack)), join_context(rounded(stack))
            )


def test_a_mesh_splits_values_and_scales_as_the_matrices(emulated_devices):
    declared, mesh = (
        family_of(TARGET).declare(TARGET),
        make_mesh(tensor=2, devices=emulated_devices),
    )
    held = form.quantise_params(declared, random_params(3, declared), "fp8")
    placed = jax.device_put(held, declared_shardings(form.declare_like(declared, held), mesh))
    (layers,) = placed.layers
    for w, spec in (
        (layers.mlp.gate_DM, (None, None, ("tensor",))),
        (layers.o_NHD, (None, ("tensor",))),
    ):
        assert w.value.sharding.is_equivalent_to(
            NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)), w.value.ndim
        )
    assert layers.o_NHD.scale.sharding.is_fully_replicated


@pytest.mark.parametrize("kind", ["int8", "blocks", "packed"])
def test_devices_hold_parts_of_quantised_experts(kind, emulated_devices):
    rng = np.random.default_rng(4)
    sizes = {"E": 4, "D": 256, "M": 256}

    def experts_of(axes):
        w = rng.normal(size=[sizes[axis] for axis in axes]).astype(np.float32)
        if kind == "int8":
            return quantise(jnp.asarray(w), (1,), kind)
        scale = 2.0 ** rng.integers(-3, 3, (4, 2, 2) if kind == "blocks" else (4, 256, 8))
        scale_OI = jnp.asarray(scale, jnp.float8_e8m0fnu)
        if kind == "blocks":
            return InBlocks(jnp.asarray(w, jnp.float8_e4m3fn), scale_OI, (256, 256), (128, 128))
        codes_OI = jnp.asarray(rng.integers(0, 256, (4, 256, 128)), jnp.uint8)
        return InBlocks(codes_OI, scale_OI, (256, 256), (1, 32))

    held = [experts_of(axes) for axes in ("EDM", "EDM", "EMD")]
    x_TD = jnp.asarray(rng.normal(size=(9, 256)) / 64, jnp.float32)
    expert_TC = rng.integers(0, 4, (9, 2)).astype(np.int32)
    weight_TC = rng.uniform(size=(9, 2)).astype(np.float32)
    mix = jax.jit(lambda *args: mix_experts(*args, jax.nn.silu))
    expected_TD = mix(Experts(*map(dequantise, held)), x_TD, expert_TC, weight_TC)
    with jax.set_mesh(make_mesh(expert=2, tensor=2, devices=emulated_devices)):
        found_TD = jax.jit(lambda *args: mix_experts(*args, jax.nn.silu))(
            Experts(*held), x_TD, expert_TC, weight_TC
        )
    scale = np.abs(expected_TD).max()
    np.testing.assert_allclose(found_TD / scale, expected_TD / scale, atol=1e-5)
