"""The command line, run in this process on tiny models: output, exit codes, one line an error.

Compilation takes nearly all of the time here: prompts and lengths are such that few programs do.
"""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dspark_jax import model
from dspark_jax.checkpoints import load
from dspark_jax.cli import command as cli
from dspark_jax.cli.arguments import make_parser
from dspark_jax.cli.given import rendering_of
from dspark_jax.cli.measurements import LOAD_POLICIES
from dspark_jax.config import TrainConfig
from dspark_jax.engine import generate
from dspark_jax.engine.reader import Generation
from dspark_jax.files import SaveError
from dspark_jax.rendering import Rendering
from dspark_jax.scheduler.policy import check_name
from dspark_jax.training import fit
from pallas_kernels import random
from tests.tiny_model import CONTEXT, DRAFTER, few_sizes, write_drafter, write_target

FIELDS = [
    "text",
    "prompt_tokens",
    "new_tokens",
    "rounds",
    "accepted_length",
    "seconds",
    "tokens_per_s",
    "finish_reason",
]


pytestmark = pytest.mark.usefixtures("own_cache", "_few_programs")


@pytest.fixture
def _few_programs(monkeypatch):
    monkeypatch.setattr(model, "config_for", few_sizes)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="module")
def drafter(tmp_path_factory):
    return write_drafter(tmp_path_factory.mktemp("models") / "drafter")


@pytest.fixture
def dspark(target, drafter, capsys):
    """Runs the command: (exit code, stdout, lines on stderr). Default models: the tiny ones."""

    def run(*words, models=("--target", target, "--drafter", drafter)):
        start = {"generate": 1, "bench": 2, "train": 0}[words[0]]
        command = [*words[:start], *models, *words[start:]] if start else words
        try:
            code = cli.main([str(word) for word in command])
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


@pytest.fixture
def write(tmp_path):
    def write_file(name, text):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def answers(out):
    return [json.loads(line) for line in out.splitlines()]


def test_text_streams_and_ends_with_one_line_of_numbers(dspark, monkeypatch):
    shown = []
    monkeypatch.setattr(cli, "_show", lambda _, text: shown.append(text))
    words = ("generate", "hello", "--max-new-tokens", 24, "--policy", "block")
    code, out, err = dspark(*words)
    assert (code, out, len(err)) == (0, "\n", 1)
    numbers = r"24 tokens, [\d.]+ tokens/s, accepted length \d\.\d\d, \d+ rounds"
    assert re.fullmatch(numbers, err[0])
    code, out, err = dspark(*words, "--json")
    (row,) = answers(out)
    assert (code, err, list(row)) == (0, [], FIELDS)
    assert "".join(shown) == row["text"]
    assert len(shown) > 2
    assert (row["new_tokens"], row["finish_reason"]) == (24, "length")
    assert row["prompt_tokens"] == len("hello > ")
    assert row["accepted_length"] > 1
    assert row["tokens_per_s"] == pytest.approx(24 / row["seconds"], rel=0.05)


@pytest.mark.full
def test_some_rounds_are_traced_on_request(dspark, tmp_path):
    words = ("--profile", tmp_path, "--profile-count", 2, "--max-new-tokens", 24)
    code, _, err = dspark("generate", "say it", *words)
    assert code == 0
    assert list(tmp_path.glob("plugins/profile/*/*.xplane.pb")), err


def test_greedy_text_does_not_depend_on_drafts(dspark):
    rows = []
    for words in ("--drafter none", "--policy none", "--policy fixed:1", "--policy block", ""):
        words = ("--json", "--max-new-tokens", 24, *words.split())
        code, out, _ = dspark("generate", "hello", *words)
        assert code == 0
        rows += answers(out)
    assert len({row["text"] for row in rows}) == 1
    assert [row["accepted_length"] for row in rows[:2]] == [1, 1]
    assert 1 < rows[2]["accepted_length"] <= 2 < rows[3]["accepted_length"] + 1


