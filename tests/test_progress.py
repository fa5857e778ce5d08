"""Progress in a log file is lines, and few of them."""

import logging

from dspark_jax import progress


def test_a_log_gets_few_whole_lines(caplog, capsys, monkeypatch):
    caplog.set_level(logging.INFO, "dspark_jax")
    monkeypatch.setattr(progress, "LINE_S", 0.05)
    now_s = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now_s)
    with progress.progress(total=1000, desc="work", mininterval=0) as bar:
        for number in range(1000):
            now_s += 0.001
            bar.set_postfix(loss=number)
            bar.update()
    lines = [record.getMessage() for record in caplog.records]
    assert 10 < len(lines) < 30
    assert lines[-1].startswith("work: 100%")
    assert not any("\r" in line or "\n" in line for line in lines)
    assert capsys.readouterr() == ("", "")


def test_what_never_gets_anywhere_says_nothing(caplog):
    caplog.set_level(logging.INFO, "dspark_jax")
    with progress.progress(total=3):
        pass
    assert not caplog.records
