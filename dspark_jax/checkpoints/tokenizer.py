"""Tokenizers: loading, chat prompts, and the ids that no token has.

A Hugging Face directory brings its tokenizer along: a ``tokenizer.json``, which is the truth where
it exists, or a SentencePiece ``tokenizer.model``, or what else transformers reads. That of a GGUF
file is rebuilt out of its vocabulary. The result is always a transformers tokenizer, and no code
that came with a model is ever executed.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from dspark_jax.characters import check_characters, first_line
from dspark_jax.checkpoints.gguf import open_gguf
from dspark_jax.checkpoints.gguf_tokenizer import gguf_tokenizer
from dspark_jax.checkpoints.library import quiet
from dspark_jax.checkpoints.pieces import make_cutter, piece_tokenizer, read_pieces
from dspark_jax.checkpoints.template import apply_template, is_plain, with_written_calls
from dspark_jax.checkpoints.tensors import LoadError, read_json
from dspark_jax.rendering import PLAIN, Rendering

TOKENIZER, PIECES, CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
SPECIAL = "special_tokens_map.json"
OTHERS = (
    "vocab*",
    "tekken.json",
    "*.tiktoken",
    "*.model",
)  # that transformers may know how to read
UNUSED_NAME = re.compile(r"mask|empty_output|reserved|unused", re.IGNORECASE)


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a Hugging Face directory or a GGUF file.

    Raises:
        LoadError: there is none, or it is broken or of a kind that is not supported.
    """
    if str(source).endswith(".gguf"):
        return gguf_tokenizer(open_gguf(source), str(source))
    with quiet():
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        directory = Path(source)
        found = next((name for name in (TOKENIZER, PIECES) if (directory / name).is_file()), None)
        try:
            config, said = (_fields(directory / name) for name in (CONFIG, SPECIAL))
            if found == TOKENIZER:
                # Not the class that tokenizer_config.json names: it would rebuild another one.
                return PreTrainedTokenizerFast.from_pretrained(directory)
            if found == PIECES:
                return _of_pieces(directory, said | config, PreTrainedTokenizerFast)
            if not any(any(directory.glob(pattern)) for pattern in OTHERS):
                raise LoadError("and no other that is known")
            return AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
        except Exception as error:  # transformers raises anything at all on a broken tokenizer
            raise LoadError(
                f"{source}: no usable tokenizer ({found or f'no {TOKENIZER}, no {PIECES}'}: "
                f"{first_line(error)}): put the model's {TOKENIZER} there"
            ) from None


def _fields(path: Path) -> dict[str, Any]:
    """What a file says, if it is there."""
    return read_json(path) if path.is_file() else {}


def _of_pieces(directory: Path, config: dict[str, Any], fast: Any) -> Any:
    """The tokenizer of a ``tokenizer.model``; transformers reads the files beside it."""
    pieces, roles, begin = read_pieces(directory / PIECES, config)
    unsaid = {role: text for role, text in roles.items() if role not in config}
    with tempfile.NamedTemporaryFile(suffix=TOKENIZER) as file:
        piece_tokenizer(pieces, begin).save(file.name)
        tokenizer = fast.from_pretrained(directory, tokenizer_file=file.name, **unsaid)
    tokenizer.backend_tokenizer.pre_tokenizer = make_cutter(pieces)
    return tokenizer


def chat_prompt_ids(
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, Any]],
    rendering: Rendering = PLAIN,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Token ids of a conversation up to where the model's answer begins.

    Args:
        tokenizer: a transformers tokenizer. One without a chat template (a base model) reads the
            prompt as plain text.
        prompt: the user's message, or turns with ``role`` and ``content``.
        rendering: how it becomes text.
        variables: of the template, ``tools`` for instance; they go before those of ``rendering``.

    Raises:
        ValueError: the prompt is empty or no text, or the template refuses it, or there is none for
            the variables.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    texts = [turn["content"] or "" for turn in rendering.turns(turns)]
    if not turns or not texts[-1].strip():
        raise ValueError("the prompt is empty: write some text")
    for text in texts:
        check_characters("the prompt", text)
    if variables:
        args = {**rendering.template_args, **variables}
        rendering = replace(rendering, template_args=args)
    if is_plain(tokenizer, rendering):
        if variables:
            raise LoadError(f"there is no chat template, which {', '.join(variables)} would be of")
        return list(tokenizer.encode("\n".join(texts)))
    render = partial(apply_template, tokenizer, rendering=rendering, open_answer=True)
    try:
        text = render(turns)
    except LoadError as error:
        if not any(turn.get("tool_calls") for turn in turns):
            raise
        try:
            text = render(with_written_calls(turns))
        except LoadError:
            raise error from None
    if not text:
        raise LoadError("the chat template makes nothing of the prompt: decode it as plain text")
    return list(tokenizer.encode(text, add_special_tokens=False))


def ids_without_token(tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """Ids below ``vocab_size`` that no token has, ascending: rows that only fill a matrix up."""
    known = set(tokenizer.get_vocab().values())
    return tuple(index for index in range(vocab_size) if index not in known)


def unused_token(tokenizer: Any, vocab_size: int) -> int:
    """An id that no text contains, for the masked places of a draft block.

    The tokenizer's own mask token, else the first row of the embedding that no token has, else a
    special token that its name marks as unused.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    if tokenizer.mask_token_id is not None and tokenizer.mask_token_id < vocab_size:
        return int(tokenizer.mask_token_id)
    free = ids_without_token(tokenizer, vocab_size)
    if free:
        return free[0]
    for index, token in sorted(tokenizer.added_tokens_decoder.items()):
        if token.special and UNUSED_NAME.search(token.content) and index < vocab_size:
            return int(index)
    raise ValueError(
        "mask_token_id is -1, but the target's tokenizer has no unused special token: "
        "set mask_token_id to an id that never occurs in its text"
    )
