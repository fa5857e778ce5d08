"""Drafters inside DeepSeek-V4's checkpoints: found, loaded, decoded with, trained, exported."""

import dataclasses
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dspark_jax.axes import init_params
from dspark_jax.checkpoints.inside import open_inside
from dspark_jax.checkpoints.load import (
    default_drafter,
    load_drafter_for,
    load_target,
    open_target,
)
from dspark_jax.checkpoints.tensors import LoadError
from dspark_jax.config import TrainConfig
from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.request import Request
from dspark_jax.evaluation.confidence import path_beside
from dspark_jax.evaluation.export import write_drafter
from dspark_jax.models.drafters import deepseek_v4, deepseek_v4_mtp
from dspark_jax.models.drafters.table import drafter_of
from dspark_jax.rules import Rule
from dspark_jax.training.fit import fit
from dspark_jax.training.run import drafter_config
from pallas_kernels.accept_block.api import accept_block
from tests.test_deepseek_v4_drafter import GOLDEN, chained, golden, models
from tests.test_families import CONFIGS
from tests.test_families_commands import dspark
from tests.test_families_decoding import (
    assert_texts_follow_the_target,
    known_seconds,
    target_of,
)
from tests.tiny_model import write_letters, write_tokenizer

__all__ = ["known_seconds"]
ENGINE = EngineConfig(
    slots=5,
    positions=48,
    policy="block",
    slot_buckets=(5,),
    row_buckets=(6,),
    position_buckets=(64,),
    chunk_rows=16,
    chunk_buckets=(1,),
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The golden checkpoint, with a tokenizer of fewer tokens than it has ids."""
    there = shutil.copytree(GOLDEN / "checkpoint", tmp_path_factory.mktemp("v4") / "target")
    write_tokenizer(there)
    return there


def changed(directory, there, config=lambda hf: None, tensors=lambda held: None):
    """A copy of a checkpoint with other settings or tensors."""
    shutil.copytree(directory, there)
    hf, held = (
        json.loads((there / "config.json").read_text()),
        load_file(there / "model.safetensors"),
    )
    config(hf)
    tensors(held)
    (there / "config.json").write_text(json.dumps(hf))
    save_file(held, there / "model.safetensors")
    return there


def without_stages(held):
    for name in [name for name in held if name.startswith("mtp.")]:
        del held[name]


def test_the_drafter_inside_is_the_default_one(directory, caplog):
    """Its stages are counted in the weights, whatever num_nextn_predict_layers says."""
    assert json.loads((directory / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert default_drafter(directory) == "default"
    assert path_beside("default", str(directory)).parent == directory  # its calibration
    with caplog.at_level(logging.INFO):
        found = load_drafter_for(load_target(directory), "default")
    assert "the drafter is the one inside target: 5 drafts a round" in caplog.text
    (own, drafter) = models()[1]
    assert (found.cfg, found.directory) == (own, directory)
    assert found.vocab.embed_VD.shape == (131, 48)
    np.testing.assert_array_equal(found.params.fc_FYD, drafter.fc_FYD)
    half = load_drafter_for(load_target(directory, jnp.bfloat16), directory).params
    assert half.fc_FYD.dtype == jnp.bfloat16
    assert half.read_out.weight_JDO.dtype == jnp.float32  # what rounding would harm


def test_the_settings_decide_which_drafter_it_is(directory, tmp_path):
    def first_release(hf):
        for key in [key for key in hf if key.startswith("dspark_")]:
            del hf[key]

    def one_layer(held):
        without_stages(held)
        held |= load_file(GOLDEN / "mtp1" / "model.safetensors")

    chain = changed(directory, tmp_path / "chain", first_release, one_layer)
    cfg, _ = open_inside(chain)
    assert isinstance(cfg, deepseek_v4_mtp.Config)
    assert cfg == chained()[0]
    bare = changed(directory, tmp_path / "bare", first_release, without_stages)
    assert default_drafter(bare) == "none"


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("dspark_target_layer_ids", [3, 4, 6], r"target_layer_ids \(3, 4, 6\) must lie in -1..5"),
        ("dspark_target_layer_ids", ["a"], "must list layers"),
        ("dspark_target_layer_ids", None, "dspark_target_layer_ids is missing"),
        ("dspark_noise_token_id", 131, r"mask_token_id 131 must lie in 0..130"),
        ("dspark_block_size", -1, "dspark_block_size"),
        ("dspark_markov_rank", 9, r"mtp.2.\S+ has shape \[131, 8\]|mtp.2.\S+ has shape"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(setting, value, message, directory, tmp_path):
    def change(hf):
        hf[setting] = value

    there = changed(directory, tmp_path / "broken", change)
    target = dataclasses.replace(load_target(directory), source=there)
    with pytest.raises(LoadError, match=message) as caught:
        load_drafter_for(target, "default")
    assert "\n" not in str(caught.value)


def test_a_stage_that_is_not_whole_is_refused(directory, tmp_path):
    def cut(held):
        del held["mtp.1.attn.attn_sink"]

    there = changed(directory, tmp_path / "cut", tensors=cut)
    with pytest.raises(LoadError, match=r"mtp\.1\.attn\.attn_sink is missing"):
        load_drafter_for(load_target(directory), there)


def prompts_and_texts():
    """Prompts of the golden with the texts that follow."""
    target, draft = golden("target"), golden("draft")
    length = int(target["greedy_prompt_len"])
    for ids, text in zip(target["input_ids"], target["greedy"], strict=True):
        yield ids[:length].tolist(), text.tolist()
    for run in range(3):
        ids, length = draft[f"run{run}/tokens"].tolist(), int(draft[f"run{run}/prompt_len"])
        yield ids[:length], ids[length:]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["stages", "chain"])
def test_greedy_text_is_that_of_the_inference_program(kind):
    (cfg, target), inside = models()
    own, drafter = inside if kind == "stages" else chained()
    config = dataclasses.replace(ENGINE, row_buckets=(own.block_size + 1,))
    engine = Engine(make_decoder((cfg, target), (own, drafter, target.vocab)), config)
    given = list(prompts_and_texts())
    streams = [engine.submit(Request(prompt, len(text))) for prompt, text in given]
    results = [stream.wait() for stream in streams]
    assert [result.token_ids for result in results] == [text for _, text in given]
    if kind == "stages":  # the rounds, too, but those at the end of a text
        for run, result in enumerate(results[2:]):
            expected = (golden("draft")[f"run{run}/accepted"] + 1).tolist()
            assert result.accepted_lengths[1 : len(expected)] == expected[1:], run


def tiny(kind):
    """A random target with three tokens and a random drafter of its own form."""
    cfg = dataclasses.replace(CONFIGS["deepseek_v4"], vocab_size=3)
    target = target_of(cfg, scale=2.0)
    if kind == "chain":
        own = deepseek_v4_mtp.config(cfg)
    else:
        stage = deepseek_v4.stages_of(cfg, 2)
        own = deepseek_v4.Config(
            **deepseek_v4.stage_fields(stage, cfg.num_layers), block_size=3, mask_token_id=1,
            target_layer_ids=(-1, cfg.num_layers - 1), markov_rank=4, confidence=True,
        )  # fmt: skip
    params = init_params(jax.random.key(1), drafter_of(own).declare_drafter(own))
    return target, (own, params, target[1].vocab)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["stages", "chain"])
def test_texts_follow_the_target_with_the_scheduler_in_the_loop(kind, known_seconds):
    target, drafter = tiny(kind)
    policy = "delayed" if drafter[0].confidence else "block"
    assert_texts_follow_the_target(target, drafter, policy)


@pytest.mark.full
def test_a_wrong_draft_law_is_noticed(known_seconds):
    """Drafts of a hotter law than the one that they are verified against."""
    target, drafter = tiny("stages")

    def against_another(logits_TV, floor_T, plan, drafts, requests):
        hotter = drafts._replace(logits_BGU=drafts.logits_BGU / 3)
        return accept_block(logits_TV, floor_T, plan, hotter, requests, rule="rejection")

    rule = Rule(against_another, lossless=False)
    with pytest.raises(AssertionError, match="chi_square"):
        assert_texts_follow_the_target(target, drafter, "delayed", rule)


def recipe_of(directory, folder, **changes):
    data = folder / "data.jsonl"
    recipe = TrainConfig(
        target=str(directory), data=str(write_letters(data, 16)), out=str(folder / "run"),
        num_layers=2, block_size=3, markov_rank=8, mask_token_id=130, target_layer_ids=(3, 5),
        max_length=48, length_buckets=(48,), tokens_per_batch=8 * 48, num_anchors=4, steps=8,
        eval_sequences=0, log_every=1, min_loss_tokens=4, learning_rate=0.01,
    )  # fmt: skip
    return dataclasses.replace(recipe, **changes)


@pytest.mark.full
def test_one_is_trained_and_written_in_the_same_form(directory, tmp_path):
    fit(recipe_of(directory, tmp_path))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < 0.9 * losses[0]
    there = tmp_path / "run" / "drafter"
    held = load_file(there / "model.safetensors")
    assert all(name.startswith(("mtp.0.", "mtp.1.")) for name in held)
    assert not held["mtp.0.ffn.gate.bias"].any()  # the balance of the router is left as it is
    assert np.abs(held["mtp.0.ffn.experts.0.w1.weight"]).max() > 0
    hf = json.loads((there / "config.json").read_text())
    assert (hf["dspark_block_size"], hf["dspark_target_layer_ids"]) == (3, [3, 5])
    target = load_target(directory)
    found = load_drafter_for(target, there)
    assert isinstance(found.cfg, deepseek_v4.Config)
    # Exported, which compares what the target accepts before and after, it is the same again.
    out = write_drafter(directory, there, "deepspec", tmp_path / "exported")
    again = load_file(out / "model.safetensors")
    assert again.keys() == held.keys()
    for name, tensor in held.items():
        np.testing.assert_array_equal(again[name], tensor)
    # In the target's own directory it takes the place of the one that is there.
    both = changed(directory, tmp_path / "both", lambda hf_: hf_.update(hf), replace_stages(held))
    inside = load_drafter_for(load_target(both), "default")
    np.testing.assert_array_equal(inside.params.norm_D, found.params.norm_D)


def replace_stages(held):
    def replace(tensors):
        without_stages(tensors)
        tensors |= held

    return replace


@pytest.mark.parametrize(
    ("field", "value"),
    [("markov_head", "gated"), ("num_heads", 2), ("confidence", False), ("draft_vocab_size", 9)],
)
def test_a_recipe_that_the_form_has_no_room_for_is_refused(field, value, directory, tmp_path):
    target, _ = open_target(directory)
    recipe = recipe_of(directory, tmp_path, **{field: value})
    with pytest.raises(ValueError, match=f"{field} is {value!r}: a drafter of layers like"):
        drafter_config(recipe, target)


def test_a_chain_is_not_exported(directory, tmp_path):
    def one_layer(held):
        without_stages(held)
        held |= load_file(GOLDEN / "mtp1" / "model.safetensors")

    chain = changed(
        directory, tmp_path / "chain", lambda hf: hf.pop("dspark_block_size"), one_layer
    )
    with pytest.raises(ValueError, match="cannot be trained or exported"):
        write_drafter(chain, "default", "deepspec", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.full
def test_the_command_drafts_with_the_one_inside(directory, capsys, caplog, own_cache):
    command = ["generate", "hello there", "--target", directory, "--max-new-tokens", 12, "--json"]
    plain = json.loads(dspark(capsys, *command, "--drafter", "none"))
    drafted = json.loads(dspark(capsys, *command, "--policy", "block"))
    assert drafted["text"] == plain["text"]
    assert "the drafter is the one inside target" in caplog.text
