"""Drafters side by side: talks played turn by turn, and what a comparison says of them."""

import json

import pytest

from dspark_jax.cli import command as cli
from dspark_jax.engine.reader import Generation
from dspark_jax.evaluation import acceptance_by, compare, pictures, talks
from tests.tiny_model import BLOCK, few_sizes

ROW = {
    "drafter",
    "category",
    "temperature",
    "concurrency",
    "speedup",
    "speedup_low",
    "speedup_high",
    "accepted_length",
    "accept_rate_by_position",
    "draft_share",
    "rows_per_token",
    "same_text",
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_categories_are_those_of_the_lines_or_the_name_of_the_file(tmp_path):
    one = write(
        tmp_path / "q.jsonl",
        {"question_id": 1, "category": "roleplay", "turns": ["a", "b"]},
        {"question_id": 2, "category": "coding", "turns": ["c", "d"]},
        {"question_id": 3, "category": "rag", "turns": ["e"]},
    )
    other = write(tmp_path / "own.jsonl", {"prompt": "f"}, {"prompt": "g"})
    found = talks.read_talks([one, other], limit=1)
    assert {name: [talk.turns for talk in some] for name, some in found.items()} == {
        "mt_bench": [("a", "b")],
        "rag": [("e",)],
        "own": [("f",)],
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"turns": ["a", 3]}, "q.jsonl:1: needs a string"),
        ({"turns": ["a", " "]}, "q.jsonl:1: the prompt is empty"),
        ({"prompt": "a", "category": 3}, "q.jsonl:1: category is 3: give a name"),
    ],
)
def test_lines_that_are_no_talks_are_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        talks.read_talks([write(tmp_path / "q.jsonl", row)])


def test_rows_that_verification_reads_are_counted():
    """Two rounds of three and one draft, which commit two and one token."""
    one = Generation(1, accepted_lengths=[2, 1], verified_lengths=[3, 1])
    assert compare._rows_per_token([one], 0) == (2 + 4) / 3
    one.undrafted_rounds = 1
    assert compare._rows_per_token([one], 5) == (2 + 4 + 5) / 3


@pytest.mark.parametrize(
    ("drafters", "message"),
    [
        ("none", "is no drafter"),
        ("a=,b", "is no drafter"),
        ("a=lookup,a=default", "is there twice"),
    ],
)
def test_drafters_that_are_none_are_refused(capsys, drafters, message):
    words = ["bench", "compare", "--drafters", drafters, "--prompts", "none.jsonl"]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_contexts_are_in_classes_that_grow():
    assert [acceptance_by.class_of(n) for n in (1, 128, 129, 256, 257)] == [
        (1, 128),
        (1, 128),
        (129, 256),
        (129, 256),
        (257, 512),
    ]


def test_rounds_are_sorted_by_context_and_turn():
    first = Generation(120, accepted_lengths=[4, 4, 2], verified_lengths=[3, 3, 3])
    first.accepted_drafts = [3, 3, 1]
    second = Generation(140, accepted_lengths=[1], verified_lengths=[3], accepted_drafts=[0])
    found = {}
    acceptance_by._sort([first, second], "chat", ("context", "turn"), found)
    assert {key: one.accepted_lengths for key, one in found.items()} == {
        ("chat", ("context", (1, 128)), ("turn", 1)): [4, 4],
        ("chat", ("context", (129, 256)), ("turn", 1)): [2],
        ("chat", ("context", (129, 256)), ("turn", 2)): [1],
    }


@pytest.mark.full
@pytest.mark.usefixtures("own_cache")
def test_acceptance_by_context_and_turn(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(acceptance_by, "config_for", few_sizes)
    path = write(tmp_path / "chat.jsonl", {"turns": ["one", "two"]}, {"turns": ["three"]})
    words = ["bench", "acceptance", *models, "--prompts", path, "--temperature", "0", "--json"]
    words += ["--max-new-tokens", "8"]
    with pytest.raises(SystemExit):
        cli.main([*words, "--by", "place"])
    assert "give some of position, context, turn" in capsys.readouterr().err
    assert cli.main([*words, "--by", "position,turn"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["turn"] for row in report["rows"]] == [1, 2]
    assert all("context" not in row for row in report["rows"])
    assert all(len(row["accept_rate_by_position"]) == BLOCK for row in report["rows"])
    assert "chat" in acceptance_by.format_by(report)


@pytest.fixture
def words(models, tmp_path, monkeypatch):
    """A comparison of two drafters, which are the same one, so that there are few programs."""
    monkeypatch.setattr(compare, "config_for", few_sizes)
    monkeypatch.setattr(compare, "REPLAYS", 1)
    one = write(tmp_path / "chat.jsonl", {"turns": ["one", "two"]}, {"turns": ["three"]})
    other = write(tmp_path / "math.jsonl", {"prompt": "four"})
    given = ["--prompts", one, "--prompts", other, "--max-new-tokens", "8", "--json"]
    drafters = f"tiny={models[3]},again={models[3]}"
    return ["bench", "compare", "--target", models[1], "--drafters", drafters, *given]


@pytest.mark.usefixtures("own_cache")
def test_a_comparison_of_two_drafters(words, tmp_path, capsys, monkeypatch):
    asked = []

    def noted(engine, *arguments, play=talks.play):
        submit = engine.submit
        monkeypatch.setattr(engine, "submit", lambda one: asked.append(one.messages) or submit(one))
        return play(engine, *arguments)

    monkeypatch.setattr(compare, "play", noted)
    page, picture = tmp_path / "page.html", tmp_path / "picture.png"
    assert cli.main([*words, "--plot", str(picture), "--html", str(page)]) == 0
    report = json.loads(capsys.readouterr().out)
    keys = [(row["drafter"], row["category"]) for row in report["rows"]]
    assert keys == [(n, c) for n in ("tiny", "again") for c in ("chat", "math", "all")]
    for row in report["rows"]:
        assert row.keys() >= ROW
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"]
        assert row["same_text"] == 1
        assert row["rows_per_token"] >= 1
        assert len(row["accept_rate_by_position"]) == BLOCK
    assert report["drafters"]["tiny"]["parameters"] > 0
    assert report["turns"] == 4
    # The second turn stands behind the model's own first answer.
    later = [messages for messages in asked if len(messages) == 3]
    assert {messages[0]["content"] for messages in later} == {"one"}
    assert {messages[1]["role"] for messages in later} == {"assistant"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert "again" in text
    assert "<script" not in text
    assert "tiny" in compare.format_compare(report)
    made_up = report | {"synthetic_acceptance": 0.5}
    assert "SYNTHETIC" in compare.format_compare(made_up)
    assert "SYNTHETIC" in pictures.compare_page(made_up)
    assert cli.main([*words, "--synthetic-acceptance", "2"]) == 2
    assert "give a chance in 0..1" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.usefixtures("own_cache")
def test_a_synthetic_acceptance_is_that(words, capsys):
    chance = ["--synthetic-acceptance", "1", "--policy", "block", "--limit", "1"]
    assert cli.main([*words, *chance]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["synthetic_acceptance"] == 1
    assert report["rows"][0]["accept_rate_by_position"] == [1.0] * BLOCK
    assert report["rows"][0]["same_text"] is None
