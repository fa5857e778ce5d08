"""What a device can run, and how its programs are compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dispatch

ROWS = dispatch.FEW_ROWS


@pytest.mark.smoke
def test_products_of_few_rows_are_the_same_products() -> None:
    rng = np.random.default_rng(0)
    x_TD, w_DI = rng.normal(size=(5, 64)), rng.normal(size=(64, 96))
    options = dispatch.product_options(5)
    found = jax.jit(jnp.matmul, compiler_options=options)(jnp.float32(x_TD), jnp.float32(w_DI))
    np.testing.assert_allclose(found, x_TD @ w_DI, atol=1e-4)


@pytest.mark.parametrize("rows", [(1,), (2, 4), (5, 32), (ROWS.stop,), (5, ROWS.stop)])
def test_all_products_must_have_few_rows(rows: tuple[int, ...]) -> None:
    assert dispatch.product_options(*rows) == {}


def test_options_that_this_xla_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_FEW_ROWS_OPTIONS", {"xla_cpu_no_such_option": "x"})
    dispatch._options_are_known.cache_clear()
    try:
        assert dispatch.product_options(5) == {}
    finally:
        dispatch._options_are_known.cache_clear()


def test_other_devices_keep_their_own_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert dispatch.product_options(5) == {}
