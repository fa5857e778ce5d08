"""A DFlash drafter for SmolLM2-135M-Instruct: the DSpark recipe without its two heads.

Command: dspark train configs/smollm2_135m_dflash.py --set data=responses.jsonl
Data: as for configs/smollm2_135m_dspark.py, with which it is to be compared: the target's own
    answers, the same number of blocks.
Hardware and time: as part of the comparison in configs/smollm2_135m_heads.py (bfloat16, 24 updates
    a batch, 117,548 blocks), 2026-11-25. Not run with as many blocks as the default drafter.
Result: of that comparison, accepted length at temperature 0 on GSM8K 1.62, MBPP 1.47 and MT-Bench
    1.22, mean 1.44, where the vanilla head that starts from bigrams has 1.60; at temperature 1 it
    is 1.32 against 1.43. On held-out answers 1.36 against 1.52.

DFlash is trained with the cross-entropy alone.
"""

from dspark_jax.config import TrainConfig

config = TrainConfig(
    target="default",
    data="responses.jsonl",
    out="runs/smollm2_135m_dflash",
    num_layers=2,
    block_size=4,
    markov_rank=0,
    confidence=False,
    draft_vocab_size=10240,
    local_init=True,
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
    eval_sequences=24,
    eval_every=4,
    checkpoint_every=1,
    log_every=1,
)
