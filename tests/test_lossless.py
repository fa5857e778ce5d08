"""The distribution of whole texts, over many seeds, is exactly the target's; broken rules show.

A target and a drafter are tables: the law of a token depends on the token before it (the drafter's
on the slot too). The vocabulary is small enough to enumerate every text of a few tokens, the real
functions decode one text for each of many keys, over as many rounds as it takes, and a chi-square
test compares the counts with the target's own probabilities. Seeds are fixed: a pass is a pass.
Every rule that losslessness rests on is then broken in turn, and the same test must notice.
"""

import contextlib
import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from dspark_jax import sampling
from dspark_jax.engine import verify
from dspark_jax.scheduler import schedule
from pallas_kernels import random
from pallas_kernels.accept_block import api, rule
from pallas_kernels.accept_block.api import Drafts, Requests, VerifyPlan
from pallas_kernels.accept_block.xla import first_argmax
from tests.marks import rest_full

target_logprob = jax.jit(sampling.target_logprob)
draft_logprob = jax.jit(sampling.draft_logprob)

G = 3
NUM_TOKENS = 4
NUM_KEYS = 100_000
SOUND_Z, BROKEN_Z = 4.0, 12.0


@dataclasses.dataclass(frozen=True)
class World:
    """Tables of a target and its drafter, indexed by the token before the slot."""

    target_VV: np.ndarray  # logits of the next token
    draft_GVU: np.ndarray  # logits of slot k
    confidence_GV: np.ndarray  # c_k: it has seen the tokens before slot k
    d2t_U: np.ndarray | None


def make_world(seed, vocabulary=4, d2t=None):
    """A drafter that resembles its target, less so from slot to slot."""
    rng = np.random.default_rng(seed)
    target = 1.2 * rng.standard_normal((vocabulary, vocabulary))
    away = rng.standard_normal((G, vocabulary, vocabulary))
    draft = target + away * np.array([0.6, 0.9, 1.2])[:, None, None]
    confidence = rng.uniform(0.1, 0.9, (G, vocabulary))
    if d2t is not None:
        draft, d2t = draft[..., d2t], np.array(d2t, np.int32)
    return World(target, draft, confidence, d2t)


WORLD = make_world(0)
REDUCED = make_world(1, d2t=[3, 0])


@dataclasses.dataclass(frozen=True)
class Setting:
    """Parameters of every request, and the temperature that its drafts are drawn at."""

    temperature: float = 1.0
    draft_temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


SETTINGS = {
    "plain": Setting(),
    "sharp target, flat draft": Setting(temperature=0.6, draft_temperature=1.5),
    "flat target, greedy draft": Setting(temperature=1.4, draft_temperature=0.0),
    "top-k": Setting(top_k=2),
    "top-p": Setting(temperature=1.2, top_p=0.8),
    "min-p": Setting(min_p=0.3),
    "all filters": Setting(temperature=1.3, draft_temperature=0.8, top_k=3, top_p=0.9, min_p=0.1),
    "greedy target": Setting(temperature=0.0),
}
PLAIN = "plain"


@struct.dataclass
class Laws:
    """A world under each of the N settings: log-probabilities of the target and the drafter."""

    target_NVV: jax.Array
    draft_NGVU: jax.Array
    confidence_GV: jax.Array
    d2t_U: jax.Array | None

    @property
    def ids_U(self):
        """Target ids of the draft vocabulary."""
        return jnp.arange(self.draft_NGVU.shape[-1]) if self.d2t_U is None else self.d2t_U


