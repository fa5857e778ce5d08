"""Mixtures of experts, at the cost of the experts that are used.

The (token, expert) pairs of a pass are sorted by expert and cut into tiles of rows that share one.
A loop over as many tiles as there are multiplies each with its expert's weights, which are read
where they lie: an expert that nobody chose costs nothing, in a gradient either. On a mesh with an
``expert`` axis every device does so for its own experts, and the results are added.
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

# (gate_XM, up_XM) -> what the last matrix multiplies.
Combine = Callable[[jax.Array, jax.Array], jax.Array]


@struct.dataclass
class Experts(Whole):
    """Weights of the experts of one layer, or of several with the one that is meant.

    Attributes:
        gate_EDM: with a leading L where layers are stacked.
        up_EDM: likewise.
        down_EMD: likewise.
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


@struct.dataclass
class _Tiles:
    """The (token, expert) pairs A of a pass, in tiles of rows with one expert.

    Attributes:
        order_A: int32 pairs by their experts.
        count_E: int32 pairs of every expert.
        first_E: those before them.
        end_E: tiles up to its own.
        per_row: experts of a row.
        size: rows of a tile.
    """

    order_A: jax.Array
    count_E: jax.Array
    first_E: jax.Array
    end_E: jax.Array
    per_row: int = struct.field(pytree_node=False)
    size: int = struct.field(pytree_node=False)

    def at(self, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The expert of a tile, its pairs, and their rows, out of bounds where there are none."""
        # A binary search is a loop, of dozens of launches on a GPU.
        expert = (self.end_E <= index).sum()
        tiles = -(-self.count_E[expert] // self.size)
        place_R = (index - self.end_E[expert] + tiles) * self.size + jnp.arange(self.size)
        pair_R = self.order_A.at[self.first_E[expert] + place_R].get(mode="clip")
        real_R = place_R < self.count_E[expert]
        return expert, pair_R, jnp.where(real_R, pair_R // self.per_row, len(self.order_A))


def _cut(expert_TC: jax.Array, first: Any, num_experts: int) -> _Tiles:
    """The tiles of some of all experts."""
    own_A = (expert_TC - first).reshape(-1)
    own_A = jnp.where((own_A >= 0) & (own_A < num_experts), own_A, num_experts)
    size = min(MAX_TILE, 1 << max(0, (own_A.size - 1) // num_experts).bit_length())
    count_E = jnp.bincount(own_A, length=num_experts + 1)[:num_experts]
    order_A = jnp.argsort(own_A, stable=True)
    first_E, end_E = jnp.cumsum(count_E) - count_E, jnp.cumsum(-(-count_E // size))
    return _Tiles(order_A, count_E, first_E, end_E, expert_TC.shape[1], size)


def _mix(
    experts: Experts,
    x_XD: jax.Array,
    expert_XC: jax.Array,
    weight_XC: jax.Array,
    *,
    combine: Combine,
    by_expert: tuple[str, ...] | None = None,
    summed: tuple[str, ...] = (),
) -> jax.Array:
    """The same by one device, whose experts and widths are some of all on mesh axes."""
    x_TD = x_XD.reshape(-1, x_XD.shape[-1])
    expert_TC = expert_XC.reshape(len(x_TD), -1)
    weight_A = weight_XC.reshape(-1).astype(jnp.float32)
    num_experts = experts.gate_EDM.shape[-3]
    first = jax.lax.axis_index(by_expert) * num_experts if by_expert else 0
    tiles = _cut(expert_TC, first, num_experts)
    weights = experts.gate_EDM, experts.up_EDM, experts.down_EMD
    out_TD = _sum_tiles(combine, weights, x_TD, weight_A, experts.layer, tiles)
    out_TD = jax.lax.psum(out_TD, summed) if summed else out_TD
    return out_TD.astype(x_XD.dtype).reshape(x_XD.shape)


def _expert(combine: Combine, weights: Any, x_RD: jax.Array, weight_R: jax.Array) -> jax.Array:
    """One expert's part of its rows, float32 [R, D]."""
    gate_DM, up_DM, down_MD = weights
    gated_RM = combine(matmul(x_RD, gate_DM), matmul(x_RD, up_DM))
    return matmul(gated_RM, down_MD).astype(jnp.float32) * weight_R[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum_tiles(
    combine: Combine,
    weights: Any,
    x_TD: jax.Array,
    weight_A: jax.Array,
    layer: jax.Array | None,
    tiles: _Tiles,
) -> jax.Array:
    """The sum of all experts' parts, float32 [T, D].

    As many tiles as there are is not a number that a gradient can be taken through: its loop is one
    of its own, which computes every tile again.
    """

    def one_tile(index: jax.Array, out_TD: jax.Array) -> jax.Array:
        expert, pair_R, row_R = tiles.at(index)
        x_RD = x_TD.at[row_R].get(mode="fill", fill_value=0)
        of_expert = [part[_place(layer, expert)] for part in weights]
        result_RD = _expert(combine, of_expert, x_RD, weight_A[pair_R])
        return out_TD.at[row_R].add(result_RD, mode="drop")

    return jax.lax.fori_loop(0, tiles.end_E[-1], one_tile, jnp.zeros(x_TD.shape, jnp.float32))


def _place(layer: jax.Array | None, expert: jax.Array) -> tuple[jax.Array, ...]:
    return (expert,) if layer is None else (layer, expert)


def _sum_tiles_forward(combine: Combine, *given: Any) -> tuple[jax.Array, Any]:
    return _sum_tiles(combine, *given), given


def _sum_tiles_backward(combine: Combine, given: Any, slope_TD: jax.Array) -> tuple[Any, ...]:
    weights, x_TD, weight_A, layer, tiles = given

    def one_tile(index: jax.Array, slopes: Any) -> Any:
        of_weights, of_x_TD, of_weight_A = slopes
        expert, pair_R, row_R = tiles.at(index)
        place = _place(layer, expert)
        x_RD = x_TD.at[row_R].get(mode="fill", fill_value=0)
        of_expert = [part[place] for part in weights]
        part = functools.partial(_expert, combine)
        _, pull = jax.vjp(part, of_expert, x_RD, weight_A[pair_R])
        more, more_RD, more_R = pull(slope_TD.at[row_R].get(mode="fill", fill_value=0))
        of_weights = [all_.at[place].add(one) for all_, one in zip(of_weights, more, strict=True)]
        return (
            of_weights,
            of_x_TD.at[row_R].add(more_RD, mode="drop"),
            of_weight_A.at[pair_R].add(more_R),
        )

    nothing = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, jnp.float32), (list(weights), x_TD, weight_A)
    )
    found = jax.lax.fori_loop(0, tiles.end_E[-1], one_tile, nothing)
    slopes = jax.tree.map(lambda slope, leaf: slope.astype(leaf.dtype), found, (
        list(weights), x_TD, weight_A
    ))  # fmt: skip
    return tuple(slopes[0]), *slopes[1:], None, None


_sum_tiles.defvjp(_sum_tiles_forward, _sum_tiles_backward)
