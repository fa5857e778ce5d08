"""Stand-in until the measurements are here."""

from __future__ import annotations

from dspark_jax.engine.engine import Engine
from dspark_jax.engine.reader import Generation


class Metrics:
    """Counts nothing yet."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def queued(self) -> None:
        """A request arrived."""

    def first_token(self, seconds: float) -> None:
        """It has its first token."""

    def token(self, seconds: float) -> None:
        """It has further ones."""

    def finished(self, result: Generation) -> None:
        """It is over."""

    def text(self) -> bytes:
        """In the format of Prometheus."""
        return b""
