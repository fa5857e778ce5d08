"""Generation end to end on tiny models: the text is the target's own, whatever drafts it."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from dspark_jax.axes import init_params, make_mesh
from dspark_jax.checkpoints.deepspec import bind_vocab
from dspark_jax.config import DrafterConfig
from dspark_jax.engine import executables
from dspark_jax.engine import generate as offline
from dspark_jax.engine import round as engine_round
from dspark_jax.engine.decoder import make_decoder
from dspark_jax.engine.request import Request
from dspark_jax.models.drafters import (
    blockwise,
    chain,
    eagle3,
    hybrid,
    lookahead,
    lookup,
    medusa,
    mtp,
)
from dspark_jax.models.drafters.heads import DraftBlock, block_of, draw_slot
from dspark_jax.models.drafters.table import drafter_of as family_of_drafter
from dspark_jax.models.drafters.table import of_draft_model, without_checkpoint
from dspark_jax.models.targets.llama import Config as LlamaConfig
from dspark_jax.models.targets.llama import declare as declare_target
from dspark_jax.models.targets.llama import encode
from dspark_jax.models.vocab import Vocab, unembed
from dspark_jax.rules import Rule
from pallas_kernels import random
from pallas_kernels.accept_block.api import Acceptance, accept_block

TARGET = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_positions=160,
    tied=False,
)
DRAFTER = DrafterConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    block_size=4,
    mask_token_id=60,
    target_layer_ids=(-1, 0),
    num_target_layers=2,
    markov_rank=6,
    confidence=True,
)


def target_of(cfg, seed=0, scale=8.0):
    """A random target; ``scale`` sharpens its distributions."""
    params = init_params(jax.random.key(seed), declare_target(cfg))
    head = params.vocab.unembed_VD * scale
    return cfg, params.replace(vocab=params.vocab.replace(unembed_VD=head))


CHAIN = eagle3.Config(**{**dataclasses.asdict(DRAFTER), "rope": DRAFTER.rope, "markov_rank": 0})


LIKE_CHAIN = {name: getattr(CHAIN, name) for name in vars(CHAIN) if not name.startswith("norm")}
LAYER, HEADS, WIDE = (kind.Config(**LIKE_CHAIN) for kind in (mtp, medusa, blockwise))


def drafter_of(target, seed=1, d2t=None, like=DRAFTER, **changes):
    """A random drafter for it, perhaps with a reduced vocabulary."""
    size = None if d2t is None else len(d2t)
    cfg = dataclasses.replace(like, draft_vocab_size=size, **changes)
    params = init_params(jax.random.key(seed), family_of_drafter(cfg).declare_drafter(cfg))
    if like in (HEADS, WIDE):  # which begin as zeros
        key = jax.random.key(9)
        params = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(key, x.shape), params)
    own = None if d2t is None else Vocab(None, None, np.array(d2t, np.int32))
    return cfg, params, bind_vocab(cfg, own, target[0], target[1].vocab)


@pytest.fixture(scope="module")
def target():
    return target_of(TARGET)


PROMPTS = [[3], [5, 9, 2], list(range(1, 40)), [7] * 20, [11, 4]]
DRAFTERS = {
    "vanilla": {},
    "gated": {"markov_head": "gated"},
    "rnn": {"markov_head": "rnn", "confidence_with_markov": False},
    "dflash": {"markov_rank": 0, "confidence": False},
    "reduced": {"d2t": sorted({1, 4, 5, 7, *range(20, 55)})},
    "eagle3": {"like": CHAIN},
    "medusa": {"like": HEADS},
    "mtp": {"like": LAYER},
    "blockwise": {"like": WIDE},
}


def generate(decoder, requests, **options):
    """Whole blocks verified, unless a policy is given: what is drafted shall matter."""
    whole = "none" if decoder.drafter is None else "block"
    return offline.generate(decoder, requests, **{"policy": whole, **options})


def requests(max_new_tokens=24, **fields):
    return [
        Request(
            prompt,
            max_new_tokens,
            key=np.asarray(random.fold_in(random.seed_key(5), i)),
            **fields,
        )
        for i, prompt in enumerate(PROMPTS)
    ]


def texts(results):
    return [result.token_ids for result in results]


@pytest.mark.smoke
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.full) if kind != "vanilla" else kind
        for kind in DRAFTERS
    ],
)
def test_greedy_text_is_the_targets_own(target, kind):
    plain = generate(make_decoder(target), requests())
    decoder = make_decoder(target, drafter_of(target, **DRAFTERS[kind]))
    spec = generate(decoder, requests())
    assert texts(spec) == texts(plain)
    assert all(len(result.token_ids) == 24 for result in spec)
    assert all(result.finish_reason == "length" for result in spec)
    # A plain dense forward pass agrees, so that both are not wrong in the same way.
    wholes = [[*prompt, *result.token_ids] for prompt, result in zip(PROMPTS, plain, strict=True)]
    padded = jnp.array([whole + [0] * (64 - len(whole)) for whole in wholes])
    dense = jax.jit(functools.partial(encode, cfg=TARGET))(target[1], padded)[0]
    best = np.argmax(unembed(target[1].vocab, dense), -1)
    for row, (prompt, result) in enumerate(zip(PROMPTS, plain, strict=True)):
        found = best[row, len(prompt) - 1 :][: len(result.token_ids)]
        np.testing.assert_array_equal(found, result.token_ids)


@pytest.mark.full
def test_a_perfect_drafter_is_accepted_whole(target, monkeypatch):
    """With the target's text as drafts every block survives: accepted length G + 1."""
    (plain,) = generate(make_decoder(target), [Request([3], 21)])

    def oracle(weights, state, anchor_B, position_B, cfg):
        known = jnp.array([3, *plain.token_ids, 0, 0, 0, 0, 0, 0])
        token = known[position_B[:, None] + 1 + jnp.arange(4)]
        return DraftBlock(token, token, jnp.zeros((1, 4, 61)), jnp.zeros((1, 4)))

    monkeypatch.setattr(engine_round, "draft", oracle)
    monkeypatch.setattr(executables, "_PROGRAMS", {})
    (spec,) = generate(make_decoder(target, drafter_of(target)), [Request([3], 21)])
    assert spec.token_ids == plain.token_ids
    assert spec.accepted_lengths == [5, 5, 5, 5]


