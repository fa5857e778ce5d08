"""What the scheduler and a round are told of the requests' confidences, and what those meant."""

from __future__ import annotations

from collections.abc import Collection, Set

import numpy as np

from dspark_jax.engine.seats import Tenant
from dspark_jax.scheduler.budget import RoundCosts
from dspark_jax.scheduler.choice import Seat
from dspark_jax.scheduler.history import History, Kind, Promise
from dspark_jax.scheduler.shape import Shape


def seats_of(
    history: History, tenants: Collection[Tenant], drafted: Set[Tenant], num_slots: int
) -> list[Seat]:
    """Everybody who decodes, as the scheduler sees it.

    Args:
        history: of the confidences.
        tenants: of all data shards.
        drafted: those of them who can draft.
        num_slots: of a data shard.
    """
    temperatures = _temperatures(history, tenants)
    return [
        Seat(
            tenant.slot // num_slots,
            tenant in drafted,
            temperatures[tenant.kind],
            history.logits.get(tenant.generation),
            tenant.generation in history.fresh,
            history.promises.get(tenant.kind, Promise()).kept,
        )
        for tenant in tenants
        if tenant.decoding
    ]


def predicted_s(costs: RoundCosts | None, shape: Shape, num_shards: int) -> float:
    """Seconds of a round by what it was chosen from; 0 where that says nothing of it, as of one
    that reads prompts."""
    if costs is None or shape.num_chunks:
        return 0.0
    return costs.round_s(shape.num_rows * num_shards if shape.num_draft else 0)


def temperatures_of(
    history: History, tenants: Collection[Tenant], num_slots: int, block_size: int
) -> np.ndarray:
    """float32: of everybody's confidences, over ``num_slots`` slots of all data shards."""
    temperatures = _temperatures(history, tenants)
    temperature_BG = np.ones((num_slots, block_size), np.float32)
    for tenant in tenants:
        temperature_BG[tenant.slot] = temperatures[tenant.kind]
    return temperature_BG


def _temperatures(history: History, tenants: Collection[Tenant]) -> dict[Kind, np.ndarray]:
    """float32 [G]: of the confidences of each kind of requests."""
    return {kind: history.temperature_G(kind) for kind in {tenant.kind for tenant in tenants}}
