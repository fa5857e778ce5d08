"""The recipes in `configs/`: each says what was done with it, and is the one that it claims."""

import ast
import runpy
from pathlib import Path

import pytest

from dspark_jax.config import TrainConfig

CONFIGS = Path(__file__).parent.parent / "configs"
FILES = sorted(CONFIGS.glob("*.py"))
# Target, its layers, the feature layers of the released drafters, and their mask.
RELEASED = {
    "qwen3_4b_dspark": ("Qwen/Qwen3-4B", 36, (1, 9, 17, 25, 33), 151669),
    "qwen3_8b_dspark": ("Qwen/Qwen3-8B", 36, (1, 9, 17, 25, 33), 151669),
    "qwen3_14b_dspark": ("Qwen/Qwen3-14B", 40, (1, 10, 19, 28, 37), 151669),
    "qwen3_30b_a3b_dspark": ("Qwen/Qwen3-30B-A3B", 48, (1, 12, 23, 34, 45), 151669),
    "gemma4_12b_dspark": ("google/gemma-4-12b-it", 48, (5, 17, 29, 41, 46), 4),
}


def recipe(name: str) -> TrainConfig:
    return runpy.run_path(str(CONFIGS / f"{name}.py"))["config"]


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_recipe_says_how_it_is_run_and_what_came_of_it(path):
    config = recipe(path.stem)
    assert isinstance(config, TrainConfig)
    assert config.out == f"runs/{path.stem}"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert f"Command: dspark train configs/{path.name}" in text
    for part in ("Data: ", "Hardware and time: ", "Result: "):
        assert f"\n{part}" in text


@pytest.mark.parametrize("name", RELEASED)
def test_the_recipes_of_released_drafters_have_their_settings(name):
    target, num_layers, layer_ids, mask = RELEASED[name]
    config = recipe(name)
    assert (config.target, config.target_layer_ids) == (target, layer_ids)
    assert layer_ids[-1] <= num_layers - 2
    assert (config.num_layers, config.block_size, config.mask_token_id) == (5, 7, mask)
    assert (config.markov_rank, config.markov_head, config.confidence) == (256, "vanilla", True)
    assert (config.ce_weight, config.l1_weight, config.confidence_weight) == (0.1, 0.9, 1.0)
    assert (config.loss_decay, config.learning_rate, config.warmup_fraction) == (4.0, 6e-4, 0.04)
    assert (config.weight_decay, config.clip_norm, config.epochs) == (0.0, 1.0, 10)
    assert config.tokens_per_batch // config.max_length == 512
    assert (config.max_length, config.num_anchors, config.draft_vocab_size) == (4096, 512, 0)


def test_dflash_differs_from_dspark_in_its_heads_and_loss_alone():
    dspark, dflash = recipe("smollm2_135m_dspark"), recipe("smollm2_135m_dflash")
    assert (dflash.markov_rank, dflash.confidence, dflash.l1_weight) == (0, False, 0.0)
    differ = {key for key, value in vars(dspark).items() if vars(dflash)[key] != value}
    heads = {"markov_rank", "confidence", "bigram_init"}
    assert differ == heads | {"out", "ce_weight", "l1_weight", "confidence_weight"}