def laws_of(world):
    """:class:`Laws` through the library, one row for each of SETTINGS."""
    columns = zip(*map(dataclasses.astuple, SETTINGS.values()), strict=True)
    columns = [np.array(column, np.float32) for column in columns]
    temperature, draft_temperature, top_k, top_p, min_p = columns
    filters = (f[:, None] for f in (temperature, top_k.astype(np.int32), top_p, min_p))
    target_NVV = np.broadcast_to(world.target_VV, (len(SETTINGS), *world.target_VV.shape))
    draft_NGVU = np.broadcast_to(world.draft_GVU, (len(SETTINGS), *world.draft_GVU.shape))
    return Laws(
        target_logprob(target_NVV.astype(np.float32), *filters),
        draft_logprob(draft_NGVU.astype(np.float32), draft_temperature[:, None, None]),
        jnp.array(world.confidence_GV, jnp.float32),
        world.d2t_U,
    )


# Schedules: confidences of this block and of the one before -> slots to verify.


def all_slots(now_BG, before_BG):
    return schedule.fixed_length(*now_BG.shape, G)


def by_threshold(now_BG, before_BG):
    return schedule.threshold_length(now_BG, 0.45)


def by_gate(now_BG, before_BG):
    return schedule.gated_length(all_slots(now_BG, before_BG), now_BG, 0.5)


def a_round_late(now_BG, before_BG):
    return jnp.where(before_BG[:, -1] > 0.5, G, 0)


def retrospective(now_BG, before_BG):
    return jnp.where(now_BG[:, 1] > 0.5, G, 0)  # c_2 has seen d_1 and decides about slot 1


def draw_block(laws, row_B, keys_B2, anchor_B, position_B, coupled):
    """Drafts as draft indices, their laws, and confidences; left to right."""

    def draw(previous_B, slot):
        law_BU = laws.draft_NGVU[row_B, slot, previous_B]
        key_B2, id_U = random.stream_key(keys_B2, random.DRAFT, position_B, slot), None
        if coupled:
            key_B2, id_U = random.noise_key(keys_B2, position_B + 1 + slot), laws.d2t_U
        index_B = api.sample_tokens(law_BU, jnp.ones(len(law_BU)), key_B2, id_U)
        return laws.ids_U[index_B], (index_B, law_BU, laws.confidence_GV[slot, previous_B])

    _, by_slot = jax.lax.scan(draw, anchor_B, jnp.arange(laws.draft_NGVU.shape[1]))
    return tuple(jnp.moveaxis(drawn, 0, 1) for drawn in by_slot)


def decode_round(laws, row_B, keys_B2, choose, coupled, state):
    """One round through the library: draft, schedule, verify, accept, commit."""
    token_BS, length_B, before_BG = state
    position_B = length_B - 1
    anchor_B = token_BS[jnp.arange(len(length_B)), position_B]
    block = draw_block(laws, row_B, keys_B2, anchor_B, position_B, coupled)
    index_BG, draft_law_BGU, confidence_BG = block
    draft_BG = laws.ids_U[index_BG]
    context_BC = jnp.concatenate([anchor_B[:, None], draft_BG], axis=1)
    target_BCV = laws.target_NVV[row_B[:, None], context_BC]
    target_TV = target_BCV.reshape(-1, target_BCV.shape[-1])
    row_BC = jnp.arange(context_BC.size).reshape(context_BC.shape)
    slot_BC, column_BC = jnp.indices(context_BC.shape)
    verified_B = choose(confidence_BG, before_BG)
    # The laws as logits, at temperature 1 and without filters.
    outcome = api.accept_block(
        target_TV,
        jnp.full(len(target_TV), -jnp.inf),
        VerifyPlan(slot_BC.reshape(-1), column_BC.reshape(-1), row_BC, verified_B),
        Drafts(index_BG, draft_law_BGU, laws.d2t_U),
        Requests(jnp.ones(len(keys_B2)), keys_B2, position_B),
        rule="coupled" if coupled else "rejection",
    )
    no_stop_BK = jnp.full((len(length_B), 1), -1)
    accepted_B, count_B, _ = verify.truncate_at_stop(
        draft_BG, outcome.accepted_B, outcome.next_B, no_stop_BK
    )
    commit = token_BS, length_B, draft_BG, accepted_B, outcome.next_B, count_B
    return *verify.commit_tokens(*commit), confidence_BG


