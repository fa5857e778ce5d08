"""Acceptance, stop tokens, commit and simple schedules; the reference's rounds replayed."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax import sampling
from dspark_jax.engine import verify
from dspark_jax.scheduler import schedule
from pallas_kernels import random
from pallas_kernels.accept_block import rule, xla
from pallas_kernels.accept_block.api import Drafts, Requests, VerifyPlan, accept_block
from pallas_kernels.accept_block.xla import first_argmax

GOLDEN = Path(__file__).parent / "data" / "verify_sampling"

B, G, V = 300, 3, 11  # shared, so that each function is compiled once

truncate_at_stop = jax.jit(verify.truncate_at_stop)
commit_tokens = jax.jit(verify.commit_tokens)
draft_logprob = jax.jit(sampling.draft_logprob)
stream_key = jax.jit(random.stream_key)
fold_in = jax.jit(random.fold_in)
uniform, gumbel = (jax.jit(draw, static_argnums=1) for draw in (random.uniform, random.gumbel))


def random_laws(rng, *shape):
    logits = 1.5 * rng.standard_normal(shape)
    return jnp.array(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True), jnp.float32)


def drawn_block(seed, draft_size=V):
    """Target and draft laws, drafts drawn from them, lengths 0 to G, keys, anchor positions."""
    rng = np.random.default_rng(seed)
    target, draft = random_laws(rng, B, G + 1, V), random_laws(rng, B, G, draft_size)
    index = (np.asarray(draft) + rng.gumbel(size=draft.shape)).argmax(-1).astype(np.int32)
    length = jnp.arange(B, dtype=jnp.int32) % (G + 1)
    keys = fold_in(random.seed_key(seed), jnp.arange(B))
    return target, draft, jnp.array(index), length, keys, 5 + length


@jax.jit
def accept_rejection(law_BCV, index_BG, draft_law_BGU, d2t_U, length_B, key_B2, anchor_B):
    drafts = Drafts(index_BG, draft_law_BGU, d2t_U)
    return accept(law_BCV, drafts, length_B, key_B2, anchor_B, "rejection")


@jax.jit
def accept_coupled(law_BCV, draft_BG, length_B, key_B2, anchor_B):
    return accept(law_BCV, Drafts(draft_BG), length_B, key_B2, anchor_B, "coupled")


def accept(law_BCV, drafts, length_B, key_B2, anchor_B, rule):
    """Acceptance of laws instead of logits: temperature 1 and no filters."""
    shape = law_BCV.shape[:2]
    slot_BC, column_BC = jnp.indices(shape)
    row_BC = jnp.arange(slot_BC.size).reshape(shape)
    plan = VerifyPlan(slot_BC.reshape(-1), column_BC.reshape(-1), row_BC, length_B)
    requests = Requests(jnp.ones(shape[0]), key_B2, anchor_B)
    law_TV = law_BCV.reshape(row_BC.size, -1)
    floor_T = jnp.full(row_BC.size, -jnp.inf)
    return accept_block(law_TV, floor_T, plan, drafts, requests, rule=rule)


@jax.jit
def accepted_prefix(target_law_BG, draft_law_BG, uniform_BG, length_B):
    chance_BG = rule.acceptance_chance(target_law_BG, draft_law_BG)
    return rule.leading(uniform_BG < chance_BG, length_B)


@jax.jit
def next_weight(target_law_BV, draft_law_BGU, accepted_B, length_B):
    """The law of the next token up to a factor, as logarithms."""
    draft_law_BV = at(draft_law_BGU, jnp.minimum(accepted_B, draft_law_BGU.shape[1] - 1))
    excess_BV = xla.excess(target_law_BV, draft_law_BV, None)
    fell_B = (accepted_B < length_B) & (excess_BV.sum(axis=-1) > xla.LEAST_MASS)
    return jnp.where(fell_B[:, None], jnp.log(excess_BV), target_law_BV)


def at(law_BCV, column_B):
    return jnp.take_along_axis(law_BCV, column_B[:, None, None], axis=1)[:, 0]


def of_token(law, token_BG):
    return jnp.array(
        np.take_along_axis(
            np.asarray(law)[:, : token_BG.shape[1]], np.asarray(token_BG)[..., None], -1
        )[..., 0]
    )


@pytest.fixture(scope="module", params=["0", "0.6", "1"])
def golden(request):
    """One temperature of the reference's recorded rounds: temperature, arrays, row names."""
    arrays = dict(np.load(GOLDEN / f"temperature{request.param}.npz"))
    names = json.loads((GOLDEN / f"temperature{request.param}_rows.json").read_text())
    return float(request.param), arrays, names["row_names"]


