"""Policies replayed over recorded rounds: an oracle above all of them, and what delays cost."""

import itertools
import json

import numpy as np
import pytest

from dspark_jax.cli import command as cli
from dspark_jax.evaluation import imagined, replay
from dspark_jax.evaluation.rounds import RecordedRequest, read_record, record_line
from dspark_jax.scheduler.budget import RoundCosts
from dspark_jax.scheduler.profile import make_profile, write_profile
from dspark_jax.scheduler.shape import Shape, Sizes

SLOTS = 4
DEVICES = {
    "smooth": lambda number: imagined.imagined_costs(1, number, SLOTS),
    "staircase": lambda number: imagined.imagined_costs(16, number, SLOTS),
    "draft costs as much as it can bring": lambda number: RoundCosts(
        (number * (1 + SLOTS),), (0.01,), 0.05, 0.01
    ),
    "rows are free": lambda number: RoundCosts(
        tuple(number * k for k in range(2, SLOTS + 2)), (0.01,) * SLOTS, 0.0, 0.01
    ),
}


def recorded(seed, count=12, sharpness=2.0):
    """Requests whose confidences are true: easy ones and hard ones, longer and shorter."""
    rng, requests = np.random.default_rng(seed), []
    for number in range(count):
        logit = rng.normal(rng.normal(0.5, 1), sharpness, (int(rng.integers(5, 40)), SLOTS))
        hit = rng.random(logit.shape) < 1 / (1 + np.exp(-logit))
        accepted = np.cumprod(hit, axis=1).sum(axis=1)
        verified = np.full(len(logit), SLOTS)
        requests.append(RecordedRequest(f"p:{number}", "rejection", 1.0, logit, verified, accepted))
    return requests


def by_policy(rows):
    return {row["policy"]: row for row in rows}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("number", [1, 5, 24])
def test_nothing_beats_the_oracle(device, number):
    rows = replay.replay_record(recorded(0), [number], lambda n, _: DEVICES[device](n))
    found = by_policy(rows)
    assert list(found)[:2] == ["oracle", "none"]
    assert found["oracle"]["regret"] == 0
    assert all(row["regret"] >= -1e-9 for row in rows)
    assert [name for name, row in found.items() if not row["lossless"]] == [
        "oracle",
        "delayed:0",
        "argmax",
    ]
    plain = found["none"]
    assert (plain["accepted_length"], plain["verification_length"]) == (1, 0)
    assert plain["undrafted_share"] == 1
    assert plain["tokens_per_s"] == pytest.approx(number / DEVICES[device](number).undrafted_s)
    for k in range(1, SLOTS + 1):
        assert found[f"fixed:{k}"]["verification_length"] == k
        assert found[f"fixed:{k}"]["undrafted_share"] == 0


def test_where_rows_are_free_everybody_verifies_everything():
    found = by_policy(
        replay.replay_record(recorded(1), [6], lambda n, _: DEVICES["rows are free"](n))
    )
    assert found["fixed:4"]["regret"] == pytest.approx(0)
    for name in ("delayed:0", "delayed:1", "delayed:2", "argmax"):
        assert found[name]["regret"] == pytest.approx(0)


def test_where_drafting_never_pays_the_oracle_and_the_delayed_policy_stop():
    device = DEVICES["draft costs as much as it can bring"]
    found = by_policy(replay.replay_record(recorded(2, 40), [4], lambda n, _: device(n)))
    assert found["oracle"]["undrafted_share"] == 1
    assert found["delayed:2"]["undrafted_share"] > 0.8
    assert found["delayed:2"]["regret"] < found["causal"]["regret"]