@functools.partial(jax.jit, static_argnames=("num_tokens", "choose", "coupled", "broken"))
def decode_texts(laws, row_B, keys_B2, num_tokens, choose, coupled, broken):
    with contextlib.ExitStack() as stack:  # in force while the function is traced
        for module, name, replacement in broken:
            stack.enter_context(mock.patch.object(module, name, replacement))
        token_BS = jnp.zeros((len(keys_B2), 1 + num_tokens * (G + 1)), jnp.int32)
        state = token_BS, jnp.ones(len(keys_B2), jnp.int32), jnp.ones((len(keys_B2), G))
        step = functools.partial(decode_round, laws, row_B, keys_B2, choose, coupled)
        token_BS, _, _ = jax.lax.fori_loop(0, num_tokens, lambda _, state: step(state), state)
    return token_BS[:, 1 : 1 + num_tokens]


@functools.partial(jax.jit, static_argnums=0)
def keys_of(num, seed=0):
    return random.fold_in(random.fold_in(jnp.zeros(2, jnp.uint32), seed), jnp.arange(num))


def decode(world, setting, keys=None, choose=all_slots, coupled=False, broken=(), num=NUM_TOKENS):
    """Texts [keys, num] of a prompt of one token 0, one for each key."""
    keys = keys_of(NUM_KEYS) if keys is None else keys
    row_B = np.full(len(keys), list(SETTINGS).index(setting), np.int32)
    return np.asarray(decode_texts(laws_of(world), row_B, keys, num, choose, coupled, broken))


def law_table(world, setting):
    """The target's filtered law [V, V] as log-probabilities."""
    return laws_of(world).target_NVV[list(SETTINGS).index(setting)]


def chi_square_z(texts, world, setting):
    """How many standard deviations the counts of texts lie from the target's law; inf if a
    text occurs that the target cannot say."""
    law_VV = np.exp(np.asarray(law_table(world, setting), np.float64))
    law_VV /= law_VV.sum(-1, keepdims=True)
    joint, previous, code = np.ones(1), np.zeros(1, int), np.zeros(len(texts), int)
    for column in texts.T:
        joint = (joint[:, None] * law_VV[previous]).reshape(-1)
        previous = np.tile(np.arange(len(law_VV)), len(previous))
        code = code * len(law_VV) + column
    counts, expected = np.bincount(code, minlength=len(joint)), joint * len(texts)
    if counts[expected == 0].any():
        return np.inf
    rare = expected < 10  # pooled: chi-square wants a few in each cell
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    degrees = len(expected) - 1
    if degrees == 0:
        return 0.0
    # Wilson and Hilferty: the cube root of chi-square / degrees is close to normal.
    ratio = ((counts - expected) ** 2 / expected).sum() / degrees
    spread = 2 / (9 * degrees)
    return (np.cbrt(ratio) - (1 - spread)) / np.sqrt(spread)


each_setting = pytest.mark.parametrize("setting", SETTINGS)
some_settings = pytest.mark.parametrize("setting", rest_full(SETTINGS, (PLAIN, "all filters")))
both_acceptances = pytest.mark.parametrize("coupled", [False, True], ids=["rejection", "coupled"])


@both_acceptances
@some_settings
def test_texts_follow_the_target(setting, coupled):
    texts = decode(WORLD, setting, coupled=coupled)
    assert abs(chi_square_z(texts, WORLD, setting)) < SOUND_Z


@both_acceptances
@some_settings
def test_with_a_reduced_vocabulary_and_lengths_that_depend_on_the_drafts(setting, coupled):
    texts = decode(REDUCED, setting, choose=by_threshold, coupled=coupled)
    assert abs(chi_square_z(texts, REDUCED, setting)) < SOUND_Z


