"""Laws against a float64 reference with a full sort; draws, keys, residual, acceptance rate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax import sampling
from pallas_kernels import random
from pallas_kernels.accept_block import xla
from pallas_kernels.random import ACCEPT, DRAFT, FIELD, RESIDUAL

target_logprob = jax.jit(sampling.target_logprob)
draft_logprob = jax.jit(sampling.draft_logprob)
first_argmax = jax.jit(xla.first_argmax)
excess = jax.jit(xla.excess)
acceptance_rate = jax.jit(sampling.acceptance_rate)
stream_key = jax.jit(random.stream_key)
fold_in = jax.jit(random.fold_in)
gumbel = jax.jit(random.gumbel, static_argnums=1)

# temperature, top_k, top_p, min_p
SETTINGS = [
    (1.0, 0, 1.0, 0.0),
    (0.0, 0, 1.0, 0.0),
    (0.3, 0, 1.0, 0.0),
    (1.7, 5, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 10_000, 1.0, 0.0),
    (0.8, 0, 0.9, 0.0),
    (1.0, 0, 1e-30, 0.0),
    (1.0, 0, 0.999, 0.0),
    (1.2, 0, 1.0, 0.1),
    (1.0, 0, 1.0, 1.0),
    (0.9, 20, 0.8, 0.05),
    (1.5, 8, 0.95, 0.3),
    (0.0, 3, 0.5, 0.5),
]


def arguments(settings):
    temperature, top_k, top_p, min_p = zip(*settings, strict=True)
    return (
        jnp.array(temperature, jnp.float32),
        jnp.array(top_k, jnp.int32),
        jnp.array(top_p, jnp.float32),
        jnp.array(min_p, jnp.float32),
    )


def random_logits(seed, *shape):
    return 3 * np.random.default_rng(seed).standard_normal(shape, np.float32)


def reference_law(logits, temperature, top_k, top_p, min_p):
    """Probabilities of one row in float64: every filter as it is usually written, by sorting."""
    scores = logits.astype(np.float64)
    if temperature == 0:
        return np.eye(len(scores))[scores.argmax()]
    scores = scores / np.float64(np.float32(temperature))
    if top_k > 0:
        scores[scores < np.sort(scores)[::-1][min(top_k, len(scores)) - 1]] = -np.inf
    probs = np.exp(scores - scores.max())
    probs /= probs.sum()
    if top_p < 1:
        mass_above = np.array([probs[probs > p].sum() for p in probs])
        probs[mass_above >= np.float64(np.float32(top_p))] = 0
    probs[probs < np.float64(np.float32(min_p)) * probs.max()] = 0
    return probs / probs.sum()


def assert_is_law(logprob, expected):
    logprob = np.asarray(logprob)
    np.testing.assert_array_equal(np.isneginf(logprob), expected == 0)
    np.testing.assert_allclose(np.exp(logprob), expected, rtol=2e-5, atol=1e-7)


@pytest.mark.smoke
@pytest.mark.parametrize("seed", range(8))
def test_target_law_matches_the_reference(seed):
    logits = random_logits(seed, len(SETTINGS), 97)
    law = target_logprob(logits, *arguments(SETTINGS))
    assert law.dtype == jnp.float32
    for row, settings in enumerate(SETTINGS):
        assert_is_law(law[row], reference_law(logits[row], *settings))


@pytest.mark.parametrize("seed", range(4))
def test_tokens_that_tie_at_a_threshold_stay_together(seed):
    rng = np.random.default_rng(seed)
    logits = rng.integers(-3, 3, (len(SETTINGS), 97)).astype(np.float32)
    law = np.asarray(target_logprob(jnp.array(logits), *arguments(SETTINGS)))
    for row, settings in enumerate(SETTINGS):
        if settings[0] == 0:
            assert law[row].argmax() == logits[row].argmax()  # one token: the first of the best
            continue
        for value in range(-3, 3):
            assert len(np.unique(law[row, logits[row] == value])) <= 1
        assert_is_law(law[row], reference_law(logits[row], *settings))


def test_a_whole_vocabulary():
    settings = [(1.0, 0, 0.9, 0.0), (0.7, 50, 0.95, 0.0), (1.0, 0, 1.0, 0.02)]
    logits = 2 * np.random.default_rng(0).standard_normal((3, 49152)).astype(np.float32)
    law = np.asarray(target_logprob(jnp.array(logits), *arguments(settings)))
    for row, (temperature, top_k, top_p, min_p) in enumerate(settings):
        probs = np.exp(logits[row].astype(np.float64) / np.float32(temperature))
        order = np.argsort(-probs)
        kept = top_k or len(probs)
        cumulative = np.cumsum(probs[order][:kept]) / probs[order][:kept].sum()
        kept = min(kept, 1 + int((cumulative < top_p).sum()))
        kept = min(kept, int((probs >= min_p * probs.max()).sum()))
        # The last token of the nucleus may differ where the mass meets p within float32.
        assert abs((law[row] > -np.inf).sum() - kept) <= 1
        assert set(order[: kept - 1]) <= set(np.flatnonzero(law[row] > -np.inf))
        np.testing.assert_allclose(np.exp(law[row]).sum(), 1, rtol=1e-5)


def smallest_reach_by_sorting(gap, weight, need):
    """Of one row: the first of the sorted gaps within which the weights suffice."""
    for reach in np.unique(gap):
        if weight[gap <= reach].sum() >= need:
            return reach
    return np.float32(np.inf)


@pytest.mark.parametrize("sparing", [False, True])
@pytest.mark.parametrize("size", [1, 97, 700, 2049])
def test_both_searches_find_the_threshold_that_sorting_finds(sparing, size):
    """Weights are multiples of 2^-10 with exact sums, so that the order of a sum means nothing."""
    rng, rows = np.random.default_rng(size), 8
    gap = rng.exponential(5, (rows, size)).astype(np.float32)
    gap[1] = rng.integers(0, 3, size)  # ties
    gap[2, 1:] = np.inf
    gap[3] = np.nextafter(np.float32(1), rng.integers(0, 3, size), dtype=np.float32)  # neighbours
    gap[:, 0] = 0
    weight = (rng.integers(0, 1024, (rows, size)) / 1024).astype(np.float32)
    need = rng.uniform(0, 1, rows).astype(np.float32) * weight.sum(-1)
    need[4:7] = np.inf, 0, weight[6].sum()
    search = jax.jit(sampling.Search(sparing=sparing).smallest_reach)
    found = search(gap, weight, need)
    expected = list(map(smallest_reach_by_sorting, gap, weight, need))
    np.testing.assert_array_equal(found, expected)
    count = np.array([1, 2, 3, 50, size, size + 1, np.inf, 1], np.float32)
    found = search(gap, jnp.float32(1), count)
    expected = list(map(smallest_reach_by_sorting, gap, np.ones_like(gap), count))
    np.testing.assert_array_equal(found, expected)


def test_leading_axes_broadcast():
    logits = random_logits(0, len(SETTINGS), 3, 97)
    law = target_logprob(logits, *(field[:, None] for field in arguments(SETTINGS)))
    for column in range(3):
        alone = target_logprob(logits[:, column], *arguments(SETTINGS))
        np.testing.assert_array_equal(law[:, column], alone)


def test_a_law_does_not_depend_on_its_neighbours():
    """Neighbours decide which passes run at all, and none may touch a row that did not ask."""
    logits = random_logits(1, len(SETTINGS), 997)
    together = target_logprob(logits, *arguments(SETTINGS))
    for row, settings in enumerate(SETTINGS):
        same = target_logprob(logits, *arguments([settings] * len(SETTINGS)))
        np.testing.assert_array_equal(together[row], same[row])


def test_extreme_temperatures_logits_and_dtypes():
    tiny = target_logprob(jnp.array([[1.0, 2.0, 2.0]]), *arguments([(1e-30, 0, 1.0, 0.0)]))
    np.testing.assert_allclose(np.exp(tiny), [[0, 0.5, 0.5]], atol=1e-7)
    huge = target_logprob(jnp.array([[3e38, -3e38, 0.0]]), *arguments([(0.5, 2, 0.9, 0.1)]))
    np.testing.assert_array_equal(huge, [[0, -jnp.inf, -jnp.inf]])
    forbidden = target_logprob(
        jnp.array([[-jnp.inf, 0.0, -jnp.inf, 0.0]]), *arguments([(1.0, 3, 0.99, 0.0)])
    )
    np.testing.assert_allclose(np.exp(forbidden), [[0, 0.5, 0, 0.5]], atol=1e-7)
    signed_zeros = target_logprob(jnp.array([[-0.0, 0.0, -1.0]]), *arguments([(1.0, 1, 0.1, 0.0)]))
    np.testing.assert_allclose(np.exp(signed_zeros), [[0.5, 0.5, 0]], atol=1e-7)
    coarse = jnp.array([[1.0, 3.0, -2.0]], jnp.bfloat16)
    for settings in ((0.0, 0, 1.0, 0.0), (0.7, 2, 0.9, 0.1)):
        law = target_logprob(coarse, *arguments([settings]))
        assert law.dtype == jnp.float32
        fine = target_logprob(coarse.astype(jnp.float32), *arguments([settings]))
        np.testing.assert_array_equal(law, fine)


def test_the_draft_law_is_the_unfiltered_target_law():
    logits = random_logits(2, 6, 97)
    for temperatures in ([0, 0.5, 1, 1.5, 0, 3], [0] * 6, [1] * 6):
        temperature = jnp.array(temperatures, jnp.float32)
        off = (jnp.zeros(6, jnp.int32), jnp.ones(6), jnp.zeros(6))
        expected = target_logprob(logits, temperature, *off)
        np.testing.assert_array_equal(draft_logprob(logits, temperature), expected)


def test_no_sort_of_the_vocabulary():
    shapes = (jnp.zeros((2, 97)), jnp.ones(2), jnp.ones(2, jnp.int32), jnp.ones(2), jnp.ones(2))
    assert " sort[" not in str(jax.make_jaxpr(sampling.target_logprob)(*shapes))


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("temperature", -0.1, "greedy"),
        ("temperature", float("nan"), "give 0"),
        ("temperature", float("inf"), "greedy"),
        ("top_k", -1, r"in 0\.\.2\^31-1"),
        ("top_k", 2**31, r"in 0\.\.2\^31-1"),
        ("top_p", 0.0, r"\(0, 1\]"),
        ("top_p", 1.01, r"\(0, 1\]"),
        ("top_p", float("nan"), r"\(0, 1\]"),
        ("min_p", -0.01, r"\[0, 1\]"),
        ("min_p", 1.5, r"\[0, 1\]"),
        ("min_p", float("nan"), r"\[0, 1\]"),
    ],
)
def test_a_meaningless_parameter_is_refused(name, value, remedy):
    valid = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    sampling.check_sampling(**valid)
    with pytest.raises(ValueError, match=rf"{name} is {value}: .*{remedy}"):
        sampling.check_sampling(**{**valid, name: value})


def test_sampling_is_frozen():
    greedy = sampling.Sampling(*arguments([(0.0, 0, 1.0, 0.0)]))
    with pytest.raises(AttributeError):
        greedy.top_k_B = jnp.ones(1)


def test_first_argmax_is_argmax_and_stays_in_range():
    scores = np.random.default_rng(3).integers(0, 9, (50, 4, 33)).astype(np.float32)
    np.testing.assert_array_equal(first_argmax(scores), scores.argmax(-1))
    odd = jnp.array([[-jnp.inf] * 3, [jnp.nan] * 3, [0.0, jnp.nan, 1.0], [-jnp.inf, 2.0, jnp.inf]])
    index = first_argmax(odd)
    assert index.dtype == jnp.int32
    assert ((index >= 0) & (index < 3)).all()
    assert index[3] == 2


def test_draws_follow_the_law():
    law = target_logprob(jnp.array([[0.0, 1.0, -1.0, 2.0, 0.5]]), *arguments([(1.0, 4, 1.0, 0.0)]))
    keys = fold_in(random.seed_key(0), jnp.arange(200_000))
    tokens = first_argmax(law + gumbel(keys, 5))
    expected = 200_000 * np.exp(np.asarray(law[0], np.float64))
    counts = np.bincount(tokens, minlength=5)
    assert counts[expected == 0].sum() == 0
    some = expected > 0
    assert ((counts[some] - expected[some]) ** 2 / expected[some]).sum() < 20  # 3 degrees


def test_a_one_hot_law_ignores_the_noise():
    logits = random_logits(4, 300, 41)
    noise = gumbel(fold_in(random.seed_key(1), jnp.arange(300)), 41)
    tokens = first_argmax(draft_logprob(logits, jnp.zeros(300)) + noise)
    np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_streams_are_independent_and_keyed_by_anchor_and_slot():
    key = random.seed_key(2)
    anchor, slot = jnp.arange(12)[:, None], jnp.arange(7)
    keys = [stream_key(key, stream, anchor, slot) for stream in (DRAFT, ACCEPT, RESIDUAL)]
    assert keys[0].shape == (12, 7, 2)
    field = random.noise_key(key, jnp.arange(20))
    assert FIELD not in (DRAFT, ACCEPT, RESIDUAL)
    every = np.concatenate([np.asarray(k).reshape(-1, 2) for k in [*keys, field]])
    # Anchor 3, slot 2 and anchor 4, slot 1 share the token's position and nothing else.
    assert len(np.unique(every, axis=0)) == 3 * 12 * 7 + 20


def test_residual_and_acceptance_rate():
    rng = np.random.default_rng(5)
    target, draft = rng.dirichlet(np.ones(9), 20), rng.dirichlet(np.ones(9), 20)
    target[:, 3] = 0
    target /= target.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        laws = jnp.log(jnp.array(target)), jnp.log(jnp.array(draft))
    expected = np.maximum(target - draft, 0)
    np.testing.assert_allclose(excess(*laws, None), expected, atol=2e-6)
    rate = acceptance_rate(*laws, None)
    np.testing.assert_allclose(rate, 1 - abs(target - draft).sum(-1) / 2, atol=2e-6)
    np.testing.assert_allclose(rate, 1 - expected.sum(-1), atol=2e-6)


def test_residual_and_acceptance_rate_of_a_reduced_vocabulary():
    rng = np.random.default_rng(6)
    target, draft = rng.dirichlet(np.ones(9), 20), rng.dirichlet(np.ones(4), 20)
    d2t = jnp.array([7, 0, 3, 4])
    whole = np.zeros((20, 9))
    whole[:, d2t] = draft
    laws = jnp.log(jnp.array(target)), jnp.log(jnp.array(draft))
    np.testing.assert_allclose(excess(*laws, d2t), np.maximum(target - whole, 0), atol=2e-6)
    rate = acceptance_rate(*laws, d2t)
    np.testing.assert_allclose(rate, 1 - abs(target - whole).sum(-1) / 2, atol=2e-6)