@pytest.mark.parametrize(
    ("threshold", "kinds"),
    [
        pytest.param(0.0, ("reduced",), marks=pytest.mark.full),
        pytest.param(0.0, tuple(DRAFTERS), marks=pytest.mark.full),
        pytest.param(0.5, tuple(DRAFTERS), marks=pytest.mark.full),
    ],
)
def test_coupled_text_depends_on_target_prompt_and_seed_alone(target, threshold, kinds):
    sampled = {"temperature": 0.8, "top_k": 30, "top_p": 0.95, "min_p": 0.01}
    plain = generate(make_decoder(target), requests(**sampled), acceptance="coupled")
    assert len({tuple(text) for text in texts(plain)}) == len(PROMPTS)
    for kind in kinds:
        decoder = make_decoder(target, drafter_of(target, seed=3, **DRAFTERS[kind]))
        if threshold and not decoder.drafter.confidence:
            continue
        policy = f"threshold:{threshold}" if threshold else "block"
        results = generate(decoder, requests(**sampled), acceptance="coupled", policy=policy)
        assert texts(results) == texts(plain), kind
    backwards = generate(decoder, requests(**sampled)[::-1], acceptance="coupled")
    assert texts(backwards)[::-1] == texts(plain)
    if len(kinds) > 1:
        alone = generate(decoder, requests(**sampled)[2:3], acceptance="coupled", policy="fixed:2")
        assert texts(alone) == texts(plain)[2:3]


