"""The notebooks run from top to bottom, here on models as small as can be."""

import ast
import asyncio
import inspect
import json
import re
from pathlib import Path

import pytest

from tests.tiny_model import BLOCK, few_sizes, write_drafter, write_target

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
RECORDED = NOTEBOOKS / "results" / "heads.json"
HEADS = ["vanilla", "gated", "rnn", "bigrams", "dflash"]
TINY_RECIPE = """
from dspark_jax.config import TrainConfig

config = TrainConfig(
    num_layers=1,
    block_size=3,
    markov_rank=4,
    target_layer_ids=(-1, 0),
    max_length=40,
    length_buckets=(40,),
    tokens_per_batch=80,
    num_anchors=8,
    eval_sequences=2,
    eval_every=1,
    log_every=1,
)
"""


def code_cells(name):
    notebook = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def pyplot():
    """Draws into memory, and forgets all figures afterwards."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def run(name, parameters):
    """The names that the notebook ends with; its parameters' cell must set each of these. A cell
    may await, as in a notebook."""
    names = {}
    for cell in code_cells(name):
        where, source = f"{name}:{cell['id']}", "".join(cell["source"])
        code = compile(source, where, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        made = eval(code, names)
        if code.co_flags & inspect.CO_COROUTINE:
            asyncio.run(made)
        if "parameters" in cell["metadata"].get("tags", []):
            assert {key for key in names if key.isupper()} >= set(parameters)
            names |= parameters
    return names


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_hold_their_outputs_and_use_the_public_api_alone(path):
    """Outputs of one run from top to bottom, without errors, warnings, or places of a machine."""
    cells = code_cells(path.name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert any(cell["outputs"] for cell in cells)
    for cell in cells:
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name", "stdout") == "stdout"
            text = "".join(output.get("text", ""))
            assert not re.search(r"/(home|root|tmp|work|Users)/", text), text
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not any(part.startswith("_") for name in names for part in name.split("."))
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith("_")


@pytest.mark.usefixtures("pyplot", "own_cache")
def test_quickstart(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dspark_jax.model.config_for", few_sizes)
    names = run(
        "quickstart.ipynb",
        {
            "TARGET": str(write_target(tmp_path / "target")),
            "DRAFTER": str(write_drafter(tmp_path / "drafter")),
            "MAX_NEW_TOKENS": 12,
            "PROMPTS": ["hello", "a longer prompt"],
        },
    )
    out = capsys.readouterr().out
    assert "target with drafter: blocks of 3 drafts" in out
    assert "same text: 2 of 2" in out
    left, right = names["figure"].axes
    assert sum(bar.get_height() for bar in left.patches) == len(names["lengths"])
    assert [bar.get_height() for bar in right.patches] == [rate or 0 for rate in names["rates"]]
    assert len(left.patches) == BLOCK + 1


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """Parameters that name tiny models, whose engines have few programs."""
    monkeypatch.setattr("dspark_jax.model.config_for", few_sizes)
    target, drafter = write_target(tmp_path / "target"), write_drafter(tmp_path / "drafter")
    return {"TARGET": str(target), "DRAFTER": str(drafter)}


@pytest.mark.full
@pytest.mark.usefixtures("pyplot", "own_cache")
def test_a_round_by_hand_is_the_engines(tiny, capsys):
    names = run("one_round.ipynb", tiny | {"PROMPT": "hello"})
    out = capsys.readouterr().out
    assert "as the engine: True" in out
    assert f"{BLOCK + 1} rows: {BLOCK} drafts verified" in out
    (axes,) = names["figure"].axes
    drafted = [one for one in names["result"].trace if one.draft_G is not None]
    assert axes.get_yticklabels()[-1].get_text() == str(min(len(drafted), names["ROUNDS"]))


@pytest.mark.usefixtures("pyplot", "own_cache")
def test_rules_that_are_not_lossless_are_seen_to_be(tiny, capsys):
    names = run("lossy.ipynb", tiny | {"PROMPT": "hello", "MAX_NEW_TOKENS": 12})
    assert [round(law_2[0], 2) for law_2 in names["laws"].values()] == [0.7, 0.5, 0.85]
    out = capsys.readouterr().out
    assert "behind A" in out
    assert "verify 2" in out
    assert (names["right"].lossless, names["wrong"].lossless) == (True, False)
    assert names["wrong"].accepted_length > names["right"].accepted_length


@pytest.mark.full
@pytest.mark.usefixtures("own_cache")
def test_the_engine_serves_readers_of_one_loop(tiny, capsys):
    names = run("engine.ipynb", tiny | {"MAX_NEW_TOKENS": 24, "POSITIONS": 128})
    assert [row[0] for row in names["rows"]] == ["one", "two", "three"]
    assert names["rows"][1][3] == "cancelled"
    assert "accepted length" in capsys.readouterr().out


def assert_comparison_is_shown(names, out, sets):
    """A line of the table for each drafter and temperature, a panel for each set and temperature,
    a curve for each drafter."""
    table = [line.split() for line in out.splitlines()]
    for head in HEADS:
        rows = [words for words in table if words[:1] == [head]]
        assert len(rows) == len(names["temperatures"])
        for temperature, words in zip(names["temperatures"], rows, strict=True):
            lengths = [
                row["accepted_length"]
                for row in names["drafters"][head]["rows"]
                if row["temperature"] == temperature
            ]
            mean = sum(lengths) / len(sets)
            assert [float(word) for word in words[1:-1]] == pytest.approx(
                [*lengths, mean], abs=0.0051
            )
    panels = names["positions"].axes
    assert len(panels) == len(sets) * len(names["temperatures"])
    for axes in panels:
        assert axes.get_legend_handles_labels()[1] == HEADS
    for axes in names["curves"].axes:
        assert axes.get_legend_handles_labels()[1] == HEADS


@pytest.mark.usefixtures("pyplot")
def test_comparison_of_the_recorded_results(capsys):
    names = run("comparison.ipynb", {"RECORDED": str(RECORDED)})
    sets = ["gsm8k", "mbpp", "mt-bench"]
    assert (names["sets"], names["temperatures"]) == (sets, [0, 1])
    assert_comparison_is_shown(names, capsys.readouterr().out, sets)


@pytest.mark.usefixtures("pyplot")
def test_scheduler(capsys):
    loads = [1, 8]
    names = run("scheduler.ipynb", {"RECORD": "", "CONCURRENCY": loads, "REQUESTS": 8, "BLOCK": 3})
    out = capsys.readouterr().out
    assert out.startswith("8 requests, ")
    shown = [line.split() for line in out.splitlines() if "not lossless" in line]
    assert [words[1] for words in shown] == ["oracle", "delayed:0", "argmax"]
    for axes, rows in zip(names["figure"].axes, names["rows"].values(), strict=True):
        assert len(axes.lines) == 6
        for line in axes.lines:
            own = [row["regret"] for row in rows if row["policy"] == line.get_label()]
            assert line.get_xydata().tolist() == [
                list(pair) for pair in zip(loads, own, strict=True)
            ]
    assert [line.get_label() for line in names["hills"].axes[0].lines] == ["smooth", "staircase"]


@pytest.mark.full
@pytest.mark.usefixtures("pyplot", "own_cache")
def test_comparison_of_drafters_trained_on_the_spot(tmp_path, capsys):
    rows = [
        {
            "conversations": [
                {"role": "user", "content": f"say it {i}"},
                {"role": "assistant", "content": "one two three four"},
            ]
        }
        for i in range(6)
    ]
    for name, lines in (
        ("data.jsonl", rows),
        ("one.jsonl", [{"prompt": "hello"}, {"prompt": "left out"}]),
        ("two.jsonl", [{"turns": ["hello you"]}]),
    ):
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "recipe.py").write_text(TINY_RECIPE)
    names = run(
        "comparison.ipynb",
        {
            "RERUN": True,
            "TARGET": str(write_target(tmp_path / "target")),
            "RECIPE": str(tmp_path / "recipe.py"),
            "DATA": str(tmp_path / "data.jsonl"),
            "STEPS": 2,
            "PROMPTS": [str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")],
            "LIMIT": 1,
            "MAX_NEW_TOKENS": 8,
            "OUT": str(tmp_path / "runs"),
        },
    )
    assert names["results"]["prompts"] == 2
    assert_comparison_is_shown(names, capsys.readouterr().out, ["one", "two"])
    assert json.loads(json.dumps(names["results"])) == names["results"]
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert set(recorded) == set(names["results"])