def test_the_oracle_is_the_best_of_all_decisions():
    """By trying them all: 4 rounds of 2 requests."""
    rng = np.random.default_rng(3)
    accepted = rng.integers(0, 3, (4, 2))
    batch = replay.Batch(np.ones((4, 2, 2), np.float32), accepted, np.zeros((4, 2), int))
    device = RoundCosts((3, 4, 6), (1.1, 1.4, 1.9), 0.3, 1.0)
    options = [(2, 1.0)] + [
        (rows, 0.3 + s) for rows, s in zip((3, 4, 6), (1.1, 1.4, 1.9), strict=True)
    ]
    best = 0.0
    for choice in np.ndindex(4, 4, 4, 4):
        tokens = sum(
            2 + min(options[c][0] - 2, a.sum()) for c, a in zip(choice, accepted, strict=True)
        )
        best = max(best, tokens / sum(options[c][1] for c in choice))
    assert replay.replay(batch, device)[0].tokens_per_s == pytest.approx(best)


def test_early_stop_is_trapped_on_a_staircase():
    """The first draft past an edge pays for a whole tile: only more of them together do."""
    requests = recorded(4, 40)
    device = RoundCosts((8, 24, 40), (0.01, 0.0115, 0.03), 0.001, 0.01)
    found = by_policy(replay.replay_record(requests, [8], lambda *_: device))
    assert found["causal"]["verification_length"] < 0.5
    assert found["delayed:2"]["tokens_per_s"] > 1.1 * found["causal"]["tokens_per_s"]


def test_newer_confidences_are_worth_something():
    """Requests change between easy and hard all the time: what is known of them gets old."""
    rng, requests = np.random.default_rng(5), []
    for number in range(16):
        easy = np.repeat(rng.random(40) < 0.5, 3)[:, None]
        logit = np.where(easy, 3.0, -3.0) + rng.normal(0, 0.1, (120, SLOTS))
        accepted = np.cumprod(rng.random(logit.shape) < 1 / (1 + np.exp(-logit)), axis=1).sum(1)
        whole = np.full(120, SLOTS)
        requests.append(RecordedRequest(f"p:{number}", "rejection", 1.0, logit, whole, accepted))
    smooth = DEVICES["smooth"]
    found = by_policy(replay.replay_record(requests, [2], lambda n, _: smooth(n)))
    regrets = [found[f"delayed:{delay}"]["regret"] for delay in (0, 1, 2)]
    assert regrets[0] < regrets[1] < regrets[2]


def test_slots_go_on_with_the_next_request():
    survivals = [np.full((n, 1), n / 10) for n in (2, 3, 1)]
    accepted = [np.full(n, n % 2) for n in (2, 3, 1)]
    batch = replay.make_batch(survivals, accepted, 2)
    assert batch.request_RB.T.tolist() == [[0, 0, 2], [1, 1, 1]]
    assert batch.accepted_RB.T.tolist() == [[0, 0, 1], [1, 1, 1]]
    np.testing.assert_allclose(batch.survival_RBG[:, :, 0].T, [[0.2, 0.2, 0.1], [0.3] * 3])
    assert batch.survival_RBG.dtype == np.float32
    # Few requests are taken several times; every one lasts to its end.
    many = replay.make_batch(survivals, accepted, 7)
    assert many.request_RB.shape == (3, 7)


def test_costs_of_imagined_devices():
    smooth, stairs = (imagined.imagined_costs(tile, 3, 4) for tile in (1, 8))
    assert smooth.buckets == tuple(range(4, 16))
    assert stairs.buckets == (8, 16)
    assert smooth.verify_s_K[-1] < stairs.verify_s_K[-1]
    assert smooth.undrafted_s < stairs.undrafted_s == stairs.verify_s_K[0]


