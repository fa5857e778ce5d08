"""The rule of lossless acceptance: which drafts stand, and which token follows them.

Rejection (Leviathan et al. 2023, Chen et al. 2023). Slot k with token v stands with probability
min(1, p^t_k(v) / p^d_k(v)). At the first slot that falls the next token comes from
normalise(max(0, p^t_k - p^d_k)); where all stand, from the target's row after them. A drafter that
draws nothing has a one-hot law: token d stands with probability p^t_k(d), and the next token after
its fall comes from p^t_k without d, for which nothing is normalised and no draft logits are needed.

Coupled (Daliri et al. 2024). The target's token at a position is argmax(log p^t + G) under a
noise field G that depends on seed and position alone, and a draft stands while it equals that
token. The text is then the target's own, whatever was drafted or verified. Greedy decoding is the
same without noise.

The target reads the anchor and the verified drafts of all requests as T flat rows; `row_BC` says
which row is column k of a request. That row holds the target's law after the anchor and k drafts:
it judges slot k, and the token that it decides has the absolute position `anchor_position + 1 + k`.

Axes: B requests, G slots of a block, C = G + 1, T rows, V target vocabulary (of one shard, where it
is split), U draft vocabulary, N shards, 2 words of a key.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import random
from pallas_kernels.accept_block import xla
from pallas_kernels.accept_block.xla import Draws, Law, Sample, Statistics

Rule = Literal["greedy", "rejection", "coupled"]

# Keeps the ratio finite where rounding drew a token of next to no probability; the published
# evaluation has the same floor.
MIN_DRAFT_LOGPROB = -18.420680743952367  # log 1e-8


class VerifyPlan(NamedTuple):
    """Which rows of the flat batch the target reads for whom.

    Attributes:
        slot_T: int32 request of each row; B marks a row that nobody needs.
        column_T: int32 its place behind the anchor, 0 for the anchor itself.
        row_BC: int32 row of every column; any row where a column is not read.
        length_B: int32 drafts verified, 0 to G.
    """

    slot_T: jax.Array
    column_T: jax.Array
    row_BC: jax.Array
    length_B: jax.Array


@jax.tree_util.register_static
@dataclass(frozen=True)
class OneHot:
    """In the place of draft logits: each draft was certain, for its drafter."""


ONE_HOT = OneHot()


class Drafts(NamedTuple):
    """The drafted blocks.

    Attributes:
        index_BG: int32 drafts as indices of the draft vocabulary.
        logits_BGU: of the law that each was drawn from, any float dtype, or ``ONE_HOT``; rejection
            alone reads them.
        d2t_U: int32 distinct target ids of the draft vocabulary; None where it is the target's.
    """

    index_BG: jax.Array
    logits_BGU: jax.Array | OneHot | None = None
    d2t_U: jax.Array | None = None

    @property
    def token_BG(self) -> jax.Array:
        """int32 target ids."""
        return self.index_BG if self.d2t_U is None else self.d2t_U[self.index_BG]


class Requests(NamedTuple):
    """What the requests bring along.

    Attributes:
        temperature_B: float32, 0 is greedy.
        key_B2: uint32 keys; drafts were drawn with their DRAFT stream, or from the coupled field.
        anchor_position_B: int32 absolute positions of the anchors.
    """

    temperature_B: jax.Array
    key_B2: jax.Array
    anchor_position_B: jax.Array


class Acceptance(NamedTuple):
    """The outcome of a round, before stop tokens.

    Attributes:
        accepted_B: int32, number of leading drafts that stand, at most the length.
        next_B: int32, the target's token after them.
        chance_BG: float32, with which each verified draft stands if those before it do: 0 or 1
            where nothing is left to chance; 0 beyond the length.
        finite_B: bool, all logits of the rows that were read are finite.
    """

    accepted_B: jax.Array
    next_B: jax.Array
    chance_BG: jax.Array
    finite_B: jax.Array


class Passes(NamedTuple):
    """An implementation of the readings of logits; ``xla.py`` says what they give."""

    statistics: Callable[[jax.Array, jax.Array, jax.Array], Statistics]
    draw: Callable[..., Draws]
    sample: Callable[..., Sample]
    sample_rest: Callable[..., Sample]


class Batch(NamedTuple):
    """Rows of logits, and how they become laws, which are not written out.

    Attributes:
        logits_TV: any float dtype.
        temperature_T: float32, as for :func:`accept_block`.
        floor_T: likewise.
        axis_name: the mesh axis that V is split over; None where the rows are whole.
    """

    logits_TV: jax.Array
    temperature_T: jax.Array
    floor_T: jax.Array
    axis_name: str | None


class Reading(NamedTuple):
    """A batch, the statistics of its rows, and its logits at some chosen tokens."""

    batch: Batch
    stats_T: Statistics
    row_Y: jax.Array
    token_Y: jax.Array
    logit_Y: jax.Array

    def law(self, row_Y: jax.Array) -> Law:
        """The laws of some rows."""
        _, temperature_T, floor_T, _ = self.batch
        law_T = Law(self.stats_T.best_T, jnp.log(self.stats_T.mass_T), floor_T, temperature_T)
        return Law(*(x_T[row_Y] for x_T in law_T))


def accept_block(
    logits_TV: jax.Array,
    floor_T: jax.Array,
    plan: VerifyPlan,
    drafts: Drafts,
    requests: Requests,
    rule: Rule,
    passes: Passes,
    axis_name: str | None = None,
) -> Acceptance:
    """``api.accept_block`` through the passes of an implementation."""
    num_requests, num_slots = drafts.index_BG.shape
    slot_T = jnp.minimum(plan.slot_T, num_requests - 1)
    temperature_T = requests.temperature_B[slot_T]
    if rule == "greedy":
        temperature_T = jnp.zeros_like(temperature_T)
    target = Batch(logits_TV, temperature_T, floor_T, axis_name)
    if rule == "rejection" and num_slots:
        certain = isinstance(drafts.logits_BGU, OneHot)
        by_chance = _accept_certain if certain else _accept_by_chance
        return by_chance(target, plan, drafts, requests, passes)
    key_T2 = None
    if rule != "greedy":
        key_T2, anchor_T = requests.key_B2[slot_T], requests.anchor_position_B[slot_T]
        if rule == "coupled":
            key_T2 = random.noise_key(key_T2, anchor_T + plan.column_T + 1)
        else:
            key_T2 = random.stream_key(key_T2, random.RESIDUAL, anchor_T, plan.column_T)
    return _accept_equal(target, key_T2, plan, drafts, passes)


def _accept_equal(
    target: Batch, key_T2: jax.Array | None, plan: VerifyPlan, drafts: Drafts, passes: Passes
) -> Acceptance:
    """Drafts stand while they equal the target's own tokens, with the noise of the keys if any."""
    sample_T = sample(target, key_T2, passes)
    token_BC = sample_T.token_T[plan.row_BC]
    stands_BG = drafts.token_BG == token_BC[:, :-1]
    accepted_B = leading(stands_BG, plan.length_B)
    return Acceptance(
        accepted_B,
        _at(token_BC, accepted_B),
        jnp.where(_verified(plan), stands_BG.astype(jnp.float32), 0),
        _finite(sample_T.finite_T, plan),
    )


