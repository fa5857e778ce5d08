"""What an engine counts: the rounds it predicted, and how good confidences are."""

import numpy as np
import pytest

from dspark_jax.engine.outlook import predicted_s
from dspark_jax.engine.stats import RECENT_DRAFTS, Tally
from dspark_jax.scheduler.budget import RoundCosts
from dspark_jax.scheduler.history import Drafted, History
from dspark_jax.scheduler.shape import Shape, Sizes


def test_rounds_are_predicted_by_what_they_were_chosen_from():
    costs = RoundCosts((4, 8), (0.25, 0.5), 0.125, 0.0625)
    sizes = Sizes(2, 64)
    shapes = Shape(sizes, 3, 4, 0), Shape(sizes, 3, 2, 0), Shape(sizes, 0, 2, 0)
    assert predicted_s(costs, shapes[0], num_shards=2) == 0.625
    assert predicted_s(costs, shapes[1], num_shards=2) == 0.375
    assert predicted_s(costs, shapes[2], num_shards=2) == 0.0625
    assert predicted_s(costs, Shape(sizes, 3, 4, 1), num_shards=2) == 0
    assert predicted_s(None, shapes[0], num_shards=2) == 0
    tally = Tally()
    tally.timed(0.5, 0.75)
    tally.timed(0.25, 0.5)
    found = tally.stats(0, 0, 0.0)
    assert (found.predicted_s, found.taken_s) == (0.75, 1.25)


def test_recent_confidences_alone_are_judged_at_their_temperatures():
    tally, kind = Tally(), (True, (2.0, 1.0))
    logit_G = np.array([0.0, np.nan], np.float32)
    tally.judge([Drafted(kind, logit_G, accepted=0, decided=0)], History())
    tally.judge([Drafted(kind, logit_G, accepted=1, decided=2)], History())
    assert tally.stats(0, 0, 0.0).calibration_error is None  # one is no number
    sure = np.array([2 * np.log(3.0), np.log(3.0)], np.float32)  # 3/4 and 9/16
    drafts = [Drafted(kind, sure, accepted=2, decided=2)] * RECENT_DRAFTS
    tally.judge(drafts, History())
    assert tally.stats(0, 0, 0.0).calibration_error == pytest.approx((1 / 4 + 7 / 16) / 2)
