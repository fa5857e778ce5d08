"""``accept_block``: from the target's logits over drafted blocks to accepted and next tokens; and
``sample_tokens``, a draw from the logits of single rows, which is one of its readings.

The logits are read once for the numbers of each row (maximum, normaliser, argmax), and one row of
each request a second time for its next token; coupled and greedy acceptance read all rows once. No
law is written out. Draft logits are read and not computed again from the drafter's factors: a logit
is four bytes, for which a GPU of 300 FLOP a byte does 600 multiplications, and hidden state and
Markov factor of most drafters are longer.

Axes: B requests, G slots of a block, T rows, V target vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.accept_block import rule as rules
from pallas_kernels.accept_block import xla
from pallas_kernels.accept_block.rule import (
    ONE_HOT,
    Acceptance,
    Drafts,
    OneHot,
    Passes,
    Requests,
    Rule,
    VerifyPlan,
)

__all__ = [
    "ONE_HOT",
    "Acceptance",
    "Drafts",
    "OneHot",
    "Requests",
    "Rule",
    "VerifyPlan",
    "accept_block",
    "sample_tokens",
]


def accept_block(
    logits_TV: jax.Array,
    floor_T: jax.Array,
    plan: VerifyPlan,
    drafts: Drafts,
    requests: Requests,
    *,
    rule: Rule = "rejection",
    axis_name: str | None = None,
    implementation: str = "xla",
) -> Acceptance:
    """Which drafts stand, and the target's next token after them.

    Args:
        logits_TV: the target's over the flat rows, bfloat16 or float32; -inf forbids a token.
        floor_T: float32, the least logit of each row that top-k, top-p and min-p keep; -inf keeps
            all.
        plan: which row is whose.
        drafts: the blocks; G = 0 is plain decoding. Rejection needs their logits, or that their
            laws are one-hot.
        requests: temperatures, keys and positions.
        rule: "rejection" or "coupled", where requests of temperature 0 take part and are greedy;
            "greedy" takes all temperatures for 0 and draws nothing.
        axis_name: inside ``jax.shard_map``, the mesh axis that V is split over in equal parts. The
            draft logits are split alike, or whole where the draft vocabulary is reduced. Numbers of
            rows cross the mesh, logits never do.
        implementation: "xla" or "mosaic_gpu".

    Returns:
        The same tokens from every implementation on the same logits, but for rounding.

    Raises:
        ValueError: shapes do not belong together, or there is no such rule or implementation.
        RuntimeError: the implementation does not run on this jax or this device.
    """
    _check(logits_TV, floor_T, plan, drafts, requests, rule)
    passes = _passes(implementation)
    return rules.accept_block(logits_TV, floor_T, plan, drafts, requests, rule, passes, axis_name)


def sample_tokens(
    logits_TV: jax.Array,
    temperature_T: jax.Array,
    key_T2: jax.Array | None,
    id_V: jax.Array | None = None,
    *,
    axis_name: str | None = None,
    implementation: str = "xla",
) -> jax.Array:
    """A token of each row: argmax(logits / temperature + noise), in one reading.

    Args:
        logits_TV: of the law that is drawn from, bfloat16 or float32; -inf forbids a token.
        temperature_T: float32, 0 is greedy.
        key_T2: uint32 keys of the noise; None where all rows are greedy.
        id_V: int32 places of the tokens in the field of the noise, which XLA alone knows how to
            read; None for their own.
        axis_name: inside ``jax.shard_map``, the mesh axis that V and ``id_V`` are split over in
            equal parts; one number of each row and shard crosses the mesh.
        implementation: "xla" or "mosaic_gpu".

    Returns:
        int32 [T], the same from every implementation but for rounding.

    Raises:
        ValueError: there is no such implementation.
        RuntimeError: the implementation does not run on this jax or this device.
    """
    floor_T = jnp.full(len(logits_TV), -jnp.inf)
    batch = rules.Batch(logits_TV, temperature_T, floor_T, axis_name)
    passes = _passes(implementation)
    if id_V is None:
        return rules.sample(batch, key_T2, passes).token_T
    return rules.sample(batch, key_T2, _passes("xla"), id_V=id_V).token_T


def _passes(implementation: str) -> Passes:
    dispatch.require(implementation)
    if implementation == "xla":
        return Passes(xla.statistics, xla.draw, xla.sample, xla.sample_rest)
    from pallas_kernels.accept_block import mosaic_gpu  # which older releases of jax lack

    kernels = mosaic_gpu.statistics, mosaic_gpu.draw, mosaic_gpu.sample, mosaic_gpu.sample_rest
    return Passes(*kernels)


def _check(
    logits_TV: jax.Array,
    floor_T: jax.Array,
    plan: VerifyPlan,
    drafts: Drafts,
    requests: Requests,
    rule: Rule,
) -> None:
    if rule not in ("greedy", "rejection", "coupled"):
        raise ValueError(f"rule is {rule!r}: choose greedy, rejection or coupled")
    num_rows, num_tokens = logits_TV.shape
    num_requests, num_slots = drafts.index_BG.shape
    shapes = {
        "floor_T": (floor_T, (num_rows,)),
        "slot_T": (plan.slot_T, (num_rows,)),
        "column_T": (plan.column_T, (num_rows,)),
        "row_BC": (plan.row_BC, (num_requests, num_slots + 1)),
        "length_B": (plan.length_B, (num_requests,)),
        "temperature_B": (requests.temperature_B, (num_requests,)),
        "key_B2": (requests.key_B2, (num_requests, 2)),
        "anchor_position_B": (requests.anchor_position_B, (num_requests,)),
    }
    if rule == "rejection" and num_slots:
        if drafts.logits_BGU is None:
            raise ValueError("rejection weighs both laws: give the drafts' logits_BGU or ONE_HOT")
        if not isinstance(drafts.logits_BGU, OneHot):
            num_drafted = num_tokens if drafts.d2t_U is None else drafts.d2t_U.shape[0]
            shapes["logits_BGU"] = drafts.logits_BGU, (num_requests, num_slots, num_drafted)
    for name, (array, shape) in shapes.items():
        if array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}: give {shape}")
