"""Mixtures of experts against the dense sum over all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_jax.axes import make_mesh
from dspark_jax.models.moe import Experts, choose_experts, mix_experts

E, D, M = 6, 8, 5


def experts_of(seed, layers=()):
    rng = np.random.default_rng(seed)
    sizes = ((D, M), (D, M), (M, D))
    return Experts(*(jnp.asarray(rng.normal(size=(*layers, E, *s)), jnp.float32) for s in sizes))


def dense(experts, x_TD, expert_TC, weight_TC):
    """Every expert for every row, in float64."""
    gate, up, down = (np.asarray(w, np.float64) for w in (
        experts.gate_EDM, experts.up_EDM, experts.down_EMD
    ))  # fmt: skip
    out_TD = np.zeros(x_TD.shape)
    for row, (x_D, chosen_C, weight_C) in enumerate(zip(x_TD, expert_TC, weight_TC, strict=True)):
        for expert, weight in zip(chosen_C, weight_C, strict=True):
            gated_M = np.asarray(jax.nn.silu(x_D @ gate[expert])) * (x_D @ up[expert])
            out_TD[row] += weight * (gated_M @ down[expert])
    return out_TD


@settings(deadline=None, max_examples=15)
@given(
    rows=st.sampled_from([1, 2, 7, 40]), chosen=st.integers(1, 4), seed=st.integers(0, 2**32 - 1)
)
def test_the_tiles_of_the_experts_in_use_are_the_dense_sum(rows, chosen, seed):
    rng = np.random.default_rng(seed)
    x_TD = rng.normal(size=(rows, D)).astype(np.float32)
    # Some experts get many rows and others none.
    favour_E = rng.exponential(size=E) + 1e-3
    expert_TC = np.stack(
        [rng.choice(E, chosen, replace=False, p=favour_E / favour_E.sum()) for _ in range(rows)]
    ).astype(np.int32)
    weight_TC = rng.uniform(size=(rows, chosen)).astype(np.float32)
    mix = jax.jit(lambda *args: mix_experts(*args, jax.nn.silu))
    found = mix(experts_of(0), x_TD, expert_TC, weight_TC)
    np.testing.assert_allclose(found, dense(experts_of(0), x_TD, expert_TC, weight_TC), atol=1e-4)


def test_the_gradient_is_that_of_the_dense_sum():
    """Of a layer of a stack, by its weights, the inputs and the weights of the choice."""
    rng, layer = np.random.default_rng(2), 1
    stack, x_TD = experts_of(2, (2,)), rng.normal(size=(7, D)).astype(np.float32)
    expert_TC = np.stack([rng.choice(E, 2, replace=False) for _ in range(7)]).astype(np.int32)
    weight_TC = rng.uniform(size=(7, 2)).astype(np.float32)
    slope_TD = rng.normal(size=(7, D)).astype(np.float32)

    def tiles(stack, x_TD, weight_TC):
        experts = stack.at(jnp.int32(layer))
        return (slope_TD * mix_experts(experts, x_TD, expert_TC, weight_TC, jax.nn.silu)).sum()

    def every(stack, x_TD, weight_TC):
        gate, up, down = (w[layer][expert_TC] for w in (
            stack.gate_EDM, stack.up_EDM, stack.down_EMD
        ))  # fmt: skip
        gated = jax.nn.silu(jnp.einsum("td,tcdm->tcm", x_TD, gate))
        gated *= jnp.einsum("td,tcdm->tcm", x_TD, up)
        return (slope_TD * jnp.einsum("tc,tcm,tcmd->td", weight_TC, gated, down)).sum()

    given = stack, x_TD, weight_TC
    found, wanted = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*given) for f in (tiles, every))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, wanted)


def test_a_layer_of_a_stack_is_read_where_it_lies():
    stack, x_TD = experts_of(1, (3,)), jnp.ones((2, D))
    expert_TC, weight_TC = jnp.array([[0, 4], [5, 4]]), jnp.ones((2, 2))
    for layer in range(3):
        one = jax.tree.map(lambda leaf, i=layer: leaf[i], stack)
        np.testing.assert_allclose(
            mix_experts(stack.at(jnp.int32(layer)), x_TD, expert_TC, weight_TC, jax.nn.silu),
            mix_experts(one, x_TD, expert_TC, weight_TC, jax.nn.silu),
            rtol=1e-6,
        )


def test_experts_that_nobody_chose_cost_nothing():
    """Weights that are not read may hold anything."""
    experts = experts_of(2)
    spoilt = jax.tree.map(lambda leaf: leaf.at[3].set(jnp.nan), experts)
    arguments = jnp.ones((2, D)), jnp.array([[0, 4], [5, 4]]), jnp.ones((2, 2)), jax.nn.silu
    np.testing.assert_array_equal(mix_experts(spoilt, *arguments), mix_experts(experts, *arguments))


def test_devices_hold_parts_of_the_experts(emulated_devices):
    rng = np.random.default_rng(3)
    x_TD = rng.normal(size=(9, D)).astype(np.float32)
    expert_TC = rng.integers(0, E, (9, 2)).astype(np.int32)
    weight_TC = rng.uniform(size=(9, 2)).astype(np.float32)
    with jax.set_mesh(make_mesh(expert=2, devices=emulated_devices)):
        mix = jax.jit(lambda *args: mix_experts(*args, jax.nn.silu))
        found = mix(experts_of(0), x_TD, expert_TC, weight_TC)
    np.testing.assert_allclose(found, dense(experts_of(0), x_TD, expert_TC, weight_TC), atol=1e-4)


@pytest.mark.parametrize("normalise", [True, False])
def test_the_best_experts_are_chosen_by_a_softmax_over_all(normalise):
    logits_TE = np.random.default_rng(4).normal(size=(5, E)).astype(np.float32)
    law_TE = np.exp(logits_TE) / np.exp(logits_TE).sum(-1, keepdims=True)
    expert_TC, weight_TC = choose_experts(logits_TE, 2, normalise=normalise)
    best_TC = np.argsort(-law_TE, axis=-1)[:, :2]
    np.testing.assert_array_equal(expert_TC, best_TC)
    expected_TC = np.take_along_axis(law_TE, best_TC, axis=-1)
    if normalise:
        expected_TC /= expected_TC.sum(-1, keepdims=True)
    np.testing.assert_allclose(weight_TC, expected_TC, rtol=1e-5)