def sample(batch: Batch, key_T2: jax.Array | None, passes: Passes, **options: Any) -> Sample:
    """A token of each whole row, by one collective where rows are split; ``options`` go to the
    pass."""
    found_T = passes.sample(*batch[:3], key_T2, batch.axis_name, **options)
    if batch.axis_name is None:
        return found_T
    return xla.merge_samples(_gather(found_T, batch.axis_name), batch.temperature_T)


def _accept_by_chance(
    target: Batch, plan: VerifyPlan, drafts: Drafts, requests: Requests, passes: Passes
) -> Acceptance:
    """Rejection sampling: the output follows the target's law, whatever the drafter's."""
    assert drafts.logits_BGU is not None
    assert not isinstance(drafts.logits_BGU, OneHot)
    num_requests, num_slots, num_drafted = drafts.logits_BGU.shape
    drafter = Batch(
        drafts.logits_BGU.reshape(-1, num_drafted),
        jnp.repeat(requests.temperature_B, num_slots),
        jnp.full(num_requests * num_slots, -jnp.inf),
        target.axis_name if drafts.d2t_U is None else None,
    )
    row_BG = jnp.arange(num_requests * num_slots).reshape(num_requests, num_slots)
    judge, author = _merged(
        _read(target, plan.row_BC[:, :-1].reshape(-1), drafts.token_BG.reshape(-1), passes),
        _read(drafter, row_BG.reshape(-1), drafts.index_BG.reshape(-1), passes),
    )
    chance_BG = acceptance_chance(_logprob(judge), _logprob(author)).reshape(row_BG.shape)
    accepted_B, next_key_B2 = _by_luck(chance_BG, plan, requests)

    row_B = _at(plan.row_BC, accepted_B)
    fell_B = _at(row_BG, jnp.minimum(accepted_B, num_slots - 1))  # or any row, where none did
    draws_B = passes.draw(
        target.logits_TV,
        row_B,
        judge.law(row_B),
        drafter.logits_TV[fell_B],
        author.law(fell_B),
        None if drafts.d2t_U is None else _in_shard(drafts.d2t_U, target),
        next_key_B2,
        target.axis_name,
    )
    token_B = _choose(draws_B, accepted_B < plan.length_B, target.axis_name)
    greedy_B = requests.temperature_B == 0
    return Acceptance(
        accepted_B,
        jnp.where(greedy_B, judge.stats_T.first_T[row_B], token_B),
        jnp.where(_verified(plan), chance_BG, 0),
        _finite(judge.stats_T.finite_T, plan),
    )


