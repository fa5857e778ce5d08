"""Text out of tokens that arrive one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


def special_id(tokenizer: Any, text: str) -> int | None:
    """The id of a special token, which no text shows, by its name; spaces around it are ignored.

    Args:
        tokenizer: a transformers tokenizer, or what decodes like one and has no special tokens.
        text: perhaps the name of one.
    """
    index = getattr(tokenizer, "added_tokens_encoder", {}).get(text.strip())
    if index is None or tokenizer.decode([index], skip_special_tokens=True):
        return None
    return int(index)


def special_ids(tokenizer: Any, names: Sequence[str]) -> tuple[int, ...]:
    """The ids of those of some names that are special tokens."""
    found = (special_id(tokenizer, name) for name in names)
    return tuple(index for index in found if index is not None)


@dataclass
class TextStream:
    """Text of a token stream, given out as soon as its characters are complete.

    A token may end in the middle of a UTF-8 character; that text waits for the rest. The pieces
    add up to what decoding all tokens at once would give, and the names of special tokens that are
    to be shown.
    """

    tokenizer: Any
    shown_ids: frozenset[int] = frozenset()
    _ids: list[int] = field(default_factory=list)
    _shown: int = 0  # tokens whose text has been given out
    _context: int = 0  # where decoding starts: some decoders treat the first token differently

    def push(self, ids: Sequence[int]) -> str:
        """The text that these further tokens complete."""
        if self.shown_ids and not self.shown_ids.isdisjoint(ids):
            return "".join(self._push_shown(token) for token in ids)
        self._ids.extend(ids)
        text = self._pending()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""  # behind a token that shows nothing, the next one's space is no first one
        self._context, self._shown = self._shown, len(self._ids)
        return text

    def _push_shown(self, token: int) -> str:
        if token not in self.shown_ids:
            return self.push([token])
        before = self.finish()
        self._ids, self._shown, self._context = [], 0, 0  # as at the beginning of a text
        return before + str(self.tokenizer.decode([token]))

    def finish(self) -> str:
        """Whatever is left, complete or not."""
        text = self._pending()
        self._context = self._shown = len(self._ids)
        return text

    def _pending(self) -> str:
        known = self._decode(self._ids[self._context : self._shown])
        return self._decode(self._ids[self._context :])[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))
