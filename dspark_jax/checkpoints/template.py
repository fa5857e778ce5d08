"""Chat templates: applied by transformers, in a sandbox, to whole conversations."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, meta

from dspark_jax.characters import check_characters, first_line
from dspark_jax.checkpoints.tensors import LoadError
from dspark_jax.rendering import PLAIN, RESERVED, Rendering

logger = logging.getLogger(__name__)

# A tag of transformers' own, which sets off answers and renders nothing.
GENERATION = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
# What templates are given besides: functions, and the names of special tokens.
GIVEN = re.compile(r"raise_exception|strftime_now|\w+_token")


def apply_template(
    tokenizer: Any,
    turns: Sequence[Mapping[str, Any]],
    rendering: Rendering = PLAIN,
    *,
    what: str = "prompt",
    open_answer: bool = False,
    **variables: Any,
) -> str:
    """The text of a conversation by the template of a tokenizer that has one.

    Args:
        tokenizer: a transformers tokenizer.
        turns: with ``role`` and ``content``.
        rendering: the system turn and the arguments of the template.
        what: the turns are, for the message.
        open_answer: whether that is added which the target's next answer follows.
        **variables: of the template, which go before the arguments of ``rendering``.

    Raises:
        LoadError: the template, a program that came with the model, refuses the turns.
        ValueError: what it makes of them is no text.
    """
    given: dict[str, Any] = {**rendering.template_args, **variables}
    try:
        text = str(
            tokenizer.apply_chat_template(
                rendering.turns(turns), add_generation_prompt=open_answer, tokenize=False, **given
            )
        )
    except Exception as error:  # a template raises whatever it likes
        raise LoadError(f"the chat template refuses the {what}: {first_line(error)}") from None
    check_characters(f"the rendered {what}", text)
    return text


def with_written_calls(turns: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The turns with the arguments of their calls as JSON texts, which some templates take in the
    place of objects."""

    def written(call: Mapping[str, Any]) -> dict[str, Any]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": arguments}}

    return [
        {**turn, "tool_calls": [*map(written, turn["tool_calls"])]}
        if turn.get("tool_calls")
        else turn
        for turn in turns
    ]


def is_plain(tokenizer: Any, rendering: Rendering) -> bool:
    """Whether conversations are rendered without a template."""
    return not rendering.chat_template or not tokenizer.chat_template


def check_rendering(tokenizer: Any, rendering: Rendering, name: str) -> None:
    """Say what of prompts and of a rendering comes to nothing with a target.

    Warns of a target without a template, of arguments that its template does not know, and of
    turns that it leaves out.

    Args:
        tokenizer: a transformers tokenizer.
        rendering: asked for.
        name: of the target.

    Raises:
        LoadError: there is no template for the arguments, or it refuses the system turn.
    """
    names = ", ".join(rendering.template_args)
    if not rendering.chat_template:
        return
    if not tokenizer.chat_template:
        if names:
            raise LoadError(
                f"{name} has no chat template, which the template argument {names} would be of: "
                "leave it out"
            )
        logger.warning("%s has no chat template: prompts are decoded as plain text", name)
        return
    if names:
        _check_names(tokenizer, rendering, name)
    _check_turns(tokenizer, rendering, name)


def free_variables(tokenizer: Any, rendering: Rendering) -> frozenset[str]:
    """The variables that a template looks at and that are not set for each text; none where it is
    not applied, or broken: every prompt says so."""
    known = None if is_plain(tokenizer, rendering) else _variables(tokenizer, rendering)
    return frozenset(n for n in (known or set()) - RESERVED if not GIVEN.fullmatch(n))


def _variables(tokenizer: Any, rendering: Rendering) -> set[str] | None:
    """All that a template looks at; None where it is broken."""
    try:
        template = tokenizer.get_chat_template(tools=rendering.template_args.get("tools"))
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])  # to parse it only
        return meta.find_undeclared_variables(environment.parse(GENERATION.sub("", template)))
    except (ValueError, TemplateSyntaxError):
        return None


def _check_names(tokenizer: Any, rendering: Rendering, name: str) -> None:
    """Warn of arguments that a template never looks at: to it, they are no error."""
    known = _variables(tokenizer, rendering)
    if known is None:
        return  # every prompt says so
    free = sorted(free_variables(tokenizer, rendering))
    for unknown in rendering.template_args.keys() - known:
        logger.warning(
            "the chat template of %s does not know the argument %s, which changes nothing "
            "(known: %s)",
            name,
            unknown,
            ", ".join(free) or "none",
        )


def _check_turns(tokenizer: Any, rendering: Rendering, name: str) -> None:
    """Try a short question: a template may leave turns out without a word."""
    turns = rendering.turns([{"role": "user", "content": "question"}])
    what = "system turn" if rendering.system else "prompt"
    try:
        text = apply_template(tokenizer, turns, rendering, what=what)
    except ValueError as error:
        if rendering.system:
            remedy = "leave out system, or write it into the prompt"
            raise LoadError(f"{name}: {error}: {remedy}") from None
        return  # every prompt says so
    for turn in turns:
        if turn["content"].strip().casefold() not in text.casefold():
            role = turn["role"]
            logger.warning("the chat template of %s leaves out or changes %s turns", name, role)
