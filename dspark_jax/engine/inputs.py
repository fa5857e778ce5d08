"""What goes into a decoding round and what comes out of it, apart from the state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
from flax import struct

from dspark_jax.config import TargetConfig
from dspark_jax.drafting import AnyDrafterConfig
from dspark_jax.engine.shaping import Masks, Shaping
from dspark_jax.models.drafters.heads import DraftBlock
from dspark_jax.models.targets.family import TargetParams
from dspark_jax.models.vocab import Vocab
from dspark_jax.rules import AcceptanceRule, Rule
from pallas_kernels.dispatch import Implementation

Asks = Literal["any", "greedy", "sampled", "filtered", "shaped"]
# What the host can say of a round; what one does, all behind it do too.
ASKS: tuple[Asks, ...] = ("greedy", "sampled", "filtered", "shaped")


@dataclass(frozen=True)
class RoundConfig:
    """What is static in a round; one program is compiled for each.

    Attributes:
        target: sizes of the target.
        drafter: sizes of the drafter; None decodes plainly.
        num_draft: how many slots of a block may be verified, at most ``block_size``; 0 is a round
            without a draft, which still extends the drafter's context.
        threshold: verify slots up to the first whose confidence lies below; 0 sets no threshold.
        gate: verify nothing of a block whose first confidence lies below; 0 sets no gate. Where
            further drafts cost nothing, as in a program of fixed size, it is the better of the two.
        acceptance: rejection sampling, or coupled by a common noise field, or a rule.
        lengths: a rule for ``policy`` of ``EngineConfig``; None is the product's own.
        draft_law: likewise, for ``draft_law``.
        kernels: the implementation of the operations of ``pallas_kernels``.
        asks: the most that anybody in the round asks for: "greedy" tokens; "sampled" ones, or
            log-probabilities; "filtered" ones; or a "shaped" law, or the likeliest tokens, in a
            round whose drafts are always given. All of it is computed without a condition, for
            which the host of a GPU would have to wait. "any" finds out in the round what but the
            last is asked, which suits a CPU.
    """

    target: TargetConfig
    drafter: AnyDrafterConfig | None
    num_draft: int
    threshold: float = 0.0
    gate: float = 0.0
    acceptance: AcceptanceRule = "rejection"
    lengths: Rule | None = None
    draft_law: Rule | None = None
    kernels: Implementation = "xla"
    asks: Asks = "any"


@struct.dataclass
class Weights:
    """The weights of a round: target, drafter and the drafter's vocabulary (None without one)."""

    target: TargetParams
    drafter: Any = None
    vocab: Vocab | None = None


def replace_weights(old: Weights, new: Weights) -> Weights:
    """New weights where the old ones lie.

    Raises:
        ValueError: shapes, dtypes or structure differ.
    """
    structure: Any = jax.tree.structure(old)
    if structure != jax.tree.structure(new):
        raise ValueError("the new weights have another structure: load the same models")
    placed: Weights = jax.tree.map(_in_place_of, old, new)
    return placed


def _in_place_of(old: jax.Array, new: jax.Array) -> jax.Array:
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        raise ValueError(
            f"the new weights have an array {new.dtype}{list(new.shape)} in the place of "
            f"{old.dtype}{list(old.shape)}: load the same models in the same dtype"
        )
    return jax.device_put(new, old.sharding)


@struct.dataclass
class Chunks:
    """Pieces of prompts that a round reads beside decoding.

    Attributes:
        slot_P: int32 slots; B marks an unused chunk.
        start_P: int32 first positions.
        count_P: int32 positions, at most W.
        last_P: bool, nothing but the anchor is left of the prompt: decoding begins in this round.
    """

    slot_P: jax.Array
    start_P: jax.Array
    count_P: jax.Array
    last_P: jax.Array


@struct.dataclass
class RoundInput:
    """What a round is told, apart from the choice of its program.

    Attributes:
        keep_B: bool, False ends a slot before the round.
        chunks: of prompts; None for a round that only decodes.
        temperature_BG: float32 of the calibration of confidences; None leaves them as they are.
        block: drafts that were made already; None drafts in the round.
        page_BX: int32 pages of every slot, of a state in pages; see
            :class:`~dspark_jax.models.cache.KVCache`.
        shaping: of a round whose law is shaped; None in all others.
        masks: likewise.
    """

    keep_B: jax.Array
    chunks: Chunks | None = None
    temperature_BG: jax.Array | None = None
    block: DraftBlock | None = None
    page_BX: jax.Array | None = None
    shaping: Shaping | None = None
    masks: Masks | None = None


@struct.dataclass
class DraftNews:
    """What the host may read of drafts that are made ahead of their round.

    Attributes:
        token_BG: int32 drafts.
        num_rows_D: int32, one of each data shard: rows of all anchors and the drafts within the
            budget of Algorithm 1, 0 where there is no budget; None where it is not asked.
    """

    token_BG: jax.Array
    num_rows_D: jax.Array | None


@struct.dataclass
class RoundReport:
    """All that the host reads of a round.

    Attributes:
        token_BC: int32 committed tokens of this round, the first ``count_B`` of them.
        count_B: int32 committed tokens: the round's accepted length, 0 for an idle slot.
        accepted_B: int32 accepted drafts.
        verified_B: int32 verified drafts.
        stopped_B: bool, the last committed token is a stop token.
        finite_B: bool, all logits that were read are finite.
        length_B: int32 committed tokens of the request so far, its prompt included.
        generation_B: int32 which request this is about; the host drops reports of others.
        logprob_BC: float32 log-probability of each token under the target's own law, before
            temperature and filters; 0 in a round without.
        draft_BG: int32 tokens of the draft; None without one.
        confidence_logit_BG: float32 of the draft; None without a draft or a confidence head.
        top_id_BCK: int32 the K = 20 likeliest tokens, or all, of the law that logprob_BC is about,
            the best first; None unless the round's law is shaped.
        top_logprob_BCK: float32 of these.
    """

    token_BC: jax.Array
    count_B: jax.Array
    accepted_B: jax.Array
    verified_B: jax.Array
    stopped_B: jax.Array
    finite_B: jax.Array
    length_B: jax.Array
    generation_B: jax.Array
    logprob_BC: jax.Array
    draft_BG: Any
    confidence_logit_BG: Any
    top_id_BCK: Any = None
    top_logprob_BCK: Any = None
