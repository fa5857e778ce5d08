"""From the logits of a round to its tokens: drafted, accepted, and what is said of them.

Two things are the same for all: what nobody asks for is left out, as the host says or the device
finds; and on a mesh every device works on its own shard of the vocabulary, of which numbers of rows
alone cross the mesh.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dspark_jax import sampling
from dspark_jax.engine.inputs import ASKS, Asks, RoundConfig, RoundInput, Weights
from dspark_jax.engine.shaping import MOST_TOP, shape_logits
from dspark_jax.engine.state import DecodeState
from dspark_jax.models.drafters.heads import DraftBlock
from dspark_jax.rules import Rule
from pallas_kernels import devices, random
from pallas_kernels.accept_block import api
from pallas_kernels.accept_block.api import Acceptance, Drafts, OneHot, Requests, VerifyPlan
from pallas_kernels.accept_block.xla import shard_start

_WHOLE = PartitionSpec()


def draft_tokens(
    logits_BU: jax.Array,
    slot: int,
    state: DecodeState,
    position_B: jax.Array,
    d2t_U: jax.Array | None,
    cfg: RoundConfig,
) -> jax.Array:
    """The tokens of a slot of the blocks, int32 [B] indices of the draft vocabulary: of its own
    stream of noise, or of the field that coupled acceptance reads."""
    temperature_B = state.sampling.temperature_B
    key_B2 = random.stream_key(state.key_B2, random.DRAFT, position_B, slot)
    id_U = None
    if cfg.acceptance == "coupled":
        key_B2, id_U = random.noise_key(state.key_B2, position_B + 1 + slot), d2t_U

    def choose(noisy: bool) -> jax.Array:
        sample = functools.partial(api.sample_tokens, implementation=cfg.kernels)
        key, ids = (key_B2, id_U) if noisy else (None, None)

        def takes(axis: str | None) -> Any:
            return PartitionSpec(None, axis), _WHOLE, _WHOLE, PartitionSpec(axis)

        return _by_shards(sample, takes, logits_BU.shape[-1], logits_BU, temperature_B, key, ids)

    return _where_asked(
        "sampled", temperature_B > 0, lambda: choose(True), lambda: choose(False), cfg
    )


@jax.named_scope("verify")
def shape_law(
    state: DecodeState,
    given: RoundInput,
    logits_TV: jax.Array,
    token_BC: jax.Array,
    plan: VerifyPlan,
    cfg: RoundConfig,
) -> jax.Array:
    """The logits that tokens are accepted and drawn by: the target's own, unless the round is a
    shaped one."""
    if cfg.asks != "shaped":
        return logits_TV
    assert given.shaping is not None
    assert given.masks is not None

    def takes(axis: str | None) -> Any:
        return PartitionSpec(None, axis), *[_WHOLE] * 6

    told = state.token_BS, state.length_B, token_BC, plan, given.shaping, given.masks.allowed_BCX
    shaped_TV: jax.Array = _by_shards(
        shape_logits,
        takes,
        logits_TV.shape[-1],
        *(logits_TV, *told),
        gives=lambda axis: PartitionSpec(None, axis),
    )
    return shaped_TV


@jax.named_scope("accept")
def accept(
    weights: Weights,
    state: DecodeState,
    block: DraftBlock | None,
    logits_TV: jax.Array,
    plan: VerifyPlan,
    position_B: jax.Array,
    cfg: RoundConfig,
) -> Acceptance:
    """The accepted prefix and the target's next token; stop tokens come later.

    Args:
        weights: of which the drafter's ids are read, where it has a vocabulary of its own.
        state: keys, temperatures and filters of the slots.
        block: the drafts and their laws; None without any.
        logits_TV: float32 of the target, at the rows of the plan.
        plan: which rows are whose.
        position_B: int32 positions of the anchors.
        cfg: static part, with the rule.

    Returns:
        accepted_B int32, leading drafts that stand; next_B int32, the token after them; finite_B
        bool, whether all logits that were read are finite.

    Source: ``notebooks/concepts/lossless.md``.

    >>> import dataclasses
    >>> from dspark_jax.engine.verify import plan_rows
    >>> weights, state, _, cfg = read_prompts(load(), [Request(prompt="Hello!")])
    >>> plan = plan_rows(jnp.array([0]), jnp.array([True]), num_rows=1, num_columns=1)
    >>> logits_TV = jnp.zeros((1, cfg.target.vocab_size)).at[0, 7].set(1.0)
    >>> cfg = dataclasses.replace(cfg, drafter=None, num_draft=0)
    >>> accept(weights, state, None, logits_TV, plan, state.length_B - 1, cfg).next_B.tolist()
    [7]
    """
    drafts = Drafts(jnp.zeros((position_B.shape[0], 0), jnp.int32))
    if block is not None:
        assert weights.vocab is not None
        index_BG, logits = block.index_BG[:, : cfg.num_draft], block.logits_BGU
        logits = logits if isinstance(logits, OneHot) else logits[:, : cfg.num_draft]
        drafts = Drafts(index_BG, logits, weights.vocab.d2t_U)
    limits = state.sampling
    requests = Requests(limits.temperature_B, state.key_B2, position_B)
    own = cfg.acceptance if isinstance(cfg.acceptance, Rule) else None
    num_tokens = logits_TV.shape[-1]

    def by(rule: api.Rule, floor_T: jax.Array) -> Acceptance:
        judge = functools.partial(api.accept_block, rule=rule, implementation=cfg.kernels)

        def takes(axis: str | None) -> Any:
            by_draft = _WHOLE if drafts.d2t_U is not None else PartitionSpec(None, None, axis)
            split: Any = (_WHOLE, by_draft, _WHOLE)
            return PartitionSpec(None, axis), _WHOLE, _WHOLE, Drafts(*split), _WHOLE

        given = logits_TV, floor_T, plan, drafts, requests
        accepted: Acceptance = _by_shards(judge, takes, num_tokens, *given)
        return accepted

    def floor() -> jax.Array:
        slot_T = jnp.minimum(plan.slot_T, position_B.shape[0] - 1)
        limits_B = limits.temperature_B, limits.top_k_B, limits.top_p_B, limits.min_p_B
        limits_T = [value_B[slot_T] for value_B in limits_B]

        def takes(axis: str | None) -> Any:
            return PartitionSpec(None, axis), *[_WHOLE] * len(limits_T)

        found_T: jax.Array = _by_shards(
            sampling.kept_floor, takes, num_tokens, logits_TV, *limits_T
        )
        return found_T

    def no_floor() -> jax.Array:
        return jnp.full(logits_TV.shape[0], -jnp.inf)

    def sampled() -> Acceptance:
        floor_T = _where_asked("filtered", sampling.filters(limits), floor, no_floor, cfg)
        if own is not None:
            accepted: Acceptance = own.function(logits_TV, floor_T, plan, drafts, requests)
            return accepted
        return by(cfg.acceptance, floor_T)  # type: ignore[arg-type]

    if own is not None:
        return sampled()
    asked_B = limits.temperature_B > 0
    found: Acceptance = _where_asked(
        "sampled", asked_B, sampled, lambda: by("greedy", no_floor()), cfg
    )
    return found


def raw_logprobs(
    state: DecodeState,
    logits_TV: jax.Array,
    row_BC: jax.Array,
    token_BC: jax.Array,
    cfg: RoundConfig,
) -> jax.Array:
    """float32 [B, C] log-probability of committed tokens; 0 where the round computes none."""

    def compute() -> jax.Array:
        def takes(axis: str | None) -> Any:
            return PartitionSpec(None, axis), _WHOLE, _WHOLE

        given = logits_TV, row_BC, token_BC
        found_BC: jax.Array = _by_shards(_logprobs, takes, logits_TV.shape[-1], *given)
        return found_BC

    asked_B = state.logprobs_B & state.active_B
    nothing = functools.partial(jnp.zeros, token_BC.shape, jnp.float32)
    return _where_asked("sampled", asked_B, compute, nothing, cfg)


def top_logprobs(
    given: RoundInput, logits_TV: jax.Array, row_BC: jax.Array, cfg: RoundConfig
) -> tuple[jax.Array | None, jax.Array | None]:
    """The likeliest tokens of some rows, int32 and float32 [B, C, K], the best first; None in a
    round that is not shaped."""
    if given.shaping is None:
        return None, None
    num_tokens = logits_TV.shape[-1]

    def compute() -> Any:
        def takes(axis: str | None) -> Any:
            return PartitionSpec(None, axis), _WHOLE

        return _by_shards(_tops, takes, num_tokens, logits_TV, row_BC)

    def nothing() -> Any:
        shape = *row_BC.shape, min(MOST_TOP, num_tokens)
        return jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32)

    found: tuple[jax.Array, jax.Array]
    found = _where_asked("shaped", given.shaping.top_B > 0, compute, nothing, cfg)
    return found


def _tops(
    logits_TV: jax.Array, row_BC: jax.Array, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """Of every shard its own likeliest tokens, and the likeliest of these."""
    count = min(MOST_TOP, logits_TV.shape[-1])
    best_TK, id_TK = jax.lax.top_k(logits_TV, count)
    id_TK += shard_start(logits_TV.shape[-1], axis_name)
    if axis_name is not None:
        all_TX, all_id_TX = jax.lax.all_gather((best_TK, id_TK), axis_name, axis=1, tiled=True)
        place_TK = jax.lax.top_k(all_TX, min(MOST_TOP, all_TX.shape[-1]))[1]
        id_TK = jnp.take_along_axis(all_id_TX, place_TK, axis=1)
    id_BCK = id_TK[row_BC]
    row_BCK = jnp.broadcast_to(row_BC[..., None], id_BCK.shape)
    return id_BCK, _logprobs(logits_TV, row_BCK, id_BCK, axis_name)


def _logprobs(
    logits_TV: jax.Array, row_BC: jax.Array, token_BC: jax.Array, axis_name: str | None
) -> jax.Array:
    """Of tokens in some rows; from every shard three numbers of each of them."""
    num_tokens = logits_TV.shape[-1]
    place_BC = token_BC - shard_start(num_tokens, axis_name)
    inside_BC = (place_BC >= 0) & (place_BC < num_tokens)
    logit_BC = jnp.where(inside_BC, logits_TV[row_BC, place_BC], -jnp.inf)
    best_T = jnp.max(logits_TV, axis=-1)
    mass_T = jnp.sum(jnp.exp(logits_TV - best_T[:, None]), axis=-1)
    numbers_NBC = jnp.stack([logit_BC, best_T[row_BC], mass_T[row_BC]])[None]
    if axis_name is not None:
        numbers_NBC = jax.lax.all_gather(numbers_NBC[0], axis_name)
    logit_NBC, best_NBC, mass_NBC = jnp.moveaxis(numbers_NBC, 1, 0)
    best_BC = jnp.max(best_NBC, axis=0)
    mass_BC = jnp.sum(mass_NBC * jnp.exp(best_NBC - best_BC), axis=0)
    return jnp.max(logit_NBC, axis=0) - (jnp.log(mass_BC) + best_BC)


def _where_asked(
    what: Asks,
    asked_B: jax.Array,
    compute: Callable[[], Any],
    otherwise: Callable[[], Any],
    cfg: RoundConfig,
) -> Any:
    """``compute()`` where the host says that this or more is asked; where it does not say what
    is asked, and on a CPU where it asks for all, only if anybody does."""
    if cfg.asks == "any":
        return jax.lax.cond(jnp.any(asked_B), compute, otherwise)
    if cfg.asks == "shaped":
        return jax.lax.platform_dependent(
            cpu=lambda: jax.lax.cond(jnp.any(asked_B), compute, otherwise), default=compute
        )
    return compute() if ASKS.index(cfg.asks) >= ASKS.index(what) else otherwise()


def _by_shards(
    function: Callable[..., Any],
    takes: Callable[[str | None], Any],
    num_tokens: int,
    *arrays: Any,
    gives: Callable[[str | None], Any] = lambda _: _WHOLE,
) -> Any:
    """``function(*arrays, axis_name=...)``, on a mesh by the shards of a vocabulary that divides
    over them; by all devices alike where it does not.

    Args:
        function: of the shards.
        takes: how the arrays are split over an axis of the mesh; or over None.
        num_tokens: of the vocabulary.
        arrays: trees.
        gives: how the results are split; by default they are the same on all shards.
    """
    split = devices.split_over(["tensor"], num_tokens)
    free = devices.free_axes()
    if all(size == 1 for size in free.values()):
        return function(*arrays, axis_name=None)
    axis = "tensor" if split and free["tensor"] > 1 else None
    return jax.shard_map(
        functools.partial(function, axis_name=axis),
        in_specs=takes(axis),
        out_specs=gives(axis),
        axis_names=set(free),
        check_vma=False,
    )(*arrays)
