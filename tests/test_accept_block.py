"""`accept_block` against one request at a time in NumPy; its distribution, shards and errors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from dspark_jax import sampling
from pallas_kernels import random
from pallas_kernels.accept_block import rule as rules
from pallas_kernels.accept_block.api import ONE_HOT, Drafts, Requests, VerifyPlan, accept_block
from pallas_kernels.accept_block.bench import composition
from pallas_kernels.accept_block.cases import CASES, Case, make_inputs
from tests.marks import rest_full

B, G, V, U = 5, 3, 203, 23  # shared, so that each form is compiled once; V is no round number
CLOSE = 1e-4  # decisions nearer than this to a draw are rounding's

fold_in = jax.jit(random.fold_in)
uniform, gumbel = (jax.jit(draw, static_argnums=1) for draw in (random.uniform, random.gumbel))
accept = jax.jit(accept_block, static_argnames=("rule", "axis_name", "implementation"))
draft_logprob, kept_floor = jax.jit(sampling.draft_logprob), jax.jit(sampling.kept_floor)


@st.composite
def batches(draw):
    """Logits, drafts drawn from them or not, ragged lengths, temperatures, filters."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    reduced = draw(st.booleans())
    alike = draw(
        st.lists(st.sampled_from(["equal", "similar", "disjoint"]), min_size=B, max_size=B)
    )
    temperature = draw(
        st.lists(st.sampled_from([0.0, 1e-30, 0.01, 0.7, 1.0, 2.0]), min_size=B, max_size=B)
    )
    length = draw(st.lists(st.integers(0, G), min_size=B, max_size=B))
    d2t = np.sort(rng.permutation(V)[:U]).astype(np.int32) if reduced else None
    ids = np.arange(V) if d2t is None else d2t
    target = 2 * rng.standard_normal((B, G + 1, V), np.float32)
    draft = target[:, :G, ids].copy()
    for b, likeness in enumerate(alike):
        if likeness == "similar":
            draft[b] += rng.standard_normal(draft[b].shape)
        elif likeness == "disjoint":
            draft[b, :, ::2] = -np.inf
            target[b, :, ids[1::2]] = -np.inf
    target, draft = (np.asarray(jnp.asarray(x, dtype)) for x in (target, draft))
    temperature = np.array(temperature, np.float32)
    index = np.array([
        [_draft(draft[b, k].astype(np.float64), temperature[b], rng) for k in range(G)]
        for b in range(B)
    ])  # fmt: skip
    filters = np.zeros(B, np.int32), np.ones(B, np.float32), np.zeros(B, np.float32)
    if draw(st.booleans()):
        filters = rng.integers(0, 9, B), rng.uniform(0.5, 1, B), rng.uniform(0, 0.2, B)
    return target, draft, index.astype(np.int32), d2t, np.array(length), temperature, filters, rng


def _draft(logits, temperature, rng):
    if temperature == 0:
        return logits.argmax()
    with np.errstate(invalid="ignore"):
        return ((logits - logits.max()) / temperature + rng.gumbel(size=logits.size)).argmax()


def flat(target, length, rng):
    """Rows of the target in any order, with a row that nobody needs, and what it is about."""
    num_rows = target.shape[0] * target.shape[1] + 1
    slot_BC, column_BC = np.indices(target.shape[:2])
    order = rng.permutation(num_rows)
    place_BC = order[:-1].reshape(target.shape[:2])
    logits_TV = np.full((num_rows, target.shape[2]), np.nan, target.dtype)
    slot_T, column_T = np.full(num_rows, len(target)), np.zeros(num_rows, int)
    read_BC = column_BC <= length[:, None]
    logits_TV[place_BC[read_BC]] = target[read_BC]
    slot_T[place_BC], column_T[place_BC] = slot_BC, column_BC
    plan = VerifyPlan(*(np.asarray(x, np.int32) for x in (slot_T, column_T, place_BC, length)))
    return logits_TV, plan


def law_of(logits, temperature, floor=-np.inf):
    """Probabilities of one row in float64."""
    logits = logits.astype(np.float64)
    if temperature == 0:
        return np.eye(len(logits))[logits.argmax()]
    weight = np.exp((logits - logits.max()) / np.float64(temperature))
    weight[logits < floor] = 0
    return weight / weight.sum()


