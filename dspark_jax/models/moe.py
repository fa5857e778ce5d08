"""Mixtures of experts, at the cost of the experts that are used.

The (token, expert) pairs of a pass are sorted by expert and cut into tiles of rows that share one.
A loop over as many tiles as there are multiplies each with its expert's weights, which are read
where they lie: an expert that nobody chose costs nothing. On a mesh with an ``expert`` axis every
device does so for its own experts, and the results are added.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec as P

from dspark_jax.axes import MESH_RULES, Param, declare
from dspark_jax.models.layers import matmul
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


def declare_experts(sizes: Mapping[str, int], prefix: str, layers: range) -> Experts:
    """Declaration of the experts of some layers, stacked on L.

    Args:
        sizes: axis letter -> size; M is the width of an expert.
        prefix: of the names before ``.{expert}.gate_proj.weight``.
        layers: which ones.
    """

    def param(axes: str, name: str, out: str) -> Param:
        return declare("LE" + axes, sizes, f"{prefix}.{{expert}}.{name}", out=out, layers=layers)

    return Experts(
        param("DM", "gate_proj.weight", "M"),
        param("DM", "up_proj.weight", "M"),
        param("MD", "down_proj.weight", "D"),
    )


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
) -> jax.Array:
    """``sum_c weight[c] * expert[c](x)`` of every row, for gated experts.

    Args:
        experts: weights.
        x_XD: inputs.
        expert_XC: int32 experts of every row.
        weight_XC: their weights.
        activation: of the gate.

    Returns:
        [X, D] in the dtype of ``x_XD``; summed in float32.
    """
    rows = x_XD.reshape(-1, x_XD.shape[-1])
    chosen, weight = (a.reshape(len(rows), -1) for a in (expert_XC, weight_XC.astype(jnp.float32)))
    (axis,) = MESH_RULES["E"]
    num_experts = experts.gate_EDM.shape[-3]
    split = devices.split_over([axis], num_experts) if axis in devices.free_axes() else None
    mix = functools.partial(_mix, activation=activation, axis=axis if split else None)
    if split:
        lead = (None,) if experts.layer is not None else ()
        by_expert: Any = Experts(*(P(*lead, split),) * 3, None if experts.layer is None else P())
        mix = jax.shard_map(
            mix,
            in_specs=(by_expert, P(), P(), P()),
            out_specs=P(),
            axis_names={axis},
            check_vma=False,
        )
    return mix(experts, rows, chosen, weight).astype(x_XD.dtype).reshape(x_XD.shape)


def _mix(
    experts: Experts,
    x_TD: jax.Array,
    expert_TC: jax.Array,
    weight_TC: jax.Array,
    *,
    activation: Callable[[jax.Array], jax.Array],
    axis: str | None,
) -> jax.Array:
    """float32 [T, D] of these experts, which are some of all on a mesh axis."""
    num_experts, num_pairs = experts.gate_EDM.shape[-3], expert_TC.size
    first = 0 if axis is None else jax.lax.axis_index(axis) * num_experts
    own_A = (expert_TC - first).reshape(-1)
    own_A = jnp.where((own_A >= 0) & (own_A < num_experts), own_A, num_experts)
    tile = min(MAX_TILE, 1 << max(0, (num_pairs - 1) // num_experts).bit_length())

    order_A = jnp.argsort(own_A, stable=True)
    count_E = jnp.bincount(own_A, length=num_experts + 1)[:num_experts]
    first_E = jnp.cumsum(count_E) - count_E
    tiles_E = -(-count_E // tile)
    end_E = jnp.cumsum(tiles_E)

    def one_tile(index: jax.Array, out_TD: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(end_E, index, side="right")
        place_R = (index - end_E[expert] + tiles_E[expert]) * tile + jnp.arange(tile)
        real_R = place_R < count_E[expert]
        pair_R = order_A.at[first_E[expert] + place_R].get(mode="clip")
        row_R = jnp.where(real_R, pair_R // expert_TC.shape[1], len(x_TD))
        x_RD = x_TD.at[row_R].get(mode="fill", fill_value=0)

        def product(rows: jax.Array, weights: jax.Array) -> jax.Array:
            where = (expert,) if experts.layer is None else (experts.layer, expert)
            return matmul(rows, weights[where])

        gated_RM = activation(product(x_RD, experts.gate_EDM)) * product(x_RD, experts.up_EDM)
        result_RD = product(gated_RM, experts.down_EMD).astype(jnp.float32)
        result_RD = result_RD * weight_TC.reshape(-1)[pair_R][:, None]
        return out_TD.at[row_R].add(result_RD, mode="drop")

    start_TD = jnp.zeros(x_TD.shape, jnp.float32)
    out_TD = jax.lax.fori_loop(0, end_E[-1], one_tile, start_TD)
    return out_TD if axis is None else jax.lax.psum(out_TD, axis)
