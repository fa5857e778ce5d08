"""The shape of the source tree: who imports whom, what lies where, what no module may do."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspark_jax.models.drafters.table import DRAFTERS
from dspark_jax.models.targets.table import FAMILIES

ROOT = Path(__file__).parent.parent
PACKAGES = ("dspark_jax", "pallas_kernels")

TOP_LEVEL = {
    "LICENSE",
    "README.md",
    "configs",
    "dspark_jax",
    "notebooks",
    "pallas_kernels",
    "pyproject.toml",
    "tests",
}
IGNORED_OUTPUT = {"build", "dist", "runs"}  # what .gitignore keeps out of the repository

# Each layer of the tree, lowest first, and what of the project it may import besides itself.
FOUNDATION = {
    f"dspark_jax.{name}"
    for name in (
        "axes",
        "characters",
        "config",
        "drafting",
        "files",
        "overrides",
        "progress",
        "recipe_rules",
        "rendering",
        "rules",
        "tracing",
    )
}
NUMERICS = FOUNDATION | {"dspark_jax.sampling", "pallas_kernels"}
LAYERS: dict[str, set[str]] = {
    "pallas_kernels": set(),
    "dspark_jax.axes": set(),
    "dspark_jax.characters": set(),
    "dspark_jax.config": {f"dspark_jax.{name}" for name in ("axes", "recipe_rules", "rendering")},
    "dspark_jax.drafting": set(),
    "dspark_jax.client": set(),
    "dspark_jax.files": set(),
    "dspark_jax.overrides": set(),
    "dspark_jax.progress": set(),
    "dspark_jax.prompts": set(),
    "dspark_jax.recipe_rules": set(),
    "dspark_jax.rendering": {"dspark_jax.characters"},
    "dspark_jax.rules": set(),
    "dspark_jax.tracing": set(),
    "dspark_jax.sampling": FOUNDATION | {"pallas_kernels"},
    "dspark_jax.checkpoint": FOUNDATION,
    "dspark_jax.models": NUMERICS,
    "dspark_jax.checkpoints": FOUNDATION
    | {f"dspark_jax.{name}" for name in ("__version__", "checkpoint", "models")},
    "dspark_jax.scheduler": NUMERICS,
    "dspark_jax.engine": NUMERICS
    | {f"dspark_jax.{name}" for name in ("__version__", "models", "scheduler")},
    "dspark_jax.training": NUMERICS
    | {f"dspark_jax.{name}" for name in ("checkpoint", "checkpoints", "models")},
    "dspark_jax.evaluation": NUMERICS
    | {
        f"dspark_jax.{name}"
        for name in (
            "checkpoints",
            "client",
            "engine",
            "model",
            "models",
            "scheduler",
            "training",
        )
    },
    "dspark_jax.model": {"pallas_kernels"}
    | {
        f"dspark_jax.{name}"
        for name in ("checkpoints", "engine", "rendering", "rules", "scheduler")
    },
    "dspark_jax.serving": {
        f"dspark_jax.{name}"
        for name in ("__version__", "characters", "engine", "model", "sampling")
    },
    "dspark_jax.cli": set(PACKAGES),
    "dspark_jax.cli.arguments": {
        f"dspark_jax.cli.{name}" for name in ("measurements", "options", "recipes")
    },
    "dspark_jax.cli.measurements": {"dspark_jax.cli.options"},
    "dspark_jax.cli.options": {
        f"dspark_jax.{name}" for name in ("characters", "prompts", "scheduler.policy")
    },
    "dspark_jax.cli.recipes": set(),
    "dspark_jax": {"dspark_jax"},  # the package's __init__: names, imported when they are used
}

# Third-party libraries: the layers that compute take few, and some have one place alone.
PURE = {
    "pallas_kernels": {"jax", "numpy"},
    "dspark_jax.axes": {"flax", "jax", "numpy"},
    "dspark_jax.sampling": {"flax", "jax", "numpy"},
    "dspark_jax.models": {"flax", "jax", "numpy"},
    "dspark_jax.scheduler": {"flax", "jax", "numpy"},
}
CONFINED = {
    **{key: {"dspark_jax.serving"} for key in ("prometheus_client", "starlette", "uvicorn")},
    "httpx": {"dspark_jax.client"},
    "ray": {"dspark_jax.cli.spreading", "dspark_jax.serving.ray_app"},
    "gguf": {"dspark_jax.checkpoints.gguf"},
    "llguidance": {"dspark_jax.engine.grammar"},
    "huggingface_hub": {"dspark_jax.checkpoints.hf"},
    "sentencepiece": {"dspark_jax.checkpoints.pieces"},
    "tokenizers": {"dspark_jax.checkpoints.gguf_tokenizer", "dspark_jax.checkpoints.pieces"},
    "transformers": {
        "dspark_jax.config",
        "dspark_jax.checkpoints.gguf",
        "dspark_jax.checkpoints.gguf_tokenizer",
        "dspark_jax.checkpoints.hf",
        "dspark_jax.checkpoints.tokenizer",
    },
}
TRACKERS = {"mlflow", "tensorboardX", "trackio", "wandb"}
OPTIONAL = {"llguidance", "matplotlib", "prometheus_client", "ray", "starlette", "uvicorn"}
OPTIONAL |= TRACKERS

# Where families of targets may be named.
TARGETS = "dspark_jax.models.targets"
# llama.cpp names its pre-tokenizers after the models that had them first; drafters inside the
# checkpoints of a family are made of its layers.
MAY_SPELL_FAMILIES = {
    "dspark_jax.checkpoints.assistant",
    "dspark_jax.models.drafters.assistant",
    "dspark_jax.models.drafters.deepseek_v4",
    "dspark_jax.models.drafters.deepseek_v4_mtp",
    "dspark_jax.models.drafters.table",
    "dspark_jax.checkpoints.gguf_splits",
    "dspark_jax.checkpoints.gguf_tokenizer",
}

# Who may know one kind of drafter: layouts of files, and ways to start the training of one.
MAY_KNOW_A_DRAFTER = {
    "dspark_jax.checkpoints.assistant",
    "dspark_jax.checkpoints.deepspec",
    "dspark_jax.checkpoints.drafter_methods",
    "dspark_jax.checkpoints.eagle3",
    "dspark_jax.checkpoints.medusa",
    "dspark_jax.checkpoints.mtp",
    "dspark_jax.checkpoints.own_layouts",
    "dspark_jax.checkpoints.speculators",
    "dspark_jax.models.drafters",
    "dspark_jax.training.bigram",
    "dspark_jax.training.growth",
    "dspark_jax.training.local_heads",
}

VAGUE_NAMES = {"base", "common", "helpers", "misc", "utils"}
MAX_LINES = 400
MAX_KERNEL_LINES = 800  # a kernel is one long function by nature


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """'dspark_jax/checkpoints/hf.py' -> 'dspark_jax.checkpoints.hf'."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[str]:
    """Every module that the file imports, at any depth, by its absolute dotted name."""
    package = name_of(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*parent, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def is_within(module: str, parents: set[str]) -> bool:
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


def layer_of(module: str) -> str:
    """The longest entry of LAYERS that holds the module."""
    found = [layer for layer in LAYERS if is_within(module, {layer})]
    assert found, f"{module} belongs to no layer"
    return max(found, key=len)


def each_file(*folders: str):
    files = python_files(*folders)
    return pytest.mark.parametrize("path", files, ids=[str(f.relative_to(ROOT)) for f in files])


@each_file(*PACKAGES)
def test_imports_only_from_layers_below(path):
    module = name_of(path)
    layer = layer_of(module)
    assert layer != "dspark_jax" or module == "dspark_jax", f"{module} has no place in LAYERS"
    allowed = LAYERS[layer] | {layer}
    for imported in imports_of(path):
        if is_within(imported, set(PACKAGES)):
            assert is_within(imported, allowed), f"{module} ({layer}) imports {imported}"


def declared_libraries() -> set[str]:
    """The dependencies in pyproject.toml, by the names they are imported under."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.split(r"[\[<>=]", requirement)[0] for requirement in project["dependencies"]}
    return {name.split("-")[0] for name in names}  # orbax-checkpoint is imported as orbax


@each_file(*PACKAGES)
def test_third_party_libraries_stay_where_they_belong(path):
    module = name_of(path)
    own = set(PACKAGES) | sys.stdlib_module_names
    for library in {imported.split(".")[0] for imported in imports_of(path)} - own:
        assert library in declared_libraries() | OPTIONAL, f"{library} is not a dependency"
        assert is_within(module, CONFINED.get(library, {module})), f"{module} imports {library}"
        assert library in PURE.get(layer_of(module), {library}), f"{module} imports {library}"


@each_file(*PACKAGES, "configs", "tests")
def test_no_torch_and_nothing_private_of_jax(path):
    for imported in imports_of(path):
        assert not is_within(imported, {"torch", "torchvision", "jax._src"}), imported
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            assert node.attr != "_src", f"line {node.lineno}"


@each_file(*PACKAGES)
def test_no_print_and_no_environment_variable(path):
    module = name_of(path)
    may_print = is_within(module, {"dspark_jax.cli", "dspark_jax.evaluation"})
    may_print = may_print or (is_within(module, {"pallas_kernels"}) and path.name == "bench.py")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert may_print or node.func.id != "print", f"print on line {node.lineno}"
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"environ", "environb", "getenv"}, f"line {node.lineno}"
    assert {"os.environ", "os.getenv"}.isdisjoint(imports_of(path))


def words_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every identifier and every string, docstrings aside."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    holders = (node for node in ast.walk(tree) if isinstance(node, documented))
    docstrings = {id(node.body[0].value) for node in holders if ast.get_docstring(node) is not None}
    for node in ast.walk(tree):
        words = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "module")]
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            words.append(node.value)
        yield from ((getattr(node, "lineno", 0), word) for word in words if isinstance(word, str))


def families_named(source: str) -> list[tuple[int, str]]:
    """Where code, its docstrings aside, names a model type of the table or a family's module."""
    names = {*FAMILIES, *(module.__name__.rpartition(".")[2] for module in FAMILIES.values())}
    name = re.compile(rf"(?<![a-z0-9])({'|'.join(names)})(?![a-z0-9])", re.IGNORECASE)
    return [(line, word) for line, word in words_of(ast.parse(source)) if name.search(word)]


@each_file(*PACKAGES)
def test_families_of_targets_are_named_in_one_place(path):
    if not is_within(name_of(path), {TARGETS} | MAY_SPELL_FAMILIES):
        assert not families_named(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "code",
    [
        "from dspark_jax.models.targets import llama",
        "from dspark_jax.models.targets.llama import extend",
        "import dspark_jax.models.targets.llama as target",
        "if cfg.family == 'qwen3': pass",
        "is_qwen2 = True",
        "def make(llama): pass",
        "options = {'use-Llama': 1}",
        "class Llama: pass",
    ],
)
def test_a_family_that_is_named_is_found(code):
    assert families_named(code)


def test_documentation_and_published_names_may_say_what_they_like():
    assert not families_named('"""Llama."""\ndef f():\n    """Of qwen3."""\n')
    assert not families_named('architecture, rope = "Qwen3DSparkModel", "llama3"')


@each_file(*PACKAGES)
def test_drafters_are_reached_through_their_table(path):
    if not is_within(name_of(path), MAY_KNOW_A_DRAFTER):
        drafters = {module.__name__ for module in DRAFTERS}
        for imported in imports_of(path):
            assert not is_within(imported, drafters), imported


@each_file(*PACKAGES, "configs", "tests")
def test_module_is_named_for_what_it_holds(path):
    assert VAGUE_NAMES.isdisjoint(name_of(path).split("."))


@each_file(*PACKAGES, "configs")
def test_module_is_short_enough_to_read(path):
    is_kernel = path.name in {"mosaic_gpu.py", "triton.py"}
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= (MAX_KERNEL_LINES if is_kernel else MAX_LINES)


def test_top_level_is_fixed():
    found = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert found - IGNORED_OUTPUT - {"__pycache__"} == TOP_LEVEL