def drawn(law, noise):
    """The token of the highest score, and by how much it is the highest."""
    with np.errstate(divide="ignore"):
        score = np.log(law) + noise
    best = np.sort(score)[-2:]
    return score.argmax(), best[1] - best[0]


def naive(target, floor, draft, index, d2t, length, temperature, key, anchor, rule):
    """One request: accepted, next token, chances, and how narrow its narrowest decision was."""
    ids = np.arange(target.shape[1]) if d2t is None else d2t
    chances, narrowest = np.zeros(len(index)), np.inf
    laws = [law_of(target[k], temperature, floor[k]) for k in range(length + 1)]

    def token_at(k):
        if temperature == 0:
            return laws[k].argmax(), np.inf
        return drawn(laws[k], np.asarray(gumbel(fold_in(key, anchor + 1 + k, random.FIELD), V)))

    accepted, standing = 0, True
    for k in range(length):
        if rule == "coupled":
            token, margin = token_at(k)
            chances[k], uniform_k = ids[index[k]] == token, 0.5
        else:
            chosen = 1 if draft is ONE_HOT else law_of(draft[k], temperature)[index[k]]
            chances[k] = min(1, laws[k][ids[index[k]]] / max(chosen, 1e-8))
            uniform_k = float(uniform(fold_in(key, anchor, 4 * k + random.ACCEPT), 1)[0])
            margin = abs(uniform_k - chances[k])
        if standing:
            standing = uniform_k < chances[k]
            accepted += standing
            narrowest = min(narrowest, margin)
    if rule == "coupled":
        token, margin = token_at(accepted)
        return accepted, token, chances, min(narrowest, margin)
    law = laws[accepted]
    if accepted < length:
        residual = law.copy()
        if draft is ONE_HOT:
            residual[ids[index[accepted]]] = 0
        else:
            residual[ids] -= law_of(draft[accepted], temperature)
        residual = np.maximum(residual, 0)
        if residual.sum() > 1e-8:
            law = residual / residual.sum()
            if residual.sum() < 1e-3:  # of rounding in float32
                narrowest = 0
    noise = np.asarray(gumbel(fold_in(key, anchor, 4 * accepted + random.RESIDUAL), V))
    token, margin = drawn(law, noise)
    return accepted, token, chances, min(narrowest, margin)


@pytest.mark.smoke
@settings(max_examples=25, deadline=None, derandomize=True)
@given(batches(), st.sampled_from(["rejection", "coupled"]), st.booleans())
def test_against_one_request_at_a_time(batch, rule, one_hot):
    target, draft, index, d2t, length, temperature, filters, rng = batch
    logits_TV, plan = flat(target, length, rng)
    slot_T = np.minimum(plan.slot_T, B - 1)
    floor_T = kept_floor(logits_TV, temperature[slot_T], *(f[slot_T] for f in filters))
    keys, anchor = fold_in(random.seed_key(7), np.arange(B)), rng.integers(0, 99, B)
    requests = Requests(temperature, keys, anchor.astype(np.int32))
    draft_B = [ONE_HOT] * B if one_hot else draft
    drafts = Drafts(index, ONE_HOT if one_hot else draft, d2t)
    got = accept(logits_TV, floor_T, plan, drafts, requests, rule=rule)
    assert got.accepted_B.dtype == got.next_B.dtype == jnp.int32
    assert got.finite_B.all() == (not np.isinf(target[np.arange(G + 1) <= length[:, None]]).any())
    floor_BC = np.asarray(floor_T)[plan.row_BC]
    compared = 0
    for b in range(B):
        accepted, token, chance_G, margin = naive(
            target[b], floor_BC[b], draft_B[b], index[b], d2t, length[b], temperature[b], keys[b],
            anchor[b], rule,
        )  # fmt: skip
        np.testing.assert_allclose(got.chance_BG[b], chance_G, atol=2e-5, rtol=2e-4)
        if margin > CLOSE:
            compared += 1
            assert (got.accepted_B[b], got.next_B[b]) == (accepted, token)
    assume(compared)


def test_no_drafts_at_all():
    """Plain decoding is a block of none: the token is a draw from the only row."""
    case = Case(6, 0, 97, dtype="float32")
    logits_TV, floor_T, plan, drafts, requests = make_inputs(case)
    got = accept(logits_TV, floor_T, plan, drafts, requests)
    key_B2 = random.stream_key(requests.key_B2, random.RESIDUAL, requests.anchor_position_B, 0)
    law_BV = jax.nn.log_softmax(logits_TV)
    np.testing.assert_array_equal(got.accepted_B, 0)
    np.testing.assert_array_equal(got.next_B, (law_BV + gumbel(key_B2, 97)).argmax(-1))
    assert got.chance_BG.shape == (6, 0)


