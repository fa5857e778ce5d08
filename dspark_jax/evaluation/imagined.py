"""What rounds cost where policies are replayed: on an imagined device, or on a measured one."""

from __future__ import annotations

from dspark_jax.scheduler.budget import RoundCosts
from dspark_jax.scheduler.profile import Profile

TILES = {"smooth": 1, "staircase": 64}  # rows of a tile of the imagined devices
FIXED_S, ROW_S, DRAFT_S = 0.010, 0.0001, 0.0015  # of a round, of each row, of drafting


def imagined_costs(tile: int, num_requests: int, block_size: int) -> RoundCosts:
    """Costs of an imagined device.

    Args:
        tile: rows are computed in whole tiles of so many: 1 is a smooth device with a program for
            every number of rows, more than that a staircase.
        num_requests: decoded together.
        block_size: G.
    """
    most = -(-num_requests * (block_size + 1) // tile) * tile
    fewest = num_requests // tile * tile + tile
    buckets = tuple(range(fewest, most + 1, tile))
    undrafted_rows = -(-num_requests // tile) * tile
    return RoundCosts(
        buckets=buckets,
        verify_s_K=tuple(FIXED_S + ROW_S * rows for rows in buckets),
        draft_s=DRAFT_S,
        undrafted_s=FIXED_S + ROW_S * undrafted_rows,
    )


def profile_costs(profile: Profile, num_requests: int, block_size: int) -> RoundCosts:
    """Costs of a measured device, at the longest caches of its profile.

    Args:
        profile: of an engine with as many slots or more.
        num_requests: decoded together.
        block_size: G.

    Raises:
        ValueError: the profile has too few slots, or is one of other blocks.
    """
    found = [sizes for sizes in profile.draft_s if sizes.slots >= num_requests]
    if not found:
        raise ValueError(
            f"the profile has no drafted rounds of {num_requests} slots: measure another with "
            f"`dspark profile --slots {num_requests}`"
        )
    slots = min(sizes.slots for sizes in found)
    costs = profile.costs(max((s for s in found if s.slots == slots), key=lambda s: s.positions))
    if costs.buckets[-1] != slots * (block_size + 1):
        raise ValueError(
            f"the profile is of blocks of {costs.buckets[-1] // slots - 1} drafts and the record "
            f"of {block_size}: take those of one drafter"
        )
    return costs
