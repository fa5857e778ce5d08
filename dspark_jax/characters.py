"""Texts: what is none, as Python's strings may hold it, and what an error says in one line."""

from __future__ import annotations


def check_characters(name: str, text: str) -> None:
    """Refuse a text that no tokenizer takes.

    Python spells a byte of the command line or of a pipe that is not UTF-8 as a half of a surrogate
    pair, and JSON can spell any half.

    Args:
        name: of the field or the argument, for the message.
        text: that is looked at.

    Raises:
        ValueError: names the place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        is_byte = 0xDC80 <= half <= 0xDCFF
        found = f"the byte 0x{half - 0xDC00:02x}" if is_byte else f"'\\u{half:04x}'"
        what = "not UTF-8" if is_byte else "half of a surrogate pair"
        raise ValueError(
            f"{name} has {found} at character {error.start + 1}, which is {what}: write the "
            "character that was meant"
        ) from None


def is_text(text: str) -> bool:
    """Whether :func:`check_characters` has nothing against a text."""
    try:
        check_characters("", text)
    except ValueError:
        return False
    return True


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
