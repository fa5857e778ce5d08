"""The output law with the scheduler in the loop, two requests jointly; wrong schedulers show.

Most of it is exact. The texts of both requests, everything that may be drafted behind them and
everything that verification may answer are enumerated, so that the joint law of both texts comes
out as numbers, over as many rounds as it takes, without drawing anything. What enumeration takes
for granted, that each round's noise is fresh, is tested with the real keys over many seeds; and
under coupled acceptance every single text has to be the text of plain decoding.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.scheduler import budget, schedule
from dspark_jax.scheduler.budget import DraftSwitch, RoundCosts
from pallas_kernels import random
from pallas_kernels.accept_block import xla
from tests.marks import rest_full
from tests.test_lossless import (
    BROKEN_Z,
    PLAIN,
    SOUND_Z,
    World,
    chi_square_z,
    decode_round,
    key_by_token_position,
    keys_of,
    law_table,
    laws_of,
    plain_texts,
)

SOUND, BROKEN = 1e-6, 0.05  # total variation: float32 rounding against a wrong law

excess = jax.jit(xla.excess, static_argnums=2)
prefix_survival = jax.jit(schedule.prefix_survival)
causal_budget = jax.jit(jax.vmap(schedule.causal_budget, (0, None, 0)))
select_prefixes = jax.jit(jax.vmap(schedule.select_prefixes))


def make_world(seed, num_slots, vocabulary):
    """A drafter of middling quality whose confidences differ wildly from token to token."""
    rng = np.random.default_rng(seed)
    target = rng.standard_normal((vocabulary, vocabulary))
    draft = target + rng.standard_normal((num_slots, vocabulary, vocabulary))
    certain = (np.arange(vocabulary) + rng.integers(vocabulary, size=(num_slots, 1))) % 2 == 0
    confidence = np.where(
        certain, *rng.uniform([[[0.8]], [[0.05]]], [[[1]], [[0.4]]], (2, *certain.shape))
    )
    return World(target, draft, confidence.astype(np.float32), None)


# Every way a request can go on.


@dataclasses.dataclass(frozen=True)
class Request:
    """What may happen to a request in a round; I counts pairs of (its text so far, a block).

    Attributes:
        text_I: index of the text, texts in the order of `texts_of`.
        chance_I: of the block, given the text.
        context_IC: the token before the block and its drafts.
        confidence_IG: of the block.
        active_I: the text is not complete yet.
        move_ICT: chance of every text after the round, for every number of verified slots.
    """

    text_I: np.ndarray
    chance_I: np.ndarray
    context_IC: np.ndarray
    confidence_IG: np.ndarray
    active_I: np.ndarray
    move_ICT: np.ndarray


def texts_of(vocabulary, num_tokens):
    """All texts up to a length, the shortest first."""
    every = (itertools.product(range(vocabulary), repeat=n) for n in range(num_tokens + 1))
    return [text for texts in every for text in texts]


def enumerate_request(world, num_tokens):
    """:class:`Request` of a prompt of one token 0 in a world.

    The chance that a draft stands is the rule of Leviathan et al.; the residual is the library's.
    """
    laws = laws_of(world)
    target_VV = np.asarray(law_table(world, PLAIN))
    draft_GVU = np.asarray(laws.draft_NGVU[0])
    num_slots, vocabulary, _ = draft_GVU.shape
    texts = texts_of(vocabulary, num_tokens)
    blocks = list(itertools.product(range(vocabulary), repeat=num_slots))
    pairs = [(t, b) for t in texts for b in blocks if len(t) < num_tokens or b == blocks[0]]
    slots = np.arange(num_slots)
    context_IC = np.array([((0, *t)[-1], *b) for t, b in pairs])
    draft_IG, before_IG = context_IC[:, 1:], context_IC[:, :-1]
    active_I = np.array([len(t) < num_tokens for t, _ in pairs])
    drawn_IG = draft_GVU[slots, before_IG, draft_IG]
    chance_GVU = np.exp(draft_GVU, dtype=np.float64)
    chance_GVU /= chance_GVU.sum(-1, keepdims=True)
    chance_I = chance_GVU[slots, before_IG, draft_IG].prod(1)
    stands_IG = np.exp(np.minimum(target_VV[before_IG, draft_IG] - drawn_IG, 0), dtype=np.float64)

    index = {text: number for number, text in enumerate(texts)}
    move_ICT = np.zeros((len(pairs), num_slots + 1, len(texts)))
    for length in range(num_slots + 1):
        for accepted in range(length + 1):
            ends_I = stands_IG[:, :accepted].prod(1)
            if accepted < length:
                ends_I = ends_I * (1 - stands_IG[:, accepted])
            law = target_VV[context_IC[:, accepted]]
            law_IV = np.exp(law, dtype=np.float64)
            if accepted < length:
                law = excess(law, draft_GVU[accepted, before_IG[:, accepted]], None)
                law_IV = np.asarray(law, np.float64)
            law_IV /= law_IV.sum(1, keepdims=True)
            for number, (text, block) in enumerate(pairs):
                for token in range(vocabulary):
                    after = index[(*text, *block[:accepted], token)[:num_tokens]]
                    move_ICT[number, length, after] += ends_I[number] * law_IV[number, token]
    for number in np.flatnonzero(~active_I):
        move_ICT[number] = np.arange(len(texts)) == index[pairs[number][0]]
    return Request(
        text_I=np.array([index[t] for t, _ in pairs]),
        chance_I=np.where(active_I, chance_I, 1.0),
        context_IC=context_IC,
        confidence_IG=world.confidence_GV[slots, before_IG],
        active_I=active_I,
        move_ICT=move_ICT,
    )


# Schedules: a memory of earlier rounds, and what this round's blocks make of it.


@dataclasses.dataclass(frozen=True)
class Policy:
    """A schedule over batches of N pairs of requests.

    Attributes:
        start: the memory before the first round.
        lengths: (memory, confidence_N2G, draft_N2G, active_N2) -> int [N, 2].
        recall: (memory, confidence_2G, draft_2G, active_2) -> the memory after the round.
    """

    start: tuple
    lengths: Callable
    recall: Callable = lambda memory, *_: memory


def survival_of(confidence_N2G, draft_N2G):
    flat = confidence_N2G.reshape(-1, confidence_N2G.shape[-1])
    return np.asarray(prefix_survival(flat)).reshape(confidence_N2G.shape)


def survival_to_stop(confidence_N2G, draft_N2G):
    """Token 1 is a stop token."""
    flat = (x.reshape(-1, x.shape[-1]) for x in (survival_of(confidence_N2G, None), draft_N2G == 1))
    return np.asarray(schedule.end_at_stop(*flat)).reshape(confidence_N2G.shape)


def fixed(length):
    return Policy((), lambda _, confidence, draft, active: np.full(active.shape, length))


def threshold(least):
    def lengths(_, confidence, draft, active):
        flat = confidence.reshape(-1, confidence.shape[-1])
        return np.asarray(schedule.threshold_length(flat, least)).reshape(active.shape)

    return Policy((), lengths)


def algorithm_1(survival_N2G, costs, active_N2):
    return np.asarray(causal_budget(survival_N2G, budget.steps_per_s(costs), active_N2))


def causal(
    costs, survival=survival_of, buckets=None, admitted=algorithm_1, rows_for=budget.bucket_for
):
    """A budget from this round's survival, whose rows become those of a bucket."""

    def lengths(_, confidence, draft, active):
        survival_N2G, anchors = survival(confidence, draft), active.sum(1)
        wanted = anchors + admitted(survival_N2G, costs, active)
        rows = rows_for(wanted, buckets or costs.buckets)
        return np.asarray(select_prefixes(survival_N2G, rows - anchors, active))

    return Policy((), lengths)


