"""What past rounds tell an engine: nothing too new, nothing of others, temperatures if asked."""

import types

import numpy as np
import pytest

from dspark_jax.engine.reader import drafted_by
from dspark_jax.scheduler import temperatures
from dspark_jax.scheduler.history import (
    Drafted,
    History,
    Promise,
    advance,
    keep_promise,
    record,
)

GREEDY, SAMPLED = (True, (1.0, 1.0)), (False, (2.0, 0.5))


def drafted(value, kind=GREEDY, accepted=0, decided=2):
    return Drafted(kind, np.full(2, value, np.float32), accepted, decided)


def known(history):
    return {request: float(logit_G[0]) for request, logit_G in history.logits.items()}


def test_a_round_is_used_two_rounds_later():
    history = record(History(), 3, {7: drafted(1.5)})
    early = advance(history, 4, [7])
    assert (known(early), early.fresh) == ({}, frozenset())
    due = advance(early, 5, [7])
    assert (known(due), due.fresh) == ({7: 1.5}, frozenset({7}))
    later = advance(due, 6, [7])
    assert (known(later), later.fresh) == ({7: 1.5}, frozenset())


def test_what_arrives_together_is_used_by_its_number():
    """Reports that were read early wait; of several that are due the newest counts."""
    history = History()
    for number in range(4):
        history = record(history, number, {7: drafted(number)})
    history = advance(history, 4, [7])
    assert (known(history), history.fresh) == ({7: 2.0}, frozenset({7}))
    assert [number for number, _ in history.waiting] == [3]


def test_a_request_that_left_is_forgotten_and_its_follower_knows_nothing():
    history = record(History(), 0, {7: drafted(1.0), 8: drafted(2.0)})
    history = advance(history, 2, [8, 9])
    assert known(history) == {8: 2.0}


def test_a_round_that_did_not_draft_leaves_older_confidences():
    history = record(record(History(), 0, {7: drafted(1.0)}), 1, {})
    history = advance(history, 3, [7])
    assert (known(history), history.fresh) == ({7: 1.0}, frozenset())


def test_rounds_without_drafts_leave_nothing_behind():
    """An engine that never drafts asks for nothing, however long it serves."""
    history = History()
    for number in range(5):
        history = record(history, number, {})
    assert not history.waiting


@pytest.fixture
def _quick(monkeypatch):
    monkeypatch.setattr(temperatures, "ENOUGH", 8.0)


def observed(recalibrates, accepted, rounds=20):
    """Confidences of σ(3) for both drafts of greedy requests, and what became of them."""
    history = History(recalibrates)
    for number in range(rounds):
        draft = drafted(3.0, GREEDY, accepted[number % len(accepted)])
        history = advance(record(history, number, {7: draft}), number + 1, [7])
    return history


@pytest.mark.usefixtures("_quick")
def test_temperatures_follow_what_is_accepted_where_they_shall():
    history = observed(True, accepted=[0, 1])  # σ(3) is far too sure of itself
    assert (history.temperature_G(GREEDY) > 2).all()
    np.testing.assert_array_equal(history.temperature_G(SAMPLED), SAMPLED[1])  # another kind
    left_alone = observed(False, accepted=[0, 1])
    np.testing.assert_array_equal(left_alone.temperature_G(GREEDY), GREEDY[1])
    assert not left_alone.online


@pytest.mark.usefixtures("_quick")
def test_temperatures_know_nothing_that_is_newer_than_two_rounds():
    others = [{8: drafted(3.0, GREEDY, accepted)} for accepted in (0, 2)]
    weights = []
    for other in others:
        history = record(observed(True, [0, 1]), 20, other)
        history = advance(history, 21, [7])
        weights.append(history.online[GREEDY].loss_GJ)
        later = advance(history, 22, [7]).online[GREEDY].loss_GJ
        assert (later != weights[-1]).any()
    np.testing.assert_array_equal(*weights)


def test_an_accepted_stop_token_is_the_last_that_was_decided_about():
    logit_BG = np.zeros((3, 2), np.float32)
    report = types.SimpleNamespace(
        confidence_logit_BG=logit_BG,
        accepted_B=np.array([1, 1, 0]),
        verified_B=np.array([2, 2, 2]),
        count_B=np.array([1, 2, 1]),
    )
    decided = [drafted_by(GREEDY, report, slot).decided for slot in range(3)]
    assert decided == [1, 2, 2]


def test_confidences_are_believed_as_far_as_they_kept_what_they_promised():
    promise, survival = Promise(), np.array([[0.9, 0.8], [np.nan, 0.1]])
    assert promise.kept == 1
    for _ in range(200):
        promise = keep_promise(promise, survival, np.array([2, 1]), np.array([1, 1]))
    assert 0 < promise.kept - 1 / 1.7 < 0.02  # the credit is left; the second request says nothing
    unread = keep_promise(promise, survival, np.array([0, 0]), np.array([0, 0]))
    assert unread == promise
    for _ in range(2000):
        promise = keep_promise(promise, survival, np.array([1, 0]), np.array([1, 0]))
    assert promise.kept > 1.05  # what is long past is forgotten


def test_greedy_and_sampled_requests_have_promises_of_their_own():
    history = record(History(), 0, {7: drafted(2.0, GREEDY, 0), 8: drafted(2.0, SAMPLED, 2)})
    early = advance(history, 1, [7, 8])
    assert not early.promises  # of a round that is too new
    found = advance(early, 2, [7, 8]).promises
    assert found[GREEDY].kept < 1 < found[SAMPLED].kept
