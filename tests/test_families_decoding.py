"""Every family through the engine: texts, their law, and meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.axes import init_params, make_mesh
from dspark_jax.checkpoints.deepspec import bind_vocab
from dspark_jax.config import DrafterConfig
from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.request import Request
from dspark_jax.models import cache as kv
from dspark_jax.models.drafters.dspark import declare_drafter
from dspark_jax.models.targets.table import family_of
from dspark_jax.models.vocab import SUPPRESSED, suppress, unembed
from dspark_jax.scheduler.seconds import Seconds
from pallas_kernels import random
from tests.test_families import CONFIGS, MOST, SIZES

PROMPTS = [[3], [5, 9, 2], list(range(1, 40)), [7] * 20]
NEW = 24
DRAFTER = DrafterConfig(
    **SIZES, num_layers=2, block_size=3, mask_token_id=1, target_layer_ids=(-1, 0), markov_rank=4,
    confidence=True, windows=(4, 0),
)  # fmt: skip
ENGINE = EngineConfig(
    slots=4,
    positions=80,
    policy="block",
    slot_buckets=(4,),
    row_buckets=(4,),
    position_buckets=(96,),
    chunk_rows=16,
    chunk_buckets=(1,),
)
# Compilation makes these slow: by default the family with the most kinds of layers speaks for all.
each_family = pytest.mark.parametrize(
    "name", [MOST, *(pytest.param(name, marks=pytest.mark.full) for name in CONFIGS)]
)


@pytest.fixture(autouse=True)
def short_rings(monkeypatch):
    """Windows whose rings go round several times in few positions."""
    monkeypatch.setattr(kv, "RING_STEP", 1)


def target_of(cfg, scale=8.0):
    """A random target; ``scale`` sharpens its distributions."""
    params = init_params(jax.random.key(0), family_of(cfg).declare(cfg))
    vocab = params.vocab
    if vocab.unembed_VD is None:
        return cfg, params.replace(vocab=vocab.replace(embed_VD=vocab.embed_VD * scale))
    return cfg, params.replace(vocab=vocab.replace(unembed_VD=vocab.unembed_VD * scale))


def drafter_of(target, **changes):
    cfg = target[0]
    sizes = {"vocab_size": cfg.vocab_size, "num_target_layers": cfg.num_layers}
    fields = family_of(cfg).draft_fields(cfg)
    own = dataclasses.replace(DRAFTER, **sizes | fields | changes)
    if own.blocks:  # whose layers have no windows
        own = dataclasses.replace(own, windows=())
    params = init_params(jax.random.key(1), declare_drafter(own))
    return own, params, bind_vocab(own, None, cfg, target[1].vocab)


def texts(decoder, config=ENGINE, **options):
    engine = Engine(decoder, config)
    streams = [
        engine.submit(Request(prompt, NEW, key=np.asarray(random.seed_key(n)), **options))
        for n, prompt in enumerate(PROMPTS)
    ]
    return [stream.wait().token_ids for stream in streams]


def greedy_texts(target):
    """By the dense encoding, one token after the other."""
    cfg, params = target

    @jax.jit
    def next_token(token_BS, length_B):
        hidden_BSD, _ = family_of(cfg).encode(params, token_BS, cfg)
        last_BD = hidden_BSD[jnp.arange(len(length_B)), length_B - 1]
        return jnp.argmax(suppress(unembed(params.vocab, last_BD), cfg.suppressed), axis=-1)

    length_B = np.array([len(prompt) for prompt in PROMPTS])
    token_BS = np.zeros((len(PROMPTS), 64), np.int32)
    for row, prompt in enumerate(PROMPTS):
        token_BS[row, : len(prompt)] = prompt
    for _ in range(NEW):
        token_BS[np.arange(len(PROMPTS)), length_B] = next_token(token_BS, length_B)
        length_B += 1
    return [row[end - NEW : end].tolist() for row, end in zip(token_BS, length_B, strict=True)]


@each_family
def test_greedy_text_with_drafts_is_the_targets_own(name):
    target = target_of(CONFIGS[name])
    assert texts(make_decoder(target, drafter_of(target))) == greedy_texts(target)


@pytest.mark.full
@pytest.mark.parametrize("name", CONFIGS)
def test_caches_in_pages_change_no_text(name):
    """Layers with windows keep their rings beside the pages, of which there are too few for all."""
    target = target_of(CONFIGS[name])
    config = dataclasses.replace(ENGINE, position_buckets=(128,), pages=4)
    assert texts(make_decoder(target, drafter_of(target)), config) == greedy_texts(target)


@pytest.mark.full
def test_ids_that_are_suppressed_are_in_no_text_and_in_no_draft():
    cfg, params = target_of(CONFIGS["gemma3"])
    seen = {token for text in greedy_texts((cfg, params)) for token in text}
    target = dataclasses.replace(cfg, suppressed=tuple(sorted(seen))[:4]), params
    decoder = make_decoder(target, drafter_of(target))
    assert texts(decoder) == greedy_texts(target)
    engine = Engine(decoder, ENGINE)
    sampled = engine.submit(Request([5, 9], NEW, temperature=1.5)).wait()
    assert not set(sampled.token_ids) & set(target[0].suppressed)


@pytest.mark.full
@pytest.mark.parametrize("changes", [{"anchor_predicts": False}, {"windows": (2, 3)}])
def test_drafts_of_other_blocks_change_no_text(changes):
    target = target_of(CONFIGS["llama"])
    assert texts(make_decoder(target, drafter_of(target, **changes))) == greedy_texts(target)


MESHES = {
    "heads and slots": {"data": 2, "tensor": 4},
    "experts": {"data": 2, "expert": 2},
    "experts and heads": {"expert": 4, "tensor": 2},
}


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        *((name, mesh) for name in CONFIGS for mesh in list(MESHES)[:2]),
        ("deepseek_v4", "experts and heads"),
    ],
)
def test_devices_together_give_the_text_of_one(name, mesh, emulated_devices):
    target = target_of(CONFIGS[name])
    drafter = drafter_of(target)
    slots = ENGINE.slots // MESHES[mesh].get("data", 1)
    config = dataclasses.replace(ENGINE, acceptance="coupled", slot_buckets=(slots,))
    single = dataclasses.replace(ENGINE, acceptance="coupled")
    together = make_decoder(target, drafter, mesh=make_mesh(**MESHES[mesh]))
    for temperature in (0.0, 0.7):
        one = texts(make_decoder(target, drafter), single, temperature=temperature)
        assert texts(together, config, temperature=temperature) == one


LAWS = {
    "window": dataclasses.replace(CONFIGS["windows"], vocab_size=3),
    "experts": dataclasses.replace(CONFIGS["qwen3_moe"], vocab_size=3),
    "soft cap": dataclasses.replace(CONFIGS["gemma2"], vocab_size=3),
    "entries": dataclasses.replace(CONFIGS["deepseek_v4"], vocab_size=3),
}
SAMPLES, TOKENS, PROMPT = 4000, 4, [1, 2, 0, 1, 2]


@pytest.fixture
def known_seconds(monkeypatch):
    """Rounds that cost what their rows say, so that drafting pays."""
    read = Seconds.read

    def note(self, number, shape, steady, now_s=None):
        seconds = 1 + 0.2 * shape.num_rows / shape.sizes.slots
        read(self, number, shape, True, self._last_s + seconds)

    monkeypatch.setattr(Seconds, "read", note)


@pytest.mark.full
@pytest.mark.parametrize("kind", LAWS)
def test_texts_follow_the_target_with_the_scheduler_in_the_loop(kind, known_seconds):
    """Every text of a few tokens of a vocabulary of three, against the target's probabilities."""
    cfg, params = target = target_of(LAWS[kind], scale=2.0)
    config = dataclasses.replace(
        ENGINE, slots=64, slot_buckets=(64,), row_buckets=(1, 2, 4), policy="delayed", queue=SAMPLES
    )
    engine = Engine(make_decoder(target, drafter_of(target)), config)
    keys = [np.asarray(random.seed_key(n)) for n in range(SAMPLES)]
    streams = [engine.submit(Request(PROMPT, TOKENS, temperature=1.0, key=key)) for key in keys]
    results = [stream.wait() for stream in streams]
    lengths = {length for result in results for length in result.verified_lengths}
    assert {0, 3} <= lengths  # some rounds draft, others do not
    every = np.array(list(np.ndindex((3,) * TOKENS)))
    token_BS = jnp.asarray(np.concatenate([np.tile(PROMPT, (len(every), 1)), every], axis=1))
    hidden_BSD, _ = family_of(cfg).encode(params, token_BS, cfg)
    law_BSV = np.asarray(jax.nn.softmax(unembed(params.vocab, hidden_BSD)), np.float64)
    chance_B = np.ones(len(every))
    for step in range(TOKENS):
        at = len(PROMPT) - 1 + step
        chance_B *= law_BSV[np.arange(len(every)), at, every[:, step]]
    places = [int(np.ravel_multi_index(r.token_ids, (3,) * TOKENS)) for r in results]
    counts_B, expected_B = np.bincount(places, minlength=len(every)), SAMPLES * chance_B
    often = expected_B >= 5
    counts, expected = (np.append(x[often], x[~often].sum()) for x in (counts_B, expected_B))
    degrees = len(counts) - 1
    chi_square = ((counts - expected) ** 2 / np.maximum(expected, 1e-9)).sum()
    assert abs(chi_square - degrees) < 4 * np.sqrt(2 * degrees)
    # The same samples do not follow a target of half the temperature.
    other = chance_B**2 / (chance_B**2).sum() * SAMPLES
    assert ((counts_B - other) ** 2 / other).sum() > len(every) + 12 * np.sqrt(2 * len(every))


def test_ids_are_suppressed_in_a_part_of_the_vocabulary_too():
    logits_XV = jnp.arange(12.0).reshape(2, 6)
    hidden_XV = np.asarray(suppress(logits_XV, (1, 4)) == SUPPRESSED)
    assert hidden_XV.tolist() == [[False, True, False, False, True, False]] * 2
    d2t_U = jnp.array([0, 4, 5, 1, 900, 3])  # its ids may lie behind the last that is suppressed
    hidden_XU = np.asarray(suppress(logits_XV, (1, 4), d2t_U) == SUPPRESSED)
    assert hidden_XU.tolist() == [[False, True, False, True, False, False]] * 2
    assert suppress(logits_XV, ()) is logits_XV
