"""Hugging Face directories of targets: old and new configurations, shards, and broken files."""

import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, LlamaConfig

from dspark_jax.checkpoints.hf import load_hf_target, target_config
from dspark_jax.checkpoints.load import load_target
from dspark_jax.checkpoints.tensors import LoadError
from dspark_jax.config import RopeConfig
from dspark_jax.models.rope import rope_frequencies
from dspark_jax.models.targets.table import FAMILIES
from dspark_jax.models.targets.text_config import TEXT_OF

DATA = Path(__file__).parent / "data"
CASES = ("llama_tied", "llama3_rope_untied", "qwen3", "qwen2_bias")
ROPES = ("llama_yarn", "llama_linear")


def golden_config(case):
    return json.loads((DATA / "hf_targets" / case / "checkpoint" / "config.json").read_text())


@pytest.fixture
def directory(tmp_path):
    """A copy of the tied Llama checkpoint, to be changed."""
    source = DATA / "hf_targets" / "llama_tied" / "checkpoint"
    return Path(shutil.copytree(source, tmp_path / "target"))


def change_config(directory, changes):
    """Set keys of config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(directory, changes):
    """Set tensors of model.safetensors."""
    path = directory / "model.safetensors"
    save_file(load_file(path) | changes, path)


def refusal(source):
    """The message with which a target is refused: one line, an error of our own."""
    with pytest.raises(LoadError) as caught:
        load_hf_target(source, jnp.float32)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_configurations_of_the_four_families():
    llama, llama3, qwen3, qwen2 = (target_config(golden_config(case)) for case in CASES)
    assert llama.tied
    assert not llama3.tied
    assert llama3.rope == RopeConfig(50000.0, "llama3", 8.0, 1.0, 4.0, 64)
    assert llama.rope == RopeConfig(10000.0)
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.out_bias) == (True, False, False)
    assert (qwen2.qk_norm, qwen2.qkv_bias, qwen2.out_bias) == (False, True, False)
    assert (qwen2.head_dim, qwen3.head_dim, qwen3.max_positions) == (16, 16, 256)


@pytest.mark.parametrize("case", CASES + ROPES)
def test_configurations_of_older_transformers_mean_the_same(case):
    config = golden_config(case)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config.pop("layer_types", None)
    assert target_config(config) == target_config(golden_config(case))
    if config["rope_scaling"]:
        rope["type"] = rope.pop("rope_type")
        assert target_config(config) == target_config(golden_config(case))


SCALINGS = {
    "both spellings": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "rope_theta": 1e6,
    },
    "an old name": {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 1e6},
    "a base of its own": {"rope_scaling": {"type": "dynamic", "factor": 4.0, "rope_theta": 7e5}},
    "yarn, as model cards say": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "yarn with an original length beside it": {
        "original_max_position_embeddings": 32,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": None,
            "original_max_position_embeddings": 64,
        },
    },
    "nothing": {"rope_parameters": None},
}


@pytest.mark.parametrize("scaling", SCALINGS)
def test_rope_is_read_as_transformers_reads_it(scaling):
    config = golden_config("llama_tied") | SCALINGS[scaling]
    config = {key: value for key, value in config.items() if value is not None}
    rope = target_config(config).rope
    theirs = LlamaConfig(**json.loads(json.dumps(config))).rope_parameters
    assert (rope.kind, rope.theta) == (theirs["rope_type"], theirs["rope_theta"])
    if rope.kind == "yarn":
        positions = theirs["original_max_position_embeddings"]
        assert rope.original_max_positions == positions
        assert rope.factor == theirs["factor"] or rope.factor == 256 / positions


def test_longrope_is_exact_up_to_the_original_length():
    scaling = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 64,
    }
    cfg = target_config(golden_config("llama_tied") | {"rope_parameters": scaling})
    assert cfg.max_positions == 64
    assert cfg.rope.attention_factor == pytest.approx((1 + math.log(4) / math.log(64)) ** 0.5)
    np.testing.assert_array_equal(
        rope_frequencies(cfg.rope, cfg.head_dim), rope_frequencies(RopeConfig(1e4), cfg.head_dim)
    )


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (
            {"mscale": 1.0, "mscale_all_dim": 0.8},
            (0.1 * math.log(4) + 1) / (0.08 * math.log(4) + 1),
        ),
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 1.5}, 1.5),
    ],
)
def test_the_attention_factor_of_yarn(rope, expected):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64} | rope
    cfg = target_config(golden_config("llama_tied") | {"rope_parameters": rope})
    assert cfg.rope.attention_factor == pytest.approx(expected)


def test_layers_with_windows_and_layers_without_rope():
    mistral = golden_config("mistral_window")
    assert target_config(mistral).windows == (8,) * 4
    assert target_config(mistral | {"sliding_window": None}).windows == ()
    del mistral["sliding_window"]
    assert target_config(mistral).windows == (4096,) * 4  # what transformers has without a word
    qwen2 = golden_config("qwen2_window")
    assert target_config(qwen2).windows == (0, 0, 9, 9)
    assert target_config({**qwen2, "layer_types": None}).windows == (0, 0, 9, 9)
    smollm3 = golden_config("smollm3")
    assert target_config(smollm3).rotary == (True, True, True, False)
    assert target_config({**smollm3, "no_rope_layers": None}).rotary == (True, True, True, False)
    for value in ([1, 1, 1], [1, 1, 1, 2], "1110"):
        with pytest.raises(ValueError, match="no_rope_layers"):
            target_config(smollm3 | {"no_rope_layers": value})


def test_defaults_of_missing_fields():
    config = golden_config("llama_tied")
    for key in ("head_dim", "num_key_value_heads", "rope_parameters", "rms_norm_eps", "mlp_bias"):
        del config[key]
    cfg = target_config(config)
    assert (cfg.head_dim, cfg.num_kv_heads, cfg.rope.theta, cfg.rms_norm_eps) == (12, 4, 1e4, 1e-6)
    assert target_config(config | {"attention_bias": True}).out_bias
    qwen3 = golden_config("qwen3")
    del qwen3["head_dim"]
    assert target_config(qwen3).head_dim == 128


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_file_does_not_say_is_what_transformers_has(name):
    for said in ({}, {"use_sliding_window": True}):
        theirs = AutoConfig.for_model(name, **said).to_json_string(use_diff=False)
        assert target_config({"model_type": name, **said}) == target_config(json.loads(theirs))


@pytest.mark.parametrize("name", TEXT_OF)
def test_what_a_text_beside_other_models_does_not_say_is_what_transformers_has(name):
    theirs = AutoConfig.for_model(name, text_config={}).text_config
    ours = target_config({"model_type": name, "text_config": {}, "tie_word_embeddings": False})
    said = json.loads(theirs.to_json_string(use_diff=False)) | {"tie_word_embeddings": False}
    assert ours == target_config(said)


NULLABLE = (
    "head_dim", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "layer_types",
    "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias", "eos_token_id", "text_config",
    "quantization_config", "partial_rotary_factor", "max_window_layers", "use_sliding_window",
)  # fmt: skip


@pytest.mark.parametrize("case", ["llama_tied", "qwen2_bias"])
@pytest.mark.parametrize("key", NULLABLE)
def test_null_says_nothing(key, case):
    config = golden_config(case)
    config.pop(key, None)
    assert target_config(config | {key: None}) == target_config(config)


def test_null_is_as_many_heads_of_keys_as_of_queries():
    config = golden_config("qwen2_bias") | {"num_key_value_heads": None}
    assert target_config(config).num_kv_heads == config["num_attention_heads"]


QUANTISED = {
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "fp8": {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}},
    "compressed-tensors": {"compression_config": {"quant_method": "compressed-tensors"}},
    "without a quant_method": {"quantization_config": {"load_in_4bit": True}},
    "quantization is set": {"quantization": {"group_size": 64, "bits": 4}},
}


@pytest.mark.parametrize("expected", QUANTISED)
def test_quantised_weights_are_refused_by_the_name_of_the_method(expected, directory):
    text = golden_config("llama_tied")
    said = QUANTISED[expected]
    for config in (
        text | said,
        {"model_type": "llava", "text_config": text | said},
        {"model_type": "llava", "text_config": text, **said},
    ):
        (directory / "config.json").write_text(json.dumps(config))
        message = refusal(directory)
        assert expected in message
        assert "take the unquantised checkpoint" in message
        assert "config.json" in message


def prefixed(directory, before, after, head):
    """Rename the tensors of a text model as they are called beside others."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    names = {name: name.replace(before, after, 1) for name in tensors}
    image = {"vision_tower.patch.weight": np.ones((2, 2), np.int8)} if after else {}
    if head:
        image[head] = tensors["model.embed_tokens.weight"] + 1
    save_file({names[name]: value for name, value in tensors.items()} | image, path)


