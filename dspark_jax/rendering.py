"""How a conversation becomes the text that a target reads; said once, for all of its prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspark_jax.characters import check_characters

# What templates are given by whoever applies them, or what says how that is done.
RESERVED = frozenset(
    (
        "self", "messages", "conversation", "conversations", "chat_template", "tokenize",
        "add_generation_prompt", "continue_final_message", "sanitize_control_tokens", "padding",
        "truncation", "max_length", "return_tensors", "return_dict",
        "return_assistant_tokens_mask", "tokenizer_kwargs",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Rendering:
    """How prompts are rendered, for decoding and for training alike.

    Attributes:
        system: a system turn for the conversations that have none; empty for none.
        chat_template: whether the target's template is applied. Otherwise, as for a target without
            one, the texts of the turns follow each other, each on a line of its own.
        template_args: arguments of the template, JSON values by name.

    Raises:
        ValueError: a value is of the wrong type, or these contradict each other.
    """

    system: str = ""
    chat_template: bool = True
    template_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.system, str):
            raise ValueError(f"system is {self.system!r:.40}: give a text")
        check_characters("system", self.system)
        if self.system and not self.system.strip():
            raise ValueError("system is only white space: write some text, or leave it out")
        if not isinstance(self.chat_template, bool):
            raise ValueError(f"chat_template is {self.chat_template!r:.40}: give True or False")
        if not isinstance(self.template_args, Mapping):
            raise ValueError(f"template_args is {self.template_args!r:.40}: give a dict")
        for name, value in self.template_args.items():
            _check_argument(name, value)
        if self.template_args and not self.chat_template:
            raise ValueError(
                f"the template argument {', '.join(self.template_args)} has no effect where the "
                "chat template is not applied: leave out the one or the other"
            )
        plain = json.loads(json.dumps(dict(self.template_args)))  # nobody changes it later
        object.__setattr__(self, "template_args", plain)

    def turns(self, turns: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The turns of a conversation with the system turn, where they have none."""
        found = [dict(turn) for turn in turns]
        if not self.system or any(turn["role"] in ("system", "developer") for turn in found):
            return found
        return [{"role": "system", "content": self.system}, *found]

    def record(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON values for recipes."""
        return {name: value for name, value in vars(self).items() if value != getattr(PLAIN, name)}


def parse_arguments(texts: Sequence[str]) -> dict[str, Any]:
    """Arguments of a template out of ``KEY=VALUE`` texts; a value that is not JSON is a string.

    Raises:
        ValueError: these are no such texts, or a key is there twice.
    """
    if not isinstance(texts, tuple | list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"template_args is {texts!r:.60}: give a tuple of KEY=VALUE texts")
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(
                f"the template argument {text!r:.60} is not KEY=VALUE, for instance "
                "enable_thinking=false"
            )
        if name in found:
            raise ValueError(f"the template argument {name} is given twice: give it once")
        try:
            found[name] = json.loads(value, parse_constant=_refuse)
        except (ValueError, RecursionError):
            found[name] = value
    return found


def _refuse(constant: str) -> None:
    """``NaN`` and ``Infinity`` are Python's, and not JSON."""
    raise ValueError(constant)


def _check_argument(name: Any, value: Any) -> None:
    """Refuse what cannot be an argument of a template."""
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"the template argument {name!r:.40} is no name: use letters and digits")
    if name in RESERVED:
        raise ValueError(f"the template argument {name} is not free: dspark sets it for each text")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        raise ValueError(
            f"the template argument {name} is {value!r:.40}: give a JSON value"
        ) from None
    check_characters(f"the template argument {name}", text)


PLAIN = Rendering()
