"""Every kernel lowers for CUDA at real shapes and compiles to SASS, without a GPU."""

import pytest

from pallas_kernels import dispatch
from tests import cuda_compile
from tests.cuda_programs import kernels_of, programs, recorded

PROGRAMS = programs()
# Another ptxas, or the code of another jax, may choose a few more or less than the recorded one.
MORE_REGISTERS = 16

by_name = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
needs_kernels = pytest.mark.skipif(
    dispatch.version_problem() is not None, reason=str(dispatch.version_problem())
)


@pytest.mark.smoke
@needs_kernels
@by_name
def test_lowers_for_cuda(program):
    text = str(cuda_compile.lower(program.function, *program.shapes).mlir_module())
    assert [name for name in program.kernels if f"{name}_mosaic" not in text] == []


@pytest.mark.smoke
@pytest.mark.skipif(cuda_compile.problem() is not None, reason=str(cuda_compile.problem()))
@by_name
def test_compiles_without_spills(program):
    before = recorded()["programs"][program.name]
    for name, kernel in kernels_of(program).items():
        assert kernel.spill_bytes == kernel.stack_bytes == 0, name
        assert kernel.registers <= before[name]["registers"] + MORE_REGISTERS, name


def test_the_record_is_of_these_programs():
    found = recorded()["programs"]
    assert {name: set(kernels) for name, kernels in found.items()} == {
        program.name: program.kernels for program in PROGRAMS
    }
    for kernels in found.values():
        for kernel in kernels.values():
            assert kernel["spill_bytes"] == kernel["stack_bytes"] == 0
            assert 0 < kernel["registers"] <= 255
