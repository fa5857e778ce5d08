"""The project's own files agree with each other and with the code."""

import ast
import builtins
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

import dspark_jax

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ROOT / "notebooks"


def test_command_in_readme_is_the_one_that_ci_runs():
    commands = [
        line
        for line in README.splitlines()
        if line.startswith("python3 -m venv") and line.endswith("pytest")
    ]
    assert len(commands) == 1
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert commands[0] in map(str.strip, script)


@pytest.mark.smoke
def test_installed_version_is_the_packages():
    assert importlib.metadata.version("dspark-jax") == dspark_jax.__version__


def test_no_dependency_is_torch():
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"].values()
    for requirement in [*project["dependencies"], *(r for extra in extras for r in extra)]:
        assert "torch" not in requirement


def test_the_site_names_every_marker_and_extra():
    pages = (PAGES / name for name in ("start.md", "project/contributing.md"))
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    for marker in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]:
        assert f"-m {marker.split(':')[0]}" in text
    for extra in PYPROJECT["project"]["optional-dependencies"]:
        assert f"[{extra}]" in text


def test_pseudocode_of_a_round_calls_functions_that_exist():
    page = (PAGES / "concepts" / "round.md").read_text(encoding="utf-8")
    (decode_round,) = re.findall(r"```text\n(def .*?)```", page, flags=re.DOTALL)
    called = {
        node.func.id
        for node in ast.walk(ast.parse(decode_round))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    } - set(dir(builtins))
    defined = {
        node.name
        for path in (ROOT / "dspark_jax").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert called <= defined, f"unknown to the code: {sorted(called - defined)}"
