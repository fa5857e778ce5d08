"""Targets against transformers, and the cached extension against the dense encoding."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_jax.axes import init_params
from dspark_jax.config import RopeConfig, TargetConfig
from dspark_jax.models.cache import empty_cache
from dspark_jax.models.hf import load_hf_target
from dspark_jax.models.layers import unstack_layers
from dspark_jax.models.target import Rows, declare_target, encode, extend, unembed

GOLDEN = Path(__file__).parent / "data" / "hf_targets"
CASES = ("llama_tied", "llama3_rope_untied", "qwen3", "qwen2_bias")
TOLERANCE = 1e-4


@pytest.mark.parametrize("case", CASES)
def test_logits_and_residual_streams_are_those_of_transformers(case):
    cfg, target = load_hf_target(GOLDEN / case / "checkpoint", jnp.float32)
    golden = np.load(GOLDEN / case / "io.npz")
    layers = tuple(range(-1, cfg.num_layers))
    hidden_BSD, feature_BSFD = encode(target, jnp.asarray(golden["input_ids"]), cfg, layers)
    # transformers' tuple ends with the normalised last layer; ours does not normalise features.
    for index, layer in enumerate(layers[:-1]):
        expected = golden[f"hidden_{layer + 1}"]
        np.testing.assert_allclose(feature_BSFD[:, :, index], expected, atol=TOLERANCE, rtol=0)
    expected = golden[f"hidden_{cfg.num_layers}"]
    np.testing.assert_allclose(hidden_BSD, expected, atol=TOLERANCE, rtol=0)
    logits_BSV = unembed(target.vocab, hidden_BSD)
    np.testing.assert_allclose(logits_BSV, golden["logits"], atol=TOLERANCE, rtol=0)
