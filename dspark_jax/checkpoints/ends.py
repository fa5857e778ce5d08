"""Where a text ends: the ids at which an answer is over."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

from dspark_jax.checkpoints.tensors import LoadError

logger = logging.getLogger(__name__)

# Tokens at which llama.cpp ends a text for their names alone, whatever a GGUF file says.
ENDS = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>"),
        *("<|calls|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>"),
        *("_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>"),
        *("<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
        # These lie between the files that a model of code has seen.
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>"),
        *("<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
    )
)
# Where all the second are there, the first is something else: the end of a thought, an old token.
UNLESS = (
    ("<|end|>", {"<|return|>", "<|call|>"}),
    ("<|end|>", {"<|return|>", "<|calls|>"}),
    ("<|end|>", {"<|flush|>", "<|call|>"}),
    ("<|end|>", {"<|flush|>", "<|calls|>"}),
    ("</s>", {"<|tool_response>"}),
)


def known_ends(tokens: Sequence[str]) -> list[int]:
    """The ids of the tokens that end a text by their names, ascending."""
    found = {token: index for index, token in enumerate(tokens) if token in ENDS}
    not_ends = {token for token, others in UNLESS if others <= found.keys()}
    return sorted(index for token, index in found.items() if token not in not_ends)


def end_ids(
    stated: Iterable[tuple[str, Any]], vocab_size: int, known: Iterable[int] = ()
) -> tuple[int, ...]:
    """The ids that end a text, each once, in the order in which they are found.

    Args:
        stated: where it was read, and what it says: an id, a list of ids or None.
        vocab_size: of the target; ids outside are left out, with a warning.
        known: further ids, of :func:`known_ends`.

    Raises:
        LoadError: a value is neither an id nor a list of ids.
    """
    found: dict[int, None] = {}
    for where, value in stated:
        several = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(index) is int for index in several):
            raise LoadError(f"{where} is {value!r:.60}: it must be an id or a list of ids")
        for index in several:
            if 0 <= index < vocab_size:
                found[index] = None
            else:
                logger.warning(
                    "%s: the id %d is not among the target's, 0..%d: no text will end there",
                    *(where, index, vocab_size - 1),
                )
    return tuple(found | dict.fromkeys(index for index in known if index < vocab_size))
