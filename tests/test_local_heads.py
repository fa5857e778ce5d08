"""Heads that begin by looking a fixed number of positions back."""

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.axes import init_params
from dspark_jax.config import DrafterConfig
from dspark_jax.models.drafters.dspark import declare_drafter, inject
from dspark_jax.models.layers import project_qkv, rms_norm
from dspark_jax.models.rope import rope_table
from dspark_jax.models.vocab import Vocab, embed
from dspark_jax.training.local_heads import constant_direction, start_with_local_heads

CFG = DrafterConfig(
    vocab_size=40, hidden_size=48, intermediate_size=16, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=32, block_size=3, mask_token_id=39, target_layer_ids=(-1, 0),
)  # fmt: skip
LENGTH, POSITION = 60, 50


def inputs():
    """Features and embeddings with a channel that hardly varies, as real ones have."""
    random = np.random.default_rng(0)
    feature_TFD = random.standard_normal((LENGTH, 2, 48)).astype(np.float32)
    embed_VD = random.standard_normal((40, 48)).astype(np.float32)
    feature_TFD[..., 7] = embed_VD[:, 7] = 6.0
    return jnp.asarray(feature_TFD), Vocab(jnp.asarray(embed_VD))


def first_layer_scores(params, feature_TFD, vocab):
    """[N, POSITION]: what each head of an anchor at POSITION thinks of the context before it."""
    layer = jax.tree.map(lambda x: x[0], params.layers[0])
    ((keys, _),) = inject(params, feature_TFD, jnp.arange(LENGTH), CFG)
    x_1D = rms_norm(embed(vocab, jnp.array([5])), layer.input_norm_D, CFG.rms_norm_eps)
    table = rope_table(jnp.array([POSITION]), CFG.rope, CFG.head_dim)
    query_1NH, _, _ = project_qkv(layer, x_1D, table, CFG)
    key_SNH = jnp.repeat(keys[0], CFG.num_heads // CFG.num_kv_heads, axis=1)
    return np.asarray(jnp.einsum("nh,snh->ns", query_1NH[0], key_SNH)[:, :POSITION])


def test_head_n_looks_n_plus_1_positions_back():
    feature_TFD, vocab = inputs()
    fresh = init_params(jax.random.key(0), declare_drafter(CFG))
    local = start_with_local_heads(fresh, vocab, feature_TFD, jnp.arange(LENGTH) % 39, CFG)
    peak_N = first_layer_scores(local, feature_TFD, vocab).argmax(axis=1)
    np.testing.assert_array_equal(peak_N, POSITION - 1 - np.arange(CFG.num_heads))
    assert (first_layer_scores(fresh, feature_TFD, vocab).argmax(axis=1) != peak_N).any()
    # Nothing but the first layer's queries and keys differs.
    same = jax.tree.map(np.array_equal, fresh, local)
    assert jax.tree.leaves(same).count(False) == 2


def test_constant_direction_is_where_all_rows_are_nearly_1():
    x_TD = np.random.default_rng(1).standard_normal((200, 8))
    x_TD[:, 3] = 5.0
    product_T = x_TD @ constant_direction(x_TD)
    np.testing.assert_allclose(product_T.mean(), 1.0)
    assert product_T.std() < 0.2