def fit_of_the_text(kind, **rules):
    """All programs together, over several rounds: the p-value of the joint law of three tokens,
    enumerated; and the results. A window takes a few tokens to guess one."""
    size, length = (3, 6) if kind == "lookahead" else (5, 3)
    cfg = dataclasses.replace(TARGET, vocab_size=size)
    target = target_of(cfg, seed=4, scale=12.0)
    drafter = None
    if kind == "lookup":
        lookup_cfg = lookup.Config(size, cfg.max_positions, block_size=2, ngram_min=1)
        drafter = lookup_cfg, lookup.NoWeights(), target[1].vocab
    elif kind == "lookahead":
        sizes = lookahead.Config(size, cfg.max_positions, length=3, columns=2)
        drafter = sizes, lookahead.declare_drafter(sizes), target[1].vocab
    elif kind == "first":
        (sizes, weights), vocab = without_checkpoint("first:1", *target), target[1].vocab
        drafter = dataclasses.replace(sizes, block_size=2), weights, vocab
    elif kind == "model":
        small = target_of(dataclasses.replace(cfg, num_layers=1), seed=6, scale=8.0)
        sizes, vocab = of_draft_model(small[0], small[1].vocab, cfg)
        drafter = dataclasses.replace(sizes, block_size=2), small[1], vocab
    elif kind != "plain":
        of_kind = {
            "reduced": {"d2t": [0, 2, 3]},
            "hybrid": {"d2t": [0, 1, 3]},
            **{name: DRAFTERS[name] for name in ("eagle3", "mtp", "medusa", "blockwise")},
        }
        changes = of_kind.get(kind, {"markov_head": "rnn"})
        drafter = drafter_of(
            target, seed=2, vocab_size=size, mask_token_id=4, block_size=2, **changes
        )
    if kind == "hybrid":
        (own, weights, vocab), other = drafter, lookup.Config(size, cfg.max_positions, ngram_min=1)
        both, weights = hybrid.with_lookup(own, weights, other)
        drafter = dataclasses.replace(both, least_match=1), weights, vocab
    sampled = {"temperature": 0.9, "top_p": 0.97}

    words = np.array(list(itertools.product(range(size), repeat=length)))
    tokens = jnp.concatenate([jnp.full((len(words), 2), 1), jnp.array(words)], axis=1)
    logits = unembed(target[1].vocab, encode(target[1], tokens, cfg)[0])[:, 1:-1]
    law = np.asarray(jax.nn.softmax(logits / 0.9), np.float64)
    order = np.sort(law, axis=-1)[..., ::-1]
    before = np.concatenate([np.zeros_like(order[..., :1]), np.cumsum(order, -1)[..., :-1]], -1)
    lowest = np.min(np.where(before < 0.97, order, 2.0), axis=-1, keepdims=True)
    law = np.where(law >= lowest, law, 0)
    law /= law.sum(-1, keepdims=True)
    steps = np.take_along_axis(law, words[..., None], axis=-1)[..., 0]
    exact = steps.prod(-1)
    assert exact.sum() == pytest.approx(1.0, abs=1e-5)

    decoder = make_decoder(target, drafter)
    count = 2500
    keys = np.asarray(random.fold_in(random.seed_key(9), jnp.arange(count)))
    batch = [Request([1, 1], length, key=key, **sampled) for key in keys]
    results = generate(decoder, batch, slots=500, **rules)
    place = np.array([np.ravel_multi_index(r.token_ids, (size,) * length) for r in results])
    seen = np.bincount(place, minlength=len(words))
    if seen[exact == 0].any():
        return 0.0, results
    often = exact * count >= 5
    observed = [*seen[often], seen[~often].sum()]
    expected = [*(exact[often] * count), exact[~often].sum() * count]
    if expected[-1] < 1:
        observed, expected = observed[:-1], expected[:-1]
    expected = np.array(expected) * (sum(observed) / sum(expected))
    return stats.chisquare(observed, expected).pvalue, results


# A drafter that is less sure of itself, and a target that believes it.
FLATTER = Rule(lambda logits_BU, _: 0.5 * logits_BU, lossless=True)