def _accept_certain(
    target: Batch, plan: VerifyPlan, drafts: Drafts, requests: Requests, passes: Passes
) -> Acceptance:
    """Rejection sampling of drafts with one-hot laws."""
    token_BG = drafts.token_BG
    (judge,) = _merged(_read(target, plan.row_BC[:, :-1].reshape(-1), token_BG.reshape(-1), passes))
    chance_BG = acceptance_chance(_logprob(judge), jnp.float32(0)).reshape(token_BG.shape)
    accepted_B, next_key_B2 = _by_luck(chance_BG, plan, requests)

    row_B = _at(plan.row_BC, accepted_B)
    draft_B = _at(token_BG, jnp.minimum(accepted_B, token_BG.shape[1] - 1))
    rest_B = passes.sample_rest(
        target.logits_TV,
        row_B,
        jnp.where(accepted_B < plan.length_B, draft_B, xla.NO_TOKEN),
        requests.temperature_B,
        target.floor_T[row_B],
        next_key_B2,
        target.axis_name,
    )
    if target.axis_name is not None:
        rest_B = xla.merge_samples(_gather(rest_B, target.axis_name), requests.temperature_B)
    # Rounding alone makes a draft fall beside which there is nothing.
    token_B = jnp.where(rest_B.score_T > -jnp.inf, rest_B.token_T, draft_B)
    return Acceptance(
        accepted_B,
        token_B,
        jnp.where(_verified(plan), chance_BG, 0),
        _finite(judge.stats_T.finite_T, plan),
    )


def _by_luck(
    chance_BG: jax.Array, plan: VerifyPlan, requests: Requests
) -> tuple[jax.Array, jax.Array]:
    """int32 [B] leading drafts that stand by their chances, and the key [B, 2] of what follows."""
    key_B2, anchor_B = requests.key_B2, requests.anchor_position_B
    slot_G = jnp.arange(chance_BG.shape[1])
    key_BG2 = random.stream_key(key_B2[:, None], random.ACCEPT, anchor_B[:, None], slot_G)
    accepted_B = leading(random.uniform(key_BG2, 1)[..., 0] < chance_BG, plan.length_B)
    return accepted_B, random.stream_key(key_B2, random.RESIDUAL, anchor_B, accepted_B)


def _choose(draws_B: Draws, fell_B: jax.Array, axis_name: str | None) -> jax.Array:
    """int32 [B]: from the residual where a draft fell, unless it has no mass; else the target's."""
    if axis_name is not None:
        draws_B = xla.merge_draws(_gather(draws_B, axis_name))
    from_residual_B = fell_B & (draws_B.mass_B > xla.LEAST_MASS)
    return jnp.where(from_residual_B, draws_B.residual_token_B, draws_B.token_B)


def acceptance_chance(target_logprob_X: jax.Array, draft_logprob_X: jax.Array) -> jax.Array:
    """float32 [X]: min(1, p^t / p^d) from both laws of each drawn token.

    A slot stands iff uniform < chance, strictly: a token that the target forbids falls even at a
    uniform of 0, and equal laws stand even at the largest, which is below 1.
    """
    draft_logprob_X = jnp.maximum(draft_logprob_X, MIN_DRAFT_LOGPROB)
    return jnp.exp(jnp.minimum(target_logprob_X - draft_logprob_X, 0))


