"""A blockwise drafter for SmolLM2-135M-Instruct, to be compared with the DSpark drafter.

Command: dspark train configs/smollm2_135m_blockwise.py --set data=responses.jsonl
Data: as for configs/smollm2_135m_dspark.py, with which it is to be compared: the target's own
    answers, the same number of blocks.
Hardware and time: not run yet.
Result: not run yet.

As the paper trains it on a frozen target: the mean of the slots' cross-entropies with the tokens
that followed. One slot fewer than the paper counts, whose first is the target itself.
"""

from dspark_jax.config import TrainConfig

config = TrainConfig(
    method="blockwise",
    target="default",
    data="responses.jsonl",
    out="runs/smollm2_135m_blockwise",
    num_layers=1,
    block_size=4,
    markov_rank=0,
    confidence=False,
    draft_vocab_size=10240,
    max_length=448,
    length_buckets=(224, 336, 448),
    tokens_per_batch=17920,
    num_anchors=52,
    updates_per_batch=40,
    sequences_per_update=8,
    steps=16,
    learning_rate=1e-3,
    ce_weight=1.0,
    l1_weight=0.0,
    confidence_weight=0.0,
    loss_decay=0.0,
    eval_sequences=24,
    eval_every=4,
    checkpoint_every=1,
    log_every=1,
)
