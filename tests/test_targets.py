"""Targets against transformers, and the cached extension against the dense encoding."""

import functools
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_jax.axes import empty_buffers, map_params, unstacked
from dspark_jax.checkpoints.hf import load_hf_target
from dspark_jax.config import RopeConfig, TargetConfig
from dspark_jax.models import layers
from dspark_jax.models.cache import Rows
from dspark_jax.models.layers import unstack_layers
from dspark_jax.models.targets.llama import declare_cache, declare_target, encode, extend
from dspark_jax.models.vocab import unembed

GOLDEN = Path(__file__).parent / "data" / "hf_targets"
CASES = ("llama_tied", "llama3_rope_untied", "qwen3", "qwen2_bias")
TOLERANCE = 1e-4


@pytest.mark.smoke
@pytest.mark.parametrize("case", CASES)
def test_logits_and_residual_streams_are_those_of_transformers(case):
    cfg, target = load_hf_target(GOLDEN / case / "checkpoint", jnp.float32)
    golden = np.load(GOLDEN / case / "io.npz")
    layers = tuple(range(-1, cfg.num_layers))
    token_BS = jnp.asarray(golden["input_ids"])
    read = jax.jit(encode, static_argnums=(2, 3))
    hidden_BSD, feature_BSFD = read(target, token_BS, cfg, layers)
    # transformers' tuple ends with the normalised last layer; ours does not normalise features.
    for index, layer in enumerate(layers[:-1]):
        expected = golden[f"hidden_{layer + 1}"]
        np.testing.assert_allclose(feature_BSFD[:, :, index], expected, atol=TOLERANCE, rtol=0)
    expected = golden[f"hidden_{cfg.num_layers}"]
    np.testing.assert_allclose(hidden_BSD, expected, atol=TOLERANCE, rtol=0)
    logits_BSV = unembed(target.vocab, hidden_BSD)
    np.testing.assert_allclose(logits_BSV, golden["logits"], atol=TOLERANCE, rtol=0)


# Every optional part of a layer at once.
TINY = TargetConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope=RopeConfig(theta=500.0, factor=4.0, original_max_positions=16),
    qk_norm=True,
    qkv_bias=True,
    out_bias=True,
)
FEATURES = (-1, 0, 2)
SLOTS, POSITIONS, ROWS_PER_SLOT = 3, 16, 4


@functools.cache
def tiny_target(*, stacked: bool, dtype=jnp.float32):
    """Random weights in which biases and norms are not trivial either."""
    rng = np.random.default_rng(0)

    def draw(param):
        scale, mean = (0.1, 1.0) if param.init == "ones" else (param.fan_in**-0.5, 0.0)
        return jnp.asarray(rng.normal(mean, scale, param.shape), dtype)

    target = map_params(draw, declare_target(TINY))
    return target if stacked else replace(target, layers=unstack_layers(target.layers))


@jax.jit
def dense(target, token_BS):
    return encode(target, token_BS, TINY, FEATURES)


@jax.jit
def step(target, cache, rows):
    return extend(target, cache, rows, TINY, FEATURES, rows_per_slot=ROWS_PER_SLOT)


def garbage_cache(*, stacked: bool):
    """A cache whose every place holds what must never be attended to."""
    declared = declare_cache(TINY, SLOTS, POSITIONS, jnp.float32)
    cache = empty_buffers(declared if stacked else unstacked(declared))
    return jax.tree.map(lambda leaf: leaf + 100.0, cache)


def make_rows(tokens, start, counts, order):
    """Rows of one step: ``counts[slot]`` tokens a slot, slots in ``order``, padded."""
    token = np.zeros(SLOTS * ROWS_PER_SLOT, np.int32)
    slot = np.full(SLOTS * ROWS_PER_SLOT, SLOTS, np.int32)
    position = np.zeros(SLOTS * ROWS_PER_SLOT, np.int32)
    row = 0
    for index in order:
        for place in range(start[index], start[index] + counts[index]):
            token[row], slot[row], position[row] = tokens[index, place], index, place
            row += 1
    return Rows(jnp.asarray(token), jnp.asarray(slot), jnp.asarray(position))


@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "unstacked"])
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_chunking_through_the_cache_equals_the_dense_encoding(stacked, seed):
    rng, target = np.random.default_rng(seed), tiny_target(stacked=stacked)
    tokens = rng.integers(0, TINY.vocab_size, (SLOTS, POSITIONS))
    lengths = rng.integers(1, POSITIONS + 1, SLOTS)
    dense_outputs = [np.asarray(out) for out in dense(target, jnp.asarray(tokens, jnp.int32))]
    cache, start = garbage_cache(stacked=stacked), np.zeros(SLOTS, int)
    while (start < lengths).any():
        counts = rng.integers(0, np.minimum(ROWS_PER_SLOT, lengths - start) + 1)
        rows = make_rows(tokens, start, counts, rng.permutation(SLOTS))
        *outputs, cache = step(target, cache, rows)
        real = np.asarray(rows.slot_T) < SLOTS
        where = (np.asarray(rows.slot_T)[real], np.asarray(rows.position_T)[real])
        for out, expected in zip(outputs, dense_outputs, strict=True):
            np.testing.assert_allclose(np.asarray(out)[real], expected[where], atol=2e-5, rtol=0)
        start = start + counts


