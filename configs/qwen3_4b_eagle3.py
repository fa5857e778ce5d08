"""An Eagle3 drafter for Qwen3-4B with the settings of the released one.

Command: dspark train configs/qwen3_4b_eagle3.py --set data=responses.jsonl
Data: the target's own answers (non-thinking, its recommended sampling) to the 1.3 M prompts of
    Open-PerfectBlend, 10 epochs.
Hardware and time: not run yet.
Result: not run yet. The DSpark paper's accepted lengths at temperature 1: GSM8K 5.14, HumanEval
    4.16, MT-Bench 2.39.

A batch is the released one, 512 sequences of up to 4,096 tokens, with a chain of 7 steps behind
every position. Where a batch does not fit, set micro_batches (512 takes one sequence at a time).
"""

import math

from dspark_jax.config import TrainConfig

config = TrainConfig(
    method="eagle3",
    target="Qwen/Qwen3-4B",
    data="responses.jsonl",
    out="runs/qwen3_4b_eagle3",
    num_layers=1,
    block_size=7,
    markov_rank=0,
    confidence=False,
    target_layer_ids=(1, 9, 17, 25, 33),
    max_length=4096,
    length_buckets=(4096,),
    tokens_per_batch=512 * 4096,
    num_anchors=4096,
    epochs=10.0,
    learning_rate=6e-4,
    ce_weight=0.0,
    l1_weight=0.0,
    soft_weight=1.0,
    confidence_weight=0.0,
    loss_decay=-1 / math.log(0.8),
    eval_sequences=64,
    dtype="bfloat16",
)
