"""A DSpark drafter for Qwen3-30B-A3B, a mixture of 128 experts, with the released settings.

Command: dspark train configs/qwen3_30b_a3b_dspark.py --set data=responses.jsonl
Data: the target's own answers (non-thinking, its recommended sampling) to the 1.3 M prompts of
    Open-PerfectBlend, 10 epochs.
Hardware and time: not run yet.
Result: not run yet.

Nobody has released a drafter of this kind for it: the settings are those for the dense Qwen3
models, five layers of the target's width with its dense MLP width of 6,144 and no experts. The
weights of the target take 61 GB in bfloat16: set fsdp, so that devices share them, and
micro_batches where a batch does not fit.
"""

from dspark_jax.config import TrainConfig

config = TrainConfig(
    target="Qwen/Qwen3-30B-A3B",
    data="responses.jsonl",
    out="runs/qwen3_30b_a3b_dspark",
    num_layers=5,
    block_size=7,
    target_layer_ids=(1, 12, 23, 34, 45),
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