@pytest.mark.parametrize(
    "choose", rest_full([by_threshold, by_gate, a_round_late], (a_round_late,))
)
def test_non_anticipating_schedules_keep_the_law(choose):
    assert abs(chi_square_z(decode(WORLD, PLAIN, choose=choose), WORLD, PLAIN)) < SOUND_Z


def test_any_schedule_at_all_keeps_the_law_under_coupling():
    texts = decode(WORLD, PLAIN, choose=retrospective, coupled=True)
    assert abs(chi_square_z(texts, WORLD, PLAIN)) < SOUND_Z


@both_acceptances
def test_requests_of_one_batch_each_follow_their_own_law(coupled):
    row_B = np.arange(NUM_KEYS, dtype=np.int32) % len(SETTINGS)
    laws, keys = laws_of(WORLD), keys_of(NUM_KEYS)
    texts = decode_texts(laws, row_B, keys, NUM_TOKENS, by_threshold, coupled, ())
    for row, setting in enumerate(SETTINGS):
        own = np.asarray(texts)[row_B == row]
        assert abs(chi_square_z(own, WORLD, setting)) < SOUND_Z


# The library's functions, each with one rule broken.

accept_block, acceptance_chance = api.accept_block, rule.acceptance_chance
choose, stream_key = rule._choose, random.stream_key


def chance_upside_down(target_X, draft_X):
    return acceptance_chance(draft_X, target_X)


def chance_of_the_target_alone(target_X, draft_X):
    return acceptance_chance(target_X, jnp.zeros_like(draft_X))


def choose_the_target_always(draws_B, fell_B, axis_name):
    return choose(draws_B, jnp.zeros_like(fell_B), axis_name)


def choose_the_residual_always(draws_B, fell_B, axis_name):
    return choose(draws_B, jnp.ones_like(fell_B), axis_name)


def accept_against_another_law(logits_TV, floor_T, plan, drafts, requests, **options):
    hotter = drafts._replace(logits_BGU=drafts.logits_BGU / 1.3)
    return accept_block(logits_TV, floor_T, plan, hotter, requests, **options)


def key_by_token_position(key_B2, stream, anchor_position_B, slot):
    return random.fold_in(key_B2, anchor_position_B + slot, stream)


def key_of_one_stream(key_B2, stream, anchor_position_B, slot):
    return stream_key(key_B2, random.DRAFT, anchor_position_B, slot)


BROKEN = {
    "acceptance ratio upside down": (rule, "acceptance_chance", chance_upside_down),
    "accepted with p alone": (rule, "acceptance_chance", chance_of_the_target_alone),
    "no residual": (rule, "_choose", choose_the_target_always),
    "bonus from the residual": (rule, "_choose", choose_the_residual_always),
    "another draft law": (api, "accept_block", accept_against_another_law),
    "one stream for all": (random, "stream_key", key_of_one_stream),
}


@pytest.mark.parametrize(
    "name", rest_full(BROKEN, ("accepted with p alone", "no residual", "another draft law"))
)
def test_a_broken_rule_is_noticed(name):
    texts = decode(WORLD, PLAIN, choose=by_threshold, broken=(BROKEN[name],))
    assert chi_square_z(texts, WORLD, PLAIN) > BROKEN_Z


def test_keys_of_the_token_position_alone_are_noticed():
    """A rejected position is drafted again with the noise that moved the old confidences."""
    broken = ((random, "stream_key", key_by_token_position),)
    texts = decode(WORLD, PLAIN, choose=a_round_late, broken=broken)
    assert chi_square_z(texts, WORLD, PLAIN) > BROKEN_Z


def test_a_retrospective_schedule_is_noticed():
    texts = decode(WORLD, PLAIN, choose=retrospective)
    assert chi_square_z(texts, WORLD, PLAIN) > BROKEN_Z


