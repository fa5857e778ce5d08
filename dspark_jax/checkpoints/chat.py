"""Conversations as token ids with a loss mask, by the target's own chat template.

The whole conversation is rendered and tokenised at once. What the target wrote lies between two
strings that the template puts around every answer; they are found by rendering a conversation
whose contents are known, so that no family of models is written down here. As in the reference
implementation, the string that ends an answer is supervised, and so is a thinking block that
the template puts in front of it; the string that opens an answer is not.

An answer whose own token ids are known is not rendered: they follow the rendered prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any

import numpy as np

from dspark_jax.checkpoints.conversations import Conversation, Turn
from dspark_jax.checkpoints.template import apply_template, is_plain, with_written_calls
from dspark_jax.checkpoints.tensors import LoadError
from dspark_jax.checkpoints.tokenizer import chat_prompt_ids
from dspark_jax.rendering import PLAIN, Rendering

# As in the reference this block alone is put before answers: thinking blocks of other forms belong
# to the answer, or are left out.
EMPTY_CHANNEL = "<|channel>thought\n<channel|>"

# Contents that no template contains or changes.
PROBE: tuple[Turn, ...] = (
    {"role": "user", "content": "firstquestion"},
    {"role": "assistant", "content": "firstanswer"},
    {"role": "user", "content": "secondquestion"},
    {"role": "assistant", "content": "secondanswer"},
)


@dataclass(frozen=True)
class ChatFormat:
    """What a template writes around an answer.

    Attributes:
        header: opens an answer, for instance ``"<|im_start|>assistant\\n"``.
        end: ends it, for instance ``"<|im_end|>\\n"``.
        opening: the end of the header, where the target's answers follow one that the template
            leaves out of what was said before: the empty thinking block of Gemma 4.
    """

    header: str
    end: str
    opening: str = ""

    def opened(self, turns: Sequence[Turn]) -> list[Turn]:
        """The turns with the opening before every answer that has none."""

        def open_turn(turn: Turn) -> Turn:
            if turn["role"] != "assistant" or turn["content"].startswith(self.opening):
                return turn
            return {**turn, "content": self.opening + turn["content"]}

        return [open_turn(turn) for turn in turns]

    def spans(self, text: str) -> Iterator[tuple[int, int]]:
        """First character, and the one behind the last, of every answer with its end.

        Where what opens an answer is there twice, as behind two questions in a row, the answer is
        behind the second.
        """
        header, end = re.escape(self.header), re.escape(self.end)
        pattern = f"{header}((?:(?!{header}).)*?{end})"
        return (match.span(1) for match in re.finditer(pattern, text, re.DOTALL))


def render(
    tokenizer: Any,
    turns: Sequence[Turn],
    rendering: Rendering = PLAIN,
    *,
    open_answer: bool = False,
    **variables: Any,
) -> str:
    """The text of a conversation; ``open_answer`` adds what the target's next answer follows.
    ``variables`` are the template's.

    Raises:
        LoadError: there is no template, or it refuses the turns.
    """
    if is_plain(tokenizer, rendering):
        why = "the target has no chat template"
        if tokenizer.chat_template:
            why = "chat_template is false, so that answers cannot be told from the rest"
        raise LoadError(f"{why}: give every answer's response_ids")
    return apply_template(
        tokenizer, turns, rendering, what="conversation", open_answer=open_answer, **variables
    )


def find_chat_format(tokenizer: Any, rendering: Rendering = PLAIN) -> ChatFormat:
    """What the target's template, applied as a rendering says, writes around an answer.

    Raises:
        LoadError: there is no template, its answers cannot be told from the rest, or the tokenizer
            cannot tell where its tokens lie in a text.
    """
    if not tokenizer.is_fast:
        raise LoadError(
            "the target's tokenizer cannot tell where its tokens lie in a text: give it as a "
            "tokenizer.json, or give every answer's response_ids"
        )
    draw = partial(render, tokenizer, rendering=rendering)
    question, answer = PROBE[0]["content"], PROBE[1]["content"]
    asked = draw(PROBE[:1])
    once, twice = draw(PROBE[:2]), draw(PROBE)
    texts = draw(PROBE[:1], open_answer=True), once, twice
    # What follows the question whoever goes on, the target or the file: a thinking block that
    # only one of them opens with belongs to the answer.
    columns = zip(*(text.removeprefix(asked) for text in texts), strict=False)
    header = "".join(column[0] for column in takewhile(lambda column: len({*column}) == 1, columns))
    opening = ""
    if header:  # what an answer without a thought follows, unless the template writes it itself
        silent = draw(PROBE[:1], open_answer=True, enable_thinking=False)
        thoughtless = silent == asked + header + EMPTY_CHANNEL
        if thoughtless and not once.startswith(silent):
            opening = EMPTY_CHANNEL
    else:  # the end of a question is all that opens an answer
        header = asked.partition(question)[2]
    chat = ChatFormat(header + opening, once.rpartition(answer)[2], opening)
    header, twice = chat.header, draw(chat.opened(PROBE))
    found = [twice[first:last] for first, last in chat.spans(twice)] if header and chat.end else []
    wanted = [turn["content"] + chat.end for turn in PROBE[1::2]]
    understood = twice.count(header) == len(found) == len(wanted)
    if not understood or not all(map(str.endswith, found, wanted)):
        raise LoadError(
            "the target's chat template does not set off answers in a way that is understood "
            f"(opened by {chat.header!r}, ended by {chat.end!r}): give conversations with one "
            "answer each, and its response_ids"
        )
    return chat


def tokens_of(text: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """A rendered text as ids int32 [S], and the character each token begins with, int64 [S]."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    start_S = np.array([start for start, _ in encoded["offset_mapping"]], np.int64)
    return np.array(encoded["input_ids"], np.int32), start_S


