"""What is asked of an engine: a prompt, and how to continue it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dspark_jax.sampling import check_sampling


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    Whatever is not meant is refused when a request is made: integers may be Python's, NumPy's or
    JAX's, ids also a tokenizer's encoding, and all are kept as Python's own.

    Attributes:
        prompt_ids: token ids of the prompt, at least one.
        max_new_tokens: the text is cut there.
        temperature, top_k, top_p, min_p: 0, 0, 1 and 0 switch them off (greedy, no filter).
        key: uint32 [2], the randomness of this request: ``fold_in(seed_key(seed), line)``.
        stop_ids: ids that end the text; the id itself is dropped from it.
        stop_strings: strings that end the text; dropped from it too.
        logprobs: whether the log-probabilities of the new tokens are wanted, under the target's
            own law before temperature and filters.

    Raises:
        ValueError: a value is of the wrong type or has no meaning; names the field and the remedy.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    key: np.ndarray = field(default_factory=lambda: np.zeros(2, np.uint32))  # seed 0
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    logprobs: bool = False

    def __post_init__(self) -> None:
        def keep(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("prompt_ids", "stop_ids"):
            keep(name, _ids(name, getattr(self, name)))
        for name in ("max_new_tokens", "top_k"):
            keep(name, _integer(name, getattr(self, name)))
        for name in ("temperature", "top_p", "min_p"):
            keep(name, _number(name, getattr(self, name)))
        if not isinstance(self.logprobs, bool | np.bool_):
            raise ValueError(f"logprobs is {self.logprobs!r:.40}: give True or False")
        keep("key", _key(self.key))
        keep("stop_strings", _strings(self.stop_strings))
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p)
        if self.max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens is {self.max_new_tokens}: ask for at least 1 new token"
            )
        if any(not text for text in self.stop_strings):
            raise ValueError("a stop string is empty: leave it out")
        if not self.prompt_ids:
            raise ValueError("the prompt is empty: write some text")

    def check(self, max_positions: int, vocab_size: int) -> None:
        """Refuse what a target cannot decode.

        Args:
            max_positions: of its context.
            vocab_size: of its vocabulary.

        Raises:
            ValueError: names the field, the value and the remedy.
        """
        if len(self.prompt_ids) >= max_positions:
            raise ValueError(
                f"the prompt has {len(self.prompt_ids)} tokens and the target's context "
                f"{max_positions}: shorten the prompt to at most {max_positions - 1} tokens"
            )
        for name in ("prompt_ids", "stop_ids"):
            largest = max(getattr(self, name), default=0)
            if largest >= vocab_size:
                raise ValueError(
                    f"{name} has the id {largest}, and the target's ids are 0..{vocab_size - 1}: "
                    "use the target's own tokenizer"
                )


def _integer(name: str, value: Any) -> int:
    """A whole number, of whatever kind."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r:.40}: give a whole number") from None


def _number(name: str, value: Any) -> float:
    """A real number, of whatever kind but text and truth values."""
    try:
        if isinstance(value, bool | np.bool_ | str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name} is {value!r:.40}: give a number") from None


def _strings(value: Any) -> tuple[str, ...]:
    """Stop strings; a single string is no list of them."""
    listed = isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)
    found = tuple(value) if listed else ()
    if not listed or not all(isinstance(text, str) for text in found):
        raise ValueError(f"stop_strings is {value!r:.40}: give a list of strings")
    return found


def _ids(name: str, value: Any) -> tuple[int, ...]:
    """Token ids out of a sequence, an array [S] or a tokenizer's encoding of one text."""
    value = value["input_ids"] if isinstance(value, Mapping) and "input_ids" in value else value
    value = getattr(value, "ids", value)
    remedy = "give token ids, for instance of tokenizer.encode(text)"
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__iter__"):
        raise ValueError(f"{name} is {value!r:.40}: {remedy}")
    if hasattr(value, "dtype"):
        value = np.asarray(value)
        if value.ndim != 1:
            raise ValueError(f"{name} has the shape {value.shape}: {remedy}, in one dimension")
        value = value.tolist()
    found = tuple(_integer(f"{name}[{place}]", one) for place, one in enumerate(value))
    for place, one in enumerate(found):
        if not 0 <= one < 2**31:
            raise ValueError(f"{name}[{place}] is {one}: ids lie in 0..2^31-1")
    return found


def _key(value: Any) -> np.ndarray:
    """uint32 [2]."""
    key = np.asarray(value)
    if key.shape != (2,) or key.dtype.kind not in "ui" or (key < 0).any() or (key >= 2**32).any():
        raise ValueError(f"key is {value!r:.40}: give uint32 [2], for instance seed_key(seed)")
    return key.astype(np.uint32)