@pytest.mark.parametrize(
    ("kind", "before", "after", "head"),
    [
        ("llava", "model.", "language_model.model.", "language_model.lm_head.weight"),
        ("llava", "model.", "model.language_model.", "lm_head.weight"),
        ("mistral3", "model.", "language_model.model.", ""),
        ("smolvlm", "model.", "model.text_model.", "lm_head.weight"),
        ("some_vl", "model.", "model.language_model.", ""),
        ("saved without its head", "model.", "", ""),
    ],
)
def test_the_text_of_a_model_that_has_others_beside_it(kind, before, after, head, directory):
    _, alone = load_hf_target(directory, jnp.float32)
    text = golden_config("llama_tied")
    del text["tie_word_embeddings"]
    config = {"model_type": kind, "text_config": text}
    (directory / "config.json").write_text(json.dumps(config))
    prefixed(directory, before, after, head)
    cfg, target = load_hf_target(directory, jnp.float32)
    assert cfg.tied == (not head)
    jax.tree.map(np.testing.assert_array_equal, target.layers, alone.layers)
    np.testing.assert_array_equal(target.vocab.embed_VD, alone.vocab.embed_VD)


UNSUPPORTED = {
    "no family": (
        {"model_type": None},
        "model_type is missing: use a model of deepseek_v4, gemma2,",
    ),
    "a family beside others": (
        {"model_type": "qwen2_5_vl", "text_config": {"model_type": "qwen2_5_vl_text"}},
        "model_type of 'qwen2_5_vl' 'qwen2_5_vl_text' is not supported",
    ),
    "a text that is none": ({"text_config": ["llama"]}, "text_config is ['llama']"),
    "a base of nothing": ({"rope_parameters": None, "rope_theta": 0}, "rope_theta is 0.0"),
    "a family": ({"model_type": "mamba"}, "model_type 'mamba'"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "quantised weights": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "windows": ({"layer_types": ["sliding_attention"] * 4}, "must list full_attention for each"),
    "too few kinds of layers": ({"layer_types": ["full_attention"] * 3}, "each of the 4 layers"),
    "too many layers": ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
    "another RoPE": ({"rope_parameters": {"rope_type": "su"}}, "rope_type 'su'"),
    "RoPE without its factor": ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
    "too few factors": (
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}},
        "short_factor has 1 values",
    ),
    "partial RoPE": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "RoPE by layer": ({"rope_parameters": {"full_attention": {}}}, "differ by layer"),
    "a missing size": ({"hidden_size": None}, "hidden_size is missing"),
    "a size of text": ({"vocab_size": "131"}, "vocab_size is '131'"),
    "a size of no use": ({"intermediate_size": 0}, "intermediate_size is 0"),
    "an epsilon that is none": ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    "a number beyond floats": ({"rope_parameters": {"rope_theta": 10**400}}, "rope_theta is inf"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_is_not_supported_is_named(case, directory):
    changes, expected = UNSUPPORTED[case]
    change_config(directory, changes)
    message = refusal(directory)
    assert expected in message
    assert "config.json" in message


def test_windows_that_no_layer_uses_are_fine():
    config = golden_config("qwen2_bias") | {"sliding_window": 8, "max_window_layers": 28}
    del config["layer_types"]
    assert target_config(config) == target_config(golden_config("qwen2_bias"))
    config["use_sliding_window"] = True
    assert target_config(config) == target_config(golden_config("qwen2_bias"))


FLOATS = (
    np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2,
)  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
def test_files_of_any_floats_load_as_any_dtype(dtype, directory):
    half = {
        name: value.astype(dtype)
        for name, value in load_file(directory / "model.safetensors").items()
    }
    change_tensors(directory, half)
    for wanted in (jnp.float32, jnp.bfloat16):
        _, params = load_hf_target(directory, wanted)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(wanted)}
        expected = half["model.norm.weight"].astype(wanted)
        np.testing.assert_array_equal(np.asarray(params.norm_D), expected)


