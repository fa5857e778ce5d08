"""Which parameters of a test run by default, and which with the ``full`` ones alone."""

from collections.abc import Container, Iterable, Sequence
from typing import Any

import pytest


def rest_full(values: Iterable[Any], kept: Container[Any]) -> list[Any]:
    """Parameters of a test; those that are not kept carry the marker ``full``.

    Args:
        values: of one parameter, or tuples of several.
        kept: those of them that the default suite runs.
    """

    def param(value: Any) -> Any:
        if value in kept:
            return value
        several = isinstance(value, Sequence) and not isinstance(value, str)
        return pytest.param(*(value if several else (value,)), marks=pytest.mark.full)

    return [param(value) for value in values]