def test_line_i_of_a_file_has_its_own_randomness_whatever_stands_around_it(dspark, write):
    file = write(
        "prompts.jsonl",
        '{"prompt": "one"}\n\n{"turns": ["two", "more"]}\n{"prompt": "one"}\n',
    )
    words = ("--temperature", 0.9, "--seed", 5, "--max-new-tokens", 12, "--drafter", "none")
    code, out, err = dspark("generate", "--prompts", file, *words, "--json")
    together = [row["text"] for row in answers(out)]
    assert (code, err, len(together)) == (0, [], 3)
    assert together[2] != together[0]
    assert answers(dspark("generate", "one", *words, "--json")[1])[0]["text"] == together[0]
    code, out, err = dspark("generate", "--prompts", file, *words, "--batch", 3)
    assert (code, out, len(err)) == (0, "\n\n".join(together) + "\n", 1)
    assert err[0].startswith("36 tokens, ")


def test_every_option_reaches_the_engine(dspark, write, monkeypatch):
    calls = []

    @contextlib.contextmanager
    def engine_for(model, requests, **options):
        calls.append((model, requests, options))
        yield None

    def serve(engine, requests, on_text):
        return [Generation(len(request.prompt_ids)) for request in requests]

    monkeypatch.setattr(model.Model, "engine_for", engine_for)
    monkeypatch.setattr(generate, "serve", serve)
    monkeypatch.setattr(model, "choose_kernels", lambda decoder, asked: asked)
    file = write("prompts.jsonl", '{"prompt": "one"}\n{"prompt": "two"}\n')
    words = "--temperature 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 --seed 7 --max-new-tokens 9 "
    words += "--stop a --stop bc --dtype bfloat16 --policy threshold:0.25 --acceptance coupled "
    words += "--kernels mosaic_gpu --batch 2"
    assert dspark("generate", "--prompts", file, *words.split(), "--json")[0] == 0
    ((found, (_, request), options),) = calls
    assert options == {"policy": "threshold:0.25", "acceptance": "coupled", "slots": 2}
    assert (found.target, found.drafter, found.kernels) == ("target", "drafter", "mosaic_gpu")
    weights = found.decoder.weights
    assert weights.target.norm_D.dtype == weights.drafter.norm_D.dtype == "bfloat16"
    np.testing.assert_array_equal(request.key, random.fold_in(random.seed_key(7), 1))
    limits = request.max_new_tokens, request.temperature, request.top_k, request.top_p
    assert (*limits, request.min_p) == (9, 0.5, 4, 0.9, 0.1)
    assert request.stop_strings == ("a", "bc")
    assert found.decoder.stop_ids == (found.decoder.tokenizer.eos_token_id,)  # of every request
    assert "".join(found.decoder.tokenizer.convert_ids_to_tokens(request.prompt_ids)) == "two > "
    assert dspark("generate", "hello", "--system", "be")[0] == 0
    _, (request,), _ = calls[1]
    assert len(request.prompt_ids) == len("be > hello > ")
    assert calls[1][2] == {"policy": "", "acceptance": "rejection", "slots": 1}


def test_texts_of_a_file_are_set_apart(dspark, write):
    file = write("prompts.jsonl", '{"prompt": "one"}\n{"prompt": "two"}\n')
    code, out, err = dspark("generate", "--prompts", file, "--max-new-tokens", 6)
    assert (code, len(err)) == (0, 1)
    assert err[0].startswith("12 tokens")
    assert [len(text) for text in out.split("\n")] == [6, 0, 6, 0]


def test_the_prompt_may_come_from_stdin(dspark, monkeypatch):
    words = ("generate", "--max-new-tokens", 4)
    expected = dspark(*words, "hello")[:2]
    for prompt in ((), ("-",)):
        for text in (b"hello", b"\xef\xbb\xbfhello"):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
            assert dspark(*words, *prompt)[:2] == expected


def test_a_stop_string_ends_the_text(dspark):
    words = ("generate", "hello", "--json", "--max-new-tokens", 24)
    whole = answers(dspark(*words)[1])[0]["text"]
    row = answers(dspark(*words, "--stop", whole[5:7], "--stop", "\n")[1])[0]
    assert row["text"] == whole[: whole.index(whole[5:7])]
    assert row["finish_reason"] == "stop"