@pytest.mark.parametrize("draft_vocabulary", rest_full([None, 31], (31,)))
def test_equal_laws_always_stand(draft_vocabulary):
    logits_TV, floor_T, plan, drafts, requests = make_inputs(Case(9, 4, 97, draft_vocabulary))
    rows_BCV = logits_TV[plan.row_BC]
    if draft_vocabulary:  # the target forbids what the drafter does not know
        known_V = jnp.zeros(97, bool).at[drafts.d2t_U].set(True)
        logits_TV = jnp.where(known_V, logits_TV, -jnp.inf)
        rows_BCV = rows_BCV[..., drafts.d2t_U]
    drafts = drafts._replace(logits_BGU=rows_BCV[:, :-1])
    got = accept(logits_TV, floor_T, plan, drafts, requests)
    np.testing.assert_array_equal(got.accepted_B, plan.length_B)
    np.testing.assert_allclose(got.chance_BG, 1, atol=1e-5)


def test_a_residual_without_mass_is_the_target():
    """Rounding may let a draft fall where both laws are the same: their difference is no law."""
    logits_TV, floor_T, plan, drafts, requests = make_inputs(Case(50, 1, 7, dtype="float32"))
    drafts = drafts._replace(logits_BGU=logits_TV[plan.row_BC[:, :1]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "acceptance_chance", lambda target_X, _: jnp.zeros_like(target_X))
        got = jax.jit(lambda *args: accept_block(*args))(logits_TV, floor_T, plan, drafts, requests)
    np.testing.assert_array_equal(got.accepted_B, 0)
    key_B2 = random.stream_key(requests.key_B2, random.RESIDUAL, requests.anchor_position_B, 0)
    law_BV = jax.nn.log_softmax(logits_TV[plan.row_BC[:, 0]])
    np.testing.assert_array_equal(got.next_B, (law_BV + gumbel(key_B2, 7)).argmax(-1))


def test_greedy_is_temperature_zero():
    logits_TV, floor_T, plan, drafts, requests = make_inputs(Case(40, 3, 11, dtype="float32"))
    best_BC = np.asarray(logits_TV).argmax(-1)[plan.row_BC]
    right = np.random.default_rng(0).random((40, 3)) < 0.7
    index = np.where(right, best_BC[:, :-1], drafts.index_BG)
    drafts = drafts._replace(index_BG=index.astype(np.int32))
    stands = np.cumprod(index == best_BC[:, :-1], axis=1).sum(1)
    cold = requests._replace(temperature_B=jnp.zeros(40))
    for rule, asked in (("greedy", requests), ("rejection", cold), ("coupled", cold)):
        got = accept(logits_TV, floor_T, plan, drafts, asked, rule=rule)
        np.testing.assert_array_equal(got.accepted_B, stands)
        np.testing.assert_array_equal(got.next_B, best_BC[np.arange(40), stands])
        np.testing.assert_array_equal(got.chance_BG, index == best_BC[:, :-1])


def test_what_is_not_finite_is_told_where_it_is_read():
    logits_TV, floor_T, plan, drafts, requests = make_inputs(Case(6, 2, 97, dtype="float32"))
    length_B = jnp.array([0, 1, 2, 0, 1, 2])
    plan = plan._replace(length_B=length_B)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        for column in range(3):
            broken_TV = logits_TV.at[plan.row_BC[:, column], 5].set(bad)
            for rule in ("greedy", "rejection", "coupled"):
                got = accept(broken_TV, floor_T, plan, drafts, requests, rule=rule)
                np.testing.assert_array_equal(got.finite_B, length_B < column)


@pytest.mark.parametrize("rule", ["rejection", "coupled"])
@pytest.mark.parametrize("draft_vocabulary", rest_full([None, 3], (3,)))
@pytest.mark.parametrize("one_hot", [False, True])
def test_the_distribution_is_the_target_s(rule, draft_vocabulary, one_hot):
    """Chi-square of the first two tokens of a round: accepted, resampled, bonus."""
    N, size, temperature = 60_000, 5, 0.8
    rng = np.random.default_rng(3)
    target = 1.5 * rng.standard_normal((1 + size, size)).astype(np.float32)  # by the last token
    d2t = None if draft_vocabulary is None else jnp.array([4, 0, 2])
    ids = np.arange(size) if d2t is None else np.asarray(d2t)
    draft = target[0, ids] + rng.standard_normal(ids.size).astype(np.float32)
    floor = np.sort(target, axis=1)[:, 1]  # top-k of 4
    keys, anchor = fold_in(random.seed_key(11), jnp.arange(N)), jnp.full(N, 6, jnp.int32)
    if rule == "coupled":
        noise = gumbel(random.noise_key(keys, anchor + 1), size)[:, ids]
    else:
        noise = gumbel(random.stream_key(keys, random.DRAFT, anchor, 0), ids.size)
    index_B = np.asarray(draft_logprob(draft, jnp.float32(temperature)) + noise).argmax(-1)
    if one_hot:
        index_B = np.full(N, draft.argmax())
    context_BC = np.stack([np.zeros(N, int), 1 + ids[index_B]], axis=1)
    slot_BC, column_BC = np.indices((N, 2), dtype=np.int32)
    plan = VerifyPlan(
        slot_BC.reshape(-1), column_BC.reshape(-1), np.arange(2 * N).reshape(N, 2),
        jnp.ones(N, jnp.int32),
    )  # fmt: skip
    law = ONE_HOT if one_hot else np.tile(draft, (N, 1, 1))
    drafts = Drafts(index_B[:, None].astype(np.int32), law, d2t)
    requests = Requests(jnp.full(N, temperature), keys, anchor)
    rows = context_BC.reshape(-1)
    got = accept(target[rows], floor[rows], plan, drafts, requests, rule=rule)

    accepted = np.asarray(got.accepted_B) == 1
    first = np.where(accepted, ids[index_B], got.next_B)
    laws = [law_of(row, temperature, least) for row, least in zip(target, floor, strict=True)]
    counts = [(first, laws[0])]
    counts += [
        (np.asarray(got.next_B)[accepted & (first == v)], laws[1 + v])
        for v in set(ids[index_B])
        if laws[0][v]
    ]
    for tokens, law in counts:
        expected = len(tokens) * law
        found = np.bincount(tokens, minlength=size)
        assert found[law == 0].sum() == 0
        some = law > 0
        square = ((found[some] - expected[some]) ** 2 / expected[some]).sum()
        assert square < 22  # 3 degrees of freedom: chance 6e-5
    assert 0.2 < accepted.mean() < 0.95


def test_the_composition_gives_the_same_tokens():
    """What the benchmark compares with is the same operation."""
    args = make_inputs(Case(12, 3, 1000, dtype="float32"), seed=2)
    got, accepted_B, next_B = accept(*args), *jax.jit(composition)(*args)
    np.testing.assert_array_equal(got.accepted_B, accepted_B)
    np.testing.assert_array_equal(got.next_B, next_B)
    assert len(set(accepted_B.tolist())) > 2


RULES = "greedy", "rejection", "coupled", "one-hot"


@pytest.mark.parametrize("dtype", rest_full(["float32", "bfloat16"], ("bfloat16",)))
@pytest.mark.parametrize("rule", RULES)
def test_nothing_as_large_as_the_logits_is_written_out(rule, dtype):
    one_hot, rule = rule == "one-hot", rule.replace("one-hot", "rejection")
    case = Case(8, 7, 4099, dtype=dtype, rule=rule, one_hot=one_hot)  # 8 rows are drawn from
    shapes = jax.eval_shape(functools.partial(make_inputs, case))
    assert not written_out(functools.partial(accept_block, rule=rule), shapes, case)
    if rule == "rejection" and not one_hot:  # the test itself
        assert written_out(composition, shapes, case)


def written_out(function, shapes, case):
    """Arrays of four bytes and as large as the logits that a compiled program has in memory."""
    text = jax.jit(function).lower(*shapes).compile().as_text()
    computations = [part for part in text.split("\n\n") if not part.startswith("%fused")]
    size = rf"= [fus]32\[{case.rows},{case.vocabulary}\]\S* (?!parameter|get-tuple|bitcast)"
    per_request = size.replace(f"{case.rows},", f"{case.requests},{case.slots + 1},")
    return re.findall(f"(?:{size}|{per_request}).*", "\n".join(computations))


# A vocabulary in shards.


def sharded(mesh, split_draft):
    parts = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
    by_token = PartitionSpec(None, "tensor")
    drafts = Drafts(
        PartitionSpec(), PartitionSpec(None, None, "tensor") if split_draft else PartitionSpec(),
        PartitionSpec(),
    )  # fmt: skip

    def accepted(rule):
        step = functools.partial(accept_block, rule=rule, axis_name="tensor")
        specs = by_token, PartitionSpec(), PartitionSpec(), drafts, PartitionSpec()
        return jax.jit(parts(step, in_specs=specs, out_specs=PartitionSpec()))

    return accepted


@pytest.mark.parametrize("draft_vocabulary", [None, 64])
@pytest.mark.parametrize("rule", rest_full(RULES, ("rejection",)))
def test_a_split_vocabulary_gives_the_same_tokens(emulated_devices, rule, draft_vocabulary):
    mesh = jax.make_mesh(
        (4,), ("tensor",), axis_types=(AxisType.Auto,), devices=emulated_devices[:4]
    )
    one_hot, rule = rule == "one-hot", rule.replace("one-hot", "rejection")
    case = Case(10, 3, 400, draft_vocabulary, dtype="float32", one_hot=one_hot)
    logits_TV, floor_T, plan, drafts, requests = make_inputs(case, seed=4)
    logits_TV = logits_TV.at[::7, :100].set(-jnp.inf)  # nothing is left of the first shard
    floor_T = jnp.where(jnp.arange(case.rows) % 3 == 0, jnp.sort(logits_TV)[:, -50], floor_T)
    temperature_B = jnp.array([0, 1, 0.5, 1, 1e-3, 1, 0, 2, 1, 1], jnp.float32)
    requests = requests._replace(temperature_B=temperature_B)
    whole = logits_TV, floor_T, plan, drafts, requests
    step = sharded(mesh, draft_vocabulary is None)(rule)
    expected, got = accept(*whole, rule=rule), step(*whole)
    np.testing.assert_array_equal(got.accepted_B, expected.accepted_B)
    np.testing.assert_array_equal(got.next_B, expected.next_B)
    np.testing.assert_array_equal(got.finite_B, expected.finite_B)
    np.testing.assert_allclose(got.chance_BG, expected.chance_BG, atol=1e-5)
    # Numbers of rows cross the mesh, logits never do.
    text = step.lower(*whole).as_text()
    sizes = [line for line in text.splitlines() if "all_gather" in line or "all_reduce" in line]
    assert 1 <= len(sizes) <= 3
    assert not any("x100x" in line or "x400x" in line for line in sizes)


# Wrong input.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: (a[0], a[1][:-1], *a[2:]), r"floor_T has shape .*give \(12,\)"),
        (lambda a: (*a[:2], a[2]._replace(row_BC=a[2].row_BC[:, :-1]), *a[3:]), "row_BC"),
        (lambda a: (*a[:3], a[3]._replace(logits_BGU=None), a[4]), "both laws"),
        (
            lambda a: (*a[:3], a[3]._replace(logits_BGU=a[3].logits_BGU[..., 1:]), a[4]),
            "logits_BGU",
        ),
        (lambda a: (*a[:4], a[4]._replace(key_B2=a[4].key_B2[:1])), r"key_B2.*\(3, 2\)"),
    ],
)
def test_shapes_that_do_not_belong_together_are_refused(change, message):
    args = make_inputs(Case(3, 3, 50))
    with pytest.raises(ValueError, match=message):
        accept_block(*change(args))


def test_names_are_refused_with_the_choice():
    args = make_inputs(Case(3, 3, 50))
    with pytest.raises(ValueError, match="greedy, rejection or coupled"):
        accept_block(*args, rule="lossy")
    with pytest.raises(ValueError, match="xla, mosaic_gpu"):
        accept_block(*args, implementation="triton")


def test_a_kernel_that_cannot_run_here_says_why():
    if jax.default_backend() == "gpu":
        pytest.skip("kernels run here")
    with pytest.raises(RuntimeError, match="mosaic_gpu needs"):
        accept_block(*make_inputs(Case(3, 3, 50)), implementation="mosaic_gpu")


def test_cases_have_names_of_their_own():
    assert len({case.name for case in CASES}) == len(CASES)
    assert Case(8, 7, 49152, dtype="float32").rows == 64  # the case of the stated target
    assert Case(8, 7, 49152, dtype="float32") in CASES
