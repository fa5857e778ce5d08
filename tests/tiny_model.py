"""A target and a drafter on disk, as small as can be, that read and write ASCII."""

import dataclasses
import json
import string
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from dspark_jax.axes import map_params
from dspark_jax.checkpoints.deepspec import save_drafter
from dspark_jax.checkpoints.hf import target_config
from dspark_jax.checkpoints.tensors import write_params
from dspark_jax.config import DrafterConfig
from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.generate import config_for
from dspark_jax.models.drafters.dspark import declare_drafter
from dspark_jax.models.targets.llama import Config as LlamaConfig
from dspark_jax.models.targets.table import family_of

PRINTABLE = sorted(set(string.printable) - set("\t\n\r\v\f"))
CONTEXT = 512
BLOCK = 3
TEMPLATE = (
    "{% for turn in messages %}"
    "{{ turn.content }}{{ '<end>' if turn.role == 'assistant' else ' > ' }}"
    "{% endfor %}"
)
SIZES = {
    "vocab_size": len(PRINTABLE) + 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 8,
    "max_positions": CONTEXT,
}
TARGET = LlamaConfig(**SIZES, num_layers=2, tied=True)
DRAFTER = DrafterConfig(
    **SIZES,
    num_layers=1,
    block_size=BLOCK,
    mask_token_id=len(PRINTABLE) + 1,
    target_layer_ids=(-1, 0),
    markov_rank=4,
    confidence=True,
    owns_vocab=False,
)


SLOTS = 6


def few_sizes(*arguments, **options) -> EngineConfig:
    """In the place of ``config_for``: all engines of a few requests have the same few programs,
    whose compilation takes nearly all of the time."""
    config = config_for(*arguments, **options)
    slots = max(config.slots, SLOTS)
    sizes = {"slots": slots, "slot_buckets": (slots,), "row_buckets": (1,)}  # all rows
    return dataclasses.replace(config, **sizes, chunk_buckets=(1,), chunk_rows=16)


def random_params(seed, declared):
    """Normal weights, norms of one; in numpy, as jax would compile a program for each shape.

    At this scale of the embedding the greedy texts vary, and some drafts are accepted.
    """
    random = np.random.default_rng(seed)

    def draw(param):
        if param.init == "ones":
            return np.ones(param.shape, np.float32)
        if param.init == "choices":
            return random.integers(0, param.fan_in, param.shape, np.int32)
        scale = 0.6 if param.init == "embed" else param.fan_in**-0.5
        return (scale * random.standard_normal(param.shape)).astype(np.float32)

    return map_params(draw, declared)


def write_target(directory: Path, cfg: LlamaConfig = TARGET, **fields) -> Path:
    """A Hugging Face directory: random weights, one token a character, and an end.

    Args:
        directory: that is made.
        cfg: sizes.
        fields: of ``config.json``, of other families, too.
    """
    directory.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "max_position_embeddings": cfg.max_positions,
        "tie_word_embeddings": cfg.tied,
    } | fields
    cfg = target_config(config)
    declared = family_of(cfg).declare(cfg)
    tensors = write_params(declared, random_params(20, declared))
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return write_tokenizer(directory)


def write_tokenizer(directory: Path) -> Path:
    """One token a character, an end and a mask, with a chat template."""
    vocabulary = {text: index for index, text in enumerate([*PRINTABLE, "<end>", "<mask>"])}
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        mask_token="<mask>",
        chat_template=TEMPLATE,
    ).save_pretrained(directory)
    return directory


def write_letters(path: Path, count: int) -> Path:
    """Conversations whose answers are 30 random letters each."""
    random = np.random.default_rng(0)
    rows = [
        {
            "conversations": [
                {"role": "user", "content": "say it"},
                {"role": "assistant", "content": "".join(random.choice(list("abc"), 30))},
            ]
        }
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_drafter(directory: Path, cfg: DrafterConfig = DRAFTER) -> Path:
    """A drafter with random weights in the reference layout."""
    save_drafter(directory, cfg, random_params(21, declare_drafter(cfg)))
    return directory
