"""The default drafter for SmolLM2-135M-Instruct."""

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
