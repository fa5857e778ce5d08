"""How much memory an engine needs beside the weights, and what fits into a given amount."""

from __future__ import annotations

from dataclasses import replace

import jax

from dspark_jax.engine.config import EngineConfig, Ladder, make_ladder
from dspark_jax.engine.decoder import Decoder, state_config
from dspark_jax.engine.programs import num_shards
from dspark_jax.engine.state import declare_state
from dspark_jax.scheduler.policy import make_policy

LOGIT_COPIES = 3  # logits, and two numbers for each that XLA may write down on the way


def engine_bytes(decoder: Decoder, config: EngineConfig, ladder: Ladder) -> int:
    """Bytes beside the weights, over all devices: the largest state, the one that it grew from,
    and the logits of the largest round."""
    shards = num_shards(decoder.mesh)

    def state_bytes(slots: int, positions: int) -> int:
        form = state_config(decoder, slots * shards, positions, config)
        return sum(buffer.nbytes for buffer in jax.tree.leaves(declare_state(form)))

    slots, positions = ladder.slots[-1], ladder.positions[-1]
    smaller = [state_bytes(size, positions) for size in ladder.slots[-2:-1]]
    smaller += [state_bytes(slots, size) for size in ladder.positions[-2:-1]]
    rows = (ladder.drafted_rows(slots, 0) or (slots,))[-1] * shards
    logits = LOGIT_COPIES * rows * decoder.target.vocab_size * 4
    return state_bytes(slots, positions) + max(smaller, default=0) + logits


def check_sizes(decoder: Decoder, config: EngineConfig, ladder: Ladder) -> None:
    """Refuse an engine that does not fit its target or the memory, before anything is allocated.

    Raises:
        ValueError: says how many positions the target has, or how many bytes are needed and how
            many slots would fit.
    """
    if config.positions > decoder.target.max_positions:
        raise ValueError(
            f"positions is {config.positions}, but the target's context ends at "
            f"{decoder.target.max_positions}: give at most that"
        )
    if not config.memory_bytes:
        return
    needed = engine_bytes(decoder, config, ladder)
    if needed > config.memory_bytes:
        slots = plan_slots(decoder, config)
        raise ValueError(
            f"{config.slots} slots of {config.positions} positions need {needed} bytes beside the "
            f"weights and memory_bytes is {config.memory_bytes}: "
            + (f"{slots} slots would fit" if slots else "give fewer positions, or more memory")
        )


def plan_slots(decoder: Decoder, config: EngineConfig) -> int:
    """The most slots of ``config.positions`` that fit into ``config.memory_bytes``; 0 for none.

    Args:
        decoder: models and mesh.
        config: whose ``slots`` and ``slot_buckets`` are not read.
    """
    policy, shards = make_policy(config.policy, decoder.drafter), num_shards(decoder.mesh)

    def fits(per_shard: int) -> bool:
        asked = replace(config, slots=per_shard * shards, slot_buckets=())
        ladder = make_ladder(asked, policy, shards)
        return engine_bytes(decoder, asked, ladder) <= config.memory_bytes

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * shards
