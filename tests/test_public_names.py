"""Every public name says what it is: docstring, parameters by their names, an example that runs."""

import ast
import dataclasses
import doctest
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import dspark_jax
from tests.marks import rest_full
from tests.tiny_model import few_sizes, write_drafter, write_letters, write_target

ROOT = Path(__file__).parent.parent
SLOW = {"Engine", "calibrate", "decode_round", "draft", "fit"}  # they compile programs of their own
NAMES = {name: getattr(dspark_jax, name) for name in dspark_jax.__all__}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny target and its drafter, and answers to train on."""
    folder = tmp_path_factory.mktemp("public")
    write_target(folder / "target")
    write_drafter(folder / "drafter")
    write_letters(folder / "answers.jsonl", 12)
    return folder


@pytest.fixture(scope="module")
def tiny(folder):
    return dspark_jax.load(folder / "target", folder / "drafter")


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize("name", rest_full(NAMES, kept=NAMES.keys() - SLOW))
def test_example_runs(name, tiny, folder, tmp_path, monkeypatch):
    """In the default model's place there is a tiny one."""
    (tmp_path / "answers.jsonl").symlink_to(folder / "answers.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dspark_jax.model.config_for", few_sizes)
    monkeypatch.setattr(
        "dspark_jax.checkpoints.load.default_target_path", lambda: folder / "target"
    )
    known = NAMES | {"load": lambda: tiny, "jax": jax, "jnp": jnp}
    examples = doctest.DocTestParser().get_doctest(
        inspect.getdoc(NAMES[name]), known, name, None, None
    )
    assert examples.examples
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    said = []
    assert runner.run(examples, out=said.append).failed == 0, "".join(said)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_told_by_its_own_name(name):
    found = NAMES[name]
    told = inspect.getdoc(found)
    if dataclasses.is_dataclass(found):
        parameters = list(found.__dataclass_fields__)
        told = "\n".join(inspect.getdoc(part) or "" for part in found.__mro__[:-1])
    else:
        made = found.__init__ if isinstance(found, type) else found
        told += inspect.getdoc(made)
        parameters = [each for each in inspect.signature(made).parameters if each != "self"]
    for parameter in parameters:
        assert re.search(rf"^ *{parameter}: ", told, flags=re.M), parameter


def docstrings():
    for folder in ("dspark_jax", "pallas_kernels", "configs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    yield path, ast.get_docstring(node) or ""


def test_docstrings_cite_what_is_there():
    """No document that the repository has not, pages that exist, each parameter by itself."""
    entry = re.compile(r"^ +\w+(?:, \w+)+: .*", flags=re.M)
    for path, text in docstrings():
        assert not re.search(r"\bspec(ification)?,? (section|§)", text), path
        for page in re.findall(r"notebooks/[\w/]+\.(?:md|ipynb)", text):
            assert (ROOT / page).is_file(), (path, page)
        for section in re.findall(r"^(?:Args|Attributes):\n((?: +.*\n|\n)*)", f"{text}\n", re.M):
            several = [
                one for one in entry.findall(section) if one.startswith("    ") and one[4] != " "
            ]
            assert not several, (path, several)