def assert_refused(result, *words):
    code, out, err = result
    assert (code, out, len(err)) == (2, "", 1), (code, out, err)
    assert err[0].startswith("dspark: ")
    for word in words:
        assert word in err[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--unknown",), "--unknown"),
        (("--temp", "1"), "--temp"),  # abbreviations would change meaning with every new flag
        (("--temperature", "hot"), "--temperature"),
        (("--temperature", "-1"), "temperature is -1"),
        (("--temperature", "nan"), "temperature is nan"),
        (("--top-p", "0"), "top_p is 0"),
        (("--top-p", "1.5"), "top_p is 1.5"),
        (("--top-k", "-1"), "top_k is -1"),
        (("--min-p", "2"), "min_p is 2"),
        (("--max-new-tokens", "0"), "max_new_tokens is 0"),
        (("--seed", "-1"), "seed is -1"),
        (("--stop", ""), "stop string is empty"),
        (("--batch", "0"), "--batch"),
        (("--policy", "sometimes"), "sometimes"),
        (("--policy", "fixed:many"), "fixed:many"),
        (("--acceptance", "always"), "always"),
        (("--kernels", "triton"), "triton"),
        (("--dtype", "int4"), "int4"),
        (("--prompts", "prompts.jsonl"), "exclude each other"),
        (("--template-arg", "a"), "'a' is not KEY=VALUE"),
        (("--template-arg", "a=1", "--template-arg", "a=2"), "a is given twice"),
        (("--template-arg", "tokenize=1"), "tokenize is not free"),
        (("--template-arg", "a=1", "--no-chat-template"), "a has no effect"),
        (("--system", " "), "system is only white space"),
        (("--system", "\udcff"), "argument --system: the text has the byte 0xff"),
        (("--stop", "ab\udc80"), "argument --stop: the text has the byte 0x80 at character 3"),
        (("--template-arg", "a=\udcff"), "argument --template-arg: the text has the byte 0xff"),
    ],
)
def test_a_wrong_flag_is_refused_before_anything_is_loaded(dspark, monkeypatch, words, expected):
    monkeypatch.setattr(load, "load_target", None)
    assert_refused(dspark("generate", "hello", *words), expected)


def test_a_missing_or_empty_prompt_is_refused(dspark, monkeypatch):
    monkeypatch.setattr(load, "load_target", None)
    assert_refused(dspark("generate", ""), "prompt is empty")
    assert_refused(dspark("generate", " \n "), "prompt is empty")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert_refused(dspark("generate"), "stdin", "prompt is empty")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9 au lait")))
    assert_refused(dspark("generate", "-"), "stdin: not UTF-8 (byte 0xe9 at 3)")
    monkeypatch.setattr(sys, "stdin", None)
    assert_refused(dspark("generate", "-"), "stdin: closed")
    assert_refused(dspark("generate"), "no prompt")
    assert_refused(dspark("generate", "a\udcff"), "argument PROMPT: the text has the byte 0xff")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    assert_refused(dspark("generate"), "no prompt", "--prompts")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "not JSON"),
        ('"hello"', "needs a string"),
        ("{}", "needs a string"),
        ('{"prompt": 3}', "needs a string"),
        ('{"turns": []}', "needs a string"),
        ('{"prompt": "  "}', "prompt is empty"),
    ],
)
def test_a_broken_line_of_prompts_is_named(dspark, write, monkeypatch, line, expected):
    monkeypatch.setattr(load, "load_target", None)
    file = write("prompts.jsonl", f'{{"prompt": "good"}}\n\n{line}\n')
    assert_refused(dspark("generate", "--prompts", file), "prompts.jsonl:3", expected)
    assert_refused(dspark("bench", "speed", "--prompts", file), "prompts.jsonl:3", expected)


