"""What holds for every family of targets, and for the decoding state that follows from it."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_jax.axes import declared_shardings, empty_buffers, make_mesh, map_params, unstacked
from dspark_jax.config import RopeConfig
from dspark_jax.engine.request import Request
from dspark_jax.engine.state import StateConfig, declare_state, make_state, move
from dspark_jax.models import cache as kv
from dspark_jax.models.cache import Rows
from dspark_jax.models.merged import single_layers
from dspark_jax.models.targets import deepseek_v4, gemma, llama, qwen3_moe
from dspark_jax.models.targets.table import FAMILIES, family_of
from dspark_jax.models.vocab import unembed
from tests.marks import rest_full
from tests.tiny_model import DRAFTER

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
}
MOST = "gemma4 of small models"
LOCAL = {"local_heads": 2, "local_head_dim": 8}
# Small configurations of every family, which together have every optional part of a layer.
CONFIGS = {
    "llama": llama.Config(
        **SIZES,
        num_layers=3,
        rope=RopeConfig(500.0, "llama3", 4.0, original_max_positions=16),
        qk_norm=True,
        qkv_bias=True,
        out_bias=True,
    ),
    "windows": llama.Config(
        **SIZES,
        num_layers=5,
        windows=(3, 0, 3, 0, 2),
        rotary=(True, False, True, False, True),
        mlp_bias=True,
    ),
    "qwen3_moe": qwen3_moe.Config(
        **SIZES,
        num_layers=5,
        qk_norm=True,
        num_experts=6,
        num_chosen=2,
        expert_size=20,
        normalise=True,
        dense_layers=(0,),
    ),
    "gemma2": gemma.Config(
        **SIZES,
        **LOCAL,
        num_layers=4,
        windows=(3, 0, 3, 0),
        generation=2,
        scale=0.3,
        score_softcap=5.0,
        softcap=3.0,
        tied=True,
    ),
    "gemma3": gemma.Config(
        **SIZES, **LOCAL, num_layers=5, windows=(3, 3, 0, 3, 3), generation=3, scale=0.3, tied=True
    ),
    "gemma4": gemma.Config(
        **SIZES | {"head_dim": 16, "num_kv_heads": 1},
        **LOCAL,
        num_layers=4,
        windows=(3, 0, 3, 0),
        rope=RopeConfig(1e6, "proportional", rotated=0.5),
        scale=0.2,
        softcap=3.0,
        value_is_key=True,
        num_experts=6,
        num_chosen=2,
        expert_size=20,
        tied=True,
    ),
    MOST: gemma.Config(
        **SIZES | {"head_dim": 16},
        **LOCAL,
        num_layers=6,
        windows=(3, 0, 3, 0, 3, 0),
        rope=RopeConfig(1e6, "proportional", rotated=0.25),
        scale=0.2,
        softcap=3.0,
        num_shared=3,
        wide_shared=True,
        token_size=16,  # with four gates, all nearly closed in places, a norm amplifies rounding
        token_vocab=61,
        tied=True,
    ),
}
CONFIGS["deepseek_v4"] = deepseek_v4.Config(
    **SIZES | {"num_kv_heads": 1},
    num_layers=5,
    windows=(3,) * 5,
    compressed_rope=RopeConfig(500.0, "yarn", 4.0, original_max_positions=64),
    rope_dim=4,
    query_rank=12,
    output_groups=2,
    output_rank=6,
    ratios=(0, 3, 2, 3, 2),
    sparse=(2, 4),
    index_heads=8,
    index_dim=6,
    index_top=3,
    mix_steps=4,
    num_experts=8,
    num_chosen=2,
    expert_size=20,
    hashed=(0,),
    limit=1.5,
)
FEATURES = (-1, 0, 2)
SLOTS, POSITIONS, ROWS_PER_SLOT = 3, 16, 4
AHEAD = 10  # as many as two chunks of a prompt
CLOSE = {"atol": 2e-5, "rtol": 0}

each_family = pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS.keys())
# Both forms of the layers, for training and for decoding; by default the latter for the plainest
# family and for the one with the most kinds of them. A single CPU's, without merged products, is
# what engines have in these tests.
each_form = pytest.mark.parametrize(
    ("cfg", "stacked"),
    [
        pytest.param(
            cfg,
            stacked,
            id=f"{name}-{'stacked' if stacked else 'unstacked'}",
            marks=() if stacked != (name in ("llama", MOST)) else pytest.mark.full,
        )
        for name, cfg in CONFIGS.items()
        for stacked in (True, False)
    ],
)
# The families that have everything that the others have.
SOME = "llama", MOST, "deepseek_v4"
some_families = pytest.mark.parametrize("name", rest_full(CONFIGS, SOME))


@pytest.fixture(autouse=True)
def short_rings(monkeypatch):
    """Windows whose rings go round several times in few positions."""
    monkeypatch.setattr(kv, "RING_STEP", 1)


def test_every_family_of_the_table_is_tried_here():
    assert {id(family_of(cfg)) for cfg in CONFIGS.values()} == {
        id(family) for family in FAMILIES.values()
    }


@functools.cache
def tiny_target(cfg, *, stacked: bool, dtype=jnp.float32):
    """Random weights in which biases and norms are not trivial either."""
    rng = np.random.default_rng(0)

    def draw(param):
        if param.init == "choices":
            return jnp.asarray(rng.integers(0, param.fan_in, param.shape), param.dtype)
        scale, mean = (0.1, 1.0) if param.init == "ones" else (param.fan_in**-0.5, 0.0)
        return jnp.asarray(rng.normal(mean, scale, param.shape), param.dtype or dtype)

    target = map_params(draw, family_of(cfg).declare(cfg))
    if stacked:
        return target
    layers = tuple(single_layers(stack) for stack in target.layers)
    return replace(target, layers=layers)


@functools.partial(jax.jit, static_argnums=0)
def dense(cfg, target, token_BS):
    return family_of(cfg).encode(target, token_BS, cfg, FEATURES)


@functools.partial(jax.jit, static_argnums=0)
def step(cfg, target, cache, rows, chunks=None):
    extend = family_of(cfg).extend
    return extend(target, cache, rows, cfg, FEATURES, rows_per_slot=ROWS_PER_SLOT, chunks=chunks)


def garbage_cache(cfg, *, stacked: bool):
    """A cache whose every place holds what must never be attended to."""
    declared = family_of(cfg).declare_cache(cfg, kv.Room(SLOTS, POSITIONS, AHEAD, jnp.float32))
    cache = empty_buffers(declared if stacked else unstacked(declared))
    return jax.tree.map(lambda leaf: leaf + 100, cache)


def make_rows(tokens, start, counts, order):
    """Rows of one step: ``counts[slot]`` tokens a slot, slots in ``order``, padded."""
    token = np.zeros(SLOTS * ROWS_PER_SLOT, np.int32)
    slot = np.full(SLOTS * ROWS_PER_SLOT, SLOTS, np.int32)
    position = np.zeros(SLOTS * ROWS_PER_SLOT, np.int32)
    row = 0
    for index in order:
        for place in range(start[index], start[index] + counts[index]):
            token[row], slot[row], position[row] = tokens[index, place], index, place
            row += 1
    return Rows(jnp.asarray(token), jnp.asarray(slot), jnp.asarray(position))


def random_tokens(cfg, seed):
    return np.random.default_rng(seed).integers(0, cfg.vocab_size, (SLOTS, POSITIONS), np.int32)


@each_form
@settings(max_examples=8, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_rows_through_the_cache_equal_the_dense_encoding(cfg, stacked, seed):
    rng, target = np.random.default_rng(seed), tiny_target(cfg, stacked=stacked)
    tokens, lengths = random_tokens(cfg, seed), rng.integers(1, POSITIONS + 1, SLOTS)
    dense_outputs = [np.asarray(out) for out in dense(cfg, target, jnp.asarray(tokens))]
    cache, start = garbage_cache(cfg, stacked=stacked), np.zeros(SLOTS, int)
    while (start < lengths).any():
        counts = rng.integers(0, np.minimum(ROWS_PER_SLOT, lengths - start) + 1)
        rows = make_rows(tokens, start, counts, rng.permutation(SLOTS))
        *outputs, cache = step(cfg, target, cache, rows)
        real = np.asarray(rows.slot_T) < SLOTS
        where = (np.asarray(rows.slot_T)[real], np.asarray(rows.position_T)[real])
        for out, expected in zip(outputs, dense_outputs, strict=True):
            np.testing.assert_allclose(np.asarray(out)[real], expected[where], **CLOSE)
        start = start + counts


@some_families
def test_chunks_of_a_prompt_equal_the_whole(name):
    """Two slots decode while the prompt of the third is read, its two pieces in one pass, and its
    anchor, too."""
    cfg, stacked = CONFIGS[name], name not in ("llama", MOST)
    target, tokens = tiny_target(cfg, stacked=stacked), random_tokens(cfg, 8)
    *_, cache = step(
        cfg,
        target,
        garbage_cache(cfg, stacked=stacked),
        make_rows(tokens, [0] * 3, [4, 3, 0], range(SLOTS)),
    )
    position_PW = jnp.arange(10, dtype=jnp.int32).reshape(2, 5)
    slot_PW = jnp.full((2, 5), 2, jnp.int32).at[1, 3:].set(SLOTS)  # 8 tokens, the rest is padding
    chunks = Rows(jnp.asarray(tokens)[2, position_PW], slot_PW, position_PW)
    rows = make_rows(tokens, [4, 3, 8], [2, 1, 1], range(SLOTS))
    *outputs, _ = step(cfg, target, cache, rows, chunks)
    num_rows = len(rows.slot_T)
    for out, whole in zip(outputs, dense(cfg, target, jnp.asarray(tokens)), strict=True):
        np.testing.assert_allclose(out[:2], whole[0, 4:6], **CLOSE)
        np.testing.assert_allclose(out[2], whole[1, 3], **CLOSE)
        np.testing.assert_allclose(out[3], whole[2, 8], **CLOSE)
        np.testing.assert_allclose(out[num_rows : num_rows + 8], whole[2, :8], **CLOSE)


@each_family
def test_rejected_rows_leave_no_trace(cfg):
    target, tokens = tiny_target(cfg, stacked=True), random_tokens(cfg, 4)
    wrong = (tokens + 1) % cfg.vocab_size
    cache = garbage_cache(cfg, stacked=True)
    *_, cache = step(cfg, target, cache, make_rows(tokens, [0] * 3, [3, 4, 2], range(SLOTS)))
    *_, cache = step(cfg, target, cache, make_rows(wrong, [3, 4, 2], [4, 4, 4], range(SLOTS)))
    after = make_rows(tokens, [3, 4, 2], [2, 2, 2], range(SLOTS))
    hidden_TD, _, _ = step(cfg, target, cache, after)
    hidden_BSD, _ = dense(cfg, target, jnp.asarray(tokens))
    expected = np.concatenate([hidden_BSD[0, 3:5], hidden_BSD[1, 4:6], hidden_BSD[2, 2:4]])
    np.testing.assert_allclose(hidden_TD[:6], expected, **CLOSE)


@each_family
def test_padding_at_the_end_changes_nothing_before_it(cfg):
    target, token_BS = tiny_target(cfg, stacked=True), jnp.asarray(random_tokens(cfg, 5))
    whole, padded = (dense(cfg, target, ids) for ids in (token_BS, token_BS.at[:, 9:].set(0)))
    for out, expected in zip(padded, whole, strict=True):
        np.testing.assert_array_equal(out[:, :9], expected[:, :9])


@pytest.mark.smoke
@each_family
def test_stacked_and_unstacked_layers_agree(cfg):
    token_BS = jnp.asarray(random_tokens(cfg, 6))
    outputs = [dense(cfg, tiny_target(cfg, stacked=form), token_BS) for form in (True, False)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), *outputs)


@each_form
def test_no_features_are_returned_where_none_are_asked_for(cfg, stacked):
    token_BS, target = jnp.zeros((2, 5), jnp.int32), tiny_target(cfg, stacked=stacked)
    _, feature_BSFD = jax.eval_shape(lambda t: family_of(cfg).encode(t, token_BS, cfg), target)
    assert feature_BSFD.shape == (2, 5, 0, cfg.hidden_size)


@some_families
def test_bfloat16_stays_close_to_float32(name):
    cfg = CONFIGS[name]
    token_BS, logits = jnp.asarray(random_tokens(cfg, 7)), {}
    for dtype in (jnp.float32, jnp.bfloat16):
        target = tiny_target(cfg, stacked=True, dtype=dtype)
        hidden_BSD, feature_BSFD = dense(cfg, target, token_BS)
        assert hidden_BSD.dtype == feature_BSFD.dtype == dtype
        logits[dtype] = unembed(target.vocab, hidden_BSD)
        assert logits[dtype].dtype == jnp.float32
    error_BSV = jnp.abs(logits[jnp.bfloat16] - logits[jnp.float32])
    # Rounding turns some tokens to other experts, and a norm enlarges what gates that are nearly
    # closed let through: these tokens differ, so that the middle one counts.
    jumps = getattr(cfg, "num_experts", 0) or getattr(cfg, "token_size", 0)
    error = jnp.median(error_BSV.max(-1)) if jumps else error_BSV.max()
    # Eight bits of mantissa, through a few layers of two residual additions each.
    assert error < 8 * 2.0**-8 * jnp.abs(logits[jnp.float32]).max()


def form_of(cfg, *, stacked=True, slots=4, positions=8, drafter=DRAFTER):
    dtypes = jnp.float32, jnp.bfloat16
    return StateConfig(cfg, drafter, slots, positions, AHEAD, 3, dtypes, (stacked, stacked))


@each_form
@pytest.mark.parametrize("drafter", [DRAFTER, None], ids=["drafter", "plain"])
def test_an_empty_state_is_what_its_declaration_says(cfg, stacked, drafter):
    form = form_of(cfg, stacked=stacked, drafter=drafter)
    declared, state = declare_state(form), make_state((), form)
    jax.tree.map(
        lambda b, leaf: np.testing.assert_array_equal(leaf, np.full(b.shape, b.fill, b.dtype)),
        declared,
        state,
    )
    leaves = jax.tree.leaves(state)
    assert sum(b.nbytes for b in jax.tree.leaves(declared)) == sum(x.nbytes for x in leaves)
    assert isinstance(jax.tree.leaves(state.target_cache)[0], jax.Array)
    assert (state.context_cache is None) == (drafter is None)


@each_family
def test_requests_take_the_first_slots_and_leave_the_others_free(cfg):
    state = make_state([Request((5, 6, 7), 2, stop_ids=(9,)), Request((8,), 4)], form_of(cfg))
    assert state.active_B.tolist() == [True, True, False, False]
    assert state.length_B.tolist() == [3, 1, 1, 1]
    assert state.stop_at_B.tolist() == [5, 5, 1, 1]
    assert state.generation_B.tolist() == [0, 1, -1, -1]
    assert state.token_BS[0].tolist() == [5, 6, 7, 0, 0, 0, 0, 0]
    assert state.stop_id_BK.tolist() == [[9, -1, -1], *[[-1, -1, -1]] * 3]


@each_form
@pytest.mark.parametrize(("slots", "positions"), [(6, 8), (2, 8), (4, 12), (4, 5)])
def test_a_moved_state_is_the_same_in_another_form(cfg, stacked, slots, positions):
    old = form_of(cfg, stacked=stacked)
    new = replace(old, num_slots=slots, num_positions=positions)
    rng = np.random.default_rng(3)
    state = jax.tree.map(
        lambda b: jnp.asarray(rng.integers(0, 2, b.shape), b.dtype), declare_state(old)
    )
    origin = np.array([3, -1, 0, 1, 2, -1][:slots])
    moved = move(state, jnp.asarray(origin, jnp.int32), new)
    kept = np.flatnonzero(origin >= 0)

    def same(buffer, before, after):
        assert (after.shape, after.dtype) == (buffer.shape, buffer.dtype)
        # Slots in front, positions behind.
        places = [buffer.axes.index(letter) for letter in "BS" if letter in buffer.axes]
        ends = [0, -1][: len(places)]
        before, after = (np.moveaxis(np.asarray(x), places, ends) for x in (before, after))
        before, after = before[origin[kept]], after[kept]
        if "S" not in buffer.axes:
            np.testing.assert_array_equal(after, before)
            return
        common = min(before.shape[-1], after.shape[-1])
        np.testing.assert_array_equal(after[..., :common], before[..., :common])
        assert (after[..., common:] == buffer.fill).all()

    jax.tree.map(same, declare_state(new), state, moved)
    assert not moved.active_B[origin < 0].any()


@each_family
def test_slots_are_split_over_data_and_heads_over_tensor(cfg, emulated_devices):
    form, mesh = form_of(cfg), make_mesh(2, 2, devices=emulated_devices)
    declared, state = declare_state(form), make_state((), form, mesh)
    shardings = declared_shardings(declared, mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings

    def split_axes(buffer, leaf):
        part = leaf.sharding.shard_shape(leaf.shape)
        return "".join(
            letter
            for letter, size, all in zip(buffer.axes, part, leaf.shape, strict=True)
            if size < all
        )

    split = jax.tree.map(split_axes, declared, state)

    def heads(buffer):
        if "K" not in buffer.axes:
            return "B"
        return "BK" if buffer.shape[buffer.axes.index("K")] % 2 == 0 else "B"

    for part in ("target_cache", "context_cache"):
        assert getattr(split, part) == jax.tree.map(heads, getattr(declared, part))
    others = split.replace(target_cache=None, context_cache=None)
    assert set(jax.tree.leaves(others)) == {"B"}
