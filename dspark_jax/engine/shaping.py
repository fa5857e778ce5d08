"""What shapes the target's law before temperature and filters: penalties and biases."""

from __future__ import annotations

MOST_BIASES = 300  # of a request: what a state of slots has room for
MOST_TOP = 20  # likeliest tokens that are reported


def check_penalties(presence: float, frequency: float, repetition: float) -> None:
    """Raises ValueError where a penalty of one request has no meaning."""
    for name, value in (("presence_penalty", presence), ("frequency_penalty", frequency)):
        if not -2 <= value <= 2:
            raise ValueError(f"{name} is {value}: give a number in -2..2 (0 is off)")
    if not 0.01 <= repetition <= 100:
        raise ValueError(
            f"repetition_penalty is {repetition}: give a number in 0.01..100 (1 is off)"
        )