def best_throughput_in_hindsight(now_BG, before_BG):
    """The length of the highest throughput over all confidences (DSpark, appendix A)."""
    steps_per_s = jnp.array([1.0, 0.5, 0.45, 0.0])
    tau_BG = 1 + jnp.cumsum(schedule.prefix_survival(now_BG), axis=1)
    tau_BC = jnp.pad(tau_BG, ((0, 0), (1, 0)), constant_values=1)
    return jnp.argmax(tau_BC * steps_per_s, axis=1)


@pytest.mark.parametrize(
    ("choose", "expected"), [(all_slots, 0.7), (best_throughput_in_hindsight, 0.85)]
)
def test_the_counterexample_of_the_paper(choose, expected):
    """Target (0.7, 0.3), draft (0.5, 0.5), c_1 = 0.8, c_2 = 0.9 after token 0, else 0."""
    target = np.log([[0.7, 0.3], [0.7, 0.3]])
    confidence = np.array([[0.8, 0.8], [0.9, 0.0], [0.0, 0.0]])
    world = World(target, np.zeros((G, 2, 2)), confidence, None)
    first = decode(world, PLAIN, choose=choose, num=1)[:, 0]
    assert abs((first == 0).mean() - expected) < 4 * np.sqrt(0.25 / NUM_KEYS)


@functools.partial(jax.jit, static_argnums=2)
def plain_texts(law_VV, keys, num):
    """Plain decoding from the coupled field: no drafts, no blocks."""
    token_B = jnp.zeros(len(keys), jnp.int32)
    texts = []
    for position in range(1, 1 + num):
        key_B2 = random.noise_key(keys, jnp.int32(position))
        noise_BV = random.gumbel(key_B2, law_VV.shape[-1])
        token_B = first_argmax(law_VV[token_B] + noise_BV)
        texts.append(token_B)
    return jnp.stack(texts, axis=1)


@some_settings
def test_coupled_text_depends_on_target_prompt_and_seed_alone(setting):
    """Not on the drafter, its vocabulary, the schedule, the batch, or drafting at all."""
    keys, num = keys_of(2000, 7), 8
    expected = np.asarray(plain_texts(law_table(WORLD, setting), keys, num))
    assert np.ptp(expected, axis=0).max() > 0 or setting == "greedy target"

    drafters = [make_world(seed, d2t=d2t) for seed, d2t in ((5, None), (6, None), (7, [2, 1]))]
    drafters = [dataclasses.replace(drafter, target_VV=WORLD.target_VV) for drafter in drafters]
    for drafter, choose in [(drafters[0], all_slots), (drafters[1], retrospective)]:
        texts = decode(drafter, setting, keys, choose, coupled=True, num=num)
        np.testing.assert_array_equal(texts, expected)
    order = np.random.default_rng(8).permutation(2000)
    texts = decode(drafters[2], setting, keys[order], by_threshold, coupled=True, num=num)
    np.testing.assert_array_equal(texts, expected[order])


def test_rejection_text_does_depend_on_the_drafter():
    """So the comparison above has the power to tell two texts apart."""
    keys = keys_of(2000, 7)
    drafters = [dataclasses.replace(make_world(seed), target_VV=WORLD.target_VV) for seed in (5, 6)]
    texts = [decode(drafter, PLAIN, keys, num=8) for drafter in drafters]
    assert (texts[0] != texts[1]).any(axis=1).mean() > 0.5


@pytest.mark.full
@both_acceptances
@each_setting
@pytest.mark.parametrize("choose", [all_slots, by_threshold, a_round_late])
@pytest.mark.parametrize("world", [WORLD, REDUCED], ids=["whole", "reduced"])
def test_texts_follow_the_target_over_a_million_keys(world, choose, setting, coupled):
    keys = keys_of(1_000_000, 9)
    texts = decode(world, setting, keys, choose, coupled, num=5)
    assert abs(chi_square_z(texts, world, setting)) < SOUND_Z