def answer_mask(text: str, start_S: np.ndarray, chat: ChatFormat) -> np.ndarray:
    """bool [S]: which tokens of a rendered text begin inside an answer."""
    mask_S = np.zeros(len(start_S), bool)
    for first, last in chat.spans(text):
        mask_S[np.searchsorted(start_S, first) : np.searchsorted(start_S, last)] = True
    return mask_S


def needs_format(conversation: Conversation) -> bool:
    """Whether the answers must be found in the text: not where there is one, with its ids."""
    earlier = [turn["role"] for turn in conversation.turns[:-1]]
    known = conversation.response_ids is not None and not conversation.uses_tools
    return not known or "assistant" in earlier


def end_of_answer(
    tokenizer: Any, stop_ids: Sequence[int], rendering: Rendering = PLAIN
) -> int | None:
    """The id that ends an answer where nobody has recorded it: the one that the template writes
    behind answers, else the end of a text; None where there is neither.

    Args:
        tokenizer: the target's.
        stop_ids: at which its texts end.
        rendering: of its prompts.
    """
    end = tokenizer.eos_token_id
    last = stop_ids[0] if end not in stop_ids and stop_ids else end
    try:
        ids, _ = tokens_of(find_chat_format(tokenizer, rendering).end, tokenizer)
    except LoadError:  # no template, or one of another kind
        return last
    first = int(ids[0]) if len(ids) else None
    special = first is not None and not tokenizer.decode([first], skip_special_tokens=True)
    return first if first in stop_ids or special else last


def encode_conversation(
    conversation: Conversation,
    tokenizer: Any,
    chat: ChatFormat | None,
    end_id: int | None,
    rendering: Rendering = PLAIN,
) -> tuple[np.ndarray, np.ndarray]:
    """A conversation as ids and loss mask.

    Args:
        conversation: with at least one answer.
        tokenizer: the target's.
        chat: what surrounds an answer; None where that is not understood, or :func:`needs_format`
            says no. Then the last answer alone is supervised, and its ids must be known.
        end_id: the token that ends an answer whose own ids are known, and not what ended it; None
            where the target has none.
        rendering: that ``chat`` was found with.

    Returns:
        token_S int32 and loss_mask_S bool.

    Raises:
        ValueError: the template refuses the conversation or leaves its tools out, or an id is no
            token of the target.
    """
    if chat is None or not needs_format(conversation):
        assert conversation.response_ids is not None
        prompt_ids = chat_prompt_ids(tokenizer, conversation.turns[:-1], rendering)
        token_S = np.array(prompt_ids, np.int32)
        mask_S = np.zeros(len(token_S), bool)
    else:
        token_S, mask_S = _encode_text(conversation, tokenizer, chat, rendering)
    if conversation.response_ids is None:
        return token_S, mask_S
    ids = list(conversation.response_ids)
    if conversation.finished:
        end_id = end_id if conversation.end_id is None else conversation.end_id
        if end_id is None:
            raise ValueError("the target's tokenizer has no end of sequence, nor has the answer")
        ids.append(end_id)
    for index in ids:
        if not 0 <= index < 2**31 or tokenizer.convert_ids_to_tokens(index) is None:
            raise ValueError(
                'an id in "response_ids" or "end_id" is no token of the target, whose ids are '
                f"0..{max(tokenizer.get_vocab().values())}: were these the answers of another "
                "model?"
            )
    answer_S = np.array(ids, np.int32)
    return np.append(token_S, answer_S), np.append(mask_S, np.ones(len(answer_S), bool))


