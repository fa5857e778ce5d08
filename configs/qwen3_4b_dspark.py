"""A DSpark drafter for Qwen3-4B with the settings of the released one.

Command: dspark train configs/qwen3_4b_dspark.py --set data=responses.jsonl
Data: the target's own answers (non-thinking, its recommended sampling) to the 1.3 M prompts of
    Open-PerfectBlend, 10 epochs.
Hardware and time: not run yet.
Result: not run yet. The paper's accepted lengths at temperature 1: GSM8K 6.11, HumanEval 5.38,
    MT-Bench 3.64.

A batch is the released one, 512 sequences of up to 4,096 tokens with 512 anchors each. Where
a batch does not fit, set micro_batches (128 takes four sequences at a time) and, on NVIDIA GPUs
from Hopper on, kernels="mosaic_gpu", by which the target keeps no scores.
"""

from dspark_jax.config import TrainConfig

config = TrainConfig(
    target="Qwen/Qwen3-4B",
    data="responses.jsonl",
    out="runs/qwen3_4b_dspark",
    num_layers=5,
    block_size=7,
    target_layer_ids=(1, 9, 17, 25, 33),
    mask_token_id=151669,
    markov_rank=256,
    max_length=4096,
    length_buckets=(4096,),
    tokens_per_batch=512 * 4096,
    num_anchors=512,
    epochs=10.0,
    learning_rate=6e-4,
    eval_sequences=64,
    dtype="bfloat16",
)
