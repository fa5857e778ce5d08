"""Counter-based random numbers: known answers, purity in (key, index), distribution, kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import random

# Random123's kat_vectors for threefry2x32 with 20 rounds: counter, key, answer.
KNOWN_ANSWERS = [
    ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]

# Op by op, sixty small operations would be compiled for every shape.
fold_in = jax.jit(random.fold_in)
bits, uniform, gumbel = (
    jax.jit(draw, static_argnums=1) for draw in (random.bits, random.uniform, random.gumbel)
)
gumbel_at = jax.jit(random.gumbel_at)


def words(pair):
    return tuple(jnp.uint32(word) for word in pair)


@pytest.mark.smoke
@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_threefry_known_answers(counter, key, answer):
    drawn = jax.jit(random.threefry2x32)(words(key), words(counter))
    assert tuple(int(word) for word in drawn) == answer


def test_key_of_a_seed_holds_all_64_bits():
    seed = 0x0123456789ABCDEF
    assert random.seed_key(seed).tolist() == [0x01234567, 0x89ABCDEF]


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=rf"seed is {seed}.*\[0, 2\*\*64\)"):
        random.seed_key(seed)


def test_padding_keeps_the_prefix():
    keys = fold_in(random.seed_key(1), jnp.arange(3))
    for draw in (bits, uniform, gumbel):
        np.testing.assert_array_equal(draw(keys, 1000)[:, :77], draw(keys, 77))


def test_explicit_indices_read_the_same_field():
    keys = fold_in(random.seed_key(2), jnp.arange(6).reshape(2, 3))
    field = gumbel(keys, 500)
    shared = jnp.array([499, 0, 7, 7])
    np.testing.assert_array_equal(gumbel_at(keys, shared), field[..., shared])
    own = jnp.arange(12).reshape(2, 3, 2) * 17
    expected = jnp.take_along_axis(field, own, axis=-1)
    np.testing.assert_array_equal(gumbel_at(keys, own), expected)


def test_fold_in_broadcasts_and_no_two_children_agree():
    roots = fold_in(random.seed_key(3), jnp.arange(20))
    children = fold_in(roots[:, None], jnp.arange(50))
    assert children.shape == (20, 50, 2)
    np.testing.assert_array_equal(children[4, 9], fold_in(roots[4], 9))
    tagged = fold_in(roots[:, None], jnp.arange(50), jnp.array(3))
    both = np.concatenate([children, tagged]).reshape(-1, 2)
    assert len(np.unique(both, axis=0)) == 2000
    drawn = bits(roots, 50)
    assert not np.isin(np.asarray(children)[..., 0], np.asarray(drawn)).any()


def test_uniform_is_uniform_over_elements_and_over_keys():
    for drawn in (
        uniform(random.seed_key(4), 200_000),
        uniform(fold_in(random.seed_key(5), jnp.arange(200_000)), 1)[:, 0],
    ):
        assert drawn.min() >= 0
        assert drawn.max() < 1
        counts = np.histogram(np.asarray(drawn), bins=256, range=(0, 1))[0]
        expected = 200_000 / 256
        chi_square = ((counts - expected) ** 2 / expected).sum()
        assert abs(chi_square - 255) / np.sqrt(2 * 255) < 4


def test_neighbouring_elements_and_keys_are_independent():
    keys = fold_in(random.seed_key(6), jnp.arange(400))
    drawn = np.asarray(uniform(keys, 500), np.float64) - 0.5
    for a, b in ((drawn[:, 1:], drawn[:, :-1]), (drawn[1:], drawn[:-1])):
        z = 12 * (a * b).sum() / np.sqrt(a.size)
        assert abs(z) < 4


def test_gumbel_has_its_moments_and_quantiles():
    drawn = np.asarray(gumbel(random.seed_key(7), 400_000), np.float64)
    assert abs(drawn.mean() - np.euler_gamma) < 4 * np.sqrt(np.pi**2 / 6 / drawn.size)
    assert abs(drawn.var() / (np.pi**2 / 6) - 1) < 0.02
    for x in (-1.5, -0.5, 0.5, 2.0, 6.0):
        p = np.exp(-np.exp(-x))
        assert abs((drawn < x).mean() - p) < 4 * np.sqrt(p * (1 - p) / drawn.size)


def test_gumbel_is_finite_and_falls_with_the_word():
    extremes = jnp.array([0, 1, 2**26 - 1, 2**26, 2**31, 2**32 - 2, 2**32 - 1], jnp.uint32)
    noise = np.asarray(random.gumbel_from_bits(extremes))
    assert np.isfinite(noise).all()
    assert (np.diff(noise) <= 0).all()
    assert noise[0] > 22.8


def test_gumbel_matches_float64_on_both_sides_of_the_series():
    word = (np.geomspace(1, 2**32 - 2**10, 4000)).astype(np.uint32)
    u = ((word.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)).astype(np.float64)
    expected = -np.log(-np.log1p(-u))
    np.testing.assert_allclose(random.gumbel_from_bits(word), expected, rtol=2e-6, atol=4e-6)


def test_the_same_function_runs_inside_a_kernel():
    keys = fold_in(random.seed_key(8), jnp.arange(4))

    def kernel(key_ref, out_ref):
        column = pl.program_id(0) * 128 + jax.lax.broadcasted_iota(jnp.int32, (4, 128), 1)
        out_ref[...] = random.gumbel_at(key_ref[...], column)

    tiled = pl.pallas_call(
        kernel,
        grid=(3,),
        in_specs=[pl.BlockSpec((4, 2), lambda tile: (0, 0))],
        out_specs=pl.BlockSpec((4, 128), lambda tile: (0, tile)),
        out_shape=jax.ShapeDtypeStruct((4, 384), jnp.float32),
        interpret=True,
    )(keys)
    np.testing.assert_array_equal(tiled, gumbel(keys, 384))