def test_a_broken_file_of_prompts_is_named(dspark, write, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "load_target", None)
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe{")
    for file, expected in (
        (tmp_path / "missing.jsonl", "no such file"),
        (write("empty.jsonl", "\n\n"), "no prompts"),
        (tmp_path, "not readable"),
        (binary, "begins as UTF-16"),
    ):
        assert_refused(dspark("generate", "--prompts", file), str(file), expected)


def test_a_prompt_longer_than_the_context_is_refused(dspark, write):
    file = write("prompts.jsonl", f'{{"prompt": "short"}}\n{{"prompt": "{"x" * CONTEXT}"}}\n')
    assert_refused(dspark("generate", "--prompts", file), "prompts.jsonl:2", f"{CONTEXT}")
    assert_refused(dspark("generate", "x" * CONTEXT), "PROMPT", "shorten")


def test_a_model_that_cannot_be_used_is_named(dspark, target, write, tmp_path):
    broken = shutil.copytree(target, tmp_path / "broken")
    weights = (target / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    for source, expected in (
        (broken, "safetensors"),
        (tmp_path / "missing", "no such directory"),
        (tmp_path / "missing.gguf", "no such file"),
        (write("broken.gguf", "GGUF, or so it says"), "GGUF"),
    ):
        models = ("--target", source, "--drafter", "none")
        assert_refused(dspark("generate", "hello", models=models), str(source), expected)


def test_a_drafter_that_does_not_fit_is_refused(dspark, tmp_path):
    other = dataclasses.replace(DRAFTER, hidden_size=32)
    for drafter, expected in (
        (write_drafter(tmp_path / "other", other), "does not fit the target"),
        (tmp_path / "missing", "no such directory"),
    ):
        assert_refused(dspark("generate", "hello", "--drafter", drafter), expected)


def test_a_policy_that_the_drafter_cannot_follow_is_refused(dspark, tmp_path):
    assert_refused(dspark("generate", "hello", "--policy", "fixed:99"), "must lie in 1..3")
    assert_refused(
        dspark("generate", "hello", "--policy", "threshold:2"), "policy is 'threshold:2'"
    )
    assert_refused(dspark("generate", "hello", "--policy", "gate:-1"), "policy is 'gate:-1'")
    blind = write_drafter(tmp_path / "blind", dataclasses.replace(DRAFTER, confidence=False))
    for policy in ("threshold:0.5", "gate:0.5", "causal", "delayed"):
        result = dspark("generate", "hello", "--policy", policy, "--drafter", blind)
        assert_refused(result, f"policy is '{policy}', but the drafter has no confidence head")


def test_the_policies_that_commands_choose_exist():
    for name in LOAD_POLICIES.split(","):
        assert check_name(name) == name


def test_another_target_than_the_default_is_decoded_plainly_unless_told_otherwise(dspark, target):
    words = ("generate", "hello", "--json", "--max-new-tokens", 4)
    code, out, _ = dspark(*words, models=("--target", target))
    assert (code, answers(out)[0]["accepted_length"]) == (0, 1)
    result = dspark("bench", "speed", "--prompts", "p.jsonl", models=("--target", target))
    assert_refused(result, "--drafter")


def test_logits_that_are_not_finite_end_with_an_error(dspark, target, tmp_path):
    spoilt = shutil.copytree(target, tmp_path / "spoilt")
    tensors = load_file(spoilt / "model.safetensors")
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, spoilt / "model.safetensors")
    words = ("--max-new-tokens", 24, "--target", spoilt)
    code, out, err = dspark("generate", "hello", "--json", *words)
    assert (code, len(err)) == (1, 1)
    assert "not finite" in err[0]
    assert answers(out)[0]["finish_reason"] == "error"


def test_interruption_and_a_closed_pipe_leave_no_traceback(dspark, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    def close(*_):
        raise BrokenPipeError

    monkeypatch.setattr(cli, "_show", interrupt)
    assert dspark("generate", "hello")[::2] == (130, ["dspark: interrupted"])
    monkeypatch.setattr(cli, "_show", close)
    monkeypatch.setattr(cli, "_discard_output", lambda: None)  # it would close pytest's stdout
    assert dspark("generate", "hello") == (141, "", [])


def test_the_compilation_cache_lies_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(model.platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        for _ in range(2):  # a directory that is set stays
            model.use_compilation_cache()
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
            monkeypatch.setattr(model.platformdirs, "user_cache_dir", None)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


CONFIG = "from dspark_jax.config import TrainConfig\nconfig = TrainConfig(steps=7)\n"


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "hello"],
        ["bench", "speed", "--prompts", "p"],
        ["bench", "acceptance", "--prompts", "p"],
        ["bench", "load", "--prompts", "p"],
        ["calibrate", "--prompts", "p"],
        ["doctor"],
        ["prepare", "p", "--out", "o"],
        ["export", "--format", "deepspec", "--out", "o"],
        ["convert", "d", "--out", "o"],
    ],
)
def test_whatever_renders_prompts_is_told_how(words):
    options = ["--system", "be", "--template-arg", "a=[1]", "--template-arg", "b=c"]
    args = make_parser("").parse_args([*words, *options])
    assert rendering_of(args) == Rendering("be", template_args={"a": [1], "b": "c"})
    plain = make_parser("").parse_args([*words, "--no-chat-template"])
    assert rendering_of(plain) == Rendering(chat_template=False)
    assert rendering_of(make_parser("").parse_args(words)) == rendering_of(
        make_parser("").parse_args(["profile"])
    )