def leading(stands_BG: jax.Array, length_B: jax.Array) -> jax.Array:
    """int32 [B]: slots before the first that falls or lies beyond `length`."""
    verified_BG = jnp.arange(stands_BG.shape[1]) < length_B[:, None]
    return jnp.sum(jnp.cumprod((stands_BG & verified_BG).astype(jnp.int32), axis=1), axis=1)


def _verified(plan: VerifyPlan) -> jax.Array:
    """bool [B, G]: slots within the length."""
    return jnp.arange(plan.row_BC.shape[1] - 1) < plan.length_B[:, None]


def _finite(finite_T: jax.Array, plan: VerifyPlan) -> jax.Array:
    unread_BC = jnp.arange(plan.row_BC.shape[1]) > plan.length_B[:, None]
    return jnp.all(finite_T[plan.row_BC] | unread_BC, axis=1)


def _at(x_BC: jax.Array, column_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BC, column_B[:, None], axis=1)[:, 0]


def _logprob(reading: Reading) -> jax.Array:
    """float32 [Y] log-probabilities of the chosen tokens."""
    law_Y = reading.law(reading.row_Y)
    sampled_Y = xla.logprob(reading.logit_Y[:, None], law_Y)[:, 0]
    one_hot_Y = jnp.where(reading.token_Y == reading.stats_T.first_T[reading.row_Y], 0.0, -jnp.inf)
    return jnp.where(law_Y.temperature_X == 0, one_hot_Y, sampled_Y)


# Shards of the vocabulary. Numbers of rows cross the mesh in one collective, draws in another.


def _read(batch: Batch, row_Y: jax.Array, token_Y: jax.Array, passes: Passes) -> Reading:
    """What this shard knows of the rows, and of the chosen tokens in them."""
    stats_T = passes.statistics(batch.logits_TV, batch.temperature_T, batch.floor_T)
    place_Y = _in_shard(token_Y, batch)
    logit_Y = batch.logits_TV.at[row_Y, place_Y].get(mode="fill", fill_value=-jnp.inf)
    return Reading(batch, stats_T, row_Y, token_Y, logit_Y.astype(jnp.float32))


def _in_shard(token_Y: jax.Array, batch: Batch) -> jax.Array:
    """Places of tokens in this shard; those of others get distinct places beyond its end."""
    if batch.axis_name is None:
        return token_Y
    num_tokens = batch.logits_TV.shape[-1]
    place_Y = token_Y - xla.shard_start(num_tokens, batch.axis_name)
    inside_Y = (place_Y >= 0) & (place_Y < num_tokens)
    return jnp.where(inside_Y, place_Y, num_tokens + jnp.arange(token_Y.size))


def _merged(*readings: Reading) -> list[Reading]:
    """Readings of whole rows."""
    split = [r for r in readings if r.batch.axis_name is not None]
    if not split:
        return list(readings)
    parts = [(r.stats_T, r.logit_Y) for r in split]
    gathered = iter(_gather(parts, split[0].batch.axis_name))
    return [r if r.batch.axis_name is None else _whole(r, *next(gathered)) for r in readings]


def _whole(reading: Reading, stats_NT: Statistics, logit_NY: jax.Array) -> Reading:
    """A reading of whole rows from those of N shards."""
    num_shards, num_tokens = len(logit_NY), reading.batch.logits_TV.shape[-1]
    start_N1 = num_tokens * jnp.arange(num_shards)[:, None]
    parts_NT = stats_NT._replace(first_T=start_N1 + stats_NT.first_T)
    stats_T = xla.merge(parts_NT, reading.batch.temperature_T)
    return reading._replace(stats_T=stats_T, logit_Y=jnp.max(logit_NY, axis=0))


def _gather(tree: Any, axis_name: str | None) -> Any:
    """Arrays of all shards, [N, ...] each, by one collective. Integers must be below 2^24."""
    leaves, structure = jax.tree.flatten(tree)
    flat_X = jnp.concatenate([leaf.astype(jnp.float32).reshape(-1) for leaf in leaves])
    flat_NX = jax.lax.all_gather(flat_X, axis_name)
    ends = itertools.accumulate(leaf.size for leaf in leaves)
    gathered = [
        flat_NX[:, end - leaf.size : end].reshape(len(flat_NX), *leaf.shape).astype(leaf.dtype)
        for leaf, end in zip(leaves, ends, strict=True)
    ]
    return jax.tree.unflatten(structure, gathered)