def golden_laws(temperature, arrays, names):
    """The library's laws of the recorded logits, and the one draft law that was made by hand."""
    temperature = jnp.full((len(names), 1), temperature)
    off = jnp.zeros(temperature.shape, jnp.int32), jnp.ones((1, 1)), jnp.zeros((1, 1))
    target = jax.jit(sampling.target_logprob)(arrays["target_logits"], temperature, *off)
    draft = np.array(draft_logprob(arrays["draft_logits"], temperature))
    by_hand = np.array(names) == "one_hot_draft_probs"
    one_hot = arrays["draft_probs"][by_hand] > 0
    draft[by_hand] = np.where(one_hot, 0, -np.inf)
    return target, jnp.array(draft)


def test_golden_laws(golden):
    target, draft = golden_laws(*golden)
    _, arrays, _ = golden
    np.testing.assert_allclose(np.exp(target), arrays["target_probs"], rtol=2e-5, atol=1e-7)
    np.testing.assert_allclose(np.exp(draft), arrays["draft_probs"], rtol=2e-5, atol=1e-7)


@pytest.mark.smoke
def test_golden_rounds(golden):
    _, arrays, _ = golden
    target_BCV, draft_BGV = golden_laws(*golden)
    token_BG = jnp.array(arrays["tokens"], jnp.int32)
    length_B = jnp.array(arrays["count"], jnp.int32)
    token_laws = of_token(target_BCV, token_BG), of_token(draft_BGV, token_BG)
    accepted_B = accepted_prefix(*token_laws, arrays["uniforms"], length_B)
    mask_BG = np.arange(5) < np.asarray(accepted_B)[:, None]
    np.testing.assert_array_equal(mask_BG, arrays["accept_prefix_mask"])

    unmatched_B = jnp.full_like(accepted_B, -2)
    stop_id_BK = jnp.array(arrays["stop_token"], jnp.int32)[:, None]
    accepted_B, count_B, stopped_B = truncate_at_stop(token_BG, accepted_B, unmatched_B, stop_id_BK)
    np.testing.assert_array_equal(accepted_B, arrays["accepted_draft_tokens"])
    np.testing.assert_array_equal(stopped_B, arrays["terminated_by_stop_token"])
    np.testing.assert_array_equal(count_B, accepted_B + ~stopped_B)
    effective_B = jnp.where(stopped_B, accepted_B, length_B)
    np.testing.assert_array_equal(effective_B, arrays["effective_proposal_length"])

    # The reference draws a next token even after a stop token, from the row after it.
    weight_BV = next_weight(at(target_BCV, accepted_B), draft_BGV, accepted_B, length_B)
    next_BV = np.exp(jax.nn.log_softmax(weight_BV))
    np.testing.assert_allclose(next_BV, arrays["next_dist"], rtol=1e-4, atol=1e-6)
    next_B = (next_BV / arrays["exp_noise"]).argmax(-1)
    np.testing.assert_array_equal(next_B, arrays["next_token"])
    committed, length = commit_tokens(
        jnp.full((len(next_B), 6), -1), 0 * accepted_B, token_BG, accepted_B, next_B, accepted_B + 1
    )
    np.testing.assert_array_equal(committed, arrays["committed_tokens"])
    np.testing.assert_array_equal(length, arrays["committed_length"])


def test_golden_covers_its_edge_cases(golden):
    _, arrays, names = golden
    assert len(names) == len(arrays["count"]) >= 32
    assert set(arrays["count"]) >= {0, 5}
    assert arrays["terminated_by_stop_token"].sum() >= 3


@pytest.mark.full
def test_rejection_draws_its_own_streams():
    """The whole is its two parts, on the uniforms and the noise of the documented keys."""
    target, draft, index, length, keys, anchor = drawn_block(0)
    outcome = accept_rejection(target, index, draft, None, length, keys, anchor)
    assert outcome.accepted_B.dtype == outcome.next_B.dtype == jnp.int32

    slots = [stream_key(keys, random.ACCEPT, anchor, slot) for slot in range(G)]
    drawn = jnp.concatenate([uniform(key, 1) for key in slots], axis=1)
    accepted = accepted_prefix(of_token(target, index), of_token(draft, index), drawn, length)
    np.testing.assert_array_equal(outcome.accepted_B, accepted)
    assert set(np.asarray(accepted).tolist()) == set(range(G + 1))
    law = next_weight(at(target, accepted), draft, accepted, length)
    noise = gumbel(stream_key(keys, random.RESIDUAL, anchor, accepted), V)
    np.testing.assert_array_equal(outcome.next_B, first_argmax(law + noise))