def test_train_runs_the_recipe_with_its_overrides(dspark, write, monkeypatch):
    recipes = []
    monkeypatch.setattr(fit, "fit", lambda recipe, **_: recipes.append(recipe) or "runs/drafter")
    config = write("config.py", CONFIG)
    code, out, err = dspark("train", config, "--set", "seed=3", "--set", "markov_head=rnn")
    assert (code, out, err) == (0, "runs/drafter\n", [])
    assert recipes == [dataclasses.replace(TrainConfig(steps=7), seed=3, markov_head="rnn")]


def test_a_configuration_that_cannot_be_used_is_refused(dspark, write, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "fit", None)
    for text, expected in (
        ("config = 3\n", "found a int"),
        ("other = 3\n", "found nothing"),
        ("config = \n", "SyntaxError"),
        ("import nothing_of_that_name\n", "ModuleNotFoundError"),
        (CONFIG.replace("steps", "stepps"), "stepps"),
        (CONFIG.replace("7", "-7"), "steps -7"),
    ):
        assert_refused(dspark("train", write("config.py", text)), "config.py", expected)
    assert_refused(dspark("train", tmp_path / "missing.py"), "no such file")
    config = write("config.py", CONFIG)
    for setting, expected in (
        ("stepps=3", "did you mean 'steps'"),
        ("steps=x", "must be a number"),
        ("steps", "key=value"),
        ("learning_rate=-1", "learning_rate"),
    ):
        assert_refused(dspark("train", config, "--set", setting), expected)


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (KeyboardInterrupt("saved step 3 of 7: run again to go on"), 130, "saved step 3"),
        (FloatingPointError("the loss of step 3\nis not finite"), 1, "step 3 is not finite"),
        (PermissionError(13, "Permission denied", "runs"), 2, "runs: Permission denied"),
        (SaveError("a checkpoint could not be written to runs"), 3, "could not be written"),
    ],
)
def test_training_that_ends_early_says_so(dspark, write, monkeypatch, error, code, expected):
    def stop(*_, **__):
        raise error

    monkeypatch.setattr(fit, "fit", stop)
    found, out, err = dspark("train", write("config.py", CONFIG))
    assert (found, out, len(err)) == (code, "", 1)
    assert expected in err[0]


@pytest.mark.smoke
def test_help_and_usage_errors_need_no_jax():
    """In a process of its own; importing jax would make every typing error take a second."""
    program = (
        "import sys; from dspark_jax.cli import command as cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "finally: assert 'jax' not in sys.modules"
    )
    for words, code in ((["--help"], 0), (["--version"], 0), (["generate", "--nothing"], 2)):
        command = [sys.executable, "-c", program, *words]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == code
        assert len((result.stdout if code == 0 else result.stderr).splitlines()) >= 1
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["bench"],
        ["nothing"],
        ["train", "--list", "--dry-run"],
        ["bench", "speed"],
        ["bench", "acceptance"],
        ["prepare"],
        ["prepare", "p.jsonl"],
        ["cache"],
        ["cache", "write", "x.py"],
    ],
)
def test_an_incomplete_command_is_refused(capsys, words):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    captured = capsys.readouterr()
    assert_refused((stop.value.code, captured.out, captured.err.splitlines()))
