"""Targets against transformers, and the cached extension against the dense encoding."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.checkpoints.hf import load_hf_target
from dspark_jax.models import layers, sequences
from dspark_jax.models.targets.table import family_of
from dspark_jax.models.vocab import unembed

GOLDEN = Path(__file__).parent / "data" / "hf_targets"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
TOLERANCE = 1e-4


@pytest.mark.smoke
@pytest.mark.parametrize("case", CASES)
def test_logits_and_residual_streams_are_those_of_transformers(case):
    cfg, target = load_hf_target(GOLDEN / case / "checkpoint", jnp.float32)
    golden = np.load(GOLDEN / case / "io.npz")
    layers = tuple(range(-1, cfg.num_layers))
    token_BS = jnp.asarray(golden["input_ids"])
    family = family_of(cfg)
    read = jax.jit(family.encode, static_argnums=(2, 3))
    hidden_BSD, feature_BSFD = read(target, token_BS, cfg, layers)
    # transformers' tuple ends with the normalised last layer; ours does not normalise features.
    for index, layer in enumerate(layers[:-1]):
        expected = golden[f"hidden_{layer + 1}"]
        np.testing.assert_allclose(feature_BSFD[:, :, index], expected, atol=TOLERANCE, rtol=0)
    expected = golden[f"hidden_{cfg.num_layers}"]
    np.testing.assert_allclose(hidden_BSD, expected, atol=TOLERANCE, rtol=0)
    logits_BSV = unembed(target.vocab, hidden_BSD)
    np.testing.assert_allclose(logits_BSV, golden["logits"], atol=TOLERANCE, rtol=0)
    # A text goes on with the same token everywhere, unless two are as good as each other.
    second, best = np.sort(golden["logits"], axis=-1)[..., -2:].transpose(2, 0, 1)
    clear = best - second > 2 * TOLERANCE
    assert clear.mean() > 0.9
    same = logits_BSV.argmax(-1) == golden["logits"].argmax(-1)
    assert np.asarray(same)[clear].all()


@pytest.mark.parametrize("rows", [1, 4, 128])
def test_whole_sequences_attend_to_what_came_before(monkeypatch, rows):
    """Whatever number of queries at a time: softmax over the keys up to each one's own."""
    monkeypatch.setattr(sequences, "ATTENTION_ROWS", rows)
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 9, n, 8)) for i, n in enumerate((4, 2, 2)))
    found = jax.jit(lambda *qkv: sequences.attend_causally(*qkv))(q, k, v)
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