def test_rows_beyond_the_length_are_not_read():
    target, draft, index, length, keys, anchor = drawn_block(1)
    beyond = (jnp.arange(G + 1) > length[:, None])[..., None]
    garbage = jnp.where(beyond, jnp.nan, target)
    for accept in (
        lambda law: accept_rejection(law, index, draft, None, length, keys, anchor),
        lambda law: accept_coupled(law, index, length, keys, anchor),
    ):
        clean, dirty = accept(target), accept(garbage)
        assert (clean.accepted_B <= length).all()
        np.testing.assert_array_equal(clean.accepted_B, dirty.accepted_B)
        np.testing.assert_array_equal(clean.next_B, dirty.next_B)


def test_a_reduced_vocabulary_is_a_law_with_zeros():
    target, draft, index, length, keys, anchor = drawn_block(2, draft_size=5)
    d2t = jnp.array([9, 2, 10, 4, 0])
    whole = np.full((B, G, V), -np.inf, np.float32)
    whole[..., d2t] = draft
    reduced = accept_rejection(target, index, draft, d2t, length, keys, anchor)
    padded = accept_rejection(target, d2t[index], jnp.array(whole), None, length, keys, anchor)
    np.testing.assert_array_equal(reduced.accepted_B, padded.accepted_B)
    np.testing.assert_array_equal(reduced.next_B, padded.next_B)
    assert not np.isin(reduced.next_B, d2t).all()


@pytest.mark.parametrize("acceptance", ["rejection", "coupled"])
def test_greedy_is_the_greedy_text(acceptance):
    laws, _, _, length, keys, anchor = drawn_block(3)
    best = np.asarray(laws).argmax(-1)
    wrong = np.random.default_rng(4).random((B, G)) < 0.3
    drafts = jnp.array(np.where(wrong, (best[:, :G] + 1) % V, best[:, :G]), jnp.int32)
    one_hot = [
        jnp.where(jnp.arange(V) == token[..., None], 0.0, -jnp.inf) for token in (best, drafts)
    ]
    if acceptance == "rejection":
        outcome = accept_rejection(one_hot[0], drafts, one_hot[1], None, length, keys, anchor)
    else:
        outcome = accept_coupled(one_hot[0], drafts, length, keys, anchor)
    equal = np.cumprod(~wrong, axis=1).sum(1)
    np.testing.assert_array_equal(outcome.accepted_B, np.minimum(equal, length))
    expected = best[np.arange(B), np.asarray(outcome.accepted_B)]
    np.testing.assert_array_equal(outcome.next_B, expected)


@pytest.mark.full
def test_acceptance_happens_at_its_rate():
    """A slot stands as often as 1 - TV says, and less often under coupling."""
    N = 40_000
    rng = np.random.default_rng(5)
    target = jnp.broadcast_to(random_laws(rng, 1, 2, V), (N, 2, V))
    draft = jnp.broadcast_to(random_laws(rng, 1, 1, V), (N, 1, V))
    keys = fold_in(random.seed_key(5), jnp.arange(N))
    anchor, length = jnp.full(N, 9, jnp.int32), jnp.ones(N, jnp.int32)
    index = first_argmax(draft[:, 0] + gumbel(stream_key(keys, random.DRAFT, anchor, 0), V))
    outcome = accept_rejection(target, index[:, None], draft, None, length, keys, anchor)
    rate = float(sampling.acceptance_rate(target[0, 0], draft[0, 0], None))
    error = np.sqrt(rate * (1 - rate) / N)
    assert abs(outcome.accepted_B.mean() - rate) < 4 * error

    index = first_argmax(draft[:, 0] + gumbel(random.noise_key(keys, anchor + 1), V))
    coupled = accept_coupled(target, index[:, None], length, keys, anchor).accepted_B.mean()
    # A coupling without communication reaches at least (1 - TV) / (1 + TV) (Daliri et al. 2024).
    assert rate / (2 - rate) - 4 * error < coupled < rate + 4 * error


