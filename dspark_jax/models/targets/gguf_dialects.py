"""What GGUF calls the parts of the families: facts of llama.cpp's converters and gguf-py's names.

A dialect turns metadata into the words of a ``config.json`` and names of tensors into those of
Hugging Face; reading the file is :mod:`dspark_jax.checkpoints.gguf`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dspark_jax.models.targets.config_json import MAX_LAYERS

# A metadata value under its key without the architecture, of a type, or a default.
Get = Callable[..., Any]
Shapes = Mapping[str, tuple[int, ...]]

GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
GEMMA_NAMES = LAYER_NAMES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "post_ffw_norm_1": "post_feedforward_layernorm_1",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
    "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "ffn_gate_inp": "router.proj",
    "ffn_gate_up_exps": "experts.gate_up_proj",
    "ffn_down_exps": "experts.down_proj",
}
# Whole names, where the last part differs, too.
GEMMA_PARTS = {
    "layer_output_scale.weight": "layer_scalar",
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
}


def _llama(get: Get, shapes: Shapes) -> dict[str, Any]:
    # Mistral's files are of this architecture.
    window = get("attention.sliding_window", 0)
    return {"model_type": "mistral", "sliding_window": window} if window else {}


def _smollm3(get: Get, shapes: Shapes) -> dict[str, Any]:
    return {"no_rope_layer_interval": 4}  # which is nowhere in the file


def _qwen3_moe(get: Get, shapes: Shapes) -> dict[str, Any]:
    layers = range(min(get("block_count"), MAX_LAYERS))
    return {
        "mlp_only_layers": [n for n in layers if f"blk.{n}.ffn_gate_inp.weight" not in shapes],
        "num_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "moe_intermediate_size": get("expert_feed_forward_length"),
        "norm_topk_prob": True,
    }


def _gemma(get: Get, largest: int) -> dict[str, Any]:
    """What Gemma 2 and 3 share; the model of so many layers scales its scores by its width."""
    layers, width = get("block_count"), get("embedding_length")
    heads = get("attention.head_count")
    head_dim = get("attention.key_length", 256)
    return {
        "query_pre_attn_scalar": width / heads if layers == largest else head_dim,
        "sliding_window": get("attention.sliding_window"),
        "attention_bias": False,
    }


def _gemma2(get: Get, shapes: Shapes) -> dict[str, Any]:
    return _gemma(get, 46) | {
        "attn_logit_softcapping": get("attn_logit_softcapping", 50.0, float),
        "final_logit_softcapping": get("final_logit_softcapping", 30.0, float),
    }


def _gemma3(get: Get, shapes: Shapes) -> dict[str, Any]:
    local = get("rope.freq_base_swa", 10000.0, float)
    return _gemma(get, 62) | {
        "sliding_window_pattern": get("attention.sliding_window_pattern", 6),
        "rope_local_base_freq": local,
    }


def _gemma4(get: Get, shapes: Shapes) -> dict[str, Any]:
    layers = get("block_count")
    slides = get("attention.sliding_window_pattern", kind=list)
    types = ["sliding_attention" if slide else "full_attention" for slide in slides]
    heads = get("attention.head_count_kv", kind=(int, list))
    heads = heads if isinstance(heads, list) else [heads] * layers
    by_type = dict(zip(types, heads, strict=True))
    widths = get("feed_forward_length", kind=(int, list))
    shared = get("attention.shared_kv_layers", 0)
    full = types.index("full_attention")
    fields = {
        "layer_types": types,
        "attention_bias": False,
        "attention_k_eq_v": f"blk.{full}.attn_v.weight" not in shapes,
        "head_dim": get("attention.key_length_swa"),
        "num_key_value_heads": by_type.get("sliding_attention", by_type["full_attention"]),
        "per_layer_config": {
            str(layer): {
                "head_dim": get("attention.key_length"),
                "num_key_value_heads": by_type["full_attention"],
            }
            for layer, name in enumerate(types)
            if name == "full_attention"
        },
        "intermediate_size": widths[0] if isinstance(widths, list) else widths,
        "use_double_wide_mlp": isinstance(widths, list) and widths[-1] != widths[0],
        "num_kv_shared_layers": shared,
        "sliding_window": get("attention.sliding_window"),
        "final_logit_softcapping": get("final_logit_softcapping", 30.0, float),
        "hidden_size_per_layer_input": get("embedding_length_per_layer_input", 0),
        "rope_local_base": get("rope.freq_base_swa", 10000.0, float),
    }
    if "per_layer_token_embd.weight" in shapes:
        fields["vocab_size_per_layer_input"] = shapes["per_layer_token_embd.weight"][0]
    if get("expert_count", 0):
        fields |= {
            "enable_moe_block": True,
            "num_experts": get("expert_count"),
            "top_k_experts": get("expert_used_count"),
            "moe_intermediate_size": get("expert_feed_forward_length"),
        }
    return fields


def _plain(get: Get, shapes: Shapes) -> dict[str, Any]:
    return {}


@dataclass(frozen=True)
class Dialect:
    """How files of one ``general.architecture`` are to be read.

    Attributes:
        model_type: of the family.
        fields: ``(get, shapes)``: fields of ``config.json`` beside those that all have.
        pairs: the rows of q and k stand in pairs, for interleaved RoPE.
        shift: what converters add to the weights of norms.
        names: of the parts of a layer.
        parts: of the parts whose last word differs.
        by_window: RoPE differs by layer, and ``rope_freqs`` is that of layers without a window.
    """

    model_type: str
    fields: Callable[[Get, Shapes], dict[str, Any]] = _plain
    pairs: bool = False
    shift: float = 0.0
    names: Mapping[str, str] = field(default_factory=lambda: LAYER_NAMES)
    parts: Mapping[str, str] = field(default_factory=dict)
    by_window: bool = False


DIALECTS: Mapping[str, Dialect] = {
    "llama": Dialect("llama", _llama, pairs=True),
    "qwen2": Dialect("qwen2"),
    "qwen3": Dialect("qwen3"),
    "smollm3": Dialect("smollm3", _smollm3, pairs=True),
    "qwen3moe": Dialect("qwen3_moe", _qwen3_moe),
    "gemma2": Dialect("gemma2", _gemma2, shift=1.0, names=GEMMA_NAMES),
    "gemma3": Dialect("gemma3_text", _gemma3, shift=1.0, names=GEMMA_NAMES),
    "gemma4": Dialect("gemma4_text", _gemma4, names=GEMMA_NAMES, parts=GEMMA_PARTS, by_window=True),
}
