"""The first layers of SmolLM2-135M-Instruct as its drafter, with a norm that is trained.

Command: dspark train configs/smollm2_135m_early_exit.py --set data=responses.jsonl
Data: as for configs/smollm2_135m_dspark.py, with which it is to be compared: the target's own
    answers, the same number of blocks.
Hardware and time: not run yet.
Result: not run yet.

The target has 30 layers, of which 8 draft; nothing but the 576 numbers of the norm behind them is
trained. ``--drafter first:8`` is the same without training.
"""

from dspark_jax.config import TrainConfig

config = TrainConfig(
    method="early_exit",
    target="default",
    data="responses.jsonl",
    out="runs/smollm2_135m_early_exit",
    num_layers=8,
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
    learning_rate=1e-2,
    ce_weight=0.1,
    l1_weight=0.9,
    confidence_weight=0.0,
    eval_sequences=24,
    eval_every=4,
    checkpoint_every=1,
    log_every=1,
)