def test_the_command_replays_a_record(tmp_path, capsys):
    record, profile = tmp_path / "rounds.jsonl", tmp_path / "profile.json"
    record.write_bytes(b"".join(map(record_line, range(6), recorded(6))))
    command = ["replay", str(record), "--concurrency", "1,4"]
    assert cli.main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["concurrency"] for row in rows} == {1, 4}
    assert cli.main([*command, "--costs", "smooth"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 1 + len(rows)
    assert sum(line.endswith("not lossless") for line in table) == 2 * 3
    sizes = Sizes(4, 64)
    rounds = {Shape(sizes, 0, 4, 0): 0.01}
    rounds |= {Shape(sizes, 4, 4 * k, 0): 0.01 + 0.001 * k for k in (2, 3, 5)}
    write_profile(profile, make_profile({}, rounds, {sizes: 0.001}))
    assert cli.main([*command, "--profile", str(profile), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["rows"]
    plain = [row["tokens_per_s"] for row in found if row["policy"] == "none"]
    assert plain == pytest.approx([100, 400])
    assert cli.main([*command[:2], "--concurrency", "8", "--profile", str(profile)]) == 2
    assert "no drafted rounds of 8 slots" in capsys.readouterr().err


# The file.


def test_records_survive_the_file(tmp_path):
    written = recorded(7, 3)
    lines = b"".join(map(record_line, itertools.count(), written))
    (tmp_path / "r.jsonl").write_bytes(lines)
    for before, after in zip(written, read_record(tmp_path / "r.jsonl"), strict=True):
        assert (after.prompt, after.acceptance, after.temperature) == (
            before.prompt,
            "rejection",
            1,
        )
        np.testing.assert_allclose(after.logit_NG, before.logit_NG, atol=1e-5)
        np.testing.assert_array_equal(after.accepted_N, before.accepted_N)
        np.testing.assert_array_equal(after.verified_N, before.verified_N)


GOOD = {
    "id": 0,
    "prompt": "p:1",
    "acceptance": "coupled",
    "temperature": 0,
    "logits": [[0.5, 1], [2, -3]],
    "verified": [2, 2],
    "accepted": [1, 0],
}
DAMAGED = {
    "not JSON": ("{", "not JSON"),
    "a list": ([], "needs exactly"),
    "unknown field": ({**GOOD, "more": 1}, "needs exactly"),
    "prompt": ({**GOOD, "prompt": 7}, "prompt is 7"),
    "acceptance": ({**GOOD, "acceptance": "luck"}, "acceptance is 'luck'"),
    "unhashable acceptance": ({**GOOD, "acceptance": []}, "acceptance is"),
    "temperature": ({**GOOD, "temperature": -1}, "temperature is -1"),
    "text": ({**GOOD, "temperature": "1"}, "temperature must be"),
    "ragged": ({**GOOD, "logits": [[1.0, 2.0], [1.0]]}, "logits must be"),
    "flat": ({**GOOD, "logits": [1.0, 2.0]}, "logits must be"),
    "empty": ({**GOOD, "logits": [[], []]}, "logits must be"),
    "NaN": ({**GOOD, "logits": [[1.0, float("nan")], [1, 1]]}, "logits must be finite"),
    "huge": ({**GOOD, "verified": [10**400, 1]}, "verified must be"),
    "true": ({**GOOD, "accepted": [True, False]}, "accepted must be"),
    "broken": ({**GOOD, "accepted": [0.5, 1]}, "accepted must be"),
    "missing round": ({**GOOD, "accepted": [1]}, "differ in their rounds"),
    "too many": ({**GOOD, "verified": [3, 2]}, "within 0..2"),
    "more than verified": ({**GOOD, "verified": [0, 2]}, "not larger than"),
    "nested": ("[" * 5000 + "]" * 5000, "not JSON|needs exactly"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_is_refused_in_one_line(tmp_path, content, message):
    line = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / "r.jsonl").write_text(f"{json.dumps(GOOD)}\n{line}\n")
    with pytest.raises(ValueError, match=message) as caught:
        read_record(tmp_path / "r.jsonl")
    assert "r.jsonl:2" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_records_of_several_drafters_and_empty_ones_are_refused(tmp_path):
    other = {**GOOD, "logits": [[1.0], [2.0]], "verified": [1, 1], "accepted": [0, 0]}
    (tmp_path / "r.jsonl").write_text(f"{json.dumps(GOOD)}\n{json.dumps(other)}\n")
    with pytest.raises(ValueError, match=r"blocks of \[1, 2\] drafts"):
        read_record(tmp_path / "r.jsonl")
    (tmp_path / "r.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no rounds in it"):
        read_record(tmp_path / "r.jsonl")
