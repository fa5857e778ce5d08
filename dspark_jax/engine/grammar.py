"""Grammars that a text follows, by way of llguidance: what is asked for, where a text stands in it,
and which tokens may come next.

The vocabulary that llguidance sees has one token more than the target's: the end, which it allows
exactly where a text may end. In its place the stop ids of the request are allowed.

Axes: N guides, C columns of a block (the anchor and its drafts), X words of 32 tokens.
"""

from __future__ import annotations

import functools
import json
import threading
import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from dspark_jax.characters import check_characters, first_line
from dspark_jax.engine.shaping import ALL

Kind = Literal["json_schema", "json_object", "regex", "lark"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Grammar:
    """What a text has to follow, token by token.

    Attributes:
        kind: ``"json_schema"`` (the text is a schema), ``"json_object"`` (any object; no text),
            ``"regex"`` (all of the generated text matches it) or ``"lark"`` (a grammar in
            llguidance's variant of Lark's notation).
        text: of the kind.

    Raises:
        ValueError: there is no such kind, or the text is not one of its kind as far as can be seen
            without compiling it, which the engine does when the request is submitted.

    >>> Grammar("regex", "[0-9]{4}").kind
    'regex'
    """

    kind: Kind
    text: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            raise ValueError(f"the grammar's kind is {self.kind!r:.40}: give one of {KINDS}")
        if not isinstance(self.text, str):
            raise ValueError(f"the grammar's text is {self.text!r:.40}: give a text")
        check_characters("the grammar's text", self.text)
        if self.kind == "json_schema":
            _check_schema(self.text)
        elif bool(self.text.strip()) == (self.kind == "json_object"):
            remedy = "leave it out" if self.text else "write one"
            raise ValueError(f"the grammar's text is {self.text!r:.40} for {self.kind}: {remedy}")


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the schema is no JSON ({first_line(error)}): correct it") from None
    if not isinstance(schema, dict | bool):
        raise ValueError(f"the schema is {text!r:.40}: give a JSON object")


# JSON with spaces and line breaks where they are usual, but not without end: small models like to
# go on with them, and never come back.
WHITESPACE = {"whitespace_pattern": r"[ \n]{1,20}"}
END = b"\xff<end>"  # how llguidance spells a special token


class Guide:
    """Where a text stands in its grammar: behind what was committed, never behind a draft."""

    def __init__(
        self, grammar: Grammar, tokenizer: Any, num_tokens: int, stop_ids: Collection[int]
    ) -> None:
        """At the beginning.

        Args:
            grammar: of the text.
            tokenizer: of the target, as ``Decoder`` has it.
            num_tokens: of the target's vocabulary.
            stop_ids: that end the text; they are allowed where it may end, and nowhere else.

        Raises:
            ValueError: llguidance is not there, cannot compile the grammar, or does not understand
                the tokenizer.
        """
        vocabulary = _vocabulary(tokenizer, num_tokens)
        self._beginning = _compile(grammar, vocabulary)
        self.matcher = self._beginning.deep_copy()
        self.stop_ids = np.array(sorted(stop_ids), np.int64)

    @property
    def accepting(self) -> bool:
        """Whether the text may end here."""
        return bool(self.matcher.is_accepting())

    def take(self, token: int) -> bool:
        """One more token of the text; returns whether it has to end there.

        Raises:
            ValueError: the grammar does not allow it, or has become too large to follow.
        """
        if not self.matcher.consume_token(token):
            raise ValueError(f"the text cannot follow its grammar: {self.error}")
        return bool(self.matcher.is_stopped())

    def restart(self, token_ids: Iterable[int]) -> None:
        """Stand behind a text, wherever this was before."""
        self.matcher = self._beginning.deep_copy()
        for token in token_ids:
            self.take(token)

    @property
    def error(self) -> str:
        """What became of the text, in one line."""
        return _one_line(self.matcher.get_error()) or "it allows no token of the vocabulary here"


def goes_on(guides: Sequence[Guide], num_tokens: int) -> list[bool]:
    """Whether each grammar allows any token at all, other than the end."""
    word_NX, _ = _read([(guide, ()) for guide in guides], 1, num_tokens)
    return [bool(word_X.any()) for word_X in word_NX[:, 0]]


def read_masks(
    guided: Sequence[tuple[Guide, Sequence[int]]], num_columns: int, num_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """The masks of blocks, as in :class:`~dspark_jax.engine.shaping.Masks`.

    Args:
        guided: guides and the drafts that are behind their texts, fewer than ``num_columns``.
        num_columns: C.
        num_tokens: of the target's vocabulary.

    Returns:
        uint32 [N, C, X] and int32 [N]. Where nothing can be said nothing is forbidden: behind a
        draft that does not stand, and where the text is over already.
    """
    word_NCX, end_NC = _read(guided, num_columns, num_tokens)
    for (guide, _), word_CX, end_C in zip(guided, word_NCX, end_NC, strict=True):
        for stop in guide.stop_ids:
            bit = np.uint32(1 << (stop % 32))
            word_C = word_CX[:, stop // 32]
            word_CX[:, stop // 32] = np.where(end_C, word_C | bit, word_C & ~bit)
    known_NC = word_NCX.any(axis=-1)
    word_NCX[~known_NC] = ALL
    count_N = np.cumprod(known_NC, axis=1).sum(axis=1, dtype=np.int32)
    return word_NCX, np.minimum(count_N, num_columns - 1).astype(np.int32)


def _read(
    guided: Sequence[tuple[Guide, Sequence[int]]], num_columns: int, num_tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """What llguidance says of the columns: uint32 [N, C, X] tokens, and bool [N, C] the end; zeros
    where it says nothing."""
    num_words = num_tokens // 32 + 1  # the end is token number ``num_tokens``
    word_RX = np.zeros((len(guided) * num_columns, num_words), np.uint32)
    where = word_RX.ctypes.data, 4 * num_words, len(word_RX)
    places = [
        (guide.matcher, place * num_columns, list(drafts))
        for place, (guide, drafts) in enumerate(guided)
    ]
    alone = [(matcher, row) for matcher, row, drafts in places if not drafts]
    blocks = [place for place in places if place[-1]]
    if alone:
        _executor().unsafe_compute_mask_ptr(alone, *where)
    if blocks:
        _executor().unsafe_compute_mask_ptr_with_draft_token(blocks, *where)
    end = np.uint32(1 << (num_tokens % 32))
    end_R = (word_RX[:, -1] & end) > 0
    word_RX[:, -1] &= end - np.uint32(1)
    word_NCX = word_RX[:, : -(-num_tokens // 32)].reshape(len(guided), num_columns, -1)
    return np.ascontiguousarray(word_NCX), end_R.reshape(len(guided), num_columns)


def _library() -> Any:
    """llguidance, which nothing but a grammar needs."""
    try:
        import llguidance
    except ImportError:
        raise ValueError(
            "a grammar needs llguidance, which is not here: pip install 'dspark-jax[serve]'"
        ) from None
    return llguidance


@functools.cache
def _executor() -> Any:
    """Threads for masks, of the process."""
    return _library().LLExecutor()


def _compile(grammar: Grammar, vocabulary: Any) -> Any:
    library = _library()
    make = library.LLMatcher
    try:
        if grammar.kind == "regex":
            source = make.grammar_from_regex(grammar.text)
        elif grammar.kind == "lark":
            source = make.grammar_from_lark(grammar.text)
        else:
            schema = grammar.text or '{"type": "object"}'
            source = make.grammar_from_json_schema(schema, defaults=WHITESPACE)
        limits = library.LLParserLimits(verbose_errors=False)
        matcher = make(vocabulary, source, log_level=0, limits=limits)
        error = matcher.get_error()
    except ValueError as refused:
        error = str(refused)
    if error:
        raise ValueError(f"the grammar ({grammar.kind}) does not compile: {_one_line(error)}")
    return matcher


def _one_line(text: str) -> str:
    return " ".join(text.replace("<non-verbose/>", "").split())[:300]


_VOCABULARIES: weakref.WeakKeyDictionary[Any, dict[int, Any]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


def _vocabulary(tokenizer: Any, num_tokens: int) -> Any:
    """The tokens of a target for llguidance, made once: it takes half a second."""
    if tokenizer is None:
        raise ValueError("the engine has no tokenizer, which a grammar needs: load a model")
    with _LOCK:
        made = _VOCABULARIES.setdefault(tokenizer, {})
        if num_tokens not in made:
            made[num_tokens] = _make_vocabulary(tokenizer, num_tokens)
        return made[num_tokens]


def _make_vocabulary(tokenizer: Any, num_tokens: int) -> Any:
    library = _library()
    fast = getattr(tokenizer, "backend_tokenizer", None)
    known = None if fast is None else _read_by_library(fast.to_str())
    if known is not None:
        tokens = _bytes_of_known(known, num_tokens)
    else:
        tokens = _bytes_of_texts(tokenizer, num_tokens)
    told = _Tokens([*tokens, END], num_tokens, known)
    return library.LLTokenizer(library.TokenizerWrapper(told))


def _read_by_library(text: str) -> Any:
    """A tokenizer.json as llguidance reads it; None for one whose tokens are spelt in a way of
    their own, which then are texts."""
    whole = json.loads(text) | {"padding": None, "truncation": None}
    try:
        return _library().LLTokenizer(json.dumps(whole))
    except ValueError:
        return None


class _Tokens:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None
    special_token_ids: Sequence[int] = ()

    def __init__(self, tokens: list[bytes], end: int, known: Any) -> None:
        """The bytes of all tokens, which of them is the end, and who cuts texts into them as the
        target has learnt it; None where nobody does."""
        self.tokens, self.eos_token_id, self._known = tokens, end, known
        self._ids = {token: index for index, token in enumerate(tokens) if token}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: bytes | str) -> list[int]:
        """The tokens of a text that a grammar leaves no choice about."""
        text = text.encode() if isinstance(text, str) else text
        if self._known is not None:
            found = list(self._known.tokenize_bytes(text))
            within = (self.tokens[token] for token in found if token < self.eos_token_id)
            if b"".join(within) == text:
                return found  # and has not taken any of it for the name of a special token
        return self._longest_first(text)

    def _longest_first(self, text: bytes) -> list[int]:
        """The longest tokens from left to right; what no token begins with is left out."""
        found, start = [], 0
        while start < len(text):
            pieces = (text[start : start + size] for size in range(self._longest, 0, -1))
            piece = next((piece for piece in pieces if piece in self._ids), b"")
            found += [self._ids[piece]] if piece else []
            start += len(piece) or 1
        return found


def _bytes_of_known(known: Any, num_tokens: int) -> list[bytes]:
    """Of a tokenizer that llguidance reads itself; special tokens, and rows without one, have none,
    which forbids them."""

    def of(token: int) -> bytes:
        there = token < known.vocab_size and not known.is_special_token(token)
        return bytes(known.decode_bytes([token])) if there else b""

    return [of(token) for token in range(num_tokens)]


def _bytes_of_texts(tokenizer: Any, num_tokens: int) -> list[bytes]:
    """Of a tokenizer whose tokens are whole texts, each as it reads behind another one."""
    read = functools.partial(tokenizer.decode, skip_special_tokens=True)
    before = next((token for token in range(num_tokens) if read([token]).strip()), 0)
    skip = len(read([before]))
    texts = [read([before, token])[skip:] for token in range(num_tokens)]
    if any("\N{REPLACEMENT CHARACTER}" in text for text in texts):
        raise ValueError(
            "the tokenizer has tokens that are parts of characters, in a form that llguidance does "
            "not read: load the model with a tokenizer.json for a grammar"
        )
    return [text.encode() for text in texts]