def delayed(costs, survival=survival_of, switch=None):
    """The bucket from two rounds ago, this round's survival within it.

    The memory is (choice of this round, choice of the next, switch); without a switch the best
    choice is taken as it is.
    """

    def choose(switch, survival_BG, known, active_B):
        known_B = np.full(2, known)
        if switch is None:
            return None, budget.best_bucket(survival_BG, known_B, active_B, costs)
        return budget.choose_bucket(switch, survival_BG, known_B, active_B, costs)

    def lengths(memory, confidence, draft, active):
        if memory[0] == 0:
            return np.zeros(active.shape, int)
        left = costs.buckets[memory[0] - 1] - active.sum(1)
        return np.asarray(select_prefixes(survival(confidence, draft), left, active))

    def recall(memory, confidence, draft, active):
        now, following, last = memory
        known = now > 0  # without a draft there is nothing to remember
        seen = survival(confidence[None], draft[None])[0]
        last, choice = choose(last, seen, known, active)
        return following, choice, last

    start = []
    for _ in range(2):
        switch, choice = choose(switch, np.ones((2, 1)), False, np.ones(2, bool))
        start.append(choice)
    return Policy((*start, switch), lengths, recall)


# The joint law of two texts.


def output_law(policy, requests, num_rounds):
    """Exact joint law [texts, texts] of two requests, active until their texts are complete."""
    row_2N = np.indices([len(request.text_I) for request in requests]).reshape(2, -1)
    paired = list(zip(requests, row_2N, strict=True))
    text_2N = [request.text_I[row] for request, row in paired]
    chance_N = np.prod([request.chance_I[row] for request, row in paired], axis=0)
    confidence_N2G, context_N2C, active_N2 = (
        np.stack([getattr(request, name)[row] for request, row in paired], axis=1)
        for name in ("confidence_IG", "context_IC", "active_I")
    )
    facts = confidence_N2G, context_N2C[..., 1:], active_N2
    seen = np.concatenate([context_N2C.reshape(len(chance_N), -1), active_N2], axis=1)
    _, sample, kind_N = np.unique(seen, axis=0, return_index=True, return_inverse=True)
    moves = [request.move_ICT.reshape(-1, request.move_ICT.shape[-1]) for request in requests]
    shape = tuple(len(move) for move in moves)

    @functools.cache
    def step(memory):
        """Place of every row among the moves of both, and the memories after, with their rows."""
        length_N2 = np.where(active_N2, policy.lengths(memory, *facts), 0)
        assert ((length_N2 >= 0) & (length_N2 <= confidence_N2G.shape[-1])).all()
        place_2N = row_2N * requests[0].move_ICT.shape[1] + length_N2.T
        after = [policy.recall(memory, *(fact[n] for fact in facts)) for n in sample]
        number = {memory: i for i, memory in enumerate(dict.fromkeys(after))}
        after_N = np.array([number[memory] for memory in after])[kind_N]
        return np.ravel_multi_index(place_2N, shape), [(m, after_N == i) for m, i in number.items()]

    law_TT = np.zeros([move.shape[1] for move in moves])
    law_TT[0, 0] = 1
    laws = {policy.start: law_TT}
    for _ in range(num_rounds):
        laws_after: dict = {}
        for memory, law_TT in laws.items():
            place_N, memories = step(memory)
            mass_N = law_TT[*text_2N] * chance_N
            for after, reached_N in memories:
                joint = np.bincount(place_N, mass_N * reached_N, np.prod(shape)).reshape(shape)
                if joint.any():
                    laws_after[after] = laws_after.get(after, 0) + moves[0].T @ joint @ moves[1]
        laws = laws_after
    return sum(laws.values())


