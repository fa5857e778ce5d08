"""Commands over a mesh of devices and over several processes: the same texts as one device's."""

import json
import os
import re
import socket
import subprocess
import sys

import pytest

from dspark_jax.cli import command as cli

PROMPTS = ("hello", "two more")
CODE = "import sys; from dspark_jax.cli.command import main; sys.exit(main(sys.argv[1:]))"


pytestmark = pytest.mark.usefixtures("own_cache")


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


def start_two(*words):
    """The command in two processes of four devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        places = ("--coordinator", f"127.0.0.1:{free.getsockname()[1]}", "--processes", "2")
    return [start(*words, *places, "--process", i, devices=4) for i in range(2)]


def ended(process, code=0):
    """What a process wrote: (stdout, stderr)."""
    out, err = process.communicate(timeout=500)
    assert process.returncode == code, err[-3000:]
    return out, err


def texts(out):
    lines = [line for line in out.splitlines() if not line.startswith("[Gloo]")]
    return [json.loads(line)["text"] for line in lines]


# Under coupled acceptance greedy and sampled texts come from the same programs.
WORDS = ("--acceptance", "coupled", "--policy", "block", "--max-new-tokens", "12", "--json")
SAMPLED = ("--temperature", "0.8", "--seed", "3")


def test_a_mesh_gives_the_text_of_one_device(dspark, prompts, emulated_devices):
    command, together = ("generate", "--prompts", prompts, *WORDS), ("--batch", len(PROMPTS))
    for way in ((), SAMPLED):
        code, one, _ = dspark(*command, *way)
        assert code == 0
        code, many, err = dspark(*command, *way, *together, "--mesh", "data=2,tensor=2")
        assert (code, err.strip()) == (0, "")
        assert texts(many) == texts(one)
        assert len(set(texts(one))) == len(PROMPTS)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "'' is no mesh: give some of data=N, expert=N and tensor=N"),
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


@pytest.mark.full
@pytest.mark.parametrize("way", [(), SAMPLED])
def test_eight_devices_give_the_text_of_one(dspark, models, prompts, way):
    """The command itself, in a process of its own."""
    command = ("generate", "--prompts", prompts, *WORDS, *way)
    many, _ = ended(start(*command, "--batch", 5, "--mesh", "data=4,tensor=2", *models))
    assert texts(many) == texts(dspark(*command)[1])


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    rows = [{"turns": [f"number {i}", "and then"]} for i in range(7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


ANSWERS = ("--max-new-tokens", "12", "--temperature", "0.8", "--acceptance", "coupled")


@pytest.mark.full
def test_prepare_on_a_mesh_and_in_several_processes(dspark, models, questions, tmp_path):
    """Two processes of four devices each answer their shares; who comes after them joins these."""
    one, mesh, shared = (tmp_path / f"{name}.jsonl" for name in ("one", "mesh", "shared"))
    assert dspark("prepare", questions, "--out", one, *ANSWERS)[0] == 0
    words = ("prepare", questions, *ANSWERS, *models)
    out, _ = ended(start(*words, "--out", mesh, "--batch", 6, "--mesh", "data=4,tensor=2"))
    assert out == f"{mesh}\n"
    words = (*words, "--out", shared, "--distributed", "--mesh", "data=2,tensor=2")
    for i, process in enumerate(start_two(*words)):
        assert ended(process)[0] == f"{shared}.part-{i}-of-2\n"
    assert not shared.exists()
    assert dspark("prepare", questions, "--out", shared, *ANSWERS)[0] == 0
    assert mesh.read_bytes() == shared.read_bytes() == one.read_bytes()


@pytest.mark.full
@pytest.mark.parametrize("mesh", ["data=2,tensor=4", "tensor=8"])
@pytest.mark.parametrize("way", [(), SAMPLED])
def test_one_engine_over_two_processes(dspark, models, prompts, mesh, way):
    """The texts are those of one device, and process 0 has them all."""
    command = ("generate", "--prompts", prompts, *WORDS, *way)
    started = start_two(*command, "--batch", 2, "--mesh", mesh, *models)
    (many, _), (nothing, _) = map(ended, started)
    assert texts(many) == texts(dspark(*command)[1])
    assert texts(nothing) == []


@pytest.mark.full
def test_prepare_with_one_engine_over_two_processes(dspark, models, questions, tmp_path):
    one, together = tmp_path / "one.jsonl", tmp_path / "together.jsonl"
    assert dspark("prepare", questions, "--out", one, *ANSWERS)[0] == 0
    words = ("prepare", questions, *ANSWERS, "--out", together, "--policy", "delayed", *models)
    for process in start_two(*words, "--batch", 4, "--mesh", "data=2,tensor=4"):
        ended(process)
    assert together.read_bytes() == one.read_bytes()


@pytest.mark.full
@pytest.mark.parametrize("lost", [0, 1])
def test_no_process_waits_for_one_that_was_killed(models, prompts, lost):
    """Nor does it end well: it misses the connection, or JAX the heartbeats."""
    words = ("generate", "--prompts", prompts, "--max-new-tokens", 300, "--json", *models)
    started = start_two(*words, "--policy", "block", "--mesh", "tensor=8")
    while "text" not in started[0].stdout.readline():  # of the first prompt; the other goes on
        assert started[0].poll() is None
    started[lost].kill()
    left = started[1 - lost]
    _, err = left.communicate(timeout=100)
    assert left.returncode not in (0, None)
    assert "another process is gone" in err or "another task died" in err


@pytest.mark.full
def test_too_many_devices_for_several_processes(models, questions, tmp_path):
    """Work that is neither shared nor done together is refused by all."""
    words = ("prepare", questions, "--out", tmp_path / "out.jsonl", "--mesh", "data=16", *models)
    for process in start_two(*words):
        assert "needs 16 devices, but 4 are here" in ended(process, code=2)[1]
    for i, process in enumerate(start_two("doctor", "--mesh", "data=8")):
        assert f"this is process {i} of 2, and doctor is the work of one" in ended(process, 2)[1]


@pytest.mark.full
@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("profile --slots 3 --positions 64 --replays 1", None),
        ("doctor --concurrency 1 --max-new-tokens 8", [2]),
        ("bench load --concurrency 3 --policies none,block --repeats 1 --requests 1", [3, 3]),
    ],
)
def test_measurements_over_a_mesh(dspark, prompts, emulated_devices, command, expected):
    """Slots are filled up to a multiple of the data shards."""
    given = ("--prompts", prompts, "--max-new-tokens", 8) if "bench" in command else ()
    code, out, err = dspark(*command.split(), *given, "--mesh", "data=2", "--json")
    assert code == 0, err[-2000:]
    report = json.loads(out)
    if expected is None:
        assert report["setting"]["mesh"] == "{'data': 2, 'fsdp': 1, 'tensor': 1}"
    else:
        assert [row["concurrency"] for row in report["rows"]] == expected
