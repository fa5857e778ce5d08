"""DSpark's sequential heads against DFlash on SmolLM2-135M: equal data, updates and depth.

Commands, the four drafters of the comparison:
    dspark train configs/smollm2_135m_heads.py --set out=runs/vanilla
    dspark train configs/smollm2_135m_heads.py --set out=runs/gated --set markov_head=gated
    dspark train configs/smollm2_135m_heads.py --set out=runs/rnn --set markov_head=rnn
    dspark train configs/smollm2_135m_heads.py --set out=runs/dflash --set markov_rank=0 \\
        --set confidence=false --set ce_weight=1 --set l1_weight=0 --set confidence_weight=0
Data: as for configs/smollm2_135m_dspark.py. No head starts from bigrams, which the vanilla one
    alone could.
"""

from dspark_jax.config import TrainConfig

config = TrainConfig(
    target="default",
    data="responses.jsonl",
    out="runs/vanilla",
    dtype="bfloat16",
    num_layers=2,
    block_size=4,
    markov_rank=64,
    draft_vocab_size=10240,
    local_init=True,
    max_length=448,
    length_buckets=(224, 336, 448),
    tokens_per_batch=17920,
    num_anchors=52,
    updates_per_batch=24,
    sequences_per_update=8,
    steps=16,
    learning_rate=1e-3,
    eval_sequences=24,
    eval_every=4,
    checkpoint_every=2,
    log_every=1,
)