@pytest.mark.parametrize(
    ("drafts", "accepted", "following", "stops", "expected"),
    [
        ([1, 2, 3], 3, 4, [-1, -1], (3, 4, False)),
        ([1, 2, 3], 0, 4, [-1, -1], (0, 1, False)),
        ([1, 2, 3], 3, 4, [2, -1], (2, 2, True)),
        ([1, 2, 3], 3, 4, [3, 1], (1, 1, True)),  # the first in the text, not in the list
        ([1, 2, 3], 3, 4, [3, -1], (3, 3, True)),  # the last draft: the next token is dropped
        ([1, 2, 3], 1, 4, [2, -1], (1, 2, False)),  # drafted and rejected
        ([1, 2, 3], 1, 2, [2, -1], (1, 2, True)),  # rejected, then drawn by the target
        ([1, 2, 3], 3, 4, [-1, 4], (3, 4, True)),
        ([2, 2, 2], 2, 2, [2, -1], (1, 1, True)),
        ([1, -1, -1], 1, 4, [-1, -1], (1, 2, False)),  # padding of both kinds never matches
    ],
)
def test_truncation_at_a_stop_token(drafts, accepted, following, stops, expected):
    arrays = (jnp.array([value]) for value in (drafts, accepted, following, stops))
    result = truncate_at_stop(*arrays)
    assert tuple(value.item() for value in result) == expected


def test_commit_appends_exactly_the_counted_tokens():
    tokens = jnp.full((5, 6), -7)
    length = jnp.array([1, 2, 3, 4, 5])
    drafts = jnp.arange(15).reshape(5, 3)
    accepted = jnp.array([3, 1, 2, 0, 3])
    count = jnp.array([4, 2, 2, 0, 4])  # all; all; the next token dropped; inactive; overflowing
    tokens, length = commit_tokens(tokens, length, drafts, accepted, 100 + jnp.arange(5), count)
    np.testing.assert_array_equal(
        tokens,
        [
            [-7, 0, 1, 2, 100, -7],
            [-7, -7, 3, 101, -7, -7],
            [-7, -7, -7, 6, 7, -7],
            [-7, -7, -7, -7, -7, -7],
            [-7, -7, -7, -7, -7, 12],
        ],
    )
    np.testing.assert_array_equal(length, [5, 4, 5, 4, 9])


def test_survival_never_rises_and_is_the_product():
    rng = np.random.default_rng(6)
    confidence = rng.uniform(0.999, 1, (5000, 7)).astype(np.float32)
    confidence[rng.random((5000, 7)) < 0.3] = 1
    survival = np.asarray(schedule.prefix_survival(jnp.array(confidence)))
    assert survival.dtype == np.float32
    assert (np.diff(survival, axis=1) <= 0).all()
    expected = np.cumprod(confidence.astype(np.float64), axis=1)
    np.testing.assert_allclose(survival, expected, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_confidence_counts_as_one_from_there_on(bad):
    confidence = jnp.array([[0.5, bad, 0.1, 0.2], [bad, 0.5, bad, 0.5], [0.5, 0.5, 0.5, bad]])
    survival = schedule.prefix_survival(confidence)
    expected = [[0.5, 0.5, 0.5, 0.5], [1, 1, 1, 1], [0.5, 0.25, 0.125, 0.125]]
    np.testing.assert_array_equal(survival, expected)
    np.testing.assert_array_equal(schedule.threshold_length(confidence, 0.4), [4, 4, 4])
    np.testing.assert_array_equal(schedule.threshold_length(confidence, 0.6), [0, 4, 0])


def test_threshold_is_static_and_on_each_slot():
    confidence = jnp.array([[0.9, 0.8, 0.7, 0.95], [0.5, 0.9, 0.9, 0.9], [0.9, 0.9, 0.9, 0.9]])
    np.testing.assert_array_equal(schedule.threshold_length(confidence, 0.75), [2, 0, 4])
    np.testing.assert_array_equal(schedule.threshold_length(confidence, 0.0), [4, 4, 4])
    np.testing.assert_array_equal(schedule.threshold_length(confidence, 1.5), [0, 0, 0])


def test_a_gate_is_passed_by_the_first_confidence_alone():
    confidence = jnp.array([[0.5, 0.1], [0.4, 0.9], [jnp.nan, 0.1], [0.6, jnp.nan]])
    length = jnp.array([2, 2, 1, 2], jnp.int32)
    np.testing.assert_array_equal(schedule.gated_length(length, confidence, 0.5), [2, 0, 1, 2])
    np.testing.assert_array_equal(schedule.gated_length(length, confidence, 0.0), length)


def test_fixed_length():
    np.testing.assert_array_equal(schedule.fixed_length(3, 7, 5), [5, 5, 5])
    for length in (-1, 8):
        with pytest.raises(ValueError, match=f"length is {length}.*0 to 7"):
            schedule.fixed_length(3, 7, length)
