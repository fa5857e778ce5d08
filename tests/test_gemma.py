"""Gemma 4's variants against recorded runs, and the two spellings of its configurations."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dspark_jax.checkpoints.hf import load_hf_target, target_config
from dspark_jax.models.targets import gemma
from dspark_jax.models.vocab import embed, unembed

DATA = Path(__file__).parent / "data"
VARIANTS = DATA / "gemma4_variants"
TOLERANCE = 1e-4
# What is recorded of the third is itself up to 1e-4 from a float64 program's numbers, as ours is on
# some processors, on the other side.
LARGEST = {"unified": TOLERANCE, "moe": TOLERANCE, "ple_shared_kv": 2 * TOLERANCE}


def variant(name):
    cfg, target = load_hf_target(VARIANTS / name / "checkpoint", jnp.float32)
    return cfg, target, np.load(VARIANTS / name / "io.npz")


@pytest.mark.parametrize("name", ["unified", "moe", "ple_shared_kv"])
def test_logits_residual_streams_and_greedy_text(name):
    cfg, target, golden = variant(name)
    layers = tuple(range(-1, cfg.num_layers))
    read = jax.jit(gemma.encode, static_argnums=(2, 3))
    hidden_BSD, feature_BSFD = read(target, jnp.asarray(golden["input_ids"]), cfg, layers)
    logits_BSV = unembed(target.vocab, hidden_BSD)
    pairs = [(feature_BSFD[:, :, i], golden[f"hidden_{i}"]) for i in range(cfg.num_layers)]
    pairs += [(feature_BSFD[:, :, -1], golden["pre_norm"]), (logits_BSV, golden["logits"])]
    for found, wanted in pairs:
        np.testing.assert_allclose(found, wanted, atol=LARGEST[name], rtol=0)
        assert np.mean(np.abs(found - wanted) <= TOLERANCE) > 0.99

    start = int(golden["greedy_prompt_len"])
    text = np.concatenate([golden["input_ids"][:, :start], golden["greedy"]], axis=1)
    hidden_BSD, _ = read(target, jnp.asarray(text), cfg, ())
    best = np.argmax(unembed(target.vocab, hidden_BSD), axis=-1)
    np.testing.assert_array_equal(best[:, start - 1 : -1], golden["greedy"])


def test_the_experts_of_every_token_and_their_weights():
    cfg, target, golden = variant("moe")
    layers = tuple(range(cfg.num_layers))
    streams = []  # the residual streams that the routers see

    def note(mixture, x_XD, cfg):
        jax.debug.callback(lambda x: streams.append(np.asarray(x)), x_XD, ordered=True)
        return route(mixture, x_XD, cfg)

    route = gemma.route
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemma, "route", note)
        jax.block_until_ready(gemma.encode(target, jnp.asarray(golden["input_ids"]), cfg, layers))
    jax.effects_barrier()
    assert len(streams) == cfg.num_layers
    mixtures = [
        jax.tree.map(lambda leaf, i=i: leaf[i] if leaf.ndim > 1 else leaf, stack.mixture)
        for stack in target.layers
        for i in range(stack.input_norm_D.shape[0])
    ]
    # Stacks hold the layers in this order: two with a window, one without.
    for layer, (mixture, x_BSD) in enumerate(zip(mixtures, streams, strict=True)):
        chosen, weight = route(mixture, jnp.asarray(x_BSD), cfg)
        order, expected = (np.argsort(x, axis=-1) for x in (chosen, golden["route_idx"][layer]))
        np.testing.assert_array_equal(
            np.take_along_axis(np.asarray(chosen), order, -1),
            np.take_along_axis(golden["route_idx"][layer], expected, -1),
        )
        np.testing.assert_allclose(
            np.take_along_axis(np.asarray(weight), order, -1),
            np.take_along_axis(golden["route_weight"][layer], expected, -1),
            atol=1e-5,
        )


def test_every_layers_own_embedding_of_a_token():
    cfg, target, golden = variant("ple_shared_kv")
    token_BS = jnp.asarray(golden["input_ids"])
    x_BSD = embed(target.vocab, token_BS)
    own_LBSO = gemma.token_inputs(target.extra, token_BS, x_BSD, cfg)
    np.testing.assert_allclose(
        np.moveaxis(own_LBSO, 0, 2), golden["per_layer_inputs"], atol=1e-5, rtol=0
    )


def test_the_older_spelling_of_the_layers_without_a_window():
    folder = VARIANTS / "unified"
    newer, older = (
        json.loads((folder / name).read_text())
        for name in ("checkpoint/config.json", "config_older_keys.json")
    )
    assert target_config(older) == target_config(newer)
    assert target_config(newer).head_dim == 32


def config_of(name, **changes):
    path = DATA / "hf_targets" / name / "checkpoint" / "config.json"
    config = json.loads(path.read_text()) | changes
    return target_config({key: value for key, value in config.items() if value is not ...})


def test_what_a_file_leaves_out_is_what_transformers_has():
    assert config_of("gemma2", layer_types=...) == config_of("gemma2")
    assert config_of("gemma2", final_logit_softcapping=...).softcap == 30.0
    assert config_of("gemma3", layer_types=..., sliding_window_pattern=4) == config_of("gemma3")
    older = {"rope_parameters": ..., "rope_theta": 1e6, "rope_local_base_freq": 1e4}
    assert config_of("gemma3", **older) == config_of("gemma3")
    scaled = config_of("gemma3", **older, rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert (scaled.rope.kind, scaled.rope.factor) == ("linear", 8.0)
    assert scaled.local_rope == config_of("gemma3").local_rope
    assert config_of("gemma4", rope_parameters=None) == config_of("gemma4")
    last_slides = config_of("gemma4", layer_types=["sliding_attention"] * 4)
    assert last_slides.windows == (8, 8, 8, 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"hidden_activation": "relu"}, "hidden_activation 'relu'"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention is 'all'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        ({"num_kv_shared_layers": 4}, "num_kv_shared_layers 4"),
        ({"per_layer_config": {"0": {"head_dim": 8}}}, "per_layer_config must say the same"),
        ({"per_layer_config": {"3": {"num_heads": 8}}}, r"per_layer_config of layer 3 has \['num"),
        ({"enable_moe_block": True, "num_experts": 4}, "top_k_experts is missing"),
        ({"final_logit_softcapping": -1.0}, "final_logit_softcapping is -1.0"),
    ],
)
def test_what_is_not_supported_is_named(changes, expected):
    with pytest.raises(ValueError, match=expected):
        config_of("gemma4", **changes)


def test_suppressed_ids_are_those_of_the_generation_config(tmp_path):
    from dspark_jax.checkpoints.load import open_target
    from dspark_jax.checkpoints.tensors import LoadError

    folder = tmp_path / "target"
    shutil.copytree(DATA / "hf_targets" / "gemma4" / "checkpoint", folder)
    shutil.copytree(DATA / "tokenizer_gemma4", folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 420}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    name = "model.embed_tokens.weight"
    tensors[name] = np.resize(tensors[name], (420, tensors[name].shape[1]))
    save_file(tensors, folder / "model.safetensors")
    (folder / "generation_config.json").write_text('{"suppress_tokens": [7, 3]}')
    assert open_target(folder)[0].cfg.suppressed == (3, 7)
    (folder / "generation_config.json").write_text('{"suppress_tokens": [7, 420]}')
    with pytest.raises(LoadError, match="suppress_tokens"):
        open_target(folder)