def _encode_text(
    conversation: Conversation, tokenizer: Any, chat: ChatFormat, rendering: Rendering
) -> tuple[np.ndarray, np.ndarray]:
    """What is known of a conversation as text: all of it, or all but the last answer. An answer
    that was cut has no end."""
    turns, known = conversation.turns, conversation.response_ids is None
    variables: dict[str, Any] = {"tools": list(conversation.tools)} if conversation.tools else {}
    if conversation.uses_tools:
        turns = _turns_with_tools(conversation, tokenizer, chat, rendering)
    shown = chat.opened(turns if known else turns[:-1])
    text = render(tokenizer, shown, rendering, open_answer=not known, **variables)
    token_S, start_S = tokens_of(text, tokenizer)
    mask_S, kept = answer_mask(text, start_S, chat), len(token_S)
    if known and turns[-1]["role"] == "assistant" and not conversation.finished:
        kept = int(np.searchsorted(start_S, len(text.removesuffix(chat.end))))
    return token_S[:kept], mask_S[:kept]


def _turns_with_tools(
    conversation: Conversation, tokenizer: Any, chat: ChatFormat, rendering: Rendering
) -> tuple[Turn, ...]:
    """The turns with their calls as the template takes them: with arguments that are objects, or
    JSON.

    Raises:
        LoadError: it takes neither.
    """
    objects = conversation.turns
    texts: Any = tuple(with_written_calls(objects))
    try:
        _check_tools(objects, conversation.tools, tokenizer, chat, rendering)
    except LoadError as error:
        try:
            _check_tools(texts, conversation.tools, tokenizer, chat, rendering)
        except LoadError:
            raise error from None
        return texts
    return objects


def _check_tools(
    turns: Sequence[Turn],
    given: Sequence[Any],
    tokenizer: Any,
    chat: ChatFormat,
    rendering: Rendering,
) -> None:
    """Whether the template writes tools, calls and results, and answers can be told from results.

    Raises:
        LoadError: it does not.
    """
    tools = list(given) or None

    def text_of(turns: Sequence[Turn], tools: list[Any] | None) -> str | None:
        try:
            return render(tokenizer, chat.opened(turns), rendering, tools=tools)
        except LoadError:  # what it misses it reads
            return None

    def answers_of(text: str | None) -> list[str]:
        return [] if text is None else [text[first:last] for first, last in chat.spans(text)]

    whole = render(tokenizer, chat.opened(turns), rendering, tools=tools)
    mute: list[Turn] = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    blank: list[Turn] = [
        {**turn, "content": "nothing"} if turn["role"] == "tool" else turn for turn in turns
    ]
    silent = text_of(blank, tools)
    for what, there, text in (
        ("the tools", tools is not None, text_of(turns, None)),
        ("calls of tools", any("tool_calls" in turn for turn in turns), text_of(mute, tools)),
        ("what tools say", blank != list(turns), silent),
    ):
        if there and text == whole:
            raise LoadError(f"the chat template leaves {what} out")
    calls = [call["function"]["arguments"] for turn in turns for call in turn.get("tool_calls", [])]
    if any(str(one) in whole for one in calls if one and isinstance(one, dict)):
        raise LoadError("the chat template writes the arguments of calls as Python does")
    # Answers do not hold what tools say, or that would be learnt.
    answers, count = answers_of(whole), sum(turn["role"] == "assistant" for turn in turns)
    if len(answers) != count or (silent is not None and answers_of(silent) != answers):
        raise LoadError("the chat template does not set answers off from what tools say")
