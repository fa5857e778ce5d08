"""Prompt lookup: what it finds, what it costs, how sure it is, and that no text depends on it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.axes import empty_buffers, make_mesh
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.model import load
from dspark_jax.models.cache import Room, Rows
from dspark_jax.models.drafters import lookup
from dspark_jax.models.drafters.lookup import MOST, Config, NoWeights
from dspark_jax.models.drafters.table import without_checkpoint
from dspark_jax.models.targets.llama import Config as LlamaConfig
from tests.test_families import CONFIGS
from tests.test_families import MOST as MOST_KINDS
from tests.test_families_decoding import ENGINE, PROMPTS, greedy_texts, target_of, texts
from tests.tiny_model import write_target

CFG = Config(50, 128, block_size=4, ngram_min=1, ngram_max=3)
B, S, T = 3, 72, 80


@functools.partial(jax.jit, static_argnames="cfg")
def observe(context, rows, token_BS, length_B, cfg=CFG):
    return lookup.observe(NoWeights(), None, context, rows, None, token_BS, length_B, cfg)


def empty_context(cfg=CFG):
    return empty_buffers(lookup.declare_context(cfg, Room(B, S, 0, None)))


def rows_of(spans):
    """Rows of positions [start, end) of every slot, filled up with padding."""
    pairs = [(slot, p) for slot, (start, end) in enumerate(spans) for p in range(start, end)]
    slot_T, position_T = np.array([*pairs, *[(B, 0)] * (T - len(pairs))], np.int32).T
    return Rows(np.zeros(T, np.int32), slot_T, position_T)


def naive(text, shortest, longest):
    """The place of the last token of the first of the longest occurrences; None without one."""
    for n in range(min(longest, len(text) - 1), shortest - 1, -1):
        for place in range(n - 1, len(text) - 1):
            if text[place - n + 1 : place + 1] == text[-n:]:
                return place
    return None


@pytest.mark.smoke
def test_drafts_are_those_of_a_search_through_the_whole_text():
    """Slots are taken over by other texts, and rows of rejected drafts are read, too."""
    rng, context, found = np.random.default_rng(0), empty_context(), 0
    for vocabulary in (2, 40, 5):
        token_BS = rng.integers(0, vocabulary, (B, S)).astype(np.int32)
        length_B, read_B = rng.integers(1, 20, B), np.zeros(B, int)
        while length_B.max() <= 64:
            ahead_B = rng.integers(0, 3, B)
            spans = zip(read_B, length_B - 1 + ahead_B, strict=True)
            context = observe(context, rows_of(spans), token_BS, length_B.astype(np.int32))
            token_BG, count_B = jax.device_get((context.token_BG, context.count_B))
            for b in range(B):
                text = token_BS[b, : length_B[b]].tolist()
                place = naive(text, 1, 3)
                expected = [] if place is None else text[place + 1 :][:4]
                assert token_BG[b, : count_B[b]].tolist() == expected
                found += place is not None
            read_B, length_B = length_B - 1, length_B + rng.integers(1, 5, B)
    assert found > 60


def test_a_round_costs_the_same_however_long_the_text_is():
    def flops(positions):
        cfg = dataclasses.replace(CFG, max_positions=positions)
        context = empty_buffers(lookup.declare_context(cfg, Room(B, positions, 0, None)))
        token_BS, length_B = np.zeros((B, positions), np.int32), np.full(B, 9, np.int32)
        given = context, rows_of([(0, 8)] * B), token_BS, length_B
        return observe.lower(*given, cfg=cfg).compile().cost_analysis()["flops"]

    assert flops(4096) == pytest.approx(flops(128), rel=0.01)


def proposed(tokens, count=4, match=2, held=0):
    """A context that has drafted tokens behind position 9 of slot 0."""
    return empty_context().replace(
        token_BG=jnp.zeros((B, 4), jnp.int32).at[0].set(jnp.array(tokens)),
        count_B=jnp.array([count, 0, 0], jnp.int32),
        position_B=jnp.full(B, 9, jnp.int32),
        match_B=jnp.array([match, 0, 0], jnp.int32),
        held_B=jnp.array([held, 0, 0], jnp.int32),
    )


@pytest.mark.parametrize(
    ("committed", "count", "stood", "decided", "held"),
    [
        (
            [5, 6, 1],
            4,
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            1,
        ),  # nothing is known behind a fall
        ([5, 6], 4, [1, 1, 0, 0], [1, 1, 0, 0], 1),  # nor behind what is committed
        ([1, 6, 7, 8], 4, [0, 0, 0, 0], [1, 0, 0, 0], 0),
        ([5, 6, 7, 8, 9], 2, [1, 1, 0, 0], [1, 1, 0, 0], 1),
        ([], 4, [0, 0, 0, 0], [0, 0, 0, 0], 1),
    ],
)
def test_outcomes_are_counted_by_kind_up_to_the_first_fall(committed, count, stood, decided, held):
    token_BS = np.zeros((B, S), np.int32)
    token_BS[0, 10 : 10 + len(committed)] = committed
    length_B = np.array([10 + len(committed), 20, 20], np.int32)
    after = lookup.learn(proposed([5, 6, 7, 8], count, held=1), token_BS, length_B)
    alike = slice(MOST + 1, MOST + 5)  # matches of 2 to 5 tokens, after one that held
    np.testing.assert_array_equal(after.stood_BX[0, alike], stood)
    np.testing.assert_array_equal(after.decided_BX[0, alike], decided)
    assert (after.stood_BX.sum(), after.decided_BX.sum()) == (sum(stood), sum(decided))
    assert after.held_B[0] == held


def test_a_confidence_knows_no_draft_and_follows_what_stood():
    context = proposed([5, 6, 7, 8])
    first_BG = lookup.confidence(context)
    np.testing.assert_array_equal(first_BG, lookup.confidence(proposed([1, 1, 1, 1])))
    assert (np.diff(first_BG[0]) > 0).all()  # the longer the match, the surer
    kind_X = jnp.arange(2 * MOST) == 1  # a match of 2 tokens
    often = context.replace(stood_BX=context.stood_BX + 90 * kind_X, decided_BX=100.0 * kind_X)
    never = context.replace(decided_BX=jnp.full_like(context.decided_BX, 100) * kind_X)
    np.testing.assert_allclose(lookup.confidence(often)[0, 0], 92 / 104)
    draft = functools.partial(
        lookup.draft, NoWeights(), None, anchor_B=None, position_B=None, choose=None, law=None,
        cfg=CFG, kernels="xla",
    )  # fmt: skip
    assert draft(context=often).count_B.tolist() == [4, 0, 0]
    assert draft(context=never).count_B.tolist() == [0, 0, 0]  # it is not worth reading
    assert (draft(context=never).confidence_logit_BG == lookup.ABSENT).all()


def test_names():
    target = LlamaConfig(**dict.fromkeys(("vocab_size", "hidden_size"), 8), intermediate_size=8,
                         num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8)  # fmt: skip
    cfg, _ = without_checkpoint("lookup:1-3", target, None)
    assert (cfg.ngram_min, cfg.ngram_max, cfg.vocab_size) == (1, 3, 8)
    assert without_checkpoint("some/lookup", target, None) is None
    for name in ("lookup:3-1", "lookup:0-2", "lookup:1-99"):
        with pytest.raises(ValueError, match="give lengths from 1 to 16"):
            without_checkpoint(name, target, None)


def test_a_model_with_lookup(tmp_path):
    path = write_target(tmp_path / "target")
    given = {"max_new_tokens": 40, "temperature": 0, "seed": 0}
    (plain,) = load(path).generate("abcabcabc", **given)
    model = load(path, "lookup:1-3")
    for policy in ("delayed", "block"):
        (found,) = model.generate("abcabcabc", policy=policy, **given)
        assert found.token_ids == plain.token_ids
    assert found.accepted_length > 1


# Through the engine.


def lookup_of(target):
    cfg = target[0]
    own = Config(cfg.vocab_size, cfg.max_positions, block_size=3, ngram_min=1)
    return own, NoWeights(), target[1].vocab


@pytest.fixture(scope="module")
def target():
    return target_of(CONFIGS[MOST_KINDS])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"policy": "causal"}, marks=pytest.mark.full),
        pytest.param({"policy": "delayed"}, marks=pytest.mark.full),
        pytest.param({"position_buckets": (128,), "pages": 4}, marks=pytest.mark.full),
    ],
    ids=str,
)
@pytest.mark.full
def test_greedy_text_is_the_targets_own(target, changes):
    config = dataclasses.replace(ENGINE, **changes)
    assert texts(make_decoder(target, lookup_of(target)), config) == greedy_texts(target)


@pytest.mark.full
@pytest.mark.parametrize("policy", ["block", "delayed", "causal"])
def test_eight_devices_give_the_text_of_one(target, policy, emulated_devices):
    plain = dataclasses.replace(ENGINE, acceptance="coupled", policy="none")
    shared = dataclasses.replace(ENGINE, acceptance="coupled", slot_buckets=(2,), policy=policy)
    together = make_decoder(target, lookup_of(target), mesh=make_mesh(data=2, tensor=4))
    for temperature in (0.0, 0.7):
        one = texts(make_decoder(target), plain, temperature=temperature)
        assert texts(together, shared, temperature=temperature) == one
    assert len(PROMPTS) == 4