def target_joint_law(worlds, num_tokens):
    """What `output_law` has to be: both texts complete, independent, each by its target."""
    each = []
    for world in worlds:
        law_VV = np.exp(np.asarray(law_table(world, PLAIN), np.float64))
        law_VV /= law_VV.sum(1, keepdims=True)
        texts = texts_of(len(law_VV), num_tokens)
        each.append(
            [
                np.prod([law_VV[pair] for pair in itertools.pairwise((0, *text))])
                if len(text) == num_tokens
                else 0.0
                for text in texts
            ]
        )
    return np.outer(*each)


def distance(policy, worlds, num_tokens):
    """Total variation between the output of a schedule and the targets."""
    requests = [enumerate_request(world, num_tokens) for world in worlds]
    found = output_law(policy, requests, num_tokens)
    assert found.sum() == pytest.approx(1, abs=1e-9)
    return abs(found - target_joint_law(worlds, num_tokens)).sum() / 2


# What keeps the law.

NUM_TOKENS = 4  # the third round knows the first, and two tokens depend on its budget
WORLDS = tuple(make_world(seed, 2, 2) for seed in (0, 1))
STAIRCASE = RoundCosts((1, 2, 4, 6), (0.9, 1.0, 1.4, 1.8), draft_s=0.1, undrafted_s=1.0)
SMOOTH = RoundCosts(tuple(range(1, 7)), tuple(1 + 0.2 * np.arange(6)), 0.1, 1.0)
COARSE = 1, 2, 4, 6  # fewer buckets than the smooth costs have
COSTS = {"staircase": STAIRCASE, "smooth": SMOOTH}
each_cost = pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS)