def believe(logits_TV, floor_T, plan, drafts, requests):
    """Every draft stands, and the best token follows."""
    best_T = jnp.argmax(logits_TV, axis=-1).astype(jnp.int32)
    next_B = jnp.take_along_axis(best_T[plan.row_BC], plan.length_B[:, None], axis=1)[:, 0]
    chance_BG = jnp.ones(drafts.index_BG.shape)
    return Acceptance(plan.length_B, next_B, chance_BG, jnp.ones(len(next_B), bool))


BELIEVE = Rule(believe, lossless=False)


def forget_the_fallen(logits_TV, floor_T, plan, drafts, requests):
    """Rejection whose next token may be the draft that has just fallen."""
    given = logits_TV, floor_T
    found = accept_block(*given, plan, drafts, requests)
    return accept_block(*given, plan._replace(length_B=found.accepted_B), drafts, requests)


FORGET = Rule(forget_the_fallen, lossless=False)


@pytest.mark.parametrize(
    ("kind", "rules"),
    [
        ("rnn", {"acceptance": "rejection", "draft_law": FLATTER}),
        pytest.param("lookup", {"acceptance": "rejection"}, marks=pytest.mark.full),
        pytest.param("eagle3", {"policy": "threshold:0.4"}, marks=pytest.mark.full),
        pytest.param("hybrid", {"acceptance": "rejection"}, marks=pytest.mark.full),
        pytest.param("hybrid", {"policy": "threshold:0.4"}, marks=pytest.mark.full),
        pytest.param("medusa", {"acceptance": "rejection"}, marks=pytest.mark.full),
        pytest.param("mtp", {"acceptance": "rejection"}, marks=pytest.mark.full),
        pytest.param("mtp", {"acceptance": "coupled"}, marks=pytest.mark.full),
        pytest.param("mtp", {"policy": "threshold:0.4"}, marks=pytest.mark.full),
        pytest.param("blockwise", {"acceptance": "rejection"}, marks=pytest.mark.full),
        pytest.param("blockwise", {"acceptance": "coupled"}, marks=pytest.mark.full),
        pytest.param("lookahead", {"acceptance": "rejection"}, marks=pytest.mark.full),
        pytest.param("lookahead", {"acceptance": "coupled"}, marks=pytest.mark.full),
        pytest.param("first", {"acceptance": "rejection"}, marks=pytest.mark.full),
        pytest.param("first", {"acceptance": "coupled"}, marks=pytest.mark.full),
        pytest.param("model", {"acceptance": "rejection"}, marks=pytest.mark.full),
        pytest.param("model", {"policy": "threshold:0.4"}, marks=pytest.mark.full),
        pytest.param("medusa", {"acceptance": "coupled"}, marks=pytest.mark.full),
        pytest.param("eagle3", {"acceptance": "rejection"}, marks=pytest.mark.full),
        pytest.param("eagle3", {"acceptance": "coupled"}, marks=pytest.mark.full),
        pytest.param("lookup", {"acceptance": "coupled"}, marks=pytest.mark.full),
        pytest.param("rnn", {"acceptance": "rejection"}, marks=pytest.mark.full),
        pytest.param("reduced", {"acceptance": "coupled"}, marks=pytest.mark.full),
        pytest.param("rnn", {"acceptance": "coupled"}, marks=pytest.mark.full),
        pytest.param("reduced", {"acceptance": "rejection"}, marks=pytest.mark.full),
        pytest.param("plain", {"acceptance": "rejection"}, marks=pytest.mark.full),
        pytest.param("plain", {"acceptance": "coupled"}, marks=pytest.mark.full),
    ],
)
def test_distribution_of_the_text(kind, rules):
    pvalue, results = fit_of_the_text(kind, **rules)
    assert pvalue > 1e-4
    assert all(result.lossless for result in results)
    if kind != "plain":
        rounds = sum(result.rounds for result in results)
        assert sum(sum(result.accepted_drafts) for result in results) > 0.1 * rounds


@pytest.mark.parametrize(
    ("kind", "rule"),
    [("rnn", BELIEVE), pytest.param("lookup", FORGET, marks=pytest.mark.full)],
)
def test_a_rule_that_loses_the_law_is_seen_to_do_so(kind, rule):
    pvalue, results = fit_of_the_text(kind, acceptance=rule)
    assert pvalue < 1e-12
    assert not any(result.lossless for result in results)


