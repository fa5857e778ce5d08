"""Lookahead: its window is the authors', its n-grams are the target's, and its rows are counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.engine import executables
from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.request import Request
from dspark_jax.models.drafters import lookahead, lookup
from dspark_jax.models.drafters.table import without_checkpoint
from dspark_jax.models.targets.llama import declare, encode
from dspark_jax.models.vocab import unembed
from tests.tiny_model import TARGET, random_params

N, W = 4, 3
CFG = lookahead.Config(TARGET.vocab_size, TARGET.max_positions, N, W)


@pytest.fixture(scope="module")
def target():
    params = random_params(7, declare(TARGET))
    return TARGET, jax.tree.map(jnp.asarray, params)


class Reference:
    """The authors' iteration over one text, by dense passes over every path of the window."""

    def __init__(self, target, prompt, chunks):
        def read(token):
            return unembed(target[1].vocab, encode(target[1], token, TARGET)[0])

        self.read = jax.jit(read)
        self.text, self.pool, self.age = list(prompt), {}, 0
        if chunks == 1:  # the first token is committed before the window begins
            self.text.append(self.best(self.text))
        number = (np.arange((N - 1) * W) + 1) * lookahead._STEP % 65536 % len(self.text)
        self.window = np.array(self.text)[number].reshape(N - 1, W)

    def best(self, tokens):
        padded = np.zeros(64, np.int32)
        padded[: len(tokens)] = tokens
        return int(np.argmax(self.read(padded[None])[0, len(tokens) - 1]))

    def step(self):
        """A round: the guess behind the anchor, and how the text goes on."""
        self.window[0, 0] = self.text[-1]
        guess = self.pool.get(self.text[-1], ())
        best = []
        for column in range(W):
            path = [*self.text[:-1], *self.window[0, : column + 1], *self.window[1:, column]]
            best.append(self.best(path))
        grams = np.concatenate([self.window, [best]])
        if self.age >= N - 2:
            for column in reversed(range(W)):
                self.pool[grams[0, column]] = tuple(grams[1:, column])
        self.window, self.age = grams[1:], self.age + 1
        stood = 0
        while True:
            self.text.append(self.best(self.text))
            if stood == len(guess) or self.text[-1] != guess[stood]:
                return guess, stood
            stood += 1


def test_rounds_are_those_of_the_authors(target, monkeypatch):
    """Texts that end in cycles, so that guesses stand; in two slots, behind prompts in chunks.
    Every guess is offered, however those before it fared."""
    monkeypatch.setattr(lookup, "LEAST", 0.0)
    monkeypatch.setattr(executables, "_PROGRAMS", {})
    drafter = CFG, lookahead.declare_drafter(CFG), target[1].vocab
    config = EngineConfig(
        slots=2, slot_buckets=(2,), positions=128, chunk_buckets=(1,), chunk_rows=16,
        row_buckets=(2 * N,), position_buckets=(192,), policy="block",
    )  # fmt: skip
    prompts = [3, 9, 4], list(range(20, 40)), [50, 2]
    with Engine(make_decoder(target, drafter), config) as engine:
        running = [engine.submit(Request(prompt, 30, temperature=0)) for prompt in prompts]
        found = [stream.wait() for stream in running]
    for prompt, result in zip(prompts, found, strict=True):
        reference = Reference(target, prompt, -(-(len(prompt) - 1) // 16))
        lengths = [1] * (len(reference.text) - len(prompt))
        while len(reference.text) < len(prompt) + 30:
            lengths.append(reference.step()[1] + 1)
        assert result.token_ids == reference.text[len(prompt) :][:30]
        count = len(result.accepted_lengths)  # without the first round
        assert result.accepted_lengths[:-1] == lengths[1:count]
    assert max(max(result.accepted_lengths) for result in found) == N


def test_names():
    cfg, _ = without_checkpoint("lookahead:3-9", TARGET, None)
    assert (cfg.length, cfg.columns, cfg.block_size, cfg.rows_beside) == (3, 9, 2, 17)
    assert without_checkpoint("lookahead", TARGET, None)[0].rows_beside == 27
    for name in ("lookahead:2-9", "lookahead:5-0", "lookahead:99-9"):
        with pytest.raises(ValueError, match="give 3 to 16 tokens and 1 to 64 columns"):
            without_checkpoint(name, TARGET, None)
