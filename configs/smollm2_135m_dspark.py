"""The default drafter for SmolLM2-135M-Instruct, shipped in `dspark_jax/pretrained/`.

Command: dspark train configs/smollm2_135m_dspark.py --set data=responses.jsonl
    and a second part, which goes on from the drafter of the first:
    dspark train configs/smollm2_135m_dspark.py --set data=responses.jsonl \\
        --set bigram_init=false --set local_init=false \\
        --set init_drafter=runs/smollm2_135m_dspark/drafter \\
        --set out=runs/smollm2_135m_dspark_on --set dtype=bfloat16 --set seed=1 \\
        --set updates_per_batch=24 --set steps=68
Data: the target's own answers to 5,001 prompts (math, code, chat) at temperatures 0 to 1, 1.04 M
    tokens; of 4,953 to train on, the first part reads 858 and the second 3,429 (3,727 in all).
Hardware and time: 2 CPU cores (AVX-512 with bfloat16 products), shared with other work, 2026-11-22:
    27 minutes at 100 to 128 blocks/s in float32, then 69 minutes at 135 blocks/s in bfloat16. The
    shipped file is rounded to bfloat16, 25 MB.
Result: expected accepted length on 24 held-out answers (mixed temperatures), by training blocks:
    1.50 after 61 k, 1.49 after 111 k, 1.56 after 156 k, 1.59 after 196 k (end of the first part);
    1.58 after 298 k, 1.71 after 400 k, 1.82 after 496 k, 1.87 after 601 k, 1.93 after 684 k and at
    the end (754 k), where 48, 44, 41 and 38 % of the drafts at each position are accepted. 16
    prompts of 128 tokens each, whole blocks verified, at temperature 0 and 1: GSM8K 2.23 and 1.76,
    MBPP 2.01 and 1.68, MT-Bench 1.49 and 1.41.

The draft vocabulary covers 97.6 % (math), 95.3 % (code) and 92.9 % (chat) of held-out answer
tokens; 8,192 ids would cover 97.0, 94.3 and 90.9.
"""

from dspark_jax.config import TrainConfig

config = TrainConfig(
    target="default",
    data="responses.jsonl",
    out="runs/smollm2_135m_dspark",
    num_layers=2,
    block_size=4,
    markov_rank=64,
    draft_vocab_size=10240,
    bigram_init=True,
    local_init=True,
    max_length=448,
    length_buckets=(224, 336, 448),
    tokens_per_batch=17920,
    num_anchors=52,
    updates_per_batch=40,
    sequences_per_update=8,
    steps=16,
    learning_rate=1e-3,
    eval_sequences=24,
    eval_every=4,
    checkpoint_every=1,
    log_every=1,
)
