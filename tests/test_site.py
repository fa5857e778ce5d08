"""README and site: what they tell users to run runs, links lead somewhere, the site is built."""

import functools
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import dspark_jax
from dspark_jax.cli.arguments import make_parser
from dspark_jax.cli.command import main
from dspark_jax.engine.config import EngineConfig
from tests.tiny_model import BLOCK, few_sizes, write_drafter, write_letters, write_target

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "notebooks").rglob("*.md"))]
FENCE = re.compile(r"(?:<!-- not run: (.+?) -->\n)?^```(\w+)\n(.*?)^```$", flags=re.M | re.S)
LANGUAGES = {"json", "python", "sh", "text", "yaml", "bibtex"}

# What makes commands small enough for a tiny model.
RECIPE = (
    " --set steps=2 --set eval_sequences=1 --set max_length=64 --set length_buckets=()"
    " --set tokens_per_batch=128 --set num_anchors=4 --set updates_per_batch=1"
    " --set sequences_per_update=0 --set init_drafter= --set markov_rank=4 --set block_size=3"
    " --set min_loss_tokens=2 --set draft_vocab_size=0 --set mask_token_id=-1"
)
SMALLER = {
    **dict.fromkeys(("cache estimate", "cache write", "train"), RECIPE),
    "bench load": "--concurrency 1,2 --requests 1 --repeats 1 --max-new-tokens 4 --policies none",
    "calibrate": "--max-new-tokens 8 --batch 2 --limit 2 --temperature 0",
    "doctor": "--concurrency 1 --max-new-tokens 4",
    "generate": "--max-new-tokens 8",
    "prepare": "--max-new-tokens 8",
    "profile": "--slots 1 --positions 64 --replays 1",
}


@dataclass(frozen=True)
class Block:
    """A fence of a page: language, text, and why no test runs it where none does."""

    page: str
    line: int
    language: str
    text: str
    reason: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            str(page.relative_to(ROOT)),
            text.count("\n", 0, found.start(2)) + 1,
            found[2],
            found[3],
            found[1] or "",
        )
        for found in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SHELL = [block for block in BLOCKS if block.language == "sh"]


def commands_of(block: Block) -> list[list[str]]:
    """The words behind each ``dspark`` of a block, comments left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[line.index("dspark") + 1 :] for line in words if "dspark" in line]


def test_blocks_are_of_languages_that_tests_know():
    assert {block.language for block in BLOCKS} <= LANGUAGES
    assert len(SHELL) > 10


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_are_known_with_their_options(block):
    """Also those that cannot run here; a block without one says why it does not run."""
    commands = commands_of(block)
    assert commands or block.reason
    assert not any(map(refused, commands))


def refused(command: list[str]) -> object:
    """The exit code of the parser, which also leaves without one where it only lists something."""
    try:
        make_parser("").parse_args(command)
    except SystemExit as end:
        return end.code
    return None


@pytest.mark.usefixtures("own_cache")
def test_python_runs(monkeypatch, tmp_path, capsys):
    """Every block as it stands, with a tiny model in the default one's place."""
    tiny = dspark_jax.load(write_target(tmp_path / "target"), write_drafter(tmp_path / "drafter"))
    monkeypatch.setattr("dspark_jax.model.load", lambda: tiny)
    monkeypatch.setattr("dspark_jax.model.config_for", few_sizes)
    few = {"slot_buckets": (2,), "row_buckets": (BLOCK + 1,), "chunk_buckets": (1,)}
    few_programs = functools.partial(EngineConfig, position_buckets=(576,), **few)
    monkeypatch.setattr("dspark_jax.engine.config.EngineConfig", few_programs)
    blocks = [block for block in BLOCKS if block.language == "python" and not block.reason]
    assert "README.md" in {block.page for block in blocks}
    for block in blocks:
        exec(compile(block.text, str(block), "exec"), {})
        assert len(capsys.readouterr().out) > 20


@pytest.mark.full
@pytest.mark.usefixtures("own_cache", "emulated_devices")
@pytest.mark.parametrize("page", sorted({block.page for block in SHELL if not block.reason}))
def test_shell_runs(page, monkeypatch, tmp_path, capsys):
    """The commands of a page, one behind the other, with tiny models, small sizes, few prompts."""
    monkeypatch.chdir(tmp_path)
    target, drafter = write_target(tmp_path / "target"), write_drafter(tmp_path / "drafter")
    monkeypatch.setattr("dspark_jax.checkpoints.load.default_target_path", lambda: target)
    monkeypatch.setattr("dspark_jax.checkpoints.load.default_drafter_path", lambda: drafter)
    monkeypatch.setattr("dspark_jax.engine.generate.config_for", few_sizes)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "CONFIG").symlink_to(ROOT / "configs" / "smollm2_135m_dspark.py")
    for name in ("prompts", "gsm8k", "mbpp", "mt-bench"):
        lines = [json.dumps({"prompt": f"{name} {number}"}) for number in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    write_letters(tmp_path / "responses.jsonl", 12)
    if page.endswith(("measure.md", "export.md")):  # what pages before these have made
        calibrate = "calibrate --prompts gsm8k.jsonl --record rounds.jsonl --out c.json"
        assert main(calibrate.split() + SMALLER["calibrate"].split()) == 0
        (tmp_path / "runs" / "mine").mkdir(parents=True)
        (tmp_path / "runs" / "mine" / "drafter").symlink_to(drafter)
    for block in SHELL:
        if block.page == page and not block.reason:
            for words in commands_of(block):
                name = make_parser("").parse_args(words).command
                assert main([*words, *SMALLER.get(name, "").split()]) == 0, (words, capsys)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?:", link):
            path, _, heading = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.is_file(), link
            if heading:
                written = target.read_text(encoding="utf-8")
                titles = re.findall(r"^#+ (.*)$", written, flags=re.M)
                words = (re.sub(r"[^\w -]", "", title.lower()) for title in titles)
                known = {each.replace(" ", "-") for each in words}
                assert heading in known, link


@pytest.mark.full
def test_the_site_is_built_without_a_network_or_a_warning(tmp_path):
    if importlib.util.find_spec("myst_nb") is None:
        pytest.skip("needs the extra docs; .ci/run builds the site in any case")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "notebooks"]
    done = subprocess.run([*command, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
