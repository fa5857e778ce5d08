"""The project's own files agree with each other and with the code."""

import ast
import builtins
import doctest
import functools
import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

import dspark_jax
from dspark_jax.engine.config import EngineConfig
from tests.tiny_model import BLOCK, few_sizes, write_drafter, write_target

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_command_in_readme_is_the_one_that_ci_runs():
    commands = [
        line
        for block in code_blocks("sh")
        for line in block.splitlines()
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


def test_readme_names_every_marker_and_extra():
    for marker in PYPROJECT["tool"]["pytest"]["ini_options"]["markers"]:
        assert f"-m {marker.split(':')[0]}" in README
    for extra in PYPROJECT["project"]["optional-dependencies"]:
        assert f"[{extra}]" in README


def test_pseudocode_in_readme_calls_functions_that_exist():
    (decode_round,) = (block for block in code_blocks("text") if block.startswith("def "))
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


def docstring_examples():
    """(path, source) of the examples in each docstring of the packages."""
    for package in ("dspark_jax", "pallas_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    found = doctest.DocTestParser().get_examples(ast.get_docstring(node) or "")
                    if found:
                        yield str(path), "".join(example.source for example in found)


@pytest.mark.usefixtures("own_cache")
def test_python_in_readme_and_docstrings_runs(monkeypatch, tmp_path, capsys):
    """Every block as it stands, with a tiny model in the default one's place."""
    tiny = dspark_jax.load(write_target(tmp_path / "target"), write_drafter(tmp_path / "drafter"))
    monkeypatch.setattr("dspark_jax.model.load", lambda: tiny)
    monkeypatch.setattr("dspark_jax.model.config_for", few_sizes)
    few = {"slot_buckets": (2,), "row_buckets": (BLOCK + 1,), "chunk_buckets": (1,)}
    few_programs = functools.partial(EngineConfig, position_buckets=(576,), **few)
    monkeypatch.setattr("dspark_jax.engine.config.EngineConfig", few_programs)
    blocks = code_blocks("python")
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
        assert len(capsys.readouterr().out) > 20
    examples = list(docstring_examples())
    assert examples
    for path, source in examples:
        exec(compile(source, path, "exec"), {"dspark_jax": dspark_jax})
