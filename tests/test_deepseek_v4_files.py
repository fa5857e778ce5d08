"""Both spellings of DeepSeek-V4's configuration, both namings of its tensors, what is refused."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig

from dspark_jax.checkpoints.hf import load_hf_target, target_config
from dspark_jax.checkpoints.tensors import LoadError
from tests.test_deepseek_v4 import GOLDEN, checkpoint

CONFIG = json.loads((GOLDEN / "checkpoint" / "config.json").read_text())
FLASH = {
    "model_type": "deepseek_v4",
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0, 0, 0],
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "qk_rope_head_dim": 64,
    "num_hash_layers": 3,
}
# Released names -> those that transformers writes, as the end of a name behind its module.
RENAMED = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
    "hc_attn_fn": "attn_hc.fn",
    "hc_attn_base": "attn_hc.base",
    "hc_attn_scale": "attn_hc.scale",
    "hc_ffn_fn": "ffn_hc.fn",
    "hc_ffn_base": "ffn_hc.base",
    "hc_ffn_scale": "ffn_hc.scale",
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.attn_sink": "self_attn.sinks",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.compressor.ape": "self_attn.compressor.position_bias",
    "attn.compressor.wkv.weight": "self_attn.compressor.kv_proj.weight",
    "attn.compressor.wgate.weight": "self_attn.compressor.gate_proj.weight",
    "attn.compressor.norm.weight": "self_attn.compressor.kv_norm.weight",
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight":
        "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "attn.indexer.compressor.ape": "self_attn.compressor.indexer.position_bias",
    "attn.indexer.compressor.wkv.weight": "self_attn.compressor.indexer.kv_proj.weight",
    "attn.indexer.compressor.wgate.weight": "self_attn.compressor.indexer.gate_proj.weight",
    "attn.indexer.compressor.norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
}  # fmt: skip


def as_transformers(tensors):
    """The target's tensors as transformers saves them: no drafter, experts of a layer together."""
    found, experts = {}, {}
    for name, tensor in tensors.items():
        layer = re.fullmatch(r"layers\.(\d+)\.(.*)", name)
        expert = layer and re.fullmatch(r"ffn\.experts\.(\d+)\.(w\d)\.weight", layer[2])
        if expert:
            experts.setdefault((layer[1], expert[2]), {})[int(expert[1])] = tensor
        elif layer:
            found[f"model.layers.{layer[1]}.{RENAMED[layer[2]]}"] = tensor
        elif not name.startswith("mtp."):
            found[RENAMED[name]] = tensor
    stacked = {key: np.stack([of[e] for e in sorted(of)]) for key, of in experts.items()}
    for layer in {layer for layer, _ in stacked}:
        prefix = f"model.layers.{layer}.mlp.experts"
        found[f"{prefix}.gate_up_proj"] = np.concatenate(
            [stacked[layer, "w1"], stacked[layer, "w3"]], axis=1
        )
        found[f"{prefix}.down_proj"] = stacked[layer, "w2"]
    return found


def write(directory, config, tensors):
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_both_spellings_and_both_namings_are_the_same_model(tmp_path):
    theirs = AutoConfig.for_model(**CONFIG).to_json_string(use_diff=False)
    assert "compress_ratios" not in theirs  # but layer_types and compress_rates
    assert "num_hash_layers" not in theirs  # but mlp_layer_types
    released = load_file(GOLDEN / "checkpoint" / "model.safetensors")
    directory = write(tmp_path / "model", json.loads(theirs), as_transformers(released))
    expected_cfg, expected = checkpoint()
    cfg, target = load_hf_target(directory, jnp.float32)
    assert cfg == expected_cfg
    jax.tree.map(np.testing.assert_array_equal, target, expected)


def test_the_released_spelling_is_what_transformers_makes_of_it():
    theirs = AutoConfig.for_model(**FLASH, num_hidden_layers=43).to_json_string(use_diff=False)
    cfg = target_config(FLASH)
    assert cfg == target_config(json.loads(theirs))
    assert cfg.ratios[:4] == (0, 0, 4, 128)
    assert cfg.sparse == tuple(range(2, 43, 2))
    assert (cfg.rope.kind, cfg.compressed_rope.kind, cfg.compressed_rope.theta) == (
        *("default", "yarn"),
        160000,
    )


def test_what_rounding_would_harm_stays_float32():
    _, target = load_hf_target(GOLDEN / "checkpoint", jnp.bfloat16)
    layer = target.layers[1]
    assert layer.heads.query_b_INH.dtype == layer.experts.gate_EDM.dtype == jnp.bfloat16
    exact = layer.attention_mixing, layer.router.gate_DE, layer.compressor.value_DO
    assert {leaf.dtype for leaf in jax.tree.leaves(exact)} == {jnp.dtype(jnp.float32)}
    assert layer.router.table_ZX.dtype == jnp.int32


REFUSED = {
    "V4.1": ({"model_type": "deepseek_v41"}, "model_type 'deepseek_v41' is not supported"),
    "ratios": ({"compress_ratios": [0, 4]}, "compress_ratios must list"),
    "spellings": ({"compress_ratios": [4] * 9}, "do not agree"),
    "kinds": ({"layer_types": ["full_attention"] * 6}, "layer_types must list sliding_attention"),
    "experts": ({"mlp_layer_types": ["moe"]}, "mlp_layer_types must list hash_moe, moe"),
    "scores": ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
    "steps": ({"hc_sinkhorn_iters": 10**12}, "hc_sinkhorn_iters is 1000000000000"),
    "heads": ({"o_groups": 3}, "a multiple of o_groups 3"),
    "rotated": ({"qk_rope_head_dim": 40}, "qk_rope_head_dim 40"),
    "RoPE": ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope of compress is 'linear'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configurations_that_are_not_supported_are_named(case):
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        target_config(CONFIG | changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda table: table + 6, "holds 6..11"), (lambda table: table * 1.0, "must be integers")],
)
def test_tables_of_experts_that_there_are_not_are_refused(change, message, tmp_path):
    tensors, name = (
        load_file(GOLDEN / "checkpoint" / "model.safetensors"),
        "layers.1.ffn.gate.tid2eid",
    )
    tensors[name] = change(tensors[name])
    with pytest.raises(LoadError, match=message) as error:
        load_hf_target(write(tmp_path / "model", CONFIG, tensors), jnp.float32)
    assert name in str(error.value)
