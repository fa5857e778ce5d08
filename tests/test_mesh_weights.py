"""Weights on a mesh: every device gets its share out of the file, and never a whole matrix."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax import load, make_mesh
from dspark_jax.axes import declared_shardings, is_param, partition
from dspark_jax.checkpoints import tensors
from dspark_jax.checkpoints.deepspec import bind_vocab, save_drafter
from dspark_jax.checkpoints.gguf import load_gguf_target
from dspark_jax.checkpoints.load import load_drafter_for, load_target
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.inputs import replace_weights
from dspark_jax.models import merged
from dspark_jax.models.drafters.dspark import declare_drafter
from dspark_jax.models.layers import Merged
from dspark_jax.models.targets.llama import declare as declare_target
from dspark_jax.models.vocab import Vocab, lm_head, unembed
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


def test_no_matrix_is_whole_on_a_device_while_it_is_loaded(target, drafter, mesh, monkeypatch):
    """The embedding is, which is no LM head here and only looked up; it has the head's shape."""
    declared = declare_target(UNTIED), declare_drafter(REDUCED)
    embedding = declared[0].vocab.embed_VD.shape
    split, seen = shapes_that_are_split(declared, mesh) - {embedding}, set()

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
    assert len(seen) >= 9
    for shards, shape in (2, (40, 2, 3, 8)), (2, (56, 40)), (2, (40, 56, 2)), (1, (40,)):
        leaves = [leaf for leaf in jax.tree.leaves(weights.target.layers) if leaf.shape == shape]
        assert leaves, shape
        assert {leaf.nbytes // shards for leaf in leaves} == set.union(*map(shares, leaves)), shape
    assert weights.vocab.embed_VD is weights.target.vocab.embed_VD
    for head in weights.vocab.unembed_VD, weights.target.vocab.unembed_VD:
        assert shares(head) == {head.nbytes // 2}


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
        head_DV = unembed(weights.vocab, jnp.eye(vocab.unembed_VD.shape[1]))
        np.testing.assert_allclose(head_DV.T, vocab.unembed_VD, rtol=1e-6)


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


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_drafter_on_a_mesh_has_no_head_of_its_own(tied, reduced, mesh):
    """A whole LM head on every device would be the largest array there."""
    target_cfg = dataclasses.replace(UNTIED, tied=tied)
    cfg = REDUCED if reduced else dataclasses.replace(REDUCED, draft_vocab_size=None)
    target, params = (
        random_params(seed, declared)
        for seed, declared in enumerate([declare_target(target_cfg), declare_drafter(cfg)])
    )
    own = Vocab(None, None, np.arange(3, 103, 2, np.int32)) if reduced else None
    vocab = bind_vocab(cfg, own, target_cfg, target.vocab)
    weights = make_decoder((target_cfg, target), (cfg, params, vocab), mesh=mesh).weights
    assert weights.vocab.embed_VD is weights.target.vocab.embed_VD
    head = lm_head(weights.vocab)
    assert shares(head) == {head.nbytes // 2}
    assert reduced or head is lm_head(weights.target.vocab)


def places(tree):
    return [
        [shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards]
        for leaf in jax.tree.leaves(tree)
    ]


def test_a_decoder_copies_nothing_but_layers(target, drafter, mesh):
    found = load_target(target, mesh=mesh)
    bound = load_drafter_for(found, drafter, mesh=mesh)
    given = (found.cfg, found.params), (bound.cfg, bound.params, bound.vocab)
    weights = make_decoder(*given, mesh=mesh).weights
    for model, loaded in (weights.target, found.params), (weights.drafter, bound.params):
        rest = {name: value for name, value in vars(loaded).items() if name != "layers"}
        assert places([getattr(model, name) for name in rest]) == places(list(rest.values()))


@pytest.mark.parametrize("sharded", [True, False])
def test_layers_are_on_the_devices_once_while_a_decoder_is_made(sharded, target, mesh, monkeypatch):
    """Beside the model there is never more than the largest matrices of all layers."""
    mesh = mesh if sharded else None
    if not sharded:
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # whose products are merged
    found, most = load_target(target, mesh=mesh), 0
    before = {id(leaf) for leaf in jax.live_arrays()} - set(map(id, jax.tree.leaves(found.params)))
    (stack,) = found.params.layers
    largest = stack.mlp.gate_DM.nbytes + stack.mlp.up_DM.nbytes
    model, program = sum(leaf.nbytes for leaf in jax.tree.leaves(found.params)), merged._program

    def spy(*how):
        def run(*parts, **options):
            nonlocal most
            made = program(*how)(*parts, **options)
            alive = [leaf for leaf in jax.live_arrays() if id(leaf) not in before]
            most = max(most, sum(leaf.nbytes for leaf in alive))
            return made

        return run

    monkeypatch.setattr(merged, "_program", spy)
    weights = make_decoder((found.cfg, found.params), mesh=mesh, donate=True).weights
    assert model < most <= model + largest
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(found.params.layers))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(weights))


def test_matrices_are_merged_where_they_are_split_alike(emulated_devices):
    """2 key heads and 4 query heads: over 2 devices both are split, over 4 the latter alone."""
    cfg = dataclasses.replace(UNTIED, num_heads=4)
    target = random_params(0, declare_target(cfg))
    for parts, together in (2, True), (4, False), (3, True):
        mesh = make_mesh(tensor=parts, devices=emulated_devices)
        layer = make_decoder((cfg, target), mesh=mesh).weights.target.layers[0][0]
        assert isinstance(layer.q_DNH, Merged) == together
        assert isinstance(layer.mlp.gate_DM, Merged)
        head_parts, width_parts = 1 if parts == 3 else parts, 1 if parts == 3 else parts
        q = layer.q_DNH.weight_DX if together else layer.q_DNH
        gate = layer.mlp.gate_DM.weight_DX
        assert shares(q) == {q.nbytes // head_parts}
        assert shares(gate) == {gate.nbytes // width_parts}


def test_weights_of_another_decoder_take_the_place_of_merged_ones(mesh):
    old, new = (
        make_decoder((UNTIED, random_params(seed, declare_target(UNTIED))), mesh=mesh).weights
        for seed in (0, 1)
    )
    placed = replace_weights(old, new)
    jax.tree.map(np.testing.assert_array_equal, placed, new)
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, placed, old))
    one_device = make_decoder((UNTIED, random_params(1, declare_target(UNTIED)))).weights
    with pytest.raises(ValueError, match="another structure"):
        replace_weights(old, one_device)
