"""A drafter for SmolLM2-135M-Instruct on a CPU; what ships went on from it on a GPU.

configs/smollm2_135m_gpu.py made the drafter in `dspark_jax/pretrained/` of this one's.

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
    27 minutes at 100 to 128 blocks/s in float32, then 69 minutes at 135 blocks/s in bfloat16. A
    third part on another CPU (AVX-512, 2026-11-27, float32, the trainer of that day) went on with
    883 more answers in front, sequences_per_update=5, num_anchors=84, updates_per_batch=60: 15
    batches at 1e-3, then 25 of 28 at 8e-4, 1.0 M blocks. A fourth, from the mean that came of it,
    read features out of a cache (dspark cache write: 1.2 M tokens, 11 GB): --set cache=cache
    --set average_decay=0.998 --set updates_per_batch=24 --set learning_rate=6e-4 --set steps=60
    --set seed=7, 0.49 M blocks in 45 minutes beside other work. A fifth (steps=80, seed=8) and a
    sixth (seed=9, 69 of 70 steps), each from the mean before it, at learning_rate=5e-4: 0.63 M and
    0.52 M blocks. The seventh (seed=10, 80 steps) and eighth (seed=11, 77 steps) likewise, 0.6 M
    each; of these 0.6 of the new mean and 0.4 of the one before.
Result: expected accepted length on 24 held-out answers (mixed temperatures), by training blocks:
    1.50 after 61 k, 1.49 after 111 k, 1.56 after 156 k, 1.59 after 196 k (end of the first part);
    1.58 after 298 k, 1.71 after 400 k, 1.82 after 496 k, 1.87 after 601 k, 1.93 after 684 k and at
    the end of the second part (754 k). The third, with other anchors: 1.95 before it, 1.79 after
    375 k more blocks, 1.94 after 1.0 M: 60 updates of one batch fit the batch (2.0 to 2.2 on it).
    The mean of the weights before and after it, 0.35 to 0.65, is better than both: 2.02 with these
    anchors, 50, 48, 43 and 41 % of the drafts at each position accepted. The fourth goes on from
    there, as the running mean of its weights: 2.11 after 0.49 M blocks (2.3 M in all), 53, 50, 45
    and 42 %. The fifth: 2.19 (2.9 M), the sixth: 2.24 (3.5 M), the seventh: 2.28 (4.1 M), the
    eighth: 2.31 (4.8 M), 59, 55, 49 and 45 %.

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
