"""How much memory an engine needs beside the weights, and what fits into a given amount."""

from __future__ import annotations

from dataclasses import replace

import jax

from dspark_jax.engine.config import EngineConfig, Ladder, make_ladder
from dspark_jax.engine.decoder import Decoder, state_config, without_drafter
from dspark_jax.engine.kernels import choose_kernels
from dspark_jax.engine.pages import pages_for
from dspark_jax.engine.pool import plan_pool, pool_bytes
from dspark_jax.engine.programs import num_shards
from dspark_jax.engine.state import declare_state, without_pages
from dspark_jax.scheduler.policy import make_policy
from pallas_kernels.ragged_attention.pages import PAGE

LOGIT_COPIES = 3  # logits, and two numbers for each that XLA may write down on the way
SHARE = 0.9  # of the free memory of a GPU that an engine takes: what programs need is not known


def complete(decoder: Decoder, config: EngineConfig) -> EngineConfig:
    """A configuration with what it leaves open: which kernels, rows of a chunk, how many pages.

    Args:
        decoder: models and mesh.
        config: a complete one stays as it is.

    Raises:
        ValueError: the kernels that are asked for do not run here, the longest request does not fit
            into the pages, or they do not divide over the data shards.
    """
    chunk_rows = config.chunk_rows or (32 if jax.default_backend() == "cpu" else 256)
    kernels = choose_kernels(decoder, config.kernels, config.position_buckets)
    paged = bool(config.pages) or kernels == "mosaic_gpu"
    paged = paged if config.paged is None else config.paged
    config = replace(config, chunk_rows=chunk_rows, paged=paged, kernels=kernels)
    if not paged:
        return config
    policy, shards = make_policy(config.policy, decoder.drafter), num_shards(decoder.mesh)
    if policy.kind == "none":
        decoder = without_drafter(decoder)
    ladder = make_ladder(replace(config, pages=shards), policy, shards)
    longest = pages_for(ladder.positions[-1]) * shards
    pages = config.pages or min(
        longest * ladder.slots[-1], _pages_in_memory(decoder, config, ladder)
    )
    if pages % shards or pages < longest:
        raise ValueError(
            f"there are {pages} pages of {PAGE} positions (pages is {config.pages}, memory_bytes "
            f"{config.memory_bytes}): give a multiple of the {shards} data shards that holds the "
            f"longest request, at least {longest}, or fewer positions"
        )
    return replace(config, pages=pages)


def _pages_in_memory(decoder: Decoder, config: EngineConfig, ladder: Ladder) -> int:
    """How many pages fit into what the configuration allows, or a GPU has left."""
    shards = num_shards(decoder.mesh)
    limit = config.memory_bytes
    if not limit:
        devices = jax.devices() if decoder.mesh is None else decoder.mesh.devices.reshape(-1)
        count = 1 if decoder.mesh is None else decoder.mesh.size
        own = (device for device in devices if device.process_index == jax.process_index())
        found = next(own).memory_stats()
        if not found or "bytes_limit" not in found:
            return 2**31 - 1  # a CPU does not say
        limit = int(SHARE * count * (found["bytes_limit"] - found["bytes_in_use"]))
    one, two = (
        engine_bytes(decoder, replace(config, pages=count * shards), ladder) for count in (1, 2)
    )
    if one == two:
        return 2**31 - 1  # no cache lies in pages
    return (shards * (limit - one) // (two - one) + shards) // shards * shards


def engine_bytes(decoder: Decoder, config: EngineConfig, ladder: Ladder) -> int:
    """Bytes beside the weights, over all devices: the largest state, the one that it grew from
    without its pages, which do not move, the logits of the largest round, and stored prefixes."""
    shards = num_shards(decoder.mesh)

    def state_bytes(slots: int, positions: int, pages: bool = True) -> int:
        declared = declare_state(state_config(decoder, slots * shards, positions, config))
        declared = declared if pages else without_pages(declared)
        return sum(buffer.nbytes for buffer in jax.tree.leaves(declared))

    slots, positions = ladder.slots[-1], ladder.positions[-1]
    smaller = [state_bytes(size, positions, False) for size in ladder.slots[-2:-1]]
    smaller += [state_bytes(slots, size, False) for size in ladder.positions[-2:-1]]
    rows = (ladder.drafted_rows(slots, 0) or (slots,))[-1] * shards
    logits = LOGIT_COPIES * rows * decoder.target.vocab_size * 4
    form = state_config(decoder, slots * shards, positions, config)
    pool = plan_pool(form, config.prefix_bytes, shards)
    stored = 0 if pool is None else pool_bytes(pool)
    return state_bytes(slots, positions) + max(smaller, default=0) + logits + stored


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
    """The most slots that fit into ``config.memory_bytes`` with room for ``config.positions`` each;
    0 for none.

    Args:
        decoder: models and mesh.
        config: whose ``slots`` and ``slot_buckets`` are not read.
    """
    policy, shards = make_policy(config.policy, decoder.drafter), num_shards(decoder.mesh)

    def fits(per_shard: int) -> bool:
        asked = replace(config, slots=per_shard * shards, slot_buckets=(), pages=0)
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
