"""The bigram start of the sequential head, against counting."""

import dataclasses
import itertools

import numpy as np
import pytest

from dspark_jax.models.drafters.dspark import declare_drafter
from dspark_jax.training.bigram import (
    NORM_START,
    PRIOR_STRENGTH,
    bigram_factors,
    start_from_bigrams,
)
from dspark_jax.training.data import TokenSequence
from tests.tiny_model import DRAFTER, random_params

VOCAB = 12
SEEN = 10  # tokens 10 and 11 never occur


def answered(prompt, answer):
    """A sequence whose answer alone is supervised."""
    mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
    return TokenSequence(np.array([*prompt, *answer], np.int32), mask)


def chain(seed, count, length=40, sharpness=2.0):
    """Answers of a Markov chain over the seen tokens, each behind a prompt of two other tokens."""
    law = np.random.default_rng(7).gumbel(size=(SEEN, SEEN)) * sharpness
    law = np.exp(law) / np.exp(law).sum(1, keepdims=True)
    random = np.random.default_rng(seed)
    sequences = []
    for _ in range(count):
        answer = [int(random.integers(SEEN))]
        while len(answer) < length:
            answer.append(int(random.choice(SEEN, p=law[answer[-1]])))
        sequences.append(answered([11, 11, answer[0]], answer[1:]))
    return sequences


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def counted(sequences, t2d_V, draft_size):
    """log p(y) and log p(y | x) as the module's docstring states them."""
    count = np.zeros((VOCAB, draft_size))
    for sequence in sequences:
        following = zip(itertools.pairwise(sequence.token_S), sequence.loss_mask_S[1:], strict=True)
        for (x, y), supervised in following:
            if supervised and t2d_V[y] >= 0:
                count[x, t2d_V[y]] += 1
    unigram = (count.sum(0) + 0.5) / (count.sum(0) + 0.5).sum()
    law = np.log(unigram) + np.log1p(count / (PRIOR_STRENGTH * unigram))
    return np.log(unigram), law - np.log(np.exp(law).sum(1, keepdims=True))


ALL = np.arange(VOCAB)
REDUCED = np.array([0, 1, -1, 2, 3, 4, -1, 5, 6, 7, 8, -1])  # token 10, place 8, never occurs


@pytest.mark.parametrize("t2d_V", [ALL, REDUCED], ids=["all", "reduced"])
def test_full_rank_is_the_smoothed_bigram_law(t2d_V):
    sequences, size = chain(0, 30), t2d_V.max() + 1
    w1_ZR, w2_RU = bigram_factors(sequences, t2d_V, VOCAB, size, VOCAB + 1)
    assert (w1_ZR.shape, w2_RU.shape) == ((VOCAB, VOCAB + 1), (VOCAB + 1, size))
    unigram, law = counted(sequences, t2d_V, size)
    found = log_softmax(w1_ZR @ w2_RU)
    np.testing.assert_allclose(found, law, rtol=0, atol=1e-5)
    # Token 10 is never followed by anything; 11 occurs in prompts alone.
    np.testing.assert_allclose(found[10:], np.stack([unigram] * 2), rtol=0, atol=1e-5)


def test_low_rank_predicts_better_than_the_unigram_law_and_more_rank_better_still():
    sequences, held_out = chain(0, 60), chain(1, 20)

    def score(law):
        answers = [s.token_S[2:] for s in held_out]
        return np.mean([law[a[:-1], a[1:]].mean() for a in answers])

    unigram, full = counted(sequences, ALL, VOCAB)
    scores = [score(np.stack([unigram] * VOCAB))]
    for rank in (3, 6):
        scores.append(
            score(log_softmax(np.matmul(*bigram_factors(sequences, ALL, VOCAB, VOCAB, rank))))
        )
    scores.append(score(full))
    assert scores == sorted(scores)
    assert scores[1] > scores[0] + 0.05


def test_the_factors_are_balanced_and_the_same_every_time():
    sequences = chain(0, 10)
    w1_ZR, w2_RU = bigram_factors(sequences, ALL, VOCAB, VOCAB, 5)
    np.testing.assert_allclose(
        np.linalg.norm(w1_ZR, axis=0), np.linalg.norm(w2_RU, axis=1), rtol=1e-4
    )
    for one, other in zip(
        (w1_ZR, w2_RU), bigram_factors(sequences, ALL, VOCAB, VOCAB, 5), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("answer", [[0], [0, 1], [0, 0, 0, 0], [6, 6]])
def test_hardly_any_data_still_gives_numbers(answer):
    sequence = answered([11], answer)
    for rank in (2, 5, 40):
        w1_ZR, w2_RU = bigram_factors([sequence], REDUCED, VOCAB, 9, rank)
        assert np.isfinite(w1_ZR @ w2_RU).all()


def test_a_drafter_starts_with_them_and_a_quiet_backbone():
    cfg = dataclasses.replace(DRAFTER, markov_rank=6)
    sequences, vocab = chain(0, 5), cfg.vocab_size
    params = random_params(3, declare_drafter(cfg))
    started = start_from_bigrams(params, sequences, None, cfg)
    w1_ZR, w2_RU = bigram_factors(sequences, np.arange(vocab), vocab, vocab, 6)
    np.testing.assert_array_equal(started.head.w1_ZR, w1_ZR)
    np.testing.assert_array_equal(started.head.w2_RU, w2_RU)
    np.testing.assert_allclose(started.norm_D, NORM_START * params.norm_D)
    np.testing.assert_array_equal(started.fc_FYD, params.fc_FYD)
