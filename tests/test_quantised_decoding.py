"""Quantised weights through the engine: their texts, alone, with drafts and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.axes import make_mesh
from dspark_jax.checkpoints.load import load_drafter_for, load_target
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.setting import setting_of
from dspark_jax.models.quantised import PerOutput, dequantise
from tests.marks import rest_full
from tests.test_families_decoding import ENGINE, NEW, texts
from tests.tiny_model import write_drafter, write_target


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return write_target(folder / "target"), write_drafter(folder / "drafter")


def decoder_of(folders, kind, mesh=None, *, change=lambda params: params):
    target = load_target(folders[0], mesh=mesh, weights=kind)
    drafter = load_drafter_for(target, folders[1], mesh=mesh, weights=kind)
    pair = drafter.cfg, change(drafter.params), drafter.vocab
    return make_decoder((target.cfg, change(target.params)), pair, mesh=mesh)


def plain(params):
    """The weights that quantised ones stand for."""

    def is_quantised(leaf):
        return isinstance(leaf, PerOutput)

    return jax.tree.map(
        lambda leaf: dequantise(leaf) if is_quantised(leaf) else leaf, params, is_leaf=is_quantised
    )


@pytest.mark.parametrize("kind", rest_full(["int8", "fp8"], ("int8",)))
def test_texts_are_those_of_the_weights_that_are_stood_for(folders, kind):
    """With drafts, whose drafter is quantised as well."""
    decoder = decoder_of(folders, kind)
    assert any(leaf.dtype.itemsize < 4 for leaf in jax.tree.leaves(decoder.weights.drafter.layers))
    found = texts(decoder)
    assert {len(ids) for ids in found} == {NEW}
    assert found == texts(decoder_of(folders, kind, change=plain))


@pytest.mark.full
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_mesh_gives_the_texts_of_one_device(folders, kind, emulated_devices):
    mesh = make_mesh(tensor=2, devices=emulated_devices)
    assert texts(decoder_of(folders, kind, mesh)) == texts(decoder_of(folders, kind))


def test_what_rounds_cost_is_kept_apart(folders):
    kinds = "plain", "int8", "fp8"
    settings = [setting_of(decoder_of(folders, kind), ENGINE) for kind in kinds]
    dtypes = ["float32", "float32, int8", "float32, bfloat16"]
    assert [setting["dtype"] for setting in settings] == dtypes


def test_a_kind_that_there_is_not_is_named(folders):
    with pytest.raises(ValueError, match="weights is 'int3': choose one of plain, int8, fp8"):
        load_target(folders[0], weights="int3")


def test_the_activations_keep_their_dtype(folders):
    target = load_target(folders[0], jnp.bfloat16, weights="int8")
    assert {leaf.dtype for leaf in jax.tree.leaves(target.params)} == {
        np.dtype(kind) for kind in ("int8", "float32", jnp.bfloat16)
    }