def test_harmless_leftovers_are_ignored_and_others_are_not(directory, caplog):
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    change_tensors(directory, {"lm_head.weight": embedding, **frequencies})
    cfg, _ = load_hf_target(directory, jnp.float32)
    assert cfg.tied
    assert not list(caplog.records)
    change_tensors(directory, {"lm_head.weight": embedding, "model.extra": embedding})
    assert "model.extra is left over" in refusal(directory)


@pytest.mark.parametrize("tied", [True, None])
def test_a_head_in_the_file_is_the_models(tied, directory, caplog):
    embedding = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(directory, {"lm_head.weight": embedding + 1})
    change_config(directory, {"tie_word_embeddings": tied})
    cfg, target = load_hf_target(directory, jnp.float32)
    assert not cfg.tied
    np.testing.assert_array_equal(target.vocab.unembed_VD, embedding + 1)
    said = "tie_word_embeddings is true, but lm_head.weight differs"
    assert (said in caplog.text) == bool(tied)


def test_without_a_head_the_embedding_is_it_unless_that_is_denied(directory, caplog):
    change_config(directory, {"tie_word_embeddings": None})
    cfg, target = load_hf_target(directory, jnp.float32)
    assert cfg.tied
    assert target.vocab.unembed_VD is None
    assert "has no lm_head.weight: the embedding is taken for it" in caplog.text
    change_config(directory, {"tie_word_embeddings": False})
    assert "lm_head.weight is missing" in refusal(directory)