INDEPENDENT = {
    "none": fixed(0),
    "fixed:1": fixed(1),
    "fixed:2": fixed(2),
    "threshold:0.5": threshold(0.5),
}


@pytest.mark.parametrize("policy", INDEPENDENT.values(), ids=INDEPENDENT)
def test_schedules_of_each_request_alone_keep_the_joint_law(policy):
    assert distance(policy, WORLDS, NUM_TOKENS) < SOUND


@pytest.mark.smoke
@each_cost
@pytest.mark.parametrize("survival", [survival_of, survival_to_stop])
@pytest.mark.parametrize("schedule_of", [causal, delayed])
def test_schedules_of_the_whole_batch_keep_the_joint_law(schedule_of, survival, costs):
    assert distance(schedule_of(costs, survival), WORLDS, NUM_TOKENS) < SOUND


def test_a_causal_budget_rounded_up_keeps_the_joint_law():
    assert distance(causal(SMOOTH, buckets=COARSE), WORLDS, NUM_TOKENS) < SOUND


@pytest.mark.parametrize("name", rest_full(COSTS, ("staircase",)))
def test_switching_drafts_on_and_off_keeps_the_joint_law(name, monkeypatch):
    """Every round is a verdict on what was drafted two rounds ago, and a pause lasts one round."""
    constants = {"EVIDENCE": 1, "WINDOW": 2, "SHORTEST_PAUSE": 1, "PROBE_SHARE": 1e9, "MARGIN": 0}
    for constant, value in constants.items():
        monkeypatch.setattr(budget, constant, value)
    assert distance(delayed(COSTS[name], switch=DraftSwitch()), WORLDS, NUM_TOKENS) < SOUND


def test_a_non_finite_confidence_keeps_the_joint_law():
    assert distance(causal(STAIRCASE), with_nan(WORLDS), NUM_TOKENS) < SOUND
    assert distance(delayed(STAIRCASE), with_nan(WORLDS), NUM_TOKENS) < SOUND


def with_nan(worlds):
    """c_2 after token 1 is not a number."""
    broken = []
    for world in worlds:
        confidence_GV = world.confidence_GV.copy()
        confidence_GV[1, 1] = np.nan
        broken.append(dataclasses.replace(world, confidence_GV=confidence_GV))
    return tuple(broken)


