"""Traces of some turns, and the names under which a profile shows the parts of a round."""

import jax
import pytest

from dspark_jax.tracing import Trace
from tests.test_round_programs import lower


@pytest.fixture
def calls(monkeypatch):
    """What the profiler is asked for."""
    made = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda place, **_: made.append(place))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: made.append("stop"))
    return made


@pytest.mark.parametrize(
    ("turns", "recorded"), [(3, 0), (4, 1), (5, 2), (6, 2), (50, 2)]
)  # of which the first three are left out
def test_so_many_turns_are_recorded(tmp_path, calls, caplog, turns, recorded):
    during = []
    with Trace(tmp_path, 2) as trace:
        for _ in range(turns):
            trace.turn()
            during.append(calls[-1:] == [str(tmp_path)])
    assert sum(during) == recorded
    assert calls == ([str(tmp_path), "stop"] if recorded else [])
    assert ("there is no trace" in caplog.text) == (not recorded)


def test_a_trace_ends_with_the_work_that_fails(tmp_path, calls):
    def fails():
        with Trace(tmp_path, 5, skip=0) as trace:
            trace.turn()
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        fails()
    assert calls == [str(tmp_path), "stop"]


def test_the_parts_of_a_round_have_their_names():
    text = lower("greedy", "rejection", num_slots=2, rows_per_slot=2).as_text(debug_info=True)
    for part in ("draft", "schedule", "verify", "accept", "commit"):
        assert f"/{part}/" in text, part
