"""A tiny random model of every family through the commands: answers, training, text, export; and
through the server."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest

import dspark_jax
from dspark_jax.cli import command as cli
from dspark_jax.config import TrainConfig
from dspark_jax.training import fit
from tests.small_server import client_of, made_service
from tests.tiny_model import BLOCK, write_letters, write_target

LAYERS = {"num_hidden_layers": 4}
WINDOWS = ["sliding_attention", "full_attention"] * 2
MISTRAL = LAYERS | {"model_type": "mistral", "sliding_window": 12}
QWEN2 = LAYERS | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 12}
MIXTURE = {
    "model_type": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
GEMMA = LAYERS | {"layer_types": WINDOWS, "sliding_window": 12, "query_pre_attn_scalar": 8}
GEMMA4 = GEMMA | {
    "model_type": "gemma4_text",
    "global_head_dim": 16,
    "final_logit_softcapping": 9.0,
}
FAMILIES = {
    "llama": LAYERS,
    "mistral": MISTRAL,
    # Its tokenizer has an id of its own.
    "qwen2": QWEN2 | {"layer_types": WINDOWS[::-1], "vocab_size": 98},
    "qwen3": LAYERS | {"model_type": "qwen3", "head_dim": 8},
    "smollm3": LAYERS | {"model_type": "smollm3"},
    "qwen3_moe": LAYERS | MIXTURE,
    "gemma2": GEMMA | {"model_type": "gemma2"},
    "gemma3": GEMMA | {"model_type": "gemma3_text"},
    "gemma4 of small models": GEMMA4
    | {
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": 97,
    },
    "gemma4": GEMMA4
    | {
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
}
FAMILIES["deepseek_v4"] = LAYERS | {
    "model_type": "deepseek_v4",
    "q_lora_rank": 12,
    "o_groups": 2,
    "o_lora_rank": 6,
    "qk_rope_head_dim": 4,
    "sliding_window": 12,
    "compress_ratios": [0, 4, 8, 4, 0],
    "index_n_heads": 8,
    "index_head_dim": 8,
    "index_topk": 6,
    "hc_sinkhorn_iters": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_hash_layers": 1,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 128,
    },
}
# Whose drafters' blocks are layers of their own, with the windows of these.
OWN_WINDOWS = {"gemma4 of small models", "gemma4", "deepseek_v4"}
LINES = [{"prompt": "hello there"}, {"prompt": "one"}, {"prompt": "what is this?"}]


def dspark(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


async def served(model):
    """What a server says to the prompt of the command, and says again, with a store of prefixes."""
    turns = [{"role": "user", "content": "hello there"}]
    body = {"messages": turns, "max_tokens": 24, "temperature": 0}
    with made_service(model, prefix_bytes=1 << 20) as service:
        async with client_of(service) as client:
            answers = [await client.post("/v1/chat/completions", json=body) for _ in range(2)]
    return [answer.json()["choices"][0]["message"]["content"] for answer in answers]


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
def test_answers_training_text_and_export(name, tmp_path, capsys, own_cache):
    target = write_target(tmp_path / "target", **FAMILIES[name])
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in LINES * 4))
    dspark(
        capsys, "prepare", prompts, "--out", answers, "--target", target,
        "--max-new-tokens", 24, "--batch", 4,
    )  # fmt: skip
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from dspark_jax.config import TrainConfig\n"
        f"config = TrainConfig(target={str(target)!r}, data={str(answers)!r}, "
        f"out={str(tmp_path / 'run')!r}, num_layers=1, block_size={BLOCK}, markov_rank=4, "
        "max_length=48, tokens_per_batch=96, num_anchors=4, min_loss_tokens=4, steps=4, "
        "eval_sequences=1, eval_every=2, checkpoint_every=2, log_every=1, sliding_window="
        f"{0 if name in OWN_WINDOWS else 16})\n"
    )
    dspark(capsys, "train", recipe)
    drafter = tmp_path / "run" / "drafter"
    command = ["generate", "hello there", "--target", target, "--max-new-tokens", 24, "--json"]
    plain = json.loads(dspark(capsys, *command, "--drafter", "none"))
    drafted = json.loads(dspark(capsys, *command, "--drafter", drafter, "--policy", "block"))
    assert drafted["text"] == plain["text"]
    models = ["--target", target, "--drafter", drafter]
    report = json.loads(
        dspark(
            capsys, "bench", "acceptance", *models, "--prompts", prompts, "--limit", 2,
            "--batch", 2, "--max-new-tokens", 12, "--json",
        )
    )  # fmt: skip
    assert report
    dspark(capsys, "export", *models, "--format", "deepspec", "--out", tmp_path / "exported")
    again = json.loads(
        dspark(capsys, *command, "--drafter", tmp_path / "exported", "--policy", "block")
    )
    assert (again["text"], again["rounds"]) == (drafted["text"], drafted["rounds"])
    assert asyncio.run(served(dspark_jax.load(target, drafter))) == [plain["text"]] * 2


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
def test_a_training_step_on_a_mesh_is_that_of_one_device(name, tmp_path, emulated_devices):
    data = write_letters(tmp_path / "data.jsonl", 16)
    recipe = TrainConfig(
        target=str(write_target(tmp_path / "target", **FAMILIES[name])),
        data=str(data),
        num_layers=1,
        block_size=3,
        markov_rank=8,
        target_layer_ids=(-1, 0),
        max_length=48,
        length_buckets=(48,),
        tokens_per_batch=8 * 48,
        num_anchors=4,
        steps=2,
        eval_sequences=0,
        log_every=1,
    )
    losses = []
    for out, mesh in (("one", {}), ("many", {"data_parallel": 2, "fsdp": 2, "tensor_parallel": 2})):
        fit.fit(replace(recipe, out=str(tmp_path / out), **mesh))
        lines = (tmp_path / out / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    np.testing.assert_allclose(*losses, rtol=1e-4)
