"""What a family of targets is: a module with a configuration of its own and these functions.

Nothing outside of this folder asks which family a target is of: :mod:`.table` finds the module, by
the ``model_type`` of a file or by the class of a configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
from flax import struct

from dspark_jax.config import TargetConfig
from dspark_jax.models.cache import Beside, Room, Rows
from dspark_jax.models.stacks import Sections
from dspark_jax.models.vocab import Vocab


@struct.dataclass
class TargetParams:
    """Weights of a target.

    Attributes:
        vocab: embedding and LM head.
        layers: blocks, of every stack (:mod:`~dspark_jax.models.stacks`).
        norm_D: final norm.
        extra: what a family has besides; None for nothing.
    """

    vocab: Vocab
    layers: Any
    norm_D: Any
    extra: Any = None


class ReadBeside(Protocol):
    """Reads rows and leaves the cache as it is."""

    def __call__(
        self,
        target: TargetParams,
        cache: Any,
        rows: Beside,
        cfg: Any,
        num_layers: int,
    ) -> jax.Array:
        """The residual streams [B, W, D] after the first ``num_layers`` layers.

        Args:
            target: weights.
            cache: valid before each slot's limit.
            rows: the rows.
            cfg: sizes.
            num_layers: static.
        """


class TargetFamily(Protocol):
    """The functions of a family; ``cfg`` is always of its ``Config``."""

    @property
    def Config(self) -> type[TargetConfig]:
        """The family's frozen configuration, by whose class its module is found."""

    def config(self, hf: Mapping[str, Any]) -> TargetConfig:
        """The configuration out of a ``config.json``, ``model_type`` included.

        Raises:
            ValueError: a field is missing or wrong, or asks for something that is not supported.
        """

    def architecture(self, cfg: Any) -> str:
        """The class of transformers that computes the same."""

    def draft_fields(self, cfg: Any) -> dict[str, Any]:
        """Fields of ``DrafterConfig`` of a drafter that is trained for such a target, where they
        are not what a recipe or the sizes of the target say."""

    def declare(self, cfg: Any) -> TargetParams:
        """Declaration of every parameter, layers stacked, under its Hugging Face name."""

    def sections(self, cfg: Any) -> Sections:
        """The layers by their kinds, which all have an ``attention``."""

    def declare_cache(self, cfg: Any, room: Room) -> Any:
        """Declaration of what ``extend`` keeps: a tree of ``Buffer``, layers stacked. Every one has
        an axis of slots; what is behind the committed length of a slot means nothing."""

    def encode(
        self,
        target: TargetParams,
        token_BS: jax.Array,
        cfg: Any,
        feature_layers: Sequence[int] = ...,
        fetch: Callable[[Any, int], Any] = ...,
        kernels: str = ...,
    ) -> tuple[jax.Array, jax.Array]:
        """Read whole sequences from position 0, causally, without a cache.

        Padding belongs at the end: nothing before it ever sees it.

        Args:
            target: weights.
            token_BS: int32 token ids.
            cfg: sizes.
            feature_layers: layers whose residual stream is returned; -1 is the embedding output.
            fetch: what is done to the weights of a layer, in the stack of this number, when its
                turn comes, such as gathering them.
            kernels: the implementation of the operations of ``pallas_kernels``.

        Returns:
            hidden_BSD after the final norm, and feature_BSFD; both in the dtype of the weights.
        """

    def extend(
        self,
        target: TargetParams,
        cache: Any,
        rows: Rows,
        cfg: Any,
        feature_layers: Sequence[int] = ...,
        *,
        rows_per_slot: int,
        chunks: Rows | None = ...,
        beside: Beside | None = ...,
        kernels: str = ...,
    ) -> tuple[jax.Array, jax.Array, Any]:
        """Read T rows: put them into the cache, attend to everything up to their position.

        Args:
            target: weights.
            cache: valid before each slot's first row; donated.
            rows: the batch; at most ``rows_per_slot`` (static) rows a slot.
            cfg: sizes.
            feature_layers: as in :meth:`encode`.
            rows_per_slot: the most rows that one slot has here.
            chunks: pieces of prompts in the same pass, [P, W]: each is W positions of one slot, of
                which those behind the first may be padding. They follow the T rows in the results.
                A chunk sees all that is written here before it in its slot.
            beside: rows of every slot that are not kept, behind all others in the results; not
                for families without :attr:`beside`.
            kernels: the implementation of the operations of ``pallas_kernels``.

        Returns:
            hidden_TD after the final norm, feature_TFD, and the cache with the rows written. Rows
            of padding hold garbage.
        """

    def leave(self, target: TargetParams, x_XD: jax.Array, cfg: Any) -> jax.Array:
        """The final norm of residual streams."""

    @property
    def beside(self) -> ReadBeside | None:
        """Reads rows that leave no trace; None where a family cannot."""
