"""The notebooks run from top to bottom, here on models as small as can be."""

import ast
import json
from pathlib import Path

import pytest

from tests.tiny_model import BLOCK, write_drafter, write_target

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"


def code_cells(name):
    notebook = json.loads((NOTEBOOKS / name).read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(name, parameters):
    """The names that the notebook ends with; its parameters' cell must set these and no others."""
    names = {}
    for cell in code_cells(name):
        exec(compile("".join(cell["source"]), f"{name}:{cell['id']}", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", []):
            assert {key for key in names if key.isupper()} == set(parameters)
            names |= parameters
    return names


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_notebooks_hold_no_output_and_use_the_public_api_alone(path):
    for cell in code_cells(path.name):
        assert not cell["outputs"]
        assert cell["execution_count"] is None
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.ImportFrom | ast.Import):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not any(part.startswith("_") for name in names for part in name.split("."))
            if isinstance(node, ast.Attribute):
                assert not node.attr.startswith("_")


def test_quickstart(tmp_path, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

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
    pyplot.close(names["figure"])
