"""What a server has: a name, an engine, and what the model's chat template knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dspark_jax.engine.engine import Engine
from dspark_jax.engine.text import special_ids
from dspark_jax.model import Model
from dspark_jax.serving.calls import CallForm, call_form
from dspark_jax.serving.reasoning import Thought, thought_of


@dataclass(frozen=True)
class Served:
    """A model behind an engine.

    Attributes:
        name: under which clients know it.
        engine: that is started.
        tokenizer: of the target.
        encode: a conversation -> ids, by the chat template.
        stop_ids: that end every text.
        positions: longest text with its prompt.
        block_size: drafts of a round; 0 without a drafter.
        variables: that the chat template looks at, ``tools`` among them.
        call_form: how calls of tools are written.
        thought: what sets a model's thoughts off; None where its template knows none.
    """

    name: str
    engine: Engine
    tokenizer: Any
    encode: Callable[..., Sequence[int]] | None
    stop_ids: tuple[int, ...]
    positions: int
    block_size: int
    variables: frozenset[str]
    call_form: CallForm
    thought: Thought | None

    def marks(self, *, calls: bool) -> tuple[int, ...]:
        """The special tokens that set off thoughts, and calls where these are asked for: a chat's
        text must show them to be taken apart."""
        thoughts = () if self.thought is None else self.thought.special
        return special_ids(self.tokenizer, thoughts + (self.call_form.special if calls else ()))


def template_of(tokenizer: Any) -> str:
    """The chat template of a tokenizer; empty where it has none."""
    template = tokenizer.chat_template or ""
    if isinstance(template, dict):  # one for tools, and one for all else
        template = "\n".join(template.values())
    return str(template)


def serve_model(model: Model, engine: Engine, name: str = "") -> Served:
    """What is known of a model and of its chat template.

    Args:
        model: that has a tokenizer.
        engine: of it.
        name: under which clients know it; empty for the target's own.
    """
    decoder = model.decoder
    template = template_of(decoder.tokenizer)
    return Served(
        name or model.target,
        engine,
        decoder.tokenizer,
        decoder.encode,
        decoder.stop_ids,
        min(engine.config.positions, decoder.target.max_positions),
        0 if decoder.drafter is None else decoder.drafter.block_size,
        model.template_variables,
        call_form(template),
        thought_of(template),
    )
