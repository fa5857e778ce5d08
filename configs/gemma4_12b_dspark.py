"""A DSpark drafter for Gemma 4 12B with the settings of the released one.

Command: dspark train configs/gemma4_12b_dspark.py --set data=responses.jsonl
Data: the target's own answers (thinking off, its recommended sampling: temperature 1, top-k 64,
    top-p 0.95) to the 1.3 M prompts of Open-PerfectBlend, 10 epochs.
Hardware and time: not run yet.
Result: not run yet.

The blocks are layers of Gemma 4 without a window: heads of 512 whose values are their keys, the
soft cap on the logits before the sequential bias. A batch is the released one, 512 sequences of up
to 4,096 tokens with 512 anchors each; where that does not fit, set micro_batches.
"""

from dspark_jax.config import TrainConfig

config = TrainConfig(
    target="google/gemma-4-12b-it",
    data="responses.jsonl",
    out="runs/gemma4_12b_dspark",
    num_layers=5,
    block_size=7,
    target_layer_ids=(5, 17, 29, 41, 46),
    mask_token_id=4,
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
