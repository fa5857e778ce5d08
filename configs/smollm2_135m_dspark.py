"""The default drafter for SmolLM2-135M-Instruct."""

from dspark_jax.config import TrainConfig

config = TrainConfig(
    target="default",
    data="responses.jsonl",
    out="runs/smollm2_135m_dspark",
    num_layers=2,
    block_size=5,
    markov_rank=64,
    markov_head="vanilla",
    draft_vocab_size=10240,
    max_length=448,
    length_buckets=(96, 160, 224, 288, 352, 400, 448),
    tokens_per_batch=2688,
    num_anchors=32,
    updates_per_batch=8,
    bigram_init=True,
    steps=200,
    learning_rate=1e-3,
    eval_sequences=24,
    eval_every=40,
    checkpoint_every=10,
    log_every=1,
)