def test_rows_overwrite_what_a_rejected_draft_left_in_the_cache():
    target = tiny_target(stacked=True)
    tokens = np.random.default_rng(4).integers(0, TINY.vocab_size, (SLOTS, POSITIONS))
    wrong = (tokens + 1) % TINY.vocab_size
    cache = garbage_cache(stacked=True)
    *_, cache = step(target, cache, make_rows(tokens, [0] * 3, [3, 4, 2], range(SLOTS)))
    *_, cache = step(target, cache, make_rows(wrong, [3, 4, 2], [4, 4, 4], range(SLOTS)))
    hidden_TD, _, _ = step(target, cache, make_rows(tokens, [3, 4, 2], [2, 2, 2], range(SLOTS)))
    hidden_BSD, _ = dense(target, jnp.asarray(tokens, jnp.int32))
    expected = np.concatenate([hidden_BSD[0, 3:5], hidden_BSD[1, 4:6], hidden_BSD[2, 2:4]])
    np.testing.assert_allclose(hidden_TD[:6], expected, atol=2e-5, rtol=0)


def test_padding_at_the_end_changes_nothing_before_it():
    target = tiny_target(stacked=True)
    token_BS = jax.random.randint(jax.random.key(5), (2, POSITIONS), 0, TINY.vocab_size)
    padded_BS = token_BS.at[:, 9:].set(0)
    hidden_BSD, feature_BSFD = dense(target, token_BS)
    padded_hidden_BSD, padded_feature_BSFD = dense(target, padded_BS)
    assert np.array_equal(np.asarray(padded_hidden_BSD)[:, :9], np.asarray(hidden_BSD)[:, :9])
    assert np.array_equal(np.asarray(padded_feature_BSFD)[:, :9], np.asarray(feature_BSFD)[:, :9])


@pytest.mark.smoke
def test_stacked_and_unstacked_layers_agree():
    token_BS = jax.random.randint(jax.random.key(6), (2, POSITIONS), 0, TINY.vocab_size)
    outputs = [dense(tiny_target(stacked=stacked), token_BS) for stacked in (True, False)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=0), *outputs)


def test_no_features_are_returned_where_none_are_asked_for():
    token_BS = jnp.zeros((2, 5), jnp.int32)
    for stacked in (True, False):
        target = tiny_target(stacked=stacked)
        _, feature_BSFD = jax.eval_shape(lambda t: encode(t, token_BS, TINY), target)
        assert feature_BSFD.shape == (2, 5, 0, TINY.hidden_size)


def test_bfloat16_stays_close_to_float32():
    token_BS = jax.random.randint(jax.random.key(7), (2, POSITIONS), 0, TINY.vocab_size)
    logits = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        target = tiny_target(stacked=True, dtype=dtype)
        hidden_BSD, feature_BSFD = dense(target, token_BS)
        assert hidden_BSD.dtype == feature_BSFD.dtype == dtype
        logits[dtype] = unembed(target.vocab, hidden_BSD)
        assert logits[dtype].dtype == jnp.float32
    error = jnp.abs(logits[jnp.bfloat16] - logits[jnp.float32]).max()
    # Eight bits of mantissa, through three layers of two residual additions each.
    assert error < 8 * 2.0**-8 * jnp.abs(logits[jnp.float32]).max()


@pytest.mark.parametrize("rows", [1, 4, 128])
def test_whole_sequences_attend_to_what_came_before(monkeypatch, rows):
    """Whatever number of queries at a time: softmax over the keys up to each one's own."""
    monkeypatch.setattr(layers, "ATTENTION_ROWS", rows)
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 9, n, 8)) for i, n in enumerate((4, 2, 2)))
    found = jax.jit(lambda *qkv: layers.attend_causally(*qkv))(q, k, v)
    for b, t, n in np.ndindex(2, 9, 4):
        score_S = np.asarray(k[b, : t + 1, n // 2], np.float64) @ np.asarray(q[b, t, n]) / 8**0.5
        weight_S = np.exp(score_S) / np.exp(score_S).sum()
        expected_H = weight_S @ np.asarray(v[b, : t + 1, n // 2])
        np.testing.assert_allclose(found[b, t, n], expected_H, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(3, 5), (5, 3)])
def test_the_derivative_of_a_product_is_that_of_a_product(sizes):
    x, w = jax.random.normal(jax.random.key(0), (2, 4, sizes[0])), jnp.ones(sizes)
    weight = jax.random.normal(jax.random.key(1), (2, 4, sizes[1]))

    def gradient(product):
        return jax.grad(lambda x, w: jnp.vdot(weight, product(x, w)), argnums=(0, 1))(x, w)

    jax.tree.map(np.testing.assert_allclose, gradient(layers.matmul), gradient(jnp.matmul))
