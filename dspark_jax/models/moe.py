"""Mixtures of experts, at the cost of the experts that are used.

The (token, expert) pairs of a pass are sorted by expert and cut into tiles of rows that share one.
A loop over as many tiles as there are multiplies each with its expert's weights, which are read
where they lie: an expert that nobody chose costs nothing. On a mesh with an ``expert`` axis every
device does so for its own experts, and the results are added.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from dspark_jax.axes import MESH_RULES, Param, declare
from dspark_jax.models.layers import gated, matmul
from dspark_jax.models.quantised import split
from dspark_jax.models.stacks import Whole
from pallas_kernels import devices

MAX_TILE = 64  # rows


@struct.dataclass
class Experts(Whole):
    """Weights of the experts of one layer, or of several with the one that is meant.

    Attributes:
        gate_EDM, up_EDM, down_EMD: with a leading L where layers are stacked.
        layer: int32, place in the stack; None where there is no L.
    """

    gate_EDM: Any
    up_EDM: Any
    down_EMD: Any
    layer: Any = None

    def at(self, index: jax.Array) -> Experts:
        """The layer at this place of the stack."""
        return self.replace(layer=index)  # type: ignore[attr-defined]


def declare_experts(
    sizes: Mapping[str, int],
    prefix: str,
    layers: range,
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Experts:
    """Declaration of the experts of some layers, stacked on L.

    Args:
        sizes: axis letter -> size; M is the width of an expert.
        prefix: of the names before ``.{expert}.gate_proj.weight``.
        layers: which ones.
        names: of gate, up and down.
    """

    def param(axes: str, name: str, out: str) -> Param:
        return declare("LE" + axes, sizes, f"{prefix}.{{expert}}.{name}", out=out, layers=layers)

    gate, up, down = (f"{name}.weight" for name in names)
    return Experts(param("DM", gate, "M"), param("DM", up, "M"), param("MD", down, "D"))


def choose_experts(
    router_logits_XE: jax.Array, num_chosen: int, *, normalise: bool
) -> tuple[jax.Array, jax.Array]:
    """The best experts of every row by a softmax over all of them.

    Args:
        router_logits_XE: of the router.
        num_chosen: k, experts of a row.
        normalise: whether their weights shall add up to 1.

    Returns:
        int32 experts [X, k] and their float32 weights.
    """
    weight_XE = jax.nn.softmax(router_logits_XE.astype(jnp.float32), axis=-1)
    weight_XC, expert_XC = jax.lax.top_k(weight_XE, num_chosen)
    if normalise:
        weight_XC = weight_XC / weight_XC.sum(-1, keepdims=True)
    return expert_XC.astype(jnp.int32), weight_XC


def mix_experts(
    experts: Experts,
    x_XD: jax.Array,
    expert_XC: jax.Array,
    weight_XC: jax.Array,
    activation: Callable[[jax.Array], jax.Array],
    limit: float | None = None,
) -> jax.Array:
    """``sum_c weight[c] * expert[c](x)`` of every row, for gated experts.

    Args:
        experts: weights.
        x_XD: inputs.
        expert_XC: int32 experts of every row.
        weight_XC: their weights.
        activation: of the gate.
        limit: as in :func:`~dspark_jax.models.layers.gated`.

    Returns:
        [X, D] in the dtype of ``x_XD``; summed in float32.
    """
    free = devices.free_axes()
    combine = functools.partial(gated, activation=activation, limit=limit)
    if math.prod(free.values()) == 1:
        return _mix(experts, x_XD, expert_XC, weight_XC, combine=combine)
    if experts.layer is not None:  # or all layers would be gathered
        parts = experts.gate_EDM, experts.up_EDM, experts.down_EMD
        experts = Experts(*(part[experts.layer] for part in parts))
    num_experts, _, width = experts.gate_EDM.shape
    by_expert = devices.split_over(MESH_RULES["E"], num_experts)
    by_width = devices.split_over(MESH_RULES["M"], width)
    # Whole sequences are split over their first axis; rows of a batch are everywhere.
    rows = P(devices.split_over(MESH_RULES["B"], len(x_XD)) if x_XD.ndim > 2 else None)
    gate, up = (
        split(part, by_expert, None, by_width) for part in (experts.gate_EDM, experts.up_EDM)
    )
    down = split(experts.down_EMD, by_expert, by_width, None)
    mix = functools.partial(
        _mix,
        combine=combine,
        by_expert=by_expert,
        summed=(by_expert or ()) + (by_width or ()),
    )
    sharded = jax.shard_map(
        mix,
        in_specs=(Experts(gate, up, down), rows, rows, rows),
        out_specs=rows,
        axis_names=set(free),
        check_vma=False,
    )
    mixed_XD: jax.Array = sharded(experts, x_XD, expert_XC, weight_XC)
    return mixed_XD


def _mix(
    experts: Experts,
    x_XD: jax.Array,
    expert_XC: jax.Array,
    weight_XC: jax.Array,
    *,
    combine: Callable[[jax.Array, jax.Array], jax.Array],
    by_expert: tuple[str, ...] | None = None,
    summed: tuple[str, ...] = (),
) -> jax.Array:
    """The same by one device, whose experts and widths are some of all on mesh axes."""
    x_TD = x_XD.reshape(-1, x_XD.shape[-1])
    expert_TC = expert_XC.reshape(len(x_TD), -1)
    weight_TC = weight_XC.reshape(expert_TC.shape).astype(jnp.float32)
    num_experts, num_pairs = experts.gate_EDM.shape[-3], expert_TC.size
    first = jax.lax.axis_index(by_expert) * num_experts if by_expert else 0
    own_A = (expert_TC - first).reshape(-1)
    own_A = jnp.where((own_A >= 0) & (own_A < num_experts), own_A, num_experts)
    tile = min(MAX_TILE, 1 << max(0, (num_pairs - 1) // num_experts).bit_length())

    order_A = jnp.argsort(own_A, stable=True)
    count_E = jnp.bincount(own_A, length=num_experts + 1)[:num_experts]
    first_E = jnp.cumsum(count_E) - count_E
    tiles_E = -(-count_E // tile)
    end_E = jnp.cumsum(tiles_E)

    def one_tile(index: jax.Array, out_TD: jax.Array) -> jax.Array:
        expert = (end_E <= index).sum()  # a binary search is a loop, of dozens of launches on a GPU
        place_R = (index - end_E[expert] + tiles_E[expert]) * tile + jnp.arange(tile)
        real_R = place_R < count_E[expert]
        pair_R = order_A.at[first_E[expert] + place_R].get(mode="clip")
        row_R = jnp.where(real_R, pair_R // expert_TC.shape[1], len(x_TD))
        x_RD = x_TD.at[row_R].get(mode="fill", fill_value=0)

        def product(rows: jax.Array, weights: jax.Array) -> jax.Array:
            where = (expert,) if experts.layer is None else (experts.layer, expert)
            return matmul(rows, weights[where])

        gated_RM = combine(product(x_RD, experts.gate_EDM), product(x_RD, experts.up_EDM))
        result_RD = product(gated_RM, experts.down_EMD).astype(jnp.float32)
        result_RD = result_RD * weight_TC.reshape(-1)[pair_R][:, None]
        return out_TD.at[row_R].add(result_RD, mode="drop")

    start_TD = jnp.zeros(x_TD.shape, jnp.float32)
    out_TD = jax.lax.fori_loop(0, end_E[-1], one_tile, start_TD)
    out_TD = jax.lax.psum(out_TD, summed) if summed else out_TD
    return out_TD.astype(x_XD.dtype).reshape(x_XD.shape)
