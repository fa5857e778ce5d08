"""Memory of the target's pass on a GPU, without one: 4 sequences of 4096 tokens of Qwen3-8B."""

import pytest

from tests import cuda_compile
from tests.cuda_features import Case, measure

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(cuda_compile.problem() is not None, reason=str(cuda_compile.problem())),
]


def test_the_kernel_keeps_no_scores():
    plain, kernel = (measure(Case(layers=2, kernels=name)) for name in ("xla", "mosaic_gpu"))
    assert kernel["mosaic"] == 2
    assert kernel["temporary_gb"] < 1.3
    assert kernel["temporary_gb"] < plain["temporary_gb"] / 3
    assert kernel["gb"] < plain["gb"] / 2.5


def test_memory_of_a_step_falls_with_its_micro_batches():
    """Sixteen sequences: what is left is mostly two gradients of 1 G parameters in float32."""
    each = (measure(Case(sequences=16, layers=2, micro_batches=count)) for count in (1, 16))
    whole, parts = each
    assert parts["temporary_gb"] < whole["temporary_gb"] / 2