def test_weights_of_another_configuration_are_refused(directory):
    change_config(directory, {"num_hidden_layers": 5})
    assert "are missing" in refusal(directory)
    change_config(directory, {"num_hidden_layers": 3})
    assert "are left over" in refusal(directory)
    change_config(directory, {"num_hidden_layers": 4, "intermediate_size": 95})
    assert "has shape [96, 48], but the configuration says [95, 48]" in refusal(directory)


def test_an_unreachable_hub_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "did not give it out" in refusal("nobody/no-such-model")
    assert "no such directory" in refusal(tmp_path / "nowhere")


def test_a_file_in_place_of_its_directory_is_refused(directory):
    for name in ("config.json", "model.safetensors"):
        assert f"is a file: name its directory, {directory}" in refusal(directory / name)


def test_a_directory_with_its_tokenizer_is_a_target(directory):
    for path in (DATA / "tokenizer_qwen_plain").iterdir():
        shutil.copy(path, directory)
    target = load_target(directory)  # a tokenizer of 419 tokens, and 131 rows
    assert (target.cfg.vocab_size, target.cfg.suppressed) == (131, ())
    rng = np.random.default_rng(0)
    embedding = rng.normal(size=(419, 48)).astype(np.float32)
    change_tensors(directory, {"model.embed_tokens.weight": embedding})
    change_config(directory, {"vocab_size": 419})
    (directory / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')
    target = load_target(directory)
    assert target.name == "target"
    assert target.tokenizer.eos_token_id == 2
    assert target.stop_ids == (7, 5, 2)
    (directory / "generation_config.json").write_text('{"eos_token_id": "stop"}')
    with pytest.raises(LoadError, match="eos_token_id is 'stop'"):
        load_target(directory)
    (directory / "tokenizer.json").write_text("{")
    with pytest.raises(LoadError, match="no usable tokenizer"):
        load_target(directory)
