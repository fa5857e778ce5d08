"""Names of DeepSeek-V4's tensors in files: in the released ones, and in those of transformers."""

from __future__ import annotations

import re

# What transformers writes -> what the released files have, one after the other.
_RELEASED = tuple(
    (re.compile(written), released)
    for written, released in (
        (r"^model\.", ""),
        (r"^embed_tokens\.", "embed."),
        (r"^lm_head\.", "head."),
        (r"^hc_head\.(?:hc_)?(\w+)$", r"hc_head_\1"),
        (r"\.(attn|ffn)_hc\.(\w+)$", r".hc_\1_\2"),
        (r"\.input_layernorm\.", ".attn_norm."),
        (r"\.post_attention_layernorm\.", ".ffn_norm."),
        (r"\.self_attn\.", ".attn."),
        (r"\.mlp\.", ".ffn."),
        (r"\.compressor\.indexer\.scorer\.weights_proj\.", ".indexer.weights_proj."),
        (r"\.compressor\.indexer\.q_b_proj\.", ".indexer.wq_b."),
        (r"\.compressor\.indexer\.", ".indexer.compressor."),
        (r"(\.compressor)\.kv_norm\.", r"\1.norm."),
        (r"(\.compressor)\.gate_proj\.", r"\1.wgate."),
        (r"\.position_bias$", ".ape"),
        (r"\.sinks$", ".attn_sink"),
        (r"\.q_a_norm\.", ".q_norm."),
        (r"\.(q_a|q_b|o_a|o_b)_proj\.", r".w\1."),
        (r"\.kv_proj\.", ".wkv."),
        (r"\.e_score_correction_bias$", ".bias"),
        (r"(experts(?:\.\d+)?)\.gate_proj\.", r"\1.w1."),
        (r"(experts(?:\.\d+)?)\.down_proj\.", r"\1.w2."),
        (r"(experts(?:\.\d+)?)\.up_proj\.", r"\1.w3."),
    )
)


def declared_name(name: str) -> str | None:
    """The released name of a tensor; None for those of a drafter that lies in the same files."""
    if name.startswith("mtp."):
        return None
    for written, released in _RELEASED:
        name = written.sub(released, name)
    return name
