"""Thoughts in front of answers: where a model thinks aloud, readers get that apart."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Thought:
    """What sets a thought off.

    Attributes:
        opening: before it.
        closing: behind it.
        special: names of tokens among these that may be special ones.
    """

    opening: str
    closing: str
    special: tuple[str, ...]


THINK = Thought("<think>", "</think>", ("<think>", "</think>"))
CHANNEL = Thought("<|channel>thought", "<channel|>", ("<|channel>", "<channel|>"))
BRACKETS = Thought("[THINK]", "[/THINK]", ("[THINK]", "[/THINK]"))


def thought_of(template: str) -> Thought | None:
    """What a chat template knows of thoughts; None where it knows nothing."""
    return next((one for one in (THINK, CHANNEL, BRACKETS) if one.closing in template), None)


class ThoughtReader:
    """Splits a text that arrives in pieces into a thought and what follows it.

    White space around the thought belongs to neither.
    """

    def __init__(self, thought: Thought, prompt: str) -> None:
        """``prompt`` is the end of what the text follows; it may be within the thought."""
        opened = prompt.rstrip().endswith(thought.opening)
        self._thought, self._state = thought, "thinking" if opened else "start"
        self._held = ""
        self._begun = False  # whether anything of the present part was given out

    def push(self, text: str) -> tuple[str, str]:
        """Further pieces of the thought and of the answer."""
        self._held += text
        thought, answer = "", ""
        if self._state == "start":
            self._start()
        if self._state == "thinking":
            thought = self._think()
        if self._state == "answering":
            answer, self._held = self._lead(self._held), ""
        return thought, answer

    def finish(self) -> tuple[str, str]:
        """What was held back, since more might have followed."""
        held, self._held = self._held, ""
        if self._state == "thinking":
            return self._lead(held).rstrip(), ""
        return "", held if self._state == "start" else self._lead(held)

    def _start(self) -> None:
        opening, held = self._thought.opening, self._held.lstrip()
        if held.startswith(opening):
            self._state, self._held = "thinking", held[len(opening) :]
        elif not opening.startswith(held):
            self._state, self._begun = "answering", True  # as it is, its white space too

    def _think(self) -> str:
        thought, closing, rest = self._held.partition(self._thought.closing)
        if closing:
            shown = self._lead(thought).rstrip()
            self._state, self._held, self._begun = "answering", rest, False
            return shown
        kept = longest_end(self._held, self._thought.closing)
        shown = self._held[: len(self._held) - kept].rstrip()
        self._held = self._held[len(shown) :]
        return self._lead(shown)

    def _lead(self, text: str) -> str:
        """Without white space in front of the part."""
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        return text


def longest_end(text: str, mark: str) -> int:
    """How many characters at a text's end may be the beginning of a mark."""
    sizes = range(min(len(text), len(mark) - 1), 0, -1)
    return next((size for size in sizes if mark.startswith(text[-size:])), 0)
