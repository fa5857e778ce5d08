"""The harness of the kernels' benchmarks."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import benchmark
from pallas_kernels.anchor_attention import bench as anchor_bench
from pallas_kernels.benchmark import Way, Work
from pallas_kernels.ragged_attention import bench as ragged_bench

FIELDS = {
    "case",
    "implementation",
    "seconds",
    "wall_seconds",
    "bytes",
    "flops",
    "floor_share",
    "ratio_to_xla",
    "difference",
}


def make_inputs(seed):
    return (jnp.full(2**16, float(seed)),)


def works():
    for case in ("small", "other"):
        ways = {
            "xla": Way(jnp.sin, make_inputs),
            "twice": Way(lambda x: jnp.sin(2 * x), make_inputs),
        }
        yield Work(case, 1000, 10**6, ways)


@pytest.fixture
def rates(monkeypatch):
    """Bytes and FLOPs a second of a device on which the FLOPs of :func:`works` are the floor."""
    monkeypatch.setattr(benchmark, "copy_rate", lambda: 1e9)
    monkeypatch.setattr(benchmark, "matmul_rate", lambda: 1e10)


def test_report_is_the_device_and_a_row_an_implementation(rates):
    found = json.loads(
        benchmark.command("", works(), ["--json", "--only", "small", "--only", "none"])
    )
    assert found["device"] == "cpu"
    assert "choose xla" in found["left_out"]
    assert [(row["case"], row["implementation"]) for row in found["rows"]] == [
        ("small", "xla"),
        ("small", "twice"),
    ]
    xla, twice = found["rows"]
    for row in (xla, twice):
        assert row.keys() == FIELDS
        assert row["seconds"] > 0
        assert row["floor_share"] == pytest.approx(1e6 / 1e10 / row["seconds"])
    assert xla["ratio_to_xla"] == 1
    assert twice["ratio_to_xla"] == pytest.approx(xla["seconds"] / twice["seconds"])


def test_table_says_what_was_left_out(rates):
    lines = benchmark.command("", works(), []).splitlines()
    assert lines[0].startswith("cpu, jax ")
    assert lines[1].startswith("XLA alone: mosaic_gpu needs")
    assert [line.split()[:2] for line in lines[2:]] == [
        [case, name] for case in ("small", "other") for name in ("xla", "twice")
    ]


def test_kernels_are_compared_with_xla_on_the_device_that_times_them(rates, monkeypatch):
    monkeypatch.setattr(benchmark.dispatch, "IMPLEMENTATIONS", ("xla", "kernel"))
    ways = {
        "kernel": Way(lambda x: (x + 1, x < 0), make_inputs),
        "xla": Way(lambda x: (x + 2, x < 0), make_inputs),
        "library": Way(lambda x: x.sum(), make_inputs),
    }
    kernel, xla, library = benchmark.measure(Work("one", 1000, 1, ways), 1e9, 1e10)
    assert (kernel["difference"], xla["difference"], library["difference"]) == (0.5, 0.0, None)
    assert benchmark.difference(np.array([1, 2, 3, 4]), np.array([1, 2, 0, 4])) == 0.25


def test_an_implementation_that_fails_leaves_the_others_alone(rates, tmp_path):
    def broken(x):
        raise NotImplementedError("heads of\n96")

    ways = {"xla": Way(broken, make_inputs), "library": Way(jnp.sin, make_inputs)}
    path = tmp_path / "found.json"
    said = benchmark.command("", [Work("one", 1000, 1, ways)], ["--out", str(path)])
    xla, library = json.loads(path.read_text())["rows"]
    assert xla == {"case": "one", "implementation": "xla", "error": "heads of 96"}
    assert library["ratio_to_xla"] is None
    assert "failed: heads of 96" in said


def test_what_was_measured_is_in_the_file_before_the_next_case(rates, tmp_path):
    path = tmp_path / "found.json"

    def then_interrupted():
        yield next(works())
        assert len(json.loads(path.read_text())["rows"]) == 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        benchmark.command("", then_interrupted(), ["--out", str(path)])
    assert len(json.loads(path.read_text())["rows"]) == 2


def test_floor_is_the_larger_of_bytes_and_flops():
    work = Work("copy", 10**9, 1, {"xla": Way(jnp.sin, make_inputs)})
    (row,) = benchmark.measure(work, 1e9, 1e10)
    assert row["floor_share"] == pytest.approx(1 / row["seconds"])


def test_cases_of_a_cpu_have_a_forward_and_a_backward_pass():
    cases = [work.case for work in anchor_bench.works()]
    assert len(cases) == 4
    assert all("float32" in case for case in cases)
    assert [case.startswith("gradient, ") for case in cases] == [False, True] * 2


def test_cases_of_serving_attention_are_timed_beside_the_library():
    works = list(ragged_bench.works())
    assert "verify 5 of 32 x 1024, 9/3 heads of 64" in [work.case for work in works]
    for work in works:
        assert set(work.ways) == {"xla", "library"}
    small = min(works, key=lambda work: work.least_bytes)
    outs = [np.asarray(way.step(*way.inputs(0)), np.float32) for way in small.ways.values()]
    np.testing.assert_allclose(*(out.reshape(-1) for out in outs), atol=1e-5)
