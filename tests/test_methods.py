"""Every method of drafting, side by side: in one comparison, on a mesh, and by its recipe."""

import dataclasses
import json
import runpy
from pathlib import Path

import jax
import pytest

from dspark_jax.axes import make_mesh
from dspark_jax.checkpoints.export import save_own
from dspark_jax.checkpoints.load import load_drafter_for, load_target
from dspark_jax.cli import command as cli
from dspark_jax.config import TrainConfig
from dspark_jax.engine import generate as offline
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.request import Request
from dspark_jax.evaluation import compare
from dspark_jax.models.drafters import blockwise, eagle3, early_exit, medusa, mtp
from dspark_jax.models.drafters.table import drafter_of
from dspark_jax.training import data
from dspark_jax.training.run import open_source, start_run
from tests.marks import rest_full
from tests.tiny_model import (
    DRAFTER,
    SIZES,
    TARGET,
    few_sizes,
    random_params,
    write_drafter,
    write_letters,
    write_target,
)

SMALL = {
    **SIZES,
    "num_layers": 1,
    "block_size": 3,
    "num_target_layers": TARGET.num_layers,
    "owns_vocab": False,
    "rms_norm_eps": 1e-6,
    "target_layer_ids": (0,),
}
TRAINED = {
    "eagle3": eagle3.Config(**SMALL),
    "mtp": mtp.Config(**SMALL),
    "medusa": medusa.of_recipe(SMALL),
    "blockwise": blockwise.of_recipe(SMALL),
    "exit": early_exit.of_recipe(SMALL),
}
NAMED = {"lookup": "lookup:1-3", "lookahead": "lookahead:3-2", "first": "first:1"}
METHODS = ("dspark", "dflash", "hybrid", "model", *TRAINED, *NAMED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A target, and a drafter of every method that has files."""
    folder = tmp_path_factory.mktemp("methods")
    write_target(folder / "target")
    write_target(folder / "model", dataclasses.replace(TARGET, num_layers=1))
    write_drafter(folder / "dspark")
    flash = dataclasses.replace(DRAFTER, markov_rank=0, confidence=False)
    write_drafter(folder / "dflash", flash)
    for seed, (name, cfg) in enumerate(TRAINED.items()):
        params = random_params(seed, drafter_of(cfg).declare_drafter(cfg))
        save_own(folder / name, (cfg, params, None), folder / "target")
    return folder


def source(folder, method):
    """What ``--drafter`` is given."""
    found = NAMED.get(method, str(folder / method))
    return f"{folder / 'dspark'}+lookup" if method == "hybrid" else found


@pytest.mark.full
@pytest.mark.usefixtures("own_cache")
def test_one_command_compares_them_all(folder, capsys, monkeypatch):
    monkeypatch.setattr(compare, "config_for", few_sizes)
    monkeypatch.setattr(compare, "REPLAYS", 1)
    prompts = folder / "chat.jsonl"
    prompts.write_text(json.dumps({"turns": ["abcabc", "abc"]}) + "\n")
    drafters = ",".join(f"{method}={source(folder, method)}" for method in METHODS)
    words = ["bench", "compare", "--target", str(folder / "target"), "--drafters", drafters]
    words += ["--prompts", str(prompts), "--max-new-tokens", "16", "--policy", "block", "--json"]
    assert cli.main(words) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["drafter"] for row in report["rows"]] == list(METHODS)
    assert {row["same_text"] for row in report["rows"]} == {1}
    rows = {row["drafter"]: row["rows_per_token"] for row in report["rows"]}
    assert rows["lookahead"] > 1 + 3 / 3  # of which at most three tokens a round come
    assert report["drafters"]["exit"]["parameters"] == TARGET.hidden_size


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_eight_devices_give_the_greedy_text_of_one(folder, method, emulated_devices):
    target = load_target(folder / "target")
    drafter = load_drafter_for(target, source(folder, method))
    weights = target.cfg, target.params
    requests = [Request(prompt, 24, temperature=0.0) for prompt in ([3, 4, 3, 4, 3], [5], [9] * 20)]
    plain = offline.generate(make_decoder(weights), requests, policy="none")
    parts = drafter.cfg, drafter.params, drafter.vocab
    sharded = make_decoder(weights, parts, mesh=make_mesh(2, 4))
    found = offline.generate(sharded, requests, policy="block")
    assert [one.token_ids for one in found] == [one.token_ids for one in plain]


CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.py"))


@pytest.mark.parametrize("name", rest_full(RECIPES, ("smollm2_135m_mtp", "smollm2_135m_medusa")))
def test_a_recipe_starts(folder, tmp_path, name):
    """Its drafter is made, and its first step is a program, for a tiny target and short texts."""
    config: TrainConfig = runpy.run_path(str(CONFIGS / f"{name}.py"))["config"]
    config = dataclasses.replace(
        config,
        target=str(folder / "target"),
        data=str(write_letters(tmp_path / "data.jsonl", 24)),
        out=str(tmp_path / "out"),
        num_layers=1,
        block_size=3,
        markov_rank=min(config.markov_rank, 4),
        draft_vocab_size=40 if config.draft_vocab_size else 0,
        target_layer_ids=(),
        mask_token_id=-1,
        max_length=40,
        length_buckets=(40,),
        tokens_per_batch=320,
        num_anchors=8,
        sequences_per_update=min(config.sequences_per_update, 4),
        eval_sequences=4,
        dtype="float32",
    )
    run = start_run(config, open_source(config))
    batch = next(data.batches_from(run.train_set, run.recipe, 0))
    state, metrics = jax.eval_shape(run.programs.step, run.state, run.frozen, batch, run.rate)
    assert jax.tree.structure(state) == jax.tree.structure(run.state)
    assert metrics["accept_rate_G"].shape == (3,)
