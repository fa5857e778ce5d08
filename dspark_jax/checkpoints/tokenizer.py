"""Tokenizers: loading, chat prompts, stop tokens, and text that streams in whole characters.

A Hugging Face directory or hub id brings its tokenizer along and transformers reads it; from a
GGUF file the byte-level BPE is rebuilt out of the vocabulary and the merges. Either way the result
is a transformers tokenizer, and no code that came with a model is ever executed.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE

from dspark_jax.characters import check_characters
from dspark_jax.checkpoints.gguf import GgufFile, open_gguf
from dspark_jax.checkpoints.template import apply_template, is_plain
from dspark_jax.checkpoints.tensors import LoadError
from dspark_jax.rendering import PLAIN, Rendering

# Token types of GGUF that are matched in the text before the BPE sees it.
CONTROL, USER_DEFINED = 3, 4
# How llama.cpp's named pre-tokenizers cut a text before the merges.
SPLITS = {
    "gpt-2": None,
    "smollm": None,
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "llama-bpe": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}
ROLES = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
UNUSED_NAME = re.compile(r"mask|empty_output|reserved|unused", re.IGNORECASE)


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a Hugging Face directory, a hub id or a GGUF file.

    Raises:
        LoadError: there is none, or it is broken or of a kind that is not supported.
    """
    if str(source).endswith(".gguf"):
        return gguf_tokenizer(open_gguf(source), str(source))
    with _quiet():
        from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except Exception as error:  # transformers raises anything at all on a broken tokenizer
        raise LoadError(f"{source}: no usable tokenizer ({_first_line(error)})") from None


def gguf_tokenizer(file: GgufFile, origin: str) -> Any:
    """The byte-level BPE tokenizer of a GGUF file, with its special tokens and chat template.

    Raises:
        LoadError: another kind of tokenizer, or a broken one.
    """
    kind = file.value("tokenizer.ggml.model", str)
    split = file.value("tokenizer.ggml.pre", str, "gpt-2")
    if kind != "gpt2" or split not in SPLITS:
        raise LoadError(
            f"{origin}: tokenizer {kind!r} with pre-tokenizer {split!r} is not supported (only "
            f"byte-level BPE with {', '.join(SPLITS)}): use the model's Hugging Face directory"
        )
    with _quiet():
        from transformers import PreTrainedTokenizerFast
    try:
        tokens = file.value("tokenizer.ggml.tokens", list)
        ids = {role: file.value(f"tokenizer.ggml.{key}_token_id", int) for role, key in ROLES}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_byte_level_bpe(file, tokens, split),
            clean_up_tokenization_spaces=False,
            **{f"{role}_token": tokens[index] for role, index in ids.items() if index is not None},
        )
        tokenizer.chat_template = file.value("tokenizer.chat_template", str)
    except Exception as error:  # the Rust library raises bare exceptions
        raise LoadError(f"{origin}: broken tokenizer ({_first_line(error)})") from None
    return tokenizer


def _byte_level_bpe(file: GgufFile, tokens: list[str], split: str) -> Tokenizer:
    """Vocabulary, merges and pre-tokenizer put together."""
    merges = [tuple(merge.split(" ", 1)) for merge in file.value("tokenizer.ggml.merges", list)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # Llama 3 takes a word that is in the vocabulary whole, whatever the merges say.
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=split == "llama-bpe"))
    pattern = SPLITS[split]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    steps: list[Any] = [byte_level]
    if pattern is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    elif split == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    types = file.value("tokenizer.ggml.token_type", list, [])
    for token, token_type in zip(tokens, types, strict=False):
        if token_type == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token_type == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    if file.value("tokenizer.ggml.add_bos_token", bool, split == "llama-bpe"):
        first = file.value("tokenizer.ggml.bos_token_id", int)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[first]} $A", special_tokens=[(tokens[first], first)]
        )
    return tokenizer


def chat_prompt_ids(
    tokenizer: Any, prompt: str | Sequence[Mapping[str, Any]], rendering: Rendering = PLAIN
) -> list[int]:
    """Token ids of a conversation up to where the model's answer begins.

    Args:
        tokenizer: a transformers tokenizer. One without a chat template (a base model) reads the
            prompt as plain text.
        prompt: the user's message, or turns with ``role`` and ``content``.
        rendering: how it becomes text.

    Raises:
        ValueError: the prompt is empty or no text, or the template refuses it.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    texts = [turn["content"] or "" for turn in rendering.turns(turns)]
    if not turns or not texts[-1].strip():
        raise ValueError("the prompt is empty: write some text")
    for text in texts:
        check_characters("the prompt", text)
    if is_plain(tokenizer, rendering):
        return list(tokenizer.encode("\n".join(texts)))
    text = apply_template(tokenizer, turns, rendering, open_answer=True)
    if not text:
        raise LoadError("the chat template makes nothing of the prompt: decode it as plain text")
    return list(tokenizer.encode(text, add_special_tokens=False))


def stop_ids(tokenizer: Any, *configs: Mapping[str, Any]) -> tuple[int, ...]:
    """Sorted ids that end a text: the tokenizer's, and ``eos_token_id`` of the configurations.

    Raises:
        LoadError: an ``eos_token_id`` is neither an id nor a list of ids.
    """
    ids: set[int] = set()
    for value in (tokenizer.eos_token_id, *(config.get("eos_token_id") for config in configs)):
        several = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(index, int) for index in several):
            raise LoadError(f"eos_token_id is {value!r}: it must be an id or a list of ids")
        ids.update(several)
    return tuple(sorted(ids))


def unused_token(tokenizer: Any, vocab_size: int) -> int:
    """An id that no text contains, for the masked places of a draft block.

    The tokenizer's own mask token, else the first row of the embedding behind the tokenizer's
    last token, else a special token that its name marks as unused.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    if len(tokenizer) < vocab_size:
        return len(tokenizer)
    for index, token in sorted(tokenizer.added_tokens_decoder.items()):
        if token.special and UNUSED_NAME.search(token.content):
            return int(index)
    raise ValueError(
        "mask_token_id is -1, but the target's tokenizer has no unused special token: "
        "set mask_token_id to an id that never occurs in its text"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences warnings: transformers says on import that there is no torch; none is wanted."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
