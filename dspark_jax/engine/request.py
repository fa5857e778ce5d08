"""What is asked of an engine: a prompt, and how to continue it."""

from __future__ import annotations

import logging
import operator
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

import numpy as np

from dspark_jax.characters import check_characters
from dspark_jax.engine.grammar import Grammar
from dspark_jax.engine.shaping import MOST_BIASES, MOST_TOP, check_penalties
from dspark_jax.rendering import Rendering
from dspark_jax.sampling import check_sampling

logger = logging.getLogger(__name__)

# A user's message, or the turns of a conversation with "role" and "content".
Prompt = str | Sequence[Mapping[str, Any]]
# Of turns: others are slips, which a template would leave out without a word.
ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    Whatever is not meant is refused when a request is made: integers may be Python's, NumPy's or
    JAX's, ids also a tokenizer's encoding, and all are kept as Python's own.

    Attributes:
        prompt_ids: token ids of the prompt, at least one; or ``prompt``, or ``messages``.
        max_new_tokens: the text is cut there, or where the target's context ends.
        temperature: 0 is greedy.
        top_k: how many tokens may be drawn, the likeliest ones; 0 for all.
        top_p: the least probability that the likeliest tokens which may be drawn have together; 1
            for all.
        min_p: the least probability of a token that may be drawn, as a share of the likeliest
            one's; 0 for all.
        key: uint32 [2], the randomness of this request, where ``seed`` does not make it.
        stop_ids: ids that end the text besides the model's own; dropped from it.
        stop_strings: strings that end the text; dropped from it too. One that is a special token
            is matched by its id. A string is a list of one.
        logprobs: whether the log-probabilities of the new tokens are wanted, under the target's
            own law before temperature and filters.
        trace: whether the result shall have every round.
        seed: of the key, 0..2^64-1; without seed and key, a fresh one. The result says which.
        prompt: a user's message, to which the engine applies the chat template.
        messages: the turns of a conversation (``role``, ``content``: a text or parts of one),
            likewise.
        presence_penalty: is taken off the logits of tokens that are among the new ones, -2..2.
        frequency_penalty: likewise, once for each time that they are, -2..2.
        repetition_penalty: by which the logits of tokens of prompt and new text are divided where
            they are positive, and multiplied where not; 0.01..100, 1 is off (Keskar et al. 2019,
            section 4.1, in the form of transformers).
        logit_bias: ids and what is added to their logits, -100..100; at most 300 of them.
        top_logprobs: how many of the likeliest tokens are wanted at every new one, with their
            log-probabilities as for ``logprobs``, which it implies; 0..20.
        grammar: that the text follows; it ends where the grammar does.
        tools: that the model may call, for the chat template: JSON objects as OpenAI's interface
            has them, ``{"type": "function", "function": {...}}``.
        template_kwargs: further arguments of the chat template, JSON values by name; they go before
            those that the model was loaded with.
        shown_ids: special tokens whose names the text has; it leaves other special tokens out.

    Penalties and bias change the law before temperature and filters, in the order of these fields
    but for the repetition penalty, which comes first; what ``logprobs`` reports they leave alone.

    Raises:
        ValueError: a value is of the wrong type or has no meaning; names the field and the remedy.

    >>> Request(prompt="Hello!", temperature=0.7, top_p=0.9, seed=3).max_new_tokens
    128
    """

    prompt_ids: Sequence[int] = ()
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    key: Any = None
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    logprobs: bool = False
    trace: bool = False
    seed: InitVar[int | None] = None
    prompt: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int = 0
    grammar: Grammar | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    shown_ids: tuple[int, ...] = ()

    def __post_init__(self, seed: int | None) -> None:
        def keep(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("prompt_ids", "stop_ids", "shown_ids"):
            keep(name, _ids(name, getattr(self, name)))
        for name in ("max_new_tokens", "top_k", "top_logprobs"):
            keep(name, _integer(name, getattr(self, name)))
        penalties = "presence_penalty", "frequency_penalty", "repetition_penalty"
        for name in ("temperature", "top_p", "min_p", *penalties):
            keep(name, _number(name, getattr(self, name)))
        for name in ("logprobs", "trace"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise ValueError(f"{name} is {getattr(self, name)!r:.40}: give True or False")
        if self.key is not None and seed is not None:
            raise ValueError("key and seed are both given: one of them says it all")
        keep("key", key_of(seed) if self.key is None else _key(self.key))
        keep("stop_strings", _strings(self.stop_strings))
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p)
        check_penalties(*(getattr(self, name) for name in penalties))
        keep("logit_bias", _biases(self.logit_bias))
        if not 0 <= self.top_logprobs <= MOST_TOP:
            raise ValueError(f"top_logprobs is {self.top_logprobs}: give 0..{MOST_TOP}")
        keep("logprobs", bool(self.logprobs) or self.top_logprobs > 0)
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise ValueError(f"grammar is {self.grammar!r:.40}: give a Grammar(kind, text)")
        if self.max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens is {self.max_new_tokens}: ask for at least 1 new token"
            )
        if any(not text for text in self.stop_strings):
            raise ValueError("a stop string is empty: leave it out")
        if self.prompt is not None:
            keep("prompt", _text("prompt", self.prompt))
        if self.messages is not None:
            keep("messages", _turns(self.messages))
        tools = {"tools": list(_list("tools", self.tools, "JSON objects"))}
        keep("tools", tuple(Rendering(template_args=tools).template_args["tools"]))
        keep("template_kwargs", Rendering(template_args=self.template_kwargs).template_args)
        if (self.tools or self.template_kwargs) and self.prompt is None and self.messages is None:
            raise ValueError("tools and template_kwargs are the chat template's: give messages")
        given = [self.prompt_ids or None, self.prompt, self.messages]
        if sum(value is not None for value in given) > 1:
            raise ValueError("give one of prompt_ids, prompt and messages, and not several")
        if not any(given):
            raise ValueError("the prompt is empty: write some text")

    def resolve(
        self, encode: Callable[..., Sequence[int]] | None, stop_ids: Sequence[int]
    ) -> Request:
        """The request in ids.

        Args:
            encode: the chat template and the tokenizer; ``variables`` are the template's.
                None where there is none.
            stop_ids: of the model, besides the request's own.

        Raises:
            ValueError: the text cannot be encoded.
        """
        text = self.prompt if self.prompt is not None else self.messages
        if text is None:
            ids: Sequence[int] = self.prompt_ids
        elif encode is None:
            raise ValueError("the engine has no tokenizer: give prompt_ids, or load a model")
        else:
            variables = dict(self.template_kwargs) | (
                {"tools": [*self.tools]} if self.tools else {}
            )
            ids = encode(text, variables=variables) if variables else encode(text)
        stop_ids = tuple(dict.fromkeys((*self.stop_ids, *stop_ids)))
        if text is None and stop_ids == self.stop_ids:
            return self
        done: dict[str, Any] = {
            "prompt": None,
            "messages": None,
            "tools": (),
            "template_kwargs": {},
        }
        return replace(self, prompt_ids=ids, stop_ids=stop_ids, **done)

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
        for name in ("prompt_ids", "stop_ids", "logit_bias"):
            largest = max(getattr(self, name), default=0)
            if largest >= vocab_size:
                raise ValueError(
                    f"{name} has the id {largest}, and the target's ids are 0..{vocab_size - 1}: "
                    "use the target's own tokenizer, and no token that it has no row for"
                )


def within_context(requests: Sequence[Request], context: int) -> list[Request]:
    """Requests whose texts end with the target's context at the latest; says how many were cut.

    Args:
        requests: in ids; those without room for a token are left as they are, to be refused.
        context: positions of the target's context.
    """
    room = [context - len(request.prompt_ids) for request in requests]
    cut = [i for i, request in enumerate(requests) if request.max_new_tokens > room[i] > 0]
    if not cut:
        return list(requests)
    asked, least = max(requests[i].max_new_tokens for i in cut), min(room[i] for i in cut)
    logger.warning(
        "max_new_tokens is %d, and the target's context of %d leaves %d of %d texts less room "
        "(%d at least): they end there",
        *(asked, context, len(cut), len(requests), least),
    )
    fitted = list(requests)
    for i in cut:
        fitted[i] = replace(requests[i], max_new_tokens=room[i])
    return fitted


def _turns(value: Any) -> tuple[Mapping[str, Any], ...]:
    """The turns of a conversation, with their contents as texts."""
    turns = _list("messages", value, "turns, dicts with role and content")
    return tuple(_turn(f"messages[{place}]", turn) for place, turn in enumerate(turns))


def _turn(name: str, turn: Any) -> Mapping[str, Any]:
    """One turn; whatever else it has is the template's."""
    is_dict = isinstance(turn, Mapping)
    if not is_dict or "role" not in turn or not ("content" in turn or turn.get("tool_calls")):
        raise ValueError(f"{name} is {turn!r:.60}: give a dict with role and content")
    role, content = turn["role"], turn.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(f"{name} has the role {role!r:.40}: give one of {', '.join(ROLES)}")
    if content is None and turn.get("tool_calls"):
        content = ""  # such a turn need say nothing
    if isinstance(content, list | tuple):
        parts = [_part(f"{name} content[{i}]", part) for i, part in enumerate(content)]
        content = "".join(parts)
    return {**turn, "role": str(role), "content": _text(f"{name} content", content)}


