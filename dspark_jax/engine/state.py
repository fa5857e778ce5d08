"""The state of decoding: B slots, their committed tokens, both caches.

``length_B`` is the only truth: ``token_BS[b, :length]`` is committed, the last of it is the anchor,
and both caches are valid below ``length - 1``. Whatever lies behind is garbage by definition:
rejected drafts are never rolled back, they are overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding

from dspark_jax.axes import partition
from dspark_jax.config import DrafterConfig, TargetConfig, TransformerConfig
from dspark_jax.engine.request import Request
from dspark_jax.models import cache as kv
from dspark_jax.sampling import Sampling


@struct.dataclass
class DecodeState:
    """Everything that a round reads and writes.

    Attributes:
        token_BS: int32 committed tokens; garbage behind ``length_B``.
        length_B: int32 committed tokens of each slot, the anchor included.
        stop_at_B: int32 length at which a slot is done.
        active_B: bool.
        stop_id_BK: int32 ids that end a slot, padded with -1.
        key_B2: uint32 key of each request.
        logprobs_B: bool, whether log-probabilities are wanted.
        generation_B: int32 number of the request in the slot; no two requests share one.
        sampling: temperature and filters of each slot.
        target_cache: the target's keys and values.
        context_cache: the drafter's context; None without a drafter.
    """

    token_BS: jax.Array
    length_B: jax.Array
    stop_at_B: jax.Array
    active_B: jax.Array
    stop_id_BK: jax.Array
    key_B2: jax.Array
    logprobs_B: jax.Array
    generation_B: jax.Array
    sampling: Sampling
    target_cache: kv.KVCache
    context_cache: Any


@dataclass(frozen=True)
class StateConfig:
    """The form of a state; one program is compiled for each.

    Attributes:
        target, drafter: sizes; drafter None for plain decoding.
        num_slots: B.
        num_positions: S, room for prompt, new tokens and one block past the limit.
        num_stop_ids: most stop ids of a request.
        dtypes: of the target's and the drafter's cache.
        stacked: whether their layers are stacked.
    """

    target: TargetConfig
    drafter: DrafterConfig | None
    num_slots: int
    num_positions: int
    num_stop_ids: int
    dtypes: tuple[Any, Any]
    stacked: tuple[bool, bool]


def slot_values(request: Request | None, generation: int, cfg: StateConfig) -> dict[str, Any]:
    """What a state holds of a request beside its caches, in numpy; of a free slot for None."""
    token_S = np.zeros(cfg.num_positions, np.int32)
    stop_id_K = np.full(cfg.num_stop_ids, -1, np.int32)
    length = stop_at = 1
    if request is not None:
        length = len(request.prompt_ids)
        stop_at = min(length + request.max_new_tokens, cfg.target.max_positions)
        token_S[:length] = request.prompt_ids
        stop_id_K[: len(request.stop_ids)] = request.stop_ids
    else:
        request = Request((0,), seed=0)
    limits: list[Any] = [np.float32(request.temperature), np.int32(request.top_k)]
    limits += [np.float32(request.top_p), np.float32(request.min_p)]
    return {
        "token_BS": token_S,
        "length_B": np.int32(length),
        "stop_at_B": np.int32(stop_at),
        "stop_id_BK": stop_id_K,
        "key_B2": np.asarray(request.key, np.uint32),
        "logprobs_B": np.bool_(request.logprobs),
        "generation_B": np.int32(generation),
        "sampling": Sampling(*limits),
    }


def make_state(requests: Sequence[Request], cfg: StateConfig) -> DecodeState:
    """A state with one active slot a request; the remaining slots are free."""
    num_free = cfg.num_slots - len(requests)
    rows = [slot_values(request, i, cfg) for i, request in enumerate(requests)]
    rows += [slot_values(None, -1, cfg)] * num_free

    def cache(sizes: TransformerConfig, which: int) -> kv.KVCache:
        size = cfg.num_slots, cfg.num_positions
        return kv.empty_cache(sizes, *size, cfg.dtypes[which], stacked=cfg.stacked[which])

    return DecodeState(
        active_B=jnp.asarray(np.arange(cfg.num_slots) < len(requests)),
        target_cache=cache(cfg.target, 0),
        context_cache=None if cfg.drafter is None else cache(cfg.drafter, 1),
        **jax.tree.map(lambda *values: jnp.asarray(np.stack(values)), *rows),
    )


def admit(state: DecodeState, slot: jax.Array, values: dict[str, Any]) -> DecodeState:
    """A request into a slot, whoever was there; it is not active before its prompt is read.

    Args:
        state: donated.
        slot: int32 scalar.
        values: of :func:`slot_values`.
    """
    before = {name: getattr(state, name) for name in values}
    after = jax.tree.map(lambda x_B, x: x_B.at[slot].set(x), before, values)
    return state.replace(active_B=state.active_B.at[slot].set(False), **after)  # type: ignore[attr-defined]


def move(state: DecodeState, origin_B: jax.Array, *, num_positions: int) -> DecodeState:
    """The state with other sizes: its slots in another order and number, its positions cut or
    extended.

    Args:
        state: every active slot that is kept is shorter than ``num_positions``.
        origin_B: int32, the old slot that each new one continues; -1 for a free slot.
        num_positions: static.
    """
    change = num_positions - state.token_BS.shape[1]

    def place(path: Any, leaf: jax.Array) -> jax.Array:
        in_cache = path[0].name.endswith("cache")
        # Layers may be stacked in front: axes are counted from the end, [B, K, S, H].
        leaf = jnp.take(leaf, origin_B, axis=leaf.ndim - 4 if in_cache else 0, mode="clip")
        axis = -2 if in_cache else -1
        if path[0].name != "token_BS" and not in_cache:
            return leaf
        if change <= 0:
            return jax.lax.slice_in_dim(leaf, 0, num_positions, axis=axis % leaf.ndim)
        widths = [(0, 0)] * leaf.ndim
        widths[axis] = (0, change)
        return jnp.pad(leaf, widths)

    moved = jax.tree_util.tree_map_with_path(place, state)
    return moved.replace(active_B=moved.active_B & (origin_B >= 0))


def state_shardings(state: DecodeState, mesh: Mesh) -> DecodeState:
    """A ``NamedSharding`` for every array: slots over data, key/value heads over tensor."""

    def sharding(path: Any, leaf: jax.Array) -> NamedSharding:
        in_cache = path[0].name.endswith("cache")
        axes = "LBKSH"[-leaf.ndim :] if in_cache else "BX"[: leaf.ndim]
        return NamedSharding(mesh, partition(axes, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, state)