@pytest.mark.full
def test_a_law_that_was_not_drawn_from_is_seen(monkeypatch):
    """A chain that says of every draft that it was drawn from a flatter law than it was."""

    def draw(vocab, logits_BU, slot, choose, law):
        token_B, index_B, logits_BU = draw_slot(vocab, logits_BU, slot, choose, law)
        return token_B, index_B, 0.2 * logits_BU

    monkeypatch.setattr(chain, "draw_slot", draw)
    monkeypatch.setattr(executables, "_PROGRAMS", {})
    pvalue, _ = fit_of_the_text("eagle3", acceptance="rejection")
    assert pvalue < 1e-12


@pytest.mark.full
def test_a_confidence_that_sees_its_draft_is_seen(monkeypatch):
    """Drafts are verified where they are one of two tokens."""

    def block(drawn, confidences):
        return block_of(drawn, [jnp.where(token_B < 2, 9.0, -9.0) for token_B, _, _ in drawn])

    monkeypatch.setattr(chain, "block_of", block)
    monkeypatch.setattr(executables, "_PROGRAMS", {})
    pvalue, _ = fit_of_the_text("eagle3", policy="threshold:0.5")
    assert pvalue < 1e-12


@pytest.mark.full
def test_a_policy_may_be_a_function(target):
    """All drafts or none, as the first confidence says: a gate, said otherwise."""
    decoder = make_decoder(target, drafter_of(target))
    own = Rule(lambda c_BG: jnp.where(c_BG[:, 0] >= 0.5, 4, 0), lossless=True)
    found = generate(decoder, requests(), policy=own)
    assert texts(found) == texts(generate(decoder, requests()))
    assert {n for result in found for n in result.verified_lengths} == {0, 4}
    with pytest.raises(ValueError, match="there is no drafter"):
        generate(make_decoder(target), requests(), policy=own)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["vanilla", "eagle3", "medusa", "mtp", "blockwise"])
@pytest.mark.parametrize("options", [{"temperature": 0.7, "top_p": 0.9}, {}])
@pytest.mark.parametrize("sizes", [(2, 4), (8, 1)])
def test_eight_devices_give_the_text_of_one(target, sizes, options, kind, emulated_devices):
    """Heads that do not divide over the mesh are replicated; slots are filled up."""
    drafter = drafter_of(target, **DRAFTERS[kind])
    sharded = make_decoder(target, drafter, mesh=make_mesh(*sizes))
    single = make_decoder(target, drafter)
    got = generate(sharded, requests(**options), acceptance="coupled")
    assert texts(got) == texts(generate(single, requests(**options), acceptance="coupled"))


@pytest.mark.full
@pytest.mark.parametrize(
    ("d2t", "options", "acceptance"),
    [
        (None, {"temperature": 0.7, "top_p": 0.9}, "rejection"),
        (range(0, 64, 2), {"temperature": 1.0}, "coupled"),
        (range(0, 64, 2), {"temperature": 1.0}, "rejection"),
        (None, {"temperature": 0.7}, "coupled"),
        (None, {}, "rejection"),
    ],
)
def test_a_vocabulary_in_shards_gives_the_text_of_one(d2t, options, acceptance, emulated_devices):
    """The vocabulary divides over the tensor axis, and each shard is verified where it lies."""
    target = target_of(dataclasses.replace(TARGET, vocab_size=64))
    drafter = drafter_of(target, d2t=d2t, vocab_size=64)
    sharded = make_decoder(target, drafter, mesh=make_mesh(2, 4))
    single = make_decoder(target, drafter)
    got = generate(sharded, requests(**options), acceptance=acceptance)
    assert texts(got) == texts(generate(single, requests(**options), acceptance=acceptance))


