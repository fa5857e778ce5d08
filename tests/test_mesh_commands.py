"""Commands over a mesh of devices and over several processes: the same texts as one device's."""

import json
import os
import re
import subprocess
import sys

import pytest

from dspark_jax.cli import command as cli
from tests.tiny_model import write_drafter, write_target

PROMPTS = ("hello", "one", "two more")
CODE = "import sys; from dspark_jax.cli.command import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(autouse=True)
def _no_compilation_cache(monkeypatch):
    """A cache of this process's programs would outlive the test."""
    monkeypatch.setattr("dspark_jax.model.use_compilation_cache", lambda: None)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    target, drafter = write_target(folder / "target"), write_drafter(folder / "drafter")
    return ["--target", str(target), "--drafter", str(drafter)]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return str(path)


@pytest.fixture
def dspark(models, capsys):
    """Runs the command here: (exit code, stdout, stderr)."""

    def run(*words):
        try:
            code = cli.main([*map(str, words), *models])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def start(*words, devices=8):
    """The command in a process of its own, with so many emulated devices."""
    flags = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.Popen(
        [sys.executable, "-c", CODE, *map(str, words)],
        env=os.environ | flags,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process, code=0):
    """What a process wrote: (stdout, stderr)."""
    out, err = process.communicate(timeout=500)
    assert process.returncode == code, err[-3000:]
    return out, err


def texts(out):
    return [json.loads(line)["text"] for line in out.splitlines()]


# Greedy, and sampled by the common noise field.
WAYS = (("--policy", "block"), ("--temperature", "0.8", "--acceptance", "coupled", "--seed", "3"))
LENGTH = ("--max-new-tokens", "12", "--batch", "3", "--json")


@pytest.mark.parametrize("way", WAYS)
def test_a_mesh_gives_the_text_of_one_device(dspark, prompts, way, emulated_devices):
    command = ("generate", "--prompts", prompts, *LENGTH, *way)
    code, one, _ = dspark(*command)
    assert code == 0
    code, many, err = dspark(*command, "--mesh", "data=2,tensor=2")
    assert (code, err) == (0, "")
    assert texts(many) == texts(one)
    assert len(set(texts(one))) == len(PROMPTS)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "'' is no mesh: give data=N, tensor=N or data=N,tensor=N"),
        ("8", "'8' is no mesh"),
        ("data", "'data' is no mesh"),
        ("data=0", "'data=0' is no mesh: .* each 1 or more"),
        ("data=-2", "'data=-2' is no mesh"),
        ("data=2,data=2", "'data=2,data=2' is no mesh"),
        ("fsdp=2", "'fsdp=2' is no mesh"),
        ("tensor=2,", "'tensor=2,' is no mesh"),
        ("data=2;tensor=2", "is no mesh"),
        ("data=32,tensor=2", "data=32 .* tensor=2 needs 64 devices, but 8 are here: choose sizes"),
    ],
)
def test_what_is_no_mesh_is_refused(dspark, value, message, emulated_devices):
    code, out, err = dspark("generate", "hello", "--mesh", value)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err)


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "hello"),
        ("bench", "speed"),
        ("bench", "acceptance"),
        ("bench", "load"),
        ("calibrate",),
        ("doctor",),
        ("profile",),
        ("export", "--format", "deepspec", "--out", "nowhere"),
    ],
)
def test_the_work_of_one_process_is_not_shared_out(dspark, prompts, command, monkeypatch):
    monkeypatch.setattr("dspark_jax.checkpoints.load.open_target", None)  # it is refused before
    given = ("--prompts", prompts) if command[0] in ("bench", "calibrate") else ()
    code, out, err = dspark(*command, *given, "--processes", 2, "--process", 1)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "this is process 1 of 2, and" in err
    assert "with --mesh for the devices of a machine" in err
