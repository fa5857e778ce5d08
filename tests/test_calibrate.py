"""Known temperatures come back; reports match the reference's; damaged files are refused."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.scheduler import reliability, schedule, temperatures
from dspark_jax.scheduler.calibration import (
    FILE_NAME,
    Calibration,
    CalibrationTable,
    read_calibration,
    write_calibration,
)

ROUNDING = 5e-6  # of σ(x) in float32 for |x| up to 40: an error of x is one of log σ(x)
GOLDEN = Path(__file__).parent / "data" / "confidence_metrics"

# Ours and the reference's names of the same numbers; positions count from 1 and from 0.
NAMES = {
    "weight": "total_weight",
    "ece": "ece",
    "auc": "auc",
    "brier": "brier",
    "predicted": "pred_mean",
    "accepted": "target_mean",
}


def assert_is_golden(report, golden):
    assert report.position == golden["position"] + 1
    for ours, theirs in NAMES.items():
        found, expected = getattr(report, ours), golden[theirs]
        assert found == (None if expected is None else pytest.approx(expected, rel=1e-6)), ours
    assert len(report.reliability) == len(golden["reliability"])
    for found, expected in zip(report.reliability, golden["reliability"], strict=True):
        assert [found.low, found.high] == pytest.approx(expected["range"])
        assert found.weight == expected["weight"]
        # float32 sigmoids there
        assert found.predicted == pytest.approx(expected["avg_pred"], rel=1e-5)
        assert found.accepted == pytest.approx(expected["avg_target"], rel=1e-12)


@pytest.mark.smoke
def test_golden_recorded_rounds():
    arrays = dict(np.load(GOLDEN / "recorder_inputs.npz"))
    golden = json.loads((GOLDEN / "recorder_expected.json").read_text())
    accepted = arrays["accept_prefix_mask"].sum(axis=1)
    drafted = arrays["draft_token_count"] > 0
    verified = np.where(drafted, arrays["effective_proposal_length"], 0)
    survival = temperatures.predicted_survival(arrays["confidence_logits"])
    report = reliability.confidence_report(survival, accepted, verified)
    assert len(report.positions) == 5
    for position, expected in zip(report.positions, golden["row"]["per_position"], strict=True):
        assert_is_golden(position, expected)
        assert position.ece_low < position.ece_high


def test_golden_predictions_on_the_edges_of_bins():
    arrays = dict(np.load(GOLDEN / "update_inputs.npz"))
    golden = json.loads((GOLDEN / "update_expected.json").read_text())
    for slot, expected in enumerate(golden["per_position"]):
        seen = arrays["lengths"] > slot
        found = reliability.position_report(
            slot + 1, arrays["probs"][seen, slot], arrays["targets"][seen, slot]
        )
        assert_is_golden(found, expected)


def sampled_rounds(rng, num, temperatures, spread=2.0):
    """Logits that are `temperatures` times too large, and how many drafts are accepted."""
    true = rng.normal(1.0, spread, (num, len(temperatures)))
    chance = 1 / (1 + np.exp(-true))
    accepted = np.cumprod(rng.random(true.shape) < chance, axis=1).sum(axis=1)
    return true * temperatures, accepted


def test_sequential_scaling_finds_the_temperatures():
    rng, true = np.random.default_rng(0), np.array([2.0, 0.6, 1.0, 1.6])
    logit, accepted = sampled_rounds(rng, 20_000, true)
    found = temperatures.fit_temperatures(logit, accepted)
    np.testing.assert_allclose(found, true, rtol=0.15)

    logit, accepted = sampled_rounds(rng, 20_000, true)
    whole = np.full(len(accepted), 4)
    before, after = (
        reliability.confidence_report(temperatures.predicted_survival(logit, t), accepted, whole)
        for t in (np.ones(4), found)
    )
    assert after.ece_mean_high < 0.02 < before.ece_mean_low
    assert after.ece_mean_low <= after.ece_mean <= after.ece_mean_high
    for position in range(4):  # scaling keeps the order of the first slot
        assert after.positions[position].brier < before.positions[position].brier + 1e-4
    assert after.positions[0].auc == pytest.approx(before.positions[0].auc, abs=2e-3)


def test_a_perfect_predictor_meets_the_floor_of_finite_samples():
    rng = np.random.default_rng(1)
    for num, floor in ((1000, 0.044), (20_000, 0.010)):
        prediction = rng.random((20, num))
        label = (rng.random(prediction.shape) < prediction).astype(float)
        errors = [reliability.calibration_error(*x) for x in zip(prediction, label, strict=True)]
        assert np.mean(errors) == pytest.approx(floor, rel=0.15)


def test_rounds_of_one_conversation_widen_the_interval():
    rng = np.random.default_rng(2)
    chance = np.repeat(rng.choice([0.2, 0.8], 50), 40)  # conversations are easy or hard
    accepted = (rng.random(2000) < chance).astype(int)
    survival, whole = np.full((2000, 1), 0.5), np.ones(2000, int)
    alone = reliability.confidence_report(survival, accepted, whole)
    grouped = reliability.confidence_report(survival, accepted, whole, np.repeat(range(50), 40))
    assert alone.ece_mean == grouped.ece_mean

    def width(report):
        return report.ece_mean_high - report.ece_mean_low

    assert width(grouped) > 2 * width(alone)


def test_positions_that_nobody_verified_have_no_numbers():
    report = reliability.confidence_report(np.full((3, 2), 0.5), np.array([1, 0, 1]), np.ones(3))
    assert report.positions[1] == reliability.PositionReport(2, 0)
    assert report.ece_mean == report.positions[0].ece
    nothing = reliability.confidence_report(np.full((3, 2), 0.5), np.zeros(3), np.zeros(3))
    assert nothing.ece_mean is None
    json.dumps(dataclasses.asdict(nothing), allow_nan=False)


@pytest.mark.parametrize(
    ("logit", "accepted", "message"),
    [
        (np.zeros((0, 4)), np.zeros(0), r"shape \(0, 4\)"),
        (np.zeros((3, 4)), np.zeros(2), r"shape \(2,\)"),
        (np.zeros(3), np.zeros(3), "rounds, slots"),
        (np.full((3, 4), np.nan), np.zeros(3), "not all finite"),
    ],
)
def test_records_that_do_not_fit_are_refused(logit, accepted, message):
    with pytest.raises(ValueError, match=message):
        temperatures.fit_temperatures(logit, accepted)
    with pytest.raises(ValueError, match=message):
        reliability.confidence_report(logit, accepted, accepted)


def test_device_and_host_agree_and_survival_still_never_rises():
    rng = np.random.default_rng(3)
    logit, temperature = rng.normal(2, 3, (500, 7)), rng.uniform(0.3, 4, 7)
    calibrated = jax.jit(temperatures.calibrated_confidence)
    confidence = calibrated(jnp.array(logit), jnp.array(temperature))
    assert confidence.dtype == np.float32
    survival = schedule.prefix_survival(confidence)
    expected = temperatures.predicted_survival(logit, temperature)
    np.testing.assert_allclose(survival, expected, rtol=7 * ROUNDING, atol=1e-30)
    assert (np.diff(np.asarray(survival), axis=1) <= 0).all()
    of_requests = calibrated(jnp.array(logit), jnp.tile(jnp.array(temperature), (500, 1)))
    np.testing.assert_allclose(of_requests, confidence, rtol=ROUNDING)


# Online calibration.


def decode_online(true, verify, count_unverified=False, num_rounds=100, num_requests=400):
    """Rounds of a batch; `verify` picks lengths by the raw logits, as a scheduler would."""
    rng, state = np.random.default_rng(4), temperatures.start_online(np.ones(len(true)))
    for _ in range(num_rounds):
        logit, would_accept = sampled_rounds(rng, num_requests, true)
        verified = verify(logit)
        accepted = np.minimum(would_accept, verified)
        seen = np.full(num_requests, len(true)) if count_unverified else verified
        state = temperatures.observe(state, logit, accepted, seen)
    return state


def confident_slots(logit):
    """Leading slots of a high raw confidence: few, and not chosen at random."""
    return np.cumprod(logit > 1, axis=1).sum(axis=1)


def test_online_temperatures_come_from_the_slots_that_were_decided_about():
    true = np.array([2.0, 0.6, 1.5])
    whole = decode_online(true, lambda logit: np.full(len(logit), 3))
    np.testing.assert_allclose(whole.temperature_G, true, rtol=0.12)
    chosen = decode_online(true, confident_slots)
    np.testing.assert_allclose(chosen.temperature_G, true, rtol=0.15)


def test_counting_slots_that_were_not_verified_as_rejected_is_noticed():
    true = np.array([2.0, 0.6, 1.5])
    biased = decode_online(true, confident_slots, count_unverified=True)
    assert (abs(np.log(biased.temperature_G / true)) > 0.15).all()


def test_few_outcomes_leave_the_temperatures_as_they_are():
    prior = np.array([1.3, 0.8])
    state = temperatures.start_online(prior)
    logit = np.array([[4.0, np.nan], [4.0, 4.0]])
    state = temperatures.observe(state, logit, np.array([2, 0]), np.array([2, 2]))
    np.testing.assert_array_equal(state.weight_G, [2, 0])  # not finite; not decided about
    np.testing.assert_array_equal(state.temperature_G, prior)
    idle = temperatures.observe(state, logit, np.array([0, 0]), np.array([0, 0]))
    np.testing.assert_array_equal(idle.loss_GJ, state.loss_GJ)


def test_old_outcomes_fade():
    rng, state = np.random.default_rng(5), temperatures.start_online(np.ones(1))
    for true, rounds in ((0.5, 100), (2.0, 200)):
        for _ in range(rounds):
            logit, accepted = sampled_rounds(rng, 200, np.array([true]))
            state = temperatures.observe(state, logit, accepted, np.ones(200, int))
    assert state.weight_G[0] <= temperatures.WINDOW
    assert state.temperature_G[0] == pytest.approx(2.0, rel=0.2)


# The file.

GREEDY = CalibrationTable("rejection", 0.0, (0.5, 0.6))
SAMPLED = CalibrationTable("rejection", 1.0, (1.0, 1.2))
COUPLED = CalibrationTable("coupled", 0.7, (1.5, 1.6))
TABLES = Calibration((GREEDY, SAMPLED, COUPLED))


def test_tables_survive_the_file(tmp_path):
    write_calibration(tmp_path / FILE_NAME, TABLES)
    assert read_calibration(tmp_path / FILE_NAME, 2) == TABLES
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize(
    ("acceptance", "temperature", "table"),
    [
        ("rejection", 1.0, SAMPLED),
        ("rejection", 0.6, SAMPLED),
        ("rejection", 0.2, GREEDY),
        ("coupled", 1.5, COUPLED),
        ("coupled", 0.1, COUPLED),
        ("coupled", 0.0, GREEDY),
    ],
)
def test_the_nearest_table_is_used_and_named(acceptance, temperature, table):
    found = TABLES.nearest(acceptance, temperature)
    assert found == table
    assert str(found) == f"{table.acceptance}, temperature {table.sampling_temperature:g}"


def test_another_acceptance_is_better_than_none():
    assert Calibration((COUPLED,)).nearest("rejection", 1.0) == COUPLED


def changed(**fields):
    return {"format": 1, "tables": [{**dataclasses.asdict(SAMPLED), **fields}]}


DAMAGED = {
    "not JSON": ("{", "not readable JSON"),
    "a list": ([], "no calibration of format 1"),
    "another format": ({"format": 2, "tables": []}, "no calibration of format 1"),
    "no tables": ({"format": 1}, "tables must be a list"),
    "empty": ({"format": 1, "tables": []}, "tables must be a list"),
    "a number for a table": ({"format": 1, "tables": [7]}, "needs exactly"),
    "unknown field": (changed(more=1), "needs exactly"),
    "acceptance": (changed(acceptance="lucky"), "acceptance is 'lucky'"),
    "acceptance of another type": (changed(acceptance=[]), "acceptance is"),
    "negative": (changed(sampling_temperature=-1), "sampling_temperature is -1"),
    "true": (changed(sampling_temperature=True), "sampling_temperature is True"),
    "huge": (changed(sampling_temperature=10**400), "sampling_temperature is 10"),
    "another block": (changed(confidence_temperatures=[1.0]), "not a list of 2"),
    "zero": (changed(confidence_temperatures=[1.0, 0]), "finite and positive"),
    "NaN": (changed(confidence_temperatures=[1.0, float("nan")]), "finite and positive"),
    "twice": ({"format": 1, "tables": 2 * changed()["tables"]}, "same key"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, content, message):
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_calibration(tmp_path / FILE_NAME, 2)
    assert FILE_NAME in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_calibration(tmp_path / FILE_NAME, 2)
