"""What is common to the configurations of all drafters."""

from __future__ import annotations

from typing import Protocol


class AnyDrafterConfig(Protocol):
    """What the configurations of all drafters have, each a frozen dataclass of its family."""

    @property
    def block_size(self) -> int:
        """Most drafts of a round."""

    @property
    def confidence(self) -> bool:
        """Whether drafts come with a confidence in each."""

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        """Feature layers."""

    @property
    def sizes(self) -> dict[str, int]:
        """Axis letter -> size; those of both vocabularies at least."""
