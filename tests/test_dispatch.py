"""What a device can run, and how its programs are compiled."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch


@pytest.fixture
def unknown_options(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dispatch, "_CPU_OPTIONS", {"xla_cpu_no_such_option": "x"})
    dispatch._options_are_known.cache_clear()
    yield
    dispatch._options_are_known.cache_clear()


@pytest.mark.smoke
def test_this_xla_knows_the_options_of_a_cpu() -> None:
    assert dispatch.sums_are_fast()
    assert dispatch.program_options()


@pytest.mark.smoke
def test_functions_keep_their_accuracy_under_the_options() -> None:
    """Where additions change their order, what they are made of must not lose digits."""
    rng = np.random.default_rng(0)
    small = 10 ** rng.uniform(-20, 0, 4096) * rng.choice([-0.9, 1], 4096)
    wide = rng.uniform(-8192, 8192, 4096)
    cases = [
        (jnp.exp, np.exp, rng.uniform(-80, 80, 4096)),
        (jnp.log1p, np.log1p, small),
        (jnp.expm1, np.expm1, small),
        (jnp.sin, np.sin, wide),
        (jnp.cos, np.cos, wide),
        (jnp.log, np.log, np.abs(small)),
        (jax.nn.sigmoid, lambda x: 1 / (1 + np.exp(-x)), rng.uniform(-80, 80, 4096)),
    ]
    for function, exact, values in cases:
        x = jnp.asarray(values, jnp.float32)
        found = jax.jit(function, compiler_options=dispatch.program_options())(x)
        np.testing.assert_allclose(found, exact(np.float64(x)), rtol=1e-6, atol=1e-7)


def test_what_is_not_finite_stays_so_under_the_options() -> None:
    x = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 0.0])
    found = jax.jit(jnp.isfinite, compiler_options=dispatch.program_options())(x)
    assert found.tolist() == [False, False, False, True]


@pytest.mark.usefixtures("unknown_options")
def test_options_that_this_xla_lacks_are_left_out() -> None:
    assert not dispatch.sums_are_fast()
    assert dispatch.program_options() == {}


def test_other_devices_keep_their_own_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert dispatch.program_options() == {}
