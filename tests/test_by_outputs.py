"""Matrices by their outputs: the same products, in the form that a CPU decodes with."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.engine.decoder import make_decoder
from dspark_jax.models import by_outputs as form
from dspark_jax.models.by_outputs import ByOutputs, by_outputs, product
from dspark_jax.models.layers import matmul
from dspark_jax.models.targets.table import family_of
from dspark_jax.models.vocab import Vocab, head_by_outputs, unembed
from pallas_kernels import dispatch
from tests.tiny_model import TARGET, random_params

ROWS = form.FEW_ROWS


def operands(rows: int, inputs: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, inputs)), rng.normal(size=(inputs, outputs))


def compiled(x_XI: jax.Array, w: ByOutputs) -> jax.stages.Compiled:
    options = dispatch.program_options()
    return jax.jit(product, compiler_options=options).lower(x_XI, w).compile()


@pytest.mark.smoke
@pytest.mark.parametrize("rows", [1, 3, 6, ROWS, 2 * ROWS + 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_are_those_of_the_matrix(rows: int, dtype: jnp.dtype) -> None:
    x_RI, w_IO = (jnp.asarray(part, dtype) for part in operands(rows, 257, 2**10))
    w = by_outputs(w_IO)
    found = compiled(x_RI, w)(x_RI, w)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.float64(x_RI) @ np.float64(w_IO), atol=2e-4)


@pytest.mark.parametrize("outputs", [2**8, 3 * 2**7, 2 * 257, 257])
def test_any_number_of_outputs_and_leading_axes(outputs: int) -> None:
    x_RI, w_IO = (jnp.asarray(part, jnp.float32) for part in operands(6, 512, outputs))
    found = matmul(x_RI.reshape(2, 3, 512), by_outputs(w_IO))
    assert found.shape == (2, 3, outputs)
    np.testing.assert_allclose(found.reshape(6, -1), x_RI @ w_IO, atol=2e-4)


def test_a_row_that_is_not_finite_leaves_the_others_alone() -> None:
    x_RI, w_IO = (jnp.asarray(part, jnp.float32) for part in operands(3, 512, 256))
    w, broken_RI = by_outputs(w_IO), x_RI.at[1, 7].set(jnp.nan).at[2, 0].set(jnp.inf)
    found = compiled(broken_RI, w)(broken_RI, w)
    assert np.isnan(found[1]).all()
    assert not np.isfinite(found[2]).any()
    np.testing.assert_allclose(found[0], x_RI[0] @ w_IO, atol=2e-4)


def test_few_rows_read_a_large_matrix_as_it_lies() -> None:
    """Nothing else computes with the matrix: no copy, no conversion, no library."""
    x_RI, w_IO = (jnp.asarray(part, jnp.bfloat16) for part in operands(6, 512, 256))
    w = by_outputs(w_IO)
    text = compiled(x_RI, w).as_text()
    entry = text[text.index("ENTRY") :]
    (parameter,) = re.findall(r"(%\S+) = bf16\[256,512\]\S+ parameter", entry)
    readers = [line for line in entry.splitlines() if re.search(rf"\(.*{parameter}\b", line)]
    assert len(readers) == 1
    assert "reduce" in readers[0]
    assert "dot(" not in text


def test_what_rows_are_made_of_is_computed_once() -> None:
    """Not again for every output, inside the loop over the matrix."""
    x_RI, w_IO = (jnp.asarray(part, jnp.float32) for part in operands(6, 512, 256))
    w = by_outputs(w_IO)

    def scaled(x_RI: jax.Array, scale_I: jax.Array, w: ByOutputs) -> jax.Array:
        return product(x_RI * scale_I, w)

    options = dispatch.program_options()
    step = jax.jit(scaled, compiler_options=options).lower(x_RI, x_RI[0], w).compile()
    entry = step.as_text().partition("ENTRY")[2]
    (loop,) = [line for line in entry.splitlines() if "reduce" in line and " fusion(" in line]
    assert len(re.findall(r"%", loop.partition(" fusion(")[2].partition(")")[0])) == 2


def test_a_head_by_outputs_gives_the_logits_of_its_rows() -> None:
    x_RD, head_DV = (jnp.asarray(part, jnp.float32) for part in operands(2, 512, 256))
    vocab = Vocab(embed_VD=head_DV.T)
    np.testing.assert_allclose(
        unembed(head_by_outputs(vocab), x_RD), unembed(vocab, x_RD), atol=2e-4
    )


def test_a_decoder_on_a_cpu_has_its_matrices_by_outputs() -> None:
    params = random_params(0, family_of(TARGET).declare(TARGET))
    decoder = make_decoder((TARGET, params))
    (layers,) = decoder.weights.target.layers
    held = layers[1].o_NHD
    assert isinstance(held, ByOutputs)
    assert held.shape == params.layers[0].o_NHD.shape[1:]
    x_XI = jnp.ones((3, held.weight_OI.shape[1]))
    w_IO = params.layers[0].o_NHD[1].reshape(x_XI.shape[1], -1)
    np.testing.assert_allclose(matmul(x_XI, held), x_XI @ w_IO, atol=1e-5)
