"""What a family of drafters is: a module with a configuration of its own and these functions.

The engine and the trainer know nothing else of a drafter: :mod:`.table` finds the module by the
class of a configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
from flax import struct

from dspark_jax.config import TargetConfig
from dspark_jax.drafting import AnyDrafterConfig
from dspark_jax.models.cache import Room, Rows
from dspark_jax.models.drafters.heads import DraftBlock
from dspark_jax.models.stacks import Sections
from dspark_jax.models.targets.family import TargetParams
from dspark_jax.models.vocab import Vocab

# (logits_BU, slot) -> index_B int32, the draw from the law that will be verified against; and
# (logits_BU, slot) -> logits_BU, that law.
Choose = Callable[[jax.Array, int], jax.Array]
Law = Callable[[jax.Array, int], jax.Array]


@struct.dataclass
class BlockOutputs:
    """What a drafter says of the blocks that it is trained on, short of the logits.

    Attributes:
        hidden_BAGD: what the LM head reads.
        code_BAGR: factors of the sequential head's bias, or None.
        confidence_logit_BAG: float32, or None.
    """

    hidden_BAGD: jax.Array
    code_BAGR: Any
    confidence_logit_BAG: Any


# What a drafter is taught: blocks behind random anchors, towards the tokens that follow them; or
# chains behind every position of a text, towards the target's distributions along it.
Lessons = Literal["blocks", "chains"]


# What of the target a drafter reads: residual streams after layers; the last state, normalised; or
# its cache and weights while it drafts, the last state, and residual streams where it is trained.
Reads = Literal["streams", "state", "cache"]


@struct.dataclass
class Borrowed:
    """The context of a drafter that reads a target's cache, while it drafts.

    Attributes:
        own: the drafter's own context.
        target: the target's weights.
        cache: the target's cache, valid before the anchors.
        cfg: sizes of the target, static.
    """

    own: Any
    target: TargetParams
    cache: Any
    cfg: TargetConfig = struct.field(pytree_node=False)


def only_values(cfg: AnyDrafterConfig, what: str, **right: Any) -> None:
    """Check fields that a kind of drafter has no choice for.

    Raises:
        ValueError: names the first that is not right.
    """
    for name, value in right.items():
        found = getattr(cfg, name)
        if found != value:
            raise ValueError(f"{name} is {found!r}: of {what} it must be {value!r}")


class TrainBlocks(Protocol):
    """A drafter over all blocks of a batch of whole sequences."""

    def __call__(
        self,
        drafter: Any,
        vocab: Vocab,
        feature_BSFD: jax.Array,
        token_BS: jax.Array,
        previous_BAG: jax.Array,
        anchor_BA: jax.Array,
        keep_BA: jax.Array,
        cfg: Any,
        *,
        kernels: str,
    ) -> BlockOutputs:
        """What it says where it is told the true tokens.

        Args:
            drafter: weights, layers stacked; its ``head`` is the sequential head.
            vocab: the drafter's vocabulary.
            feature_BSFD: the target's features.
            token_BS: int32 the sequences.
            previous_BAG: int32 true tokens before each slot's prediction, the anchor first.
            anchor_BA: int32 positions of the anchors.
            keep_BA: False marks a dummy block.
            cfg: sizes.
            kernels: the implementation of the operations of ``pallas_kernels``.
        """


class DrafterFamily(Protocol):
    """The functions of a family; ``cfg`` is always of its ``Config``, ``drafter`` its weights."""

    @property
    def Config(self) -> type[AnyDrafterConfig]:
        """The family's frozen configuration, by whose class its module is found."""

    def declare_drafter(self, cfg: Any) -> Any:
        """Declaration of every trainable parameter under its name in the family's own layout."""

    def declare_context(self, cfg: Any, room: Room) -> Any:
        """Declaration of what is kept of what the target has read, as for
        :meth:`~dspark_jax.models.targets.family.TargetFamily.declare_cache`."""

    def sections(self, cfg: Any) -> Sections:
        """The layers whose attention is that of ``ragged_attention``, by their kinds, which all
        have an ``attention``."""

    def for_decoding(self, drafter: Any, *, donate: bool) -> Any:
        """Weights on their devices in the form for decoding; ``donate`` as in
        :func:`~dspark_jax.models.merged.single_layers`."""

    def observe(
        self,
        drafter: Any,
        vocab: Vocab,
        context: Any,
        rows: Rows,
        feature_TFD: jax.Array,
        token_BS: jax.Array,
        length_B: jax.Array,
        cfg: Any,
        *,
        kernels: str = ...,
    ) -> Any:
        """The context with what the target has read in a round.

        Args:
            drafter: weights, in the form for decoding.
            vocab: the drafter's vocabulary.
            context: donated.
            rows: all rows of the target's pass; those of padding are dropped.
            feature_TFD: the target's features of these rows, and behind them of those of a window
                (:func:`~.table.window_of`) where one was read.
            token_BS: int32 committed tokens after the round.
            length_B: int32 how many they are, the anchor included. Rows at ``length - 1`` and
                behind are of rejected drafts: garbage, which the next round overwrites.
            cfg: sizes.
            kernels: the implementation of the operations of ``pallas_kernels``.
        """

    def draft(
        self,
        drafter: Any,
        vocab: Vocab,
        context: Any,
        anchor_B: jax.Array,
        position_B: jax.Array,
        choose: Choose,
        law: Law,
        cfg: Any,
        *,
        kernels: str,
    ) -> DraftBlock:
        """A block behind every anchor.

        Args:
            drafter: weights, in the form for decoding.
            vocab: the drafter's vocabulary.
            context: valid before the anchors; a :class:`Borrowed` where the family reads a
                target's cache.
            anchor_B: int32 anchor tokens.
            position_B: int32 their positions.
            choose: see :data:`Choose`; it is given the logits of ``law``.
            law: see :data:`Law`.
            cfg: sizes.
            kernels: the implementation of the operations of ``pallas_kernels``.
        """

    @property
    def lessons(self) -> Lessons:
        """What it is taught."""

    @property
    def reads(self) -> Reads:
        """What it reads of the target; a state is the one feature there is."""

    @property
    def train_blocks(self) -> TrainBlocks | None:
        """Teacher-forced forward pass; None for drafters that are not trained."""
