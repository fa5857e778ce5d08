"""DeepSeek-V4 against the inference program that ships with its checkpoints."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.checkpoints.hf import load_hf_target
from dspark_jax.models import hyper_connections as streams
from dspark_jax.models.stacks import loop_layers
from dspark_jax.models.targets import deepseek_v4 as family
from dspark_jax.models.targets import deepseek_v4_entries as entries
from dspark_jax.models.targets import deepseek_v4_layers as layers
from dspark_jax.models.vocab import unembed

GOLDEN = Path(__file__).parent / "data" / "deepseek_v4"
TOLERANCE = {"atol": 2e-4, "rtol": 0}  # of the golden: its two programs differ by 2e-5


@functools.cache
def checkpoint():
    return load_hf_target(GOLDEN / "checkpoint", jnp.float32)


@functools.cache
def golden():
    return dict(np.load(GOLDEN / "target.npz"))


@functools.cache
def trace():
    """All that the golden records of every layer, each computed from the recorded streams before
    it: one program."""
    cfg, target = checkpoint()
    length = golden()["input_ids"].shape[1]

    @jax.jit
    def run(target, token_BS, x_LBSJD, attended_LBSD):
        table_of, position_S = family.tables(jnp.arange(length), cfg), jnp.arange(length)
        found = []

        def body(number, layer, place):
            kind, x, out = place.kind, x_LBSJD[number], {}
            table = table_of[kind.ratio > 0]
            mix = streams.mix(layer.attention_mixing, x, cfg.streams)
            u = layers.rms_norm(streams.join(mix, x), layer.attention_norm_D, cfg.rms_norm_eps)

            def attend(inputs):
                return family._attend_causally(layer, kind, inputs, table, cfg), None

            out["after"], _ = layers.read_layer(layer, x, token_BS, table, cfg, attend)
            latent, q = layers.queries(layer.heads, u, table, cfg)
            key = layers.keys(layer.heads, u, table, cfg)
            seen, _ = attend(layers.Inputs(u, latent, q, key))
            out["attn_out"] = layers.output(layer.heads, seen, table)
            # The mixing around the experts, from the recorded output of the attention on.
            x = streams.part(mix, x, attended_LBSD[number])
            second = streams.mix(layer.mlp_mixing, x, cfg.streams)
            v = layers.rms_norm(streams.join(second, x), layer.mlp_norm_D, cfg.rms_norm_eps)
            out["ffn_out"] = layers.experts(layer, v, token_BS, cfg)
            out["route"] = layers.route(layer.router, v, token_BS, cfg)
            out["mixes"] = mix, second
            if kind.ratio:
                out["entries"] = family.entries_of(layer.compressor, u, kind, cfg)
            if kind.sparse:
                index = family.entries_of(layer.indexer.compressor, u, kind, cfg)
                visible = entries.complete(position_S, index.shape[1], kind)[None]
                out["index_keys"] = index
                queries = entries.index_queries(layer.indexer, u, latent, table, cfg)
                out["selected"] = entries.choose(*queries, index, visible, cfg.index_top)
            found.append(out)
            return number + 1

        loop_layers(body, 0, target.layers, family.sections(cfg))
        return found

    token_BS = jnp.asarray(golden()["input_ids"], jnp.int32)
    return jax.device_get(run(target, token_BS, golden()["streams"], golden()["attn_out"]))


def test_every_residual_stream_and_the_logits_are_those_of_the_inference_program():
    cfg, target = checkpoint()
    taps = tuple(range(-1, cfg.num_layers))
    token_BS = jnp.asarray(golden()["input_ids"], jnp.int32)
    read = jax.jit(family.encode, static_argnums=(2, 3))
    hidden_BSD, feature_BSFD = read(target, token_BS, cfg, taps)
    expected = np.moveaxis(golden()["streams"].mean(-2), 0, 2)
    np.testing.assert_allclose(feature_BSFD, expected, **TOLERANCE)
    tapped = feature_BSFD[:, :, -3:].reshape(2, 40, -1)
    np.testing.assert_allclose(tapped, golden()["features"], **TOLERANCE)
    np.testing.assert_allclose(hidden_BSD, golden()["last_hidden"], **TOLERANCE)
    logits_BSV = unembed(target.vocab, hidden_BSD)
    np.testing.assert_allclose(logits_BSV, golden()["logits"], **TOLERANCE)
    np.testing.assert_allclose(logits_BSV, golden()["logits_transformers"], **TOLERANCE)


@pytest.mark.parametrize("number", range(6))
def test_a_layer_alone_is_that_of_the_inference_program(number):
    found = trace()[number]
    np.testing.assert_allclose(found["after"], golden()["streams"][number + 1], **TOLERANCE)
    for name in ("attn_out", "ffn_out"):
        np.testing.assert_allclose(found[name], golden()[name][number], **TOLERANCE)
    for place, mix in enumerate(found["mixes"], 2 * number):
        np.testing.assert_allclose(mix.pre_XJ, golden()["mix_pre"][place], **TOLERANCE)
        np.testing.assert_allclose(mix.post_XJ, golden()["mix_post"][place], **TOLERANCE)
        # This closely, a row step at the end of the iteration, or one step fewer, would be seen.
        close = {"atol": 2e-6, "rtol": 0} if place == 2 * number else TOLERANCE
        np.testing.assert_allclose(mix.comb_XJJ, golden()["mix_comb"][place], **close)
    known = golden()["route_idx"][number], golden()["route_weight"][number]
    order, expected_order = np.argsort(found["route"][0]), np.argsort(known[0])
    for ours, expected in zip(found["route"], known, strict=True):
        np.testing.assert_allclose(
            np.take_along_axis(ours, order, -1),
            np.take_along_axis(expected, expected_order, -1),
            **TOLERANCE,
        )


@pytest.mark.parametrize("number", range(1, 5))
def test_entries_and_the_choice_among_them_are_those_of_the_inference_program(number):
    found = trace()[number]
    entry_BKH = golden()[f"layer{number}/entries"]
    np.testing.assert_allclose(found["entries"], entry_BKH, **TOLERANCE)
    if "selected" not in found:
        return
    key_BKH = golden()[f"layer{number}/index_keys"]
    np.testing.assert_allclose(found["index_keys"], key_BKH, **TOLERANCE)
    selected_BSK = golden()[f"layer{number}/selected"]
    for place in np.ndindex(selected_BSK.shape[:2]):
        best_K, visible_K = (x[place] for x in found["selected"])
        expected = selected_BSK[place][selected_BSK[place] >= 0]
        np.testing.assert_array_equal(np.sort(best_K[visible_K]), expected)
