"""What products with quantised weights move on a GPU, compiled for one without it."""

import pytest

from dspark_jax.models.quantised import PANEL
from tests import cuda_compile
from tests.cuda_quantised import WEIGHTS, measured

BESIDE = 20e6  # bytes: rows and results, the latter in float32 and in parts too
needs_compiler = pytest.mark.skipif(
    cuda_compile.problem() is not None, reason=str(cuda_compile.problem())
)


@pytest.mark.smoke
@needs_compiler
@pytest.mark.parametrize(
    ("name", "width"), [("plain", 2), ("int8", 1), ("fp8", 1), ("e4m3 in blocks", 1)]
)
def test_weights_are_read_once_as_they_lie(name, width):
    found = measured()[name]
    assert width * WEIGHTS <= found["moved"] <= width * WEIGHTS + BESIDE
    assert found["temporary"] <= BESIDE


@needs_compiler
def test_bytes_of_two_weights_are_unpacked_panel_by_panel():
    """No matrix is written out: a panel is, and is read out of the L2 cache again. That counts
    here, so that it is no fewer bytes than a plain matrix has."""
    found = measured()["e2m1 in blocks"]
    packed, unpacked = WEIGHTS * (1 / 2 + 1 / 32), 2 * WEIGHTS
    assert found["temporary"] <= 2 * PANEL + BESIDE
    assert unpacked / 2 > 2 * PANEL + BESIDE
    assert found["moved"] <= packed + 2 * unpacked + 4 * BESIDE