def test_kernels_that_do_not_run_here_are_refused(target):
    with pytest.raises(ValueError, match="choose one of auto, xla, mosaic_gpu"):
        generate(make_decoder(target), [Request([1])], kernels="cuda")
    if jax.default_backend() != "gpu":
        with pytest.raises(ValueError, match="kernels is 'mosaic_gpu': mosaic_gpu needs"):
            generate(make_decoder(target), [Request([1])], kernels="mosaic_gpu")


def test_stop_ids_and_limits_are_the_requests_own(target):
    decoder = make_decoder(target, drafter_of(target))
    free = texts(generate(decoder, requests()))
    stops = [text[6] for text in free]
    batch = [
        dataclasses.replace(request, stop_ids=(stop, 59), max_new_tokens=limit)
        for request, stop, limit in zip(requests(), stops, [24, 3, 24, 1, 24], strict=True)
    ]
    for text, stop, request, result in zip(
        free, stops, batch, generate(decoder, batch), strict=True
    ):
        want = text[: min(text.index(stop), request.max_new_tokens)]
        assert result.token_ids == want
        reached = len(want) == request.max_new_tokens
        assert result.finish_reason == ("length" if reached else "stop")


@pytest.mark.full
def test_a_text_may_fill_the_context(target):
    decoder = make_decoder(target, drafter_of(target))
    (result,) = generate(decoder, [Request(list(range(1, 51)) * 3, 1000)])
    assert len(result.token_ids) == TARGET.max_positions - 150
    assert result.finish_reason == "length"


class Letters:
    """A tokenizer of the 61 ids as letters."""

    def decode(self, ids, **_):
        return "".join(chr(ord("A") + i) for i in ids)


def test_stop_strings_cut_the_text_wherever_they_begin(target):
    decoder = make_decoder(target, drafter_of(target), tokenizer=Letters())
    (free,) = generate(decoder, [Request(PROMPTS[2], 24)])
    stop = free.text[9:12]
    shown = []
    (result,) = generate(
        decoder,
        [Request(PROMPTS[2], 24, stop_strings=(stop, "never"))],
        on_text=lambda _, text: shown.append(text),
    )
    assert result.text == free.text[: free.text.index(stop)] == "".join(shown)
    assert result.finish_reason == "stop"
    assert len(shown) > 1


def test_programs_are_compiled_once(target):
    decoder = make_decoder(target, drafter_of(target))
    generate(decoder, requests())
    before = set(executables._PROGRAMS)
    generate(decoder, requests(max_new_tokens=30))
    assert set(executables._PROGRAMS) == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_ids": []}, "prompt is empty"),
        ({"prompt_ids": [1] * 160}, "the target's context 160"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"stop_strings": ("",)}, "stop string is empty"),
    ],
)
def test_what_cannot_be_decoded_is_refused(target, fields, message):
    decoder = make_decoder(target)
    with pytest.raises(ValueError, match=message):
        generate(decoder, [dataclasses.replace(Request([1, 2]), **fields)])


def test_policies_that_do_not_fit_are_refused(target):
    plain = make_decoder(target, drafter_of(target, markov_rank=0, confidence=False))
    with pytest.raises(ValueError, match="must lie in 1"):
        generate(plain, [Request([1])], policy="fixed:9")
    with pytest.raises(ValueError, match="no confidence head"):
        generate(plain, [Request([1])], policy="threshold:0.5")
    with pytest.raises(ValueError, match="acceptance is 'maybe'"):
        generate(plain, [Request([1])], acceptance="maybe")


def test_logits_that_are_not_finite_end_their_request_alone(target):
    cfg, params = target
    good = generate(make_decoder(target), requests())
    used = set().union(*PROMPTS, *texts(good))
    poison = next(token for token in range(cfg.vocab_size) if token not in used)
    embed = params.vocab.embed_VD.at[poison].set(jnp.nan)
    broken = cfg, params.replace(vocab=params.vocab.replace(embed_VD=embed))
    bad, *others = generate(make_decoder(broken), [Request([poison, 2], 8), *requests()])
    assert bad.finish_reason == "error"
    assert bad.token_ids == []
    assert texts(others) == texts(good)
