"""Budgets, prefixes and bucket choices against literal searches; the switch over time.

What they do to the distribution of a text is in test_schedule_lossless.py, and the survival, the
fixed and the threshold schedule are tested with the rest of a round in test_verify.py.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.scheduler import budget, schedule
from dspark_jax.scheduler.budget import DraftSwitch, RoundCosts

B, G = 5, 4
TOP = B * (G + 1)
CASES = 4000

prefix_survival = jax.jit(schedule.prefix_survival)
causal_budget = jax.jit(jax.vmap(schedule.causal_budget))
select_prefixes = jax.jit(jax.vmap(schedule.select_prefixes))


def literal_algorithm_1(survival_BG, steps_per_s_T, active_B):
    """Spec section 6, word for word."""
    num_active = int(active_B.sum())
    pairs = [
        (-survival_BG[r, j], j, r)
        for r in range(len(active_B))
        for j in range(survival_BG.shape[1])
        if active_B[r] and survival_BG[r, j] > 0
    ]
    rows, tokens = num_active, float(num_active)
    best = tokens * steps_per_s_T[rows]
    for negative, _, _ in sorted(pairs):
        rows += 1
        tokens -= negative
        throughput = tokens * (steps_per_s_T[rows] if rows < len(steps_per_s_T) else 0.0)
        if not throughput > best:
            return rows - 1 - num_active
        best = throughput
    return rows - num_active


def literal_selection(survival_BG, budget_, active_B):
    """The best slots one by one; ties: the earlier slot, then the earlier request."""
    pairs = [
        (-survival_BG[r, j], j, r)
        for r, j in itertools.product(range(survival_BG.shape[0]), range(survival_BG.shape[1]))
        if active_B[r] and survival_BG[r, j] > 0
    ]
    taken = sorted(pairs)[: max(budget_, 0)]
    for r in range(len(active_B)):  # a prefix of every block
        assert sorted(j for _, j, owner in taken if owner == r) == list(
            range(sum(owner == r for _, _, owner in taken))
        )
    return [sum(owner == r for _, _, owner in taken) for r in range(len(active_B))]


def random_cases(seed, num):
    """Survivals with ties, zeros and ones, idle requests, and staircase and smooth tables.

    Half of the cases are multiples of 1/8 with steps of 1/16: there every sum and product is exact
    in float32, so that ties of the throughput itself are met as well.
    """
    rng = np.random.default_rng(seed)
    coarse_N = rng.random(num) < 0.5
    confidence = rng.uniform(0.2, 1, (num, B, G)) ** rng.choice([0.1, 1, 3], (num, 1, 1))
    confidence = np.where(rng.random((num, B, G)) < 0.1, 1.0, confidence)
    survival = np.asarray(prefix_survival(confidence.reshape(-1, G))).reshape(num, B, G)
    eighths = -np.sort(-rng.integers(0, 9, (num, B, G)), axis=-1) / 8
    survival = np.where(coarse_N[:, None, None], eighths, survival).astype(np.float32)
    survival[rng.random(num) < 0.1, 0, 2:] = 0  # after a drafted stop token
    active = rng.random((num, B)) < rng.choice([0.3, 0.8, 1.0], (num, 1))

    rows = np.arange(TOP + 1)
    smooth = 1 / (1 + rng.uniform(0.005, 0.3, (num, 1)) * rows)
    edges = np.sort(rng.integers(1, TOP, (num, 3)), axis=1)
    stair = 1 / (1 + rng.uniform(0.1, 1, (num, 1)) * (rows >= edges[..., None]).sum(1))
    sixteenths = np.ceil(16 * stair) / 16
    table = np.where(rng.random((num, 1)) < 0.5, smooth, stair)
    table = np.where(coarse_N[:, None], sixteenths, table).astype(np.float32)
    return survival, table, active


def assert_causal_is_literal(seed, num):
    survival, table, active = random_cases(seed, num)
    found = np.asarray(causal_budget(survival, table, active))
    assert found.dtype == np.int32
    expected = [literal_algorithm_1(*case) for case in zip(survival, table, active, strict=True)]
    np.testing.assert_array_equal(found, expected)
    return found


@pytest.mark.smoke
def test_causal_budget_is_algorithm_1():
    found = assert_causal_is_literal(0, CASES)
    assert len(np.unique(found)) == B * G + 1, "cases should stop everywhere"


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 21))
def test_causal_budget_is_algorithm_1_on_many_more_cases(seed):
    assert_causal_is_literal(seed, CASES)


def test_causal_budget_ends_with_the_table():
    survival, active = jnp.ones((1, 2, 3), jnp.float32), jnp.array([[True, True]])
    for rows in range(2, 9):
        table = jnp.ones((1, rows + 1), jnp.float32)
        assert causal_budget(survival, table, active)[0] == min(rows - 2, 6)
    assert causal_budget(survival, jnp.ones((1, 9)), jnp.array([[False, False]]))[0] == 0


def test_an_admission_never_depends_on_what_ranks_below_it():
    """Whatever replaces the survivals after rank n leaves the first n decisions alone."""
    survival, table, active = random_cases(1, CASES)
    flat = np.where(active[..., None], survival, 0).reshape(CASES, -1)
    order = np.argsort(-flat, axis=1, kind="stable")
    found = np.asarray(causal_budget(survival, table, active))
    rng = np.random.default_rng(2)
    rank = rng.integers(1, B * G, CASES)
    changed = flat.copy()
    for case in range(CASES):
        lower = order[case, rank[case] :]
        changed[case, lower] *= rng.random(len(lower), dtype=np.float32)
    again = np.asarray(causal_budget(changed.reshape(survival.shape), table, active))
    np.testing.assert_array_equal(np.minimum(again, rank), np.minimum(found, rank))


@pytest.mark.smoke
def test_selection_takes_the_best_slots_with_ties_by_index():
    survival, _, active = random_cases(3, 1500)
    budgets = np.random.default_rng(4).integers(-1, B * G + 3, 1500).astype(np.int32)
    found = np.asarray(select_prefixes(survival, budgets, active))
    assert found.dtype == np.int32
    for case in range(1500):
        expected = literal_selection(survival[case], int(budgets[case]), active[case])
        np.testing.assert_array_equal(found[case], expected)


def test_equal_survivals_are_shared_out_slot_by_slot():
    survival, active = jnp.ones((1, 3, 2)), jnp.ones((1, 3), bool)
    for number, expected in enumerate([[0, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1], [2, 1, 1]]):
        found = select_prefixes(survival, jnp.array([number]), active)
        np.testing.assert_array_equal(found[0], expected)


def test_survival_ends_after_a_drafted_stop_token():
    survival = jnp.array([[0.9, 0.8, 0.7, 0.6]] * 4)
    stops = jnp.array([[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1], [0, 0, 0, 1]], bool)
    expected = [[0.9, 0.8, 0.7, 0.6], [0.9, 0, 0, 0], [0.9, 0.8, 0.7, 0], [0.9, 0.8, 0.7, 0.6]]
    found = schedule.end_at_stop(survival, stops)
    np.testing.assert_array_equal(found, np.float32(expected))


# The budget, on the host.

COSTS = RoundCosts((2, 4, 8, TOP), (1.0, 1.1, 1.5, 3.0), draft_s=0.2, undrafted_s=0.9)


def test_buckets_round_up():
    np.testing.assert_array_equal(
        budget.bucket_for(np.arange(1, 9), (2, 4, 8)), [2, 2, 4, 4, 8, 8, 8, 8]
    )
    assert int(budget.bucket_for(3, (2, 4))) == 4
    with pytest.raises(ValueError, match=r"5 rows do not fit.*largest bucket has 4"):
        budget.bucket_for(5, (2, 4))


def test_steps_are_a_staircase_over_the_buckets():
    table = budget.steps_per_s(RoundCosts((1, 3, 4), (0.5, 1.0, 1.5), 0.5, 0.5))
    np.testing.assert_array_equal(table, np.float32([1, 1, 1 / 1.5, 1 / 1.5, 0.5]))
    assert table.dtype == np.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"buckets": ()}, "buckets"),
        ({"buckets": (2, 2, 8, 9)}, "ascending"),
        ({"verify_s_K": (1.0,)}, "one for each of the 4"),
        ({"verify_s_K": (1.0, 0.0, 1.0, 1.0)}, "positive"),
        ({"undrafted_s": float("nan")}, "positive"),
        ({"draft_s": -1.0}, "draft_s is -1.0"),
    ],
)
def test_senseless_costs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(COSTS, **change)


def random_costs(rng):
    buckets = tuple(sorted(rng.choice(np.arange(1, TOP + 1), 4, replace=False).tolist()))
    verify = tuple(np.cumsum(rng.uniform(0.1, 1, 4)).tolist())
    return RoundCosts(buckets, verify, float(rng.uniform(0, 0.5)), float(rng.uniform(0.2, 2)))


def literal_best_bucket(survival, active, costs, floor):
    """Selects for real under every choice; compares totals, or the slowest request."""
    num_active = int(active.sum())
    choices = {0: (np.zeros(B, int), costs.undrafted_s)}
    for k, (rows, seconds) in enumerate(zip(costs.buckets, costs.verify_s_K, strict=True), 1):
        if rows > num_active:
            lengths = literal_selection(survival, rows - num_active, active)
            choices[k] = np.array(lengths), costs.draft_s + seconds
    total, slowest = {}, {}
    for k, (lengths, seconds) in choices.items():
        tokens = 1 + np.array([survival[r, : lengths[r]].sum(dtype=float) for r in range(B)])
        total[k] = tokens[active].sum() / seconds
        slowest[k] = tokens[active].min() / seconds
    reached = {k: total[k] for k in choices if slowest[k] >= floor}
    return (reached or slowest), choices


@pytest.mark.parametrize("floor", [0.0, 1.0, 1.6])
def test_best_bucket_is_the_global_maximum(floor):
    rng = np.random.default_rng(5)
    survival, _, active = random_cases(6, 400)
    survival = survival * rng.uniform(0.9, 1, survival.shape[:2])[..., None]  # no ties
    chosen = []
    for case in range(400):
        if not active[case].any():
            continue
        costs, known = random_costs(rng), np.ones(B, bool)
        found = budget.best_bucket(survival[case], known, active[case], costs, floor)
        values, _ = literal_best_bucket(survival[case], active[case], costs, floor)
        assert values[found] == pytest.approx(max(values.values()), rel=1e-9)
        chosen.append(found)
    assert set(chosen) == {0, 1, 2, 3, 4}


def test_early_stopping_is_trapped_where_the_global_search_is_not():
    """A step up right after the anchors: every single admission loses, a full bucket wins."""
    survival, active = np.full((1, 4), 0.9, np.float32), np.ones(1, bool)
    costs = RoundCosts((1, 5), (1.0, 2.0), 0.0, 1.0)
    table = budget.steps_per_s(costs)[None]
    assert causal_budget(survival[None], table, active[None])[0] == 0
    assert budget.best_bucket(survival, active, active, costs) == 2


def test_missing_history_counts_as_survival_1():
    survival, active = np.zeros((B, G), np.float32), np.ones(B, bool)
    assert budget.best_bucket(survival, active, active, COSTS) == 0
    assert budget.best_bucket(survival, ~active, active, COSTS) == 4
    idle = np.zeros(B, bool)
    assert budget.best_bucket(survival, ~active, idle, COSTS) == 0


def test_a_floor_gives_throughput_up_for_the_slowest_request():
    """One sure request could fill the bucket; the small bucket is faster for the other."""
    survival = np.array([[1, 1, 1, 1], [0.1, 0.01, 0, 0]], np.float32)
    active = np.ones(2, bool)
    costs = RoundCosts((2, 6), (1.0, 2.0), 0.0, 1.0)
    choose = functools.partial(budget.best_bucket, survival, active, active, costs)
    assert choose() == 2
    assert choose(min_tokens_per_s_user=0.9) == 0
    assert choose(min_tokens_per_s_user=5.0) == 0  # out of reach: the nearest


# The switch, over time.

GOOD, BAD = np.full((B, G), 0.9, np.float32), np.full((B, G), 0.05, np.float32)
SPLIT = RoundCosts((2 * B, TOP), (1.1, 1.4), draft_s=0.2, undrafted_s=1.0)
CROWDED = dataclasses.replace(SPLIT, verify_s_K=(9.0, 12.0))  # no drafts are worth this
EVERYBODY = np.ones(B, bool)


def run_switch(survival_of, num_rounds, active=EVERYBODY, costs_of=lambda _: SPLIT):
    """Choices of every round, the survival of a drafted one being known two rounds later."""
    switch, chosen = DraftSwitch(), []
    for number in range(num_rounds):
        fresh = number >= 2 and chosen[number - 2] > 0
        seen, known = survival_of(number - 2), np.full(B, fresh)
        switch, choice = budget.choose_bucket(switch, seen, known, active, costs_of(number))
        chosen.append(choice)
    return np.array(chosen)


def remembering(survival, **fields):
    """A switch that has seen one kind of drafts alone."""
    return DraftSwitch(seen=(tuple(survival[0].tolist()),) * budget.WINDOW, **fields)


def test_good_drafts_are_always_drafted():
    assert (run_switch(lambda _: GOOD, 300) > 0).all()


def test_a_text_that_does_not_pay_is_plain_after_a_few_rounds():
    """Reports are two rounds late: `EARLY` drafts, and those that were under way."""
    chosen = run_switch(lambda _: BAD, 60, np.arange(B) < 1)
    assert (chosen > 0).sum() <= budget.EARLY + 3
    assert (chosen[budget.EARLY + 3 : budget.SHORTEST_PAUSE] == 0).all()
    assert (chosen[:2] <= 1).all()  # nothing is known yet: few drafts, as if half of them stood


@pytest.mark.parametrize("num_active", [1, B])
def test_probing_bad_drafts_costs_a_share_of_the_time_and_no_more(num_active):
    chosen = run_switch(lambda _: BAD, 10_000, np.arange(B) < num_active)[100:]
    drafts = np.minimum(np.array([num_active, *SPLIT.buckets])[chosen] - num_active, num_active * G)
    tokens = 1 + 0.05 * drafts / num_active
    seconds = np.array([1.0, 1.3, 1.6])[chosen]
    assert 1 - budget.PROBE_SHARE <= tokens.sum() / seconds.sum() < 1
    assert (chosen[-1000:] > 0).any()


def test_drafting_resumes_when_drafts_improve():
    chosen = run_switch(lambda number: BAD if number < 300 else GOOD, 1000)
    assert (chosen[100:300] == 0).mean() > 0.9
    assert (chosen[600:] > 0).all()


def test_one_unlucky_round_of_one_request_ends_nothing():
    chosen = run_switch(lambda n: BAD if n % 4 == 0 else GOOD, 400, np.arange(B) == 0)
    assert (chosen > 0).all()


def test_what_drafts_are_worth_follows_the_load_at_once():
    chosen = run_switch(
        lambda _: GOOD, 300, costs_of=lambda n: CROWDED if 100 <= n < 200 else SPLIT
    )
    assert (chosen[:100] > 0).all()
    assert (chosen[100:200] == 0).all()
    assert (chosen[200:] > 0).all()


def test_a_gain_below_the_margin_starts_nothing_and_ends_nothing():
    per_round = 1.6 * (1 + budget.MARGIN / 2)  # tokens of a request
    survival = np.full((B, G), (per_round - 1) / G, np.float32)
    costs = dataclasses.replace(SPLIT, verify_s_K=(1.4, 1.4))
    for drafting in (True, False):
        before = remembering(survival, drafting=drafting, left=0 if drafting else 50)
        after, choice = budget.choose_bucket(before, survival, EVERYBODY, EVERYBODY, costs)
        assert after.drafting == drafting
        assert (choice > 0) == drafting


def test_the_best_of_many_is_worth_more_than_the_mean():
    """Eight rows for drafts pay where half the requests have sure ones, not where all are even."""
    costs = RoundCosts((B + 8, TOP), (2.0, 4.0), 0.1, 1.0)
    for kinds, expected in ([(1.0, 0.0), 1], [(0.5, 0.5), 0]):
        seen = tuple((kind,) * G for kind in kinds) * (budget.WINDOW // 2)
        before, nobody = DraftSwitch(seen=seen), np.zeros(B, bool)
        assert budget.choose_bucket(before, BAD, nobody, EVERYBODY, costs)[1] == expected


def test_an_arrival_does_not_end_a_pause():
    """A request without history counts like what was seen."""
    paused = remembering(BAD, drafting=False, left=50)
    switch, choice = budget.choose_bucket(paused, BAD, np.arange(B) > 0, EVERYBODY, SPLIT)
    assert choice == 0
    assert not switch.drafting


def test_nothing_is_drafted_where_no_bucket_has_room():
    costs = RoundCosts((1, B), (1.0, 1.0), 0.0, 1.0)
    for known in (EVERYBODY, ~EVERYBODY):
        _, choice = budget.choose_bucket(DraftSwitch(), GOOD, known, EVERYBODY, costs)
        assert choice == 0
