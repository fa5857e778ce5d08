"""Grammars that a text follows: what is asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal, get_args

from dspark_jax.characters import check_characters, first_line

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