def _part(name: str, part: Any) -> str:
    """One part of a content: ``{"type": "text", "text": ...}``."""
    is_dict = isinstance(part, Mapping)
    if is_dict and part.get("type", "text") != "text":
        raise ValueError(f"{name} is of the type {part['type']!r:.40}: targets read text alone")
    return _text(name, part.get("text") if is_dict else part)


def _text(name: str, value: Any) -> str:
    """A text in whole characters."""
    if isinstance(value, bytes | bytearray):
        raise ValueError(f"{name} is {value!r:.40}: give a text, for instance by decode()")
    if not isinstance(value, str):
        raise ValueError(f"{name} is {value!r:.40}: give a text")
    check_characters(name, value)
    return str(value)


def _list(name: str, value: Any, what: str) -> tuple[Any, ...]:
    """Several of something; one text or dict is no list of them."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | bytearray | Mapping):
        raise ValueError(f"{name} is {value!r:.40}: give a list of {what}")
    return tuple(value)


def key_of(seed: int | None) -> np.ndarray:
    """The key of a seed; a fresh one for None.

    Raises:
        ValueError: it is no seed.
    """
    seed = secrets.randbits(63) if seed is None else _integer("seed", seed)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed is {seed}: give an integer in 0..2^64-1, or None for a fresh one")
    return np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)  # as random.seed_key, anywhere


def seed_of(key: np.ndarray) -> int:
    """The seed whose key this is."""
    return int(key[0]) << 32 | int(key[1])


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


def _biases(value: Any) -> dict[int, float]:
    """Ids and what is added to their logits."""
    if not isinstance(value, Mapping):
        raise ValueError(f"logit_bias is {value!r:.40}: give a dict of ids and numbers")
    if len(value) > MOST_BIASES:
        raise ValueError(
            f"logit_bias has {len(value)} ids: give {MOST_BIASES} at most, or a grammar"
        )
    found = dict(zip(_ids("logit_bias", list(value)), value.values(), strict=True))
    for token, bias in found.items():
        found[token] = _number(f"logit_bias[{token}]", bias)
        if not -100 <= found[token] <= 100:
            raise ValueError(f"logit_bias[{token}] is {bias}: give a number in -100..100")
    return found


def _strings(value: Any) -> tuple[str, ...]:
    """Stop strings; a single string is one of them."""
    value = (value,) if isinstance(value, str) else value
    texts = _list("stop_strings", value, "strings")
    return tuple(_text(f"stop_strings[{place}]", text) for place, text in enumerate(texts))


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