@pytest.mark.full
@each_cost
@pytest.mark.parametrize("schedule_of", [causal, delayed])
@pytest.mark.parametrize("seed", range(10, 12))
def test_many_worlds_keep_the_joint_law(seed, schedule_of, costs):
    worlds = tuple(make_world(10 * seed + i, 3, 2) for i in range(2))
    assert distance(schedule_of(costs), worlds, NUM_TOKENS) < SOUND
    worlds = tuple(make_world(10 * seed + i, 2, 3) for i in range(2))
    assert distance(schedule_of(costs), worlds, 3) < SOUND


# What does not.


def retrospective(survival_N2G, costs, active_N2):
    """The best of all budgets by this round's survival: the global search, two rounds too early."""
    best = [
        budget.best_bucket(survival_BG, np.ones(2, bool), active_B, costs)
        for survival_BG, active_B in zip(survival_N2G, active_N2, strict=True)
    ]
    rows = np.array([0, *costs.buckets])[best]
    return np.maximum(rows - active_N2.sum(1), 0)


def rounded_down(rows, buckets):
    edges = np.array([0, *buckets])
    return edges[np.searchsorted(edges, rows, side="right") - 1]


def own_confidence(confidence_N2G, draft_N2G):
    """Not a product, so that it may rise along a block."""
    return confidence_N2G


def survival_without_stop_slot(confidence_N2G, draft_N2G):
    """0 in the slot of the stop token itself too: its own draft has a say."""
    survival_N2G = survival_of(confidence_N2G, draft_N2G)
    return np.where(np.cumsum(draft_N2G == 1, axis=-1) > 0, 0, survival_N2G).astype(np.float32)


def survival_of_confident_block(confidence_N2G, draft_N2G):
    """A non-finite confidence makes slots before it confident too."""
    finite = np.isfinite(confidence_N2G).all(-1, keepdims=True)
    return survival_of(np.where(finite, confidence_N2G, 1).astype(np.float32), draft_N2G)


BROKEN_POLICIES = {
    "global maximum over this round": causal(STAIRCASE, admitted=retrospective),
    "causal budget rounded down": causal(SMOOTH, buckets=COARSE, rows_for=rounded_down),
    "survival that rises, causal": causal(SMOOTH, own_confidence),
    "survival that rises, delayed": delayed(SMOOTH, own_confidence),
    "stop slot judged by its own draft, causal": causal(STAIRCASE, survival_without_stop_slot),
    "stop slot judged by its own draft, delayed": delayed(STAIRCASE, survival_without_stop_slot),
    "non-finite block": delayed(STAIRCASE, survival_of_confident_block),
}


@pytest.mark.parametrize("policy", BROKEN_POLICIES.values(), ids=BROKEN_POLICIES)
def test_a_wrong_scheduler_is_noticed(policy):
    worlds = with_nan(WORLDS) if policy is BROKEN_POLICIES["non-finite block"] else WORLDS
    assert distance(policy, worlds, NUM_TOKENS) > BROKEN


COUNTEREXAMPLE = World(
    np.log([[0.7, 0.3]] * 2), np.zeros((2, 2, 2)), np.float32([[0.8, 0.8], [0.9, 0.0]]), None
)


def costs_of(*steps_per_s):
    """Of rounds of 1, 2, ... rows."""
    seconds = tuple(1 / rate for rate in steps_per_s)
    return RoundCosts(tuple(range(1, 1 + len(seconds))), seconds, 0.0, seconds[0])


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (causal(costs_of(1, 0.5, 0.45)), 0.7),
        (delayed(costs_of(1, 0.5, 0.45)), 0.7),
        (causal(costs_of(1, 0.5, 0.45), admitted=retrospective), 0.85),
        (causal(costs_of(1, 0.6, 0.45), buckets=(1, 3)), 0.7),
        (causal(costs_of(1, 0.6, 0.45), buckets=(1, 3), rows_for=rounded_down), 0.85),
    ],
    ids=["causal", "delayed", "retrospective", "rounded up", "rounded down"],
)
def test_the_counterexamples_of_one_token(policy, expected):
    """Target (0.7, 0.3), draft (0.5, 0.5), c_1 = 0.8, c_2 = 0.9 after token 0, else 0."""
    requests = [enumerate_request(COUNTEREXAMPLE, num_tokens) for num_tokens in (1, 0)]
    law_T = output_law(policy, requests, 1)[:, 0]
    np.testing.assert_allclose(law_T, [0, expected, 1 - expected], atol=1e-6)


