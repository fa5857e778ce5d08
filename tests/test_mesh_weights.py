"""Weights on a mesh: every device gets its share out of the file, and never anything whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax import load, make_mesh
from dspark_jax.axes import declared_shardings, is_param, partition
from dspark_jax.checkpoints import tensors
from dspark_jax.checkpoints.deepspec import save_drafter
from dspark_jax.checkpoints.gguf import load_gguf_target
from dspark_jax.checkpoints.load import load_drafter_for, load_target
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.models.drafters.dspark import declare_drafter
from dspark_jax.models.targets.llama import declare as declare_target
from dspark_jax.models.vocab import Vocab, lm_head
from tests.test_gguf import write_gguf
from tests.tiny_model import DRAFTER, TARGET, random_params, write_target

# All heads, widths and vocabularies divide over two, and no other test has arrays of these shapes.
SIZES = {"hidden_size": 40, "intermediate_size": 56, "num_kv_heads": 2, "vocab_size": 104}
UNTIED = dataclasses.replace(TARGET, **SIZES, tied=False)
REDUCED = dataclasses.replace(DRAFTER, **SIZES, draft_vocab_size=50)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("models") / "target", UNTIED)


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
    """Over a reduced vocabulary."""
    directory = tmp_path_factory.mktemp("models") / "drafter"
    params = random_params(21, declare_drafter(REDUCED))
    save_drafter(directory, REDUCED, params, Vocab(None, None, np.arange(3, 103, 2, np.int32)))
    return directory


@pytest.fixture
def mesh(emulated_devices):
    return make_mesh(data=2, tensor=2, devices=emulated_devices)


def shapes_that_are_split(declared, mesh):
    params = jax.tree.leaves(declared, is_leaf=is_param)
    return {p.shape for p in params if any(partition(p.axes, p.shape, mesh))}


def shares(leaf):
    return {shard.data.nbytes for shard in leaf.addressable_shards}


def test_nothing_is_whole_on_a_device_while_it_is_loaded(target, drafter, mesh, monkeypatch):
    declared = declare_target(UNTIED), declare_drafter(REDUCED)
    split, seen = shapes_that_are_split(declared, mesh), set()

    def spy(param, tensor):
        assert not tensor.flags.owndata  # a view of the file
        for leaf in jax.live_arrays():
            if leaf.shape in split:
                assert shares(leaf) <= {leaf.nbytes // 2, leaf.nbytes // 4}, leaf.shape
                seen.add(leaf.shape)
        return from_file(param, tensor)

    from_file = tensors.from_file
    monkeypatch.setattr(tensors, "from_file", spy)
    monkeypatch.setattr("dspark_jax.model.use_compilation_cache", lambda: None)
    weights = load(target, drafter, mesh=mesh).decoder.weights
    assert len(seen) >= 10
    found = weights.target, weights.drafter
    expected = declared_shardings(declared, mesh)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, found, expected))
    assert weights.vocab.embed_VD is weights.target.vocab.embed_VD
    head_UD = weights.vocab.unembed_VD
    assert shares(head_UD) == {head_UD.nbytes // 2}


@pytest.mark.parametrize("reduced", [True, False])
def test_an_embedding_of_the_drafters_own_reaches_the_decoder(reduced, target, drafter, mesh):
    for where in (None, mesh):
        found = load_target(target, mesh=where)
        loaded = load_drafter_for(found, drafter, mesh=where)
        vocab = loaded.vocab if reduced else found.params.vocab
        own = dataclasses.replace(vocab, embed_VD=2 * vocab.embed_VD)
        given = (found.cfg, found.params), (loaded.cfg, loaded.params, own)
        weights = make_decoder(*given, mesh=where).weights
        np.testing.assert_array_equal(weights.vocab.embed_VD, own.embed_VD)
        np.testing.assert_array_equal(weights.target.vocab.embed_VD, vocab.embed_VD)
        np.testing.assert_array_equal(lm_head(weights.vocab), vocab.unembed_VD)


def test_weights_on_a_mesh_are_those_of_one_device(target, drafter, mesh):
    one, many = load_target(target), load_target(target, mesh=mesh)
    found = load_drafter_for(many, drafter, mesh=mesh)
    expected = load_drafter_for(one, drafter)
    jax.tree.map(np.testing.assert_array_equal, many.params, one.params)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    jax.tree.map(np.testing.assert_array_equal, found.vocab, expected.vocab)


@pytest.mark.parametrize("kind", [jnp.float32, jnp.bfloat16])
def test_a_gguf_file_is_read_onto_a_mesh(tmp_path, mesh, kind):
    path = write_gguf(tmp_path / "model.gguf", "llama_tied")
    cfg, one = load_gguf_target(path, kind)
    _, many = load_gguf_target(path, kind, mesh)
    jax.tree.map(np.testing.assert_array_equal, many, one)
    expected = declared_shardings(declare_target(cfg), mesh)
    assert jax.tree.all(jax.tree.map(lambda x, s: x.sharding == s, many, expected))


def test_a_decoder_copies_nothing_that_lies_right(target, drafter, mesh):
    def places(tree):
        return [
            [shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards]
            for leaf in jax.tree.leaves(tree)
        ]

    found = load_target(target, mesh=mesh)
    bound = load_drafter_for(found, drafter, mesh=mesh)
    given = (found.cfg, found.params), (bound.cfg, bound.params, bound.vocab)
    weights = make_decoder(*given, mesh=mesh).weights
    assert places(weights.target) == places(found.params)
    assert places(weights.drafter) == places(bound.params)
