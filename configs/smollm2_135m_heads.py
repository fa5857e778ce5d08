"""DSpark's sequential heads against DFlash on SmolLM2-135M: equal data, updates and depth.

Command: dspark train configs/smollm2_135m_heads.py --set out=runs/NAME, for each of these:
    vanilla
    gated: --set markov_head=gated
    rnn: --set markov_head=rnn
    bigrams: --set bigram_init=true, vanilla once more
    dflash: --set markov_rank=0 --set confidence=false --set ce_weight=1 --set l1_weight=0 \\
        --set confidence_weight=0
Data: as for configs/smollm2_135m_dspark.py; of 4,953 answers to train on, the 16 steps read the
    same 858. The draft vocabulary of all five, and the bigrams, come from all 4,953.
Hardware and time: 2 CPU cores (AVX-512 with bfloat16 products), shared with other work,
    2026-11-25: 117,548 blocks each, at 226 (vanilla), 210 (gated), 209 (rnn) and 163 blocks/s
    (bigrams), 9 to 12 minutes; dflash 27 minutes, in most of which it was held up.
Result: accepted length, mean of GSM8K, MBPP and MT-Bench (16 prompts of 128 tokens each, whole
    blocks verified), at temperature 0 and 1, and how far ahead of dflash:
        vanilla   1.46  +2 %    1.43  +8 %
        gated     1.47  +2 %    1.37  +3 %
        rnn       1.46  +1 %    1.37  +4 %
        bigrams   1.60 +11 %    1.43  +8 %
        dflash    1.44          1.32
    Held-out answers, drafts accepted at each position behind the true tokens: vanilla 32, 20, 19
    and 16 %, bigrams 34, 32, 31 and 29 %, dflash 29, 14, 12 and 10 %. In 384 updates a head from
    random weights learns part of what the bigrams bring at once. More in
    notebooks/comparison.ipynb.
"""

from dspark_jax.config import TrainConfig

config = TrainConfig(
    target="default",
    data="responses.jsonl",
    out="runs/smollm2_135m_heads",
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
