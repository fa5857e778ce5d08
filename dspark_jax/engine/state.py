"""The state of decoding: B slots, their committed tokens, both caches.

``length_B`` is the only truth: ``token_BS[b, :length]`` is committed, the last of it is the anchor,
and both caches are valid below ``length - 1``. Whatever lies behind is garbage by definition:
rejected drafts are never rolled back, they are overwritten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding

from dspark_jax.axes import partition
from dspark_jax.config import DrafterConfig, TargetConfig
from dspark_jax.models import cache as kv
from dspark_jax.sampling import Sampling, check_sampling
from pallas_kernels import random


@dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    Attributes:
        prompt_ids: token ids of the prompt, at least one.
        max_new_tokens: the text is cut there.
        temperature, top_k, top_p, min_p: 0, 0, 1 and 0 switch them off (greedy, no filter).
        key: uint32 [2], the randomness of this request: ``fold_in(seed_key(seed), line)``.
        stop_ids: ids that end the text; the id itself is dropped from it.
        stop_strings: strings that end the text; dropped from it too.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    key: np.ndarray = field(default_factory=lambda: np.asarray(random.seed_key(0)))
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def check(self, max_positions: int) -> None:
        """Refuse what cannot be decoded.

        Raises:
            ValueError: names the field, the value and the remedy.
        """
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p)
        if self.max_new_tokens < 1:
            raise ValueError(
                f"max_new_tokens is {self.max_new_tokens}: ask for at least 1 new token"
            )
        if not self.prompt_ids:
            raise ValueError("the prompt is empty: write some text")
        if len(self.prompt_ids) >= max_positions:
            raise ValueError(
                f"the prompt has {len(self.prompt_ids)} tokens and the target's context "
                f"{max_positions}: shorten the prompt to at most {max_positions - 1} tokens"
            )
        if any(not text for text in self.stop_strings):
            raise ValueError("a stop string is empty: leave it out")


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
    sampling: Sampling
    target_cache: kv.KVCache
    context_cache: Any


def make_state(
    requests: Sequence[Request],
    num_slots: int,
    num_positions: int,
    target_cfg: TargetConfig,
    drafter_cfg: DrafterConfig | None,
    dtypes: tuple[Any, Any],
    stacked: tuple[bool, bool],
) -> DecodeState:
    """A state with one slot a request; the remaining slots are idle.

    Args:
        requests: at most ``num_slots``.
        num_slots: B.
        num_positions: S, room for prompt, new tokens and one block past the limit.
        target_cfg, drafter_cfg: sizes.
        dtypes: of the target's and the drafter's cache.
        stacked: whether their layers are stacked.
    """
    count = max((len(request.stop_ids) for request in requests), default=0)
    token_BS = np.zeros((num_slots, num_positions), np.int32)
    length_B, stop_at_B = np.ones(num_slots, np.int32), np.zeros(num_slots, np.int32)
    stop_id_BK = np.full((num_slots, max(count, 1)), -1, np.int32)
    key_B2 = np.zeros((num_slots, 2), np.uint32)
    temperature_B = np.zeros(num_slots, np.float32)
    top_k_B, top_p_B = np.zeros(num_slots, np.int32), np.ones(num_slots, np.float32)
    min_p_B = np.zeros(num_slots, np.float32)
    for slot, request in enumerate(requests):
        length = len(request.prompt_ids)
        token_BS[slot, :length] = request.prompt_ids
        length_B[slot] = length
        stop_at_B[slot] = min(length + request.max_new_tokens, target_cfg.max_positions)
        stop_id_BK[slot, : len(request.stop_ids)] = request.stop_ids
        key_B2[slot] = request.key
        temperature_B[slot], top_k_B[slot] = request.temperature, request.top_k
        top_p_B[slot], min_p_B[slot] = request.top_p, request.min_p
    context = None
    if drafter_cfg is not None:
        context = kv.empty_cache(
            drafter_cfg, num_slots, num_positions, dtypes[1], stacked=stacked[1]
        )
    return DecodeState(
        token_BS=jnp.asarray(token_BS),
        length_B=jnp.asarray(length_B),
        stop_at_B=jnp.asarray(stop_at_B),
        active_B=jnp.asarray(np.arange(num_slots) < len(requests)),
        stop_id_BK=jnp.asarray(stop_id_BK),
        key_B2=jnp.asarray(key_B2),
        sampling=Sampling(
            jnp.asarray(temperature_B),
            jnp.asarray(top_k_B),
            jnp.asarray(top_p_B),
            jnp.asarray(min_p_B),
        ),
        target_cache=kv.empty_cache(
            target_cfg, num_slots, num_positions, dtypes[0], stacked=stacked[0]
        ),
        context_cache=context,
    )


def state_shardings(state: DecodeState, mesh: Mesh) -> DecodeState:
    """A ``NamedSharding`` for every array: slots over data, key/value heads over tensor."""

    def sharding(path: Any, leaf: jax.Array) -> NamedSharding:
        in_cache = path[0].name.endswith("cache")
        axes = "LBKSH"[-leaf.ndim :] if in_cache else "BX"[: leaf.ndim]
        return NamedSharding(mesh, partition(axes, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(sharding, state)
