"""Tokens by their texts and bytes, as log-probabilities show them."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

LEAST = -9999.0  # for a probability of zero, which JSON has no logarithm of


def token_text(tokenizer: Any, index: int) -> str:
    """A token's text; that of half a character has replacement characters in it."""
    return str(tokenizer.decode([index]))


def token_bytes(tokenizer: Any, index: int) -> list[int]:
    """A token's bytes: those of its text, or, where that is half a character, of its name in the
    alphabet of byte-level vocabularies, or ``<0x0A>`` as SentencePiece names bytes."""
    text = token_text(tokenizer, index)
    if "\N{REPLACEMENT CHARACTER}" in text:
        name = str(tokenizer.convert_ids_to_tokens(index))
        one = re.fullmatch("<0x([0-9A-F]{2})>", name)
        if one:
            return [int(one[1], 16)]
        if all(letter in _alphabet() for letter in name):
            return [_alphabet()[letter] for letter in name]
    return list(text.encode())


def finite(logprob: float) -> float:
    """A logarithm that JSON has."""
    return max(logprob, LEAST)


@lru_cache(maxsize=1)
def _alphabet() -> dict[str, int]:
    """The byte that a letter of byte-level vocabularies stands for: itself where it can be seen,
    the others in order from U+0100 on."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in seen]
    found = {chr(byte): byte for byte in seen}
    return found | {chr(256 + place): byte for place, byte in enumerate(others)}