@each_cost
def test_the_delayed_choice_takes_every_kind_of_value(costs):
    """So that the proofs above are about something: no draft, some drafts, many drafts."""
    policy, request = delayed(costs), enumerate_request(WORLDS[0], 2)
    open_I, active = np.flatnonzero(request.active_I), np.ones(2, bool)
    chosen = {
        policy.recall((1, 1, None), request.confidence_IG[[i, j]], np.zeros(2), active)[1]
        for i, j in itertools.product(open_I, open_I)
    }
    assert 0 in chosen
    assert len(chosen) > 2


# The real keys, over many seeds: requests in pairs, rounds on the device. Slot 4 has seen a draft
# that the round after next may draft again.

# Both blocks whole are worth their time only if c_4 is high in both: d_3 decides.
LONG = World(
    np.log([[0.8, 0.2], [0.3, 0.7]]),
    np.zeros((4, 2, 2)),
    np.float32([[0.95, 0.9], [0.96, 0.94], [0.95, 0.93], [0.98, 0.02]]),
    None,
)
LONG_COSTS = RoundCosts((2, 10), (1.0, 4.2), draft_s=0.1, undrafted_s=1.0)


def pairs_of(x_BG):
    return x_BG.reshape(-1, 2, x_BG.shape[-1])


def on_device_none(now_BG, older_BG):
    return jnp.zeros(now_BG.shape[0], jnp.int32)


def on_device_causal(now_BG, older_BG):
    survival_N2G = pairs_of(schedule.prefix_survival(now_BG))
    active_N2 = jnp.ones(survival_N2G.shape[:2], bool)
    table = jnp.asarray(budget.steps_per_s(LONG_COSTS))
    budget_N = jax.vmap(schedule.causal_budget, (0, None, 0))(survival_N2G, table, active_N2)
    rows_T = budget.bucket_for(np.arange(11), LONG_COSTS.buckets)
    taken_N = jnp.asarray(rows_T)[2 + budget_N] - 2
    return jax.vmap(schedule.select_prefixes)(survival_N2G, taken_N, active_N2).reshape(-1)


@functools.cache
def choice_table():
    """The choice for each pair of token contexts that confidences may show; the last is unknown."""
    contexts = list(itertools.product(range(2), repeat=4))
    confidence = np.array([[LONG.confidence_GV[k, c] for k, c in enumerate(t)] for t in contexts])
    survival = np.vstack([np.cumprod(confidence, axis=1), np.ones(4)])
    number = range(len(survival))
    known = np.arange(len(survival)) < len(contexts)
    active = np.ones(2, bool)
    return np.array(
        [
            [
                budget.best_bucket(survival[[i, j]], known[[i, j]], active, LONG_COSTS)
                for j in number
            ]
            for i in number
        ]
    )


def on_device_delayed(now_BG, older_BG):
    """`best_bucket` of the confidences of two rounds ago, looked up by what they were."""
    context_BG = (older_BG == LONG.confidence_GV[:, 1]).astype(jnp.int32)
    context_B = context_BG @ (2 ** np.arange(4)[::-1])
    context_N2 = jnp.where(older_BG[:, 0] > 1, 16, context_B).reshape(-1, 2)
    choice_N = jnp.asarray(choice_table())[context_N2[:, 0], context_N2[:, 1]]
    taken_N = jnp.array([2, *LONG_COSTS.buckets])[choice_N] - 2
    survival_N2G = pairs_of(schedule.prefix_survival(now_BG))
    active_N2 = jnp.ones(survival_N2G.shape[:2], bool)
    return jax.vmap(schedule.select_prefixes)(survival_N2G, taken_N, active_N2).reshape(-1)


