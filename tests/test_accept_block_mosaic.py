"""The Mosaic GPU kernels of `accept_block`: interpreted against XLA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch
from pallas_kernels.accept_block import rule as rules
from pallas_kernels.accept_block import xla
from pallas_kernels.accept_block.cases import Case, make_inputs

pytestmark = [
    pytest.mark.smoke,
    pytest.mark.skipif(
        dispatch.version_problem() is not None, reason=str(dispatch.version_problem())
    ),
]

XLA = rules.Passes(xla.statistics, xla.draw, xla.sample, xla.sample_rest)


def mosaic():
    from pallas_kernels.accept_block import mosaic_gpu

    names = "statistics", "draw", "sample", "sample_rest"
    return rules.Passes(*(getattr(mosaic_gpu, name) for name in names))


def interpreted(accept, *args, **options):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**options)):
        return jax.block_until_ready(accept(*args))


def inputs(case):
    """Ragged lengths, a greedy request, filters, and tokens that are forbidden."""
    logits_TV, floor_T, plan, drafts, requests = make_inputs(case, seed=1)
    logits_TV = logits_TV.at[::2, 7].set(-jnp.inf)
    floor_T = floor_T.at[1].set(jnp.sort(logits_TV[1].astype(jnp.float32))[-20])
    length_B = jnp.arange(case.requests, dtype=jnp.int32) % (case.slots + 1)
    temperature_B = jnp.array([0.7, 1.0, 0.0, 1.5])[: case.requests]
    plan, requests = (
        plan._replace(length_B=length_B[::-1]),
        requests._replace(temperature_B=temperature_B),
    )
    return logits_TV, floor_T, plan, drafts, requests


@pytest.mark.parametrize("vocabulary", [1100, 1072, 1024])
@pytest.mark.parametrize(
    ("rule", "draft_vocabulary", "dtype"),
    [
        ("rejection", None, "bfloat16"),
        ("rejection", 300, "float32"),
        ("one-hot", None, "bfloat16"),
        ("coupled", None, "float32"),
        ("greedy", None, "bfloat16"),
    ],
)
def test_the_tokens_are_those_of_xla(monkeypatch, rule, draft_vocabulary, dtype, vocabulary):
    from pallas_kernels.accept_block import mosaic_gpu

    monkeypatch.setattr(mosaic_gpu, "MIN_BLOCKS", 1)  # so that there are shares to merge
    one_hot, rule = rule == "one-hot", rule.replace("one-hot", "rejection")
    args = inputs(Case(4, 2, vocabulary, draft_vocabulary, dtype, rule, one_hot))
    got = interpreted(rules.accept_block, *args, rule, mosaic())
    expected = rules.accept_block(*args, rule, XLA)
    np.testing.assert_array_equal(got.accepted_B, expected.accepted_B)
    np.testing.assert_array_equal(got.next_B, expected.next_B)
    np.testing.assert_array_equal(got.finite_B, expected.finite_B)
    np.testing.assert_allclose(got.chance_BG, expected.chance_BG, atol=1e-5)


def test_no_races():
    args = make_inputs(Case(1, 1, 1100))
    got = interpreted(rules.accept_block, *args, "rejection", mosaic(), detect_races=True)
    assert got.next_B == rules.accept_block(*args, "rejection", XLA).next_B


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_what_is_not_finite_is_told(bad):
    logits_XV = jax.random.normal(jax.random.key(0), (3, 2100)).at[1, 2099].set(bad)
    stats = interpreted(mosaic().statistics, logits_XV, jnp.ones(3), jnp.full(3, -jnp.inf))
    np.testing.assert_array_equal(stats.finite_T, [True, False, True])
    drawn = interpreted(mosaic().sample, logits_XV, jnp.ones(3), jnp.full(3, -jnp.inf), None)
    np.testing.assert_array_equal(drawn.finite_T, [True, False, True])


@pytest.mark.parametrize("share", [0, 1])
def test_a_shard_of_the_vocabulary_is_read_as_by_xla(monkeypatch, share):
    """The interpreter runs one device at a time: the parts that are merged, one by one."""
    monkeypatch.setattr(xla, "shard_start", lambda num_tokens, _: share * num_tokens)
    logits_TV, floor_T, *_, requests = make_inputs(Case(3, 1, 1100, dtype="float32"))
    part_TV = logits_TV[:, 550 * share : 550 * (share + 1)]
    ones_T = jnp.ones(len(part_TV))
    got = interpreted(mosaic().statistics, part_TV, ones_T, floor_T)
    expected = xla.statistics(part_TV, ones_T, floor_T)
    np.testing.assert_array_equal(got.best_T, expected.best_T)
    np.testing.assert_allclose(got.mass_T, expected.mass_T, rtol=1e-5)

    key_T2 = jnp.repeat(requests.key_B2, 2, axis=0)
    got = interpreted(mosaic().sample, part_TV, ones_T, floor_T, key_T2)
    expected_T = xla.sample(part_TV, ones_T, floor_T, key_T2)
    np.testing.assert_array_equal(got.token_T, expected_T.token_T)
    np.testing.assert_allclose(got.score_T, expected_T.score_T, rtol=1e-5)
    assert (got.token_T // 550 == share).all()

    rest = jnp.array([4, 1, 2]), got.token_T[jnp.array([4, 1, 2])]  # any but what was drawn
    given = part_TV, *rest, ones_T[:3], floor_T[:3], key_T2[rest[0]]
    got, expected_T = interpreted(mosaic().sample_rest, *given), xla.sample_rest(*given)
    np.testing.assert_array_equal(got.token_T, expected_T.token_T)
    assert (got.token_T != rest[1]).all()

    row_B, hotter_TV = jnp.array([4, 1, 2]), part_TV / 1.5
    law_T = xla.Law(expected.best_T, jnp.log(expected.mass_T), floor_T, ones_T)
    law_B = xla.Law(*(x_T[row_B] for x_T in law_T))
    draft_law_B = law_B._replace(best_X=law_B.best_X / 1.5, log_mass_X=law_B.log_mass_X + 1)
    given = part_TV, row_B, law_B, hotter_TV[row_B], draft_law_B, None, requests.key_B2
    got, expected_B = interpreted(mosaic().draw, *given), xla.draw(*given)
    np.testing.assert_array_equal(got.token_B, expected_B.token_B)
    np.testing.assert_array_equal(got.residual_token_B, expected_B.residual_token_B)
    np.testing.assert_allclose(got.mass_B, expected_B.mass_B, rtol=1e-5)
    assert (got.token_B // 550 == share).all()
    assert (got.mass_B > xla.LEAST_MASS).all()
