"""The text model's part of a ``config.json``, whole: with what transformers' class of that
``model_type`` has where the file says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dspark_jax.models.targets.config_json import QUANTISATION, field

TEXT = "text_config"
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "sliding_window",
)
# ``model_type`` -> these sizes; None for what is not there: as many key/value heads as heads, no
# window, no MLP.
DEFAULTS: Mapping[str, tuple[int | None, ...]] = {
    "deepseek_v4": (129280, 4096, None, 43, 64, 1, 1048576, 128),
    "llama": (32000, 4096, 11008, 32, 32, None, 2048, None),
    "mistral": (32000, 4096, 14336, 32, 32, 8, 131072, 4096),
    "qwen2": (151936, 4096, 22016, 32, 32, 32, 32768, 4096),
    "qwen3": (151936, 4096, 22016, 32, 32, 32, 32768, 4096),
    "qwen3_moe": (151936, 2048, 6144, 24, 32, 4, 32768, 4096),
    "smollm3": (128256, 2048, 11008, 36, 16, 4, 32768, None),
    "gemma2": (256000, 2304, 9216, 26, 8, 4, 8192, 4096),
    "gemma3_text": (262208, 2304, 9216, 26, 8, 4, 131072, 4096),
    "gemma4_text": (262144, 2304, 9216, 30, 8, 4, 131072, 512),
    "gemma4_unified_text": (262144, 2304, 9216, 30, 8, 4, 262144, 1024),
}
# Models that have others beside their text -> what their text is where they do not say.
TEXT_OF = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "gemma4_unified": "gemma4_unified_text",
    "got_ocr2": "qwen2",
    "idefics3": "llama",
    "internvl": "qwen2",
    "llava": "llama",
    "llava_next": "llama",
    "llava_onevision": "qwen2",
    "mistral3": "mistral",
    "smolvlm": "llama",
    "vipllava": "llama",
}


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of the text model, whether it stands alone or beside others.

    Args:
        config: the content of ``config.json``.

    Returns:
        Its fields, ``model_type`` among them; sizes that are absent are those of transformers.

    Raises:
        ValueError: ``text_config`` is no object.
    """
    text = {**config}
    name = config.get("model_type")
    if config.get(TEXT) is not None:
        text = {**field(config, TEXT, dict)}
        name = text.get("model_type") or name
        # What is said of the whole model holds for its text.
        for key in (*QUANTISATION, "tie_word_embeddings"):
            if config.get(key) is not None:
                text[key] = config[key]
    name = TEXT_OF.get(str(name), name)
    sizes = zip(SIZES, DEFAULTS.get(str(name), ()), strict=False)
    return {**dict(sizes), **text, "model_type": name}