def on_device_hindsight(now_BG, older_BG):
    """The choice of `on_device_delayed` from this round's confidences: too early."""
    return on_device_delayed(now_BG, now_BG)


@functools.partial(jax.jit, static_argnames=("num_tokens", "lengths", "coupled", "stream_key"))
def decode_pairs(laws, keys_B2, num_tokens, lengths, coupled, stream_key):
    """Texts [B, num_tokens]; requests 2 i and 2 i + 1 share their rounds."""
    num_slots = laws.draft_NGVU.shape[1]
    row_B = jnp.zeros(len(keys_B2), jnp.int32)

    def step(_, state):
        token_BS, length_B, last_BG, older_BG = state

        def choose(now_BG, _):
            return lengths(now_BG, older_BG)

        state = token_BS, length_B, last_BG
        return *decode_round(laws, row_B, keys_B2, choose, coupled, state), last_BG

    with mock.patch.object(random, "stream_key", stream_key):  # while the function is traced
        token_BS = jnp.zeros((len(keys_B2), 1 + num_tokens * (num_slots + 1)), jnp.int32)
        unknown_BG = jnp.full((len(keys_B2), num_slots), 2.0)
        state = token_BS, jnp.ones(len(keys_B2), jnp.int32), unknown_BG, unknown_BG
        token_BS, *_ = jax.lax.fori_loop(0, num_tokens, step, state)
    return token_BS[:, 1 : 1 + num_tokens]


def decode(lengths, keys, coupled=False, stream_key=random.stream_key, num_tokens=8):
    laws = laws_of(LONG)
    return np.asarray(decode_pairs(laws, keys, num_tokens, lengths, coupled, stream_key))


@pytest.mark.parametrize(
    "lengths", rest_full([on_device_causal, on_device_delayed], (on_device_delayed,))
)
def test_with_the_real_keys_texts_follow_the_target(lengths):
    assert abs(chi_square_z(decode(lengths, keys_of(100_000)), LONG, PLAIN)) < SOUND_Z


@pytest.mark.parametrize(
    ("lengths", "stream_key"),
    [(on_device_delayed, key_by_token_position), (on_device_hindsight, random.stream_key)],
    ids=["keys of the token position alone", "the budget of this round"],
)
def test_with_the_real_keys_a_wrong_rule_is_noticed(lengths, stream_key):
    texts = decode(lengths, keys_of(100_000), stream_key=stream_key)
    assert chi_square_z(texts, LONG, PLAIN) > BROKEN_Z


ON_DEVICE = [on_device_none, on_device_causal, on_device_delayed, on_device_hindsight]


@pytest.mark.smoke
@pytest.mark.parametrize("lengths", ON_DEVICE)
def test_coupled_text_is_plain_text_under_any_schedule_beside_any_neighbour(lengths):
    keys = keys_of(2000, 3)
    expected = np.asarray(plain_texts(law_table(LONG, PLAIN), keys, 8))
    order = np.random.default_rng(0).permutation(2000)
    for arranged in (np.arange(2000), order):
        texts = decode(lengths, keys[arranged], coupled=True)
        np.testing.assert_array_equal(texts, expected[arranged])


def test_rejection_text_does_depend_on_its_neighbour():
    """So the comparison above can tell schedules apart."""
    keys = keys_of(2000, 3)
    order = np.random.default_rng(0).permutation(2000)
    texts, arranged = decode(on_device_delayed, keys), decode(on_device_delayed, keys[order])
    assert (texts[order] != arranged).any()
