"""An MTP layer for SmolLM2-135M-Instruct, to be compared with the DSpark drafter.

Command: dspark train configs/smollm2_135m_mtp.py --set data=responses.jsonl
Data: as for configs/smollm2_135m_dspark.py, with which it is to be compared: the target's own
    answers, the same number of chains as there are blocks there.
Hardware and time: not run yet.
Result: not run yet.

As FastMTP trains it: one layer, steps of a chain on its own states and the true tokens, the
cross-entropy with these tokens weighted 0.6^k; but on a frozen target, from fresh weights.
"""

import math

from dspark_jax.config import TrainConfig

config = TrainConfig(
    method="mtp",
    target="default",
    data="responses.jsonl",
    out="runs/smollm2_135m_mtp",
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
    loss_decay=-1 / math.log(0.6),
    eval_sequences=24,
    eval_every=4,
    checkpoint_every=1,
    log_every=1,
)
