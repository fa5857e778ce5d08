"""Attention of rows of ragged requests against a plain loop over requests, rows and heads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from dspark_jax.axes import unstacked
from dspark_jax.models.cache import Room
from dspark_jax.models.drafters.dspark import (
    block_hidden,
    declare_context,
    declare_drafter,
    slot_hidden,
)
from dspark_jax.models.merged import single_layers
from dspark_jax.models.targets.llama import declare as declare_target
from pallas_kernels import dispatch
from pallas_kernels.ragged_attention.api import ragged_attention
from pallas_kernels.ragged_attention.bench import library, library_arguments
from pallas_kernels.ragged_attention.cases import CASES, Case
from pallas_kernels.ragged_attention.groups import group_by_slot, group_runs
from pallas_kernels.ragged_attention.pages import PAGE
from tests.tiny_model import DRAFTER, TARGET, random_params

WIDTH = 16


def naive(q, k, v, slot_T, limit_T, own=None, window=None):
    """One softmax a row and head, in float64; ``own`` holds keys and values of each row's group."""
    out = np.zeros(q.shape)
    shared = q.shape[1] // k.shape[1]
    for row, (slot, limit) in enumerate(zip(slot_T, limit_T, strict=True)):
        if slot == len(k):
            continue
        start = 0 if window is None else max(0, limit - window)
        for head in range(q.shape[1]):
            keys = k[slot, head // shared, start:limit].astype(np.float64)
            values = v[slot, head // shared, start:limit].astype(np.float64)
            if own is not None:
                keys = np.concatenate([keys, own[0][row, :, head // shared]])
                values = np.concatenate([values, own[1][row, :, head // shared]])
            if len(keys):
                score = keys @ q[row, head].astype(np.float64) / np.sqrt(q.shape[2])
                power = np.exp(score - score.max())
                out[row, head] = power @ values / power.sum()
    return out


def cache(rng, slots, kv_heads, positions):
    shape = slots, kv_heads, positions, WIDTH
    return tuple(rng.normal(size=shape).astype(np.float32) for _ in range(2))


def rows_of(rng, lengths, counts, positions, num_padding, heads):
    """Flat rows behind prefixes of the given lengths, in any order, and padding among them."""
    slot, position = [], []
    for index, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        slot += [index] * count
        position += range(length, length + count)
    slot += [len(lengths)] * num_padding
    position += [rng.integers(positions) for _ in range(num_padding)]
    order = rng.permutation(len(slot))
    slot_T, position_T = np.array(slot, np.int32)[order], np.array(position, np.int32)[order]
    return rng.normal(size=(len(slot), heads, WIDTH)).astype(np.float32), slot_T, position_T


def run(q_TNH, k_BKSH, v_BKSH, groups, limit_T, window=None, own=None, page_BX=None):
    step = jax.jit(functools.partial(ragged_attention, window=window))
    limit_T = jnp.asarray(limit_T)
    out_TNH = step(q_TNH, k_BKSH, v_BKSH, groups, limit_T, own=own, page_BX=page_BX)
    return np.asarray(out_TNH, np.float32)


@settings(deadline=None, max_examples=25)
@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    kv_heads=st.integers(1, 2),
    shared=st.integers(1, 3),
    num_padding=st.integers(0, 3),
    window=st.sampled_from([None, 1, 5]),
    seed=st.integers(0, 2**31),
)
def test_verification_reads_every_request_up_to_its_rows(
    counts, kv_heads, shared, num_padding, window, seed
):
    rng = np.random.default_rng(seed)
    positions = 24
    if not sum(counts) + num_padding:
        num_padding = 1
    lengths = [int(rng.integers(0, positions - count + 1)) for count in counts]
    k, v = cache(rng, len(counts), kv_heads, positions)
    q, slot_T, position_T = rows_of(rng, lengths, counts, positions, num_padding, kv_heads * shared)
    limit_T = position_T + 1
    # What nobody may see is garbage: keys that are not even numbers, values of any size.
    for slot, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        k[slot, :, length + count :] = np.nan
        v[slot, :, length + count :] = 1e30
    groups = group_by_slot(jnp.asarray(slot_T), jnp.asarray(position_T), len(counts), 4)
    out = run(q, k, v, groups, limit_T, window=window)
    expected = naive(q, k, v, slot_T, limit_T, window=window)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)
    assert not out[slot_T == len(counts)].any()


@settings(deadline=None, max_examples=15)
@given(
    num_groups=st.integers(1, 3),
    rows=st.integers(1, 5),
    shared=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_chunks_read_the_slots_that_they_name(num_groups, rows, shared, seed):
    rng = np.random.default_rng(seed)
    k, v = cache(rng, 4, 2, 16)
    slot_P = rng.integers(0, 4, num_groups).astype(np.int32)
    limit_T = rng.integers(0, 17, num_groups * rows).astype(np.int32)
    q = rng.normal(size=(num_groups * rows, 2 * shared, WIDTH)).astype(np.float32)
    out = run(q, k, v, group_runs(jnp.asarray(slot_P), num_groups, rows), limit_T)
    expected = naive(q, k, v, np.repeat(slot_P, rows), limit_T)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)
    assert not out[limit_T == 0].any()


@settings(deadline=None, max_examples=15)
@given(
    lengths=st.lists(st.integers(0, 16), min_size=1, max_size=3),
    rows=st.integers(1, 4),
    keys=st.integers(1, 4),
    window=st.sampled_from([None, 3]),
    seed=st.integers(0, 2**31),
)
def test_a_block_sees_the_cache_before_it_and_all_of_its_own_keys(
    lengths, rows, keys, window, seed
):
    rng = np.random.default_rng(seed)
    slots = len(lengths)
    k, v = cache(rng, slots, 2, 16)
    for slot, length in enumerate(lengths):
        k[slot, :, length:] = np.nan
    own = tuple(rng.normal(size=(slots, keys, 2, WIDTH)).astype(np.float32) for _ in range(2))
    q = rng.normal(size=(slots * rows, 6, WIDTH)).astype(np.float32)
    limit_T = np.repeat(np.array(lengths, np.int32), rows)
    out = run(q, k, v, group_runs(None, slots, rows), limit_T, own=own, window=window)
    slot_T = np.repeat(np.arange(slots), rows)
    of_rows = tuple(values[slot_T] for values in own)
    expected = naive(q, k, v, slot_T, limit_T, of_rows, window)
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)


@settings(deadline=None, max_examples=15)
@given(
    limits=st.lists(st.integers(0, 192), min_size=1, max_size=3),
    rows=st.integers(1, 3),
    chunks=st.booleans(),
    own=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_caches_in_pages_are_read_in_the_order_of_their_positions(limits, rows, chunks, own, seed):
    """Pages in any order, of other slots among them; what a row may not see is garbage."""
    rng = np.random.default_rng(seed)
    slots, columns = len(limits), 3
    k, v = cache(rng, slots, 2, columns * PAGE)
    page_BX = rng.permutation(slots * columns + 2)[: slots * columns].reshape(slots, columns)
    pools = []
    for values, garbage in ((k, np.nan), (v, 1e30)):
        pool = np.full((slots * columns + 2, 2, PAGE, WIDTH), garbage, np.float32)
        pool[page_BX] = values.reshape(slots, 2, columns, PAGE, WIDTH).swapaxes(1, 2)
        for slot, limit in enumerate(limits):
            for column in range(-(-limit // PAGE), columns):
                pool[page_BX[slot, column]] = garbage
        pools.append(pool)
    slot_P = rng.integers(0, slots, 4).astype(np.int32) if chunks else np.arange(slots)
    groups = group_runs(jnp.asarray(slot_P) if chunks else None, len(slot_P), rows)
    limit_T = np.repeat(np.array(limits, np.int32)[slot_P], rows)
    q = rng.normal(size=(len(limit_T), 6, WIDTH)).astype(np.float32)
    keys = tuple(rng.normal(size=(len(slot_P), 2, 2, WIDTH)).astype(np.float32) for _ in range(2))
    brought = keys if own else None
    # A page that a slot does not hold has a number beyond all.
    held_BX = np.where(np.arange(columns) * PAGE < np.array(limits)[:, None], page_BX, 10**6)
    out = run(q, *pools, groups, limit_T, own=brought, page_BX=held_BX)
    contiguous = run(q, k, v, groups, limit_T, own=brought)
    np.testing.assert_array_equal(out, contiguous)


def small_case(dtype=jnp.float32):
    """(q, k, v, groups, limit_T): two rows of each of three slots."""
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(values, dtype) for values in cache(rng, 3, 2, 32))
    q = jnp.asarray(rng.normal(size=(6, 4, WIDTH)), dtype)
    return q, k, v, group_runs(None, 3, 2), jnp.array([3, 4, 31, 32, 0, 1], jnp.int32)


def test_a_block_in_the_cache_equals_one_that_brings_its_keys():
    q, k, v, groups, _ = small_case()
    start_B, width = np.array([0, 5, 28]), 4
    held = run(q, k, v, groups, np.repeat(start_B + width, 2).astype(np.int32))
    place = start_B[:, None] + np.arange(width)
    own = tuple(values[np.arange(3)[:, None], :, place] for values in (k, v))
    brought = run(q, k, v, groups, np.repeat(start_B, 2).astype(np.int32), own=own)
    np.testing.assert_allclose(brought, held, rtol=1e-5, atol=1e-6)


def test_one_layer_of_a_stacked_cache():
    q, k, v, groups, limit_T = small_case()
    stacked = (jnp.stack([values + 1, values]) for values in (k, v))
    step = jax.jit(ragged_attention)
    out = step(q, *stacked, groups, limit_T, layer=jnp.int32(1))
    np.testing.assert_array_equal(out, step(q, k, v, groups, limit_T))


def test_bfloat16_keeps_its_precision():
    q, k, v, groups, limit_T = small_case(jnp.bfloat16)
    step = jax.jit(ragged_attention)
    out = step(q, k, v, groups, limit_T)
    assert out.dtype == jnp.bfloat16
    wide = (values.astype(jnp.float32) for values in (q, k, v))
    # A result and each weight are rounded to 8 bits.
    np.testing.assert_allclose(
        out.astype(np.float32), step(*wide, groups, limit_T), rtol=2**-7, atol=2**-7
    )


def test_gradient_is_that_of_a_dense_softmax():
    q, k, v, groups, limit_T = small_case()
    weight = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

    def dense(q, k, v):
        q = q.reshape(3, 2, 2, 2, WIDTH)
        score = jnp.einsum("bckgh,bksh->bckgs", q, k) * WIDTH**-0.5
        seen = jnp.arange(32) < limit_T.reshape(3, 2, 1)
        score = jnp.where(seen[:, :, None, None], score, -1e30)
        out = jnp.einsum("bckgs,bksh->bckgh", jax.nn.softmax(score), v)
        return jnp.where(seen.any(-1)[..., None, None, None], out, 0).reshape(6, 4, WIDTH)

    def grad(attend):
        return jax.jit(jax.grad(lambda *qkv: jnp.sum(attend(*qkv) * weight), argnums=(0, 1, 2)))

    ours = grad(lambda q, k, v: ragged_attention(q, k, v, groups, limit_T))(q, k, v)
    for got, expected in zip(ours, grad(dense)(q, k, v), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stacked", [True, False])
def test_a_drafted_block_is_the_one_of_training(stacked):
    """One anchor a slot: the attention of decoding and the one that is trained agree."""
    drafter = jax.device_put(random_params(0, declare_drafter(DRAFTER)))
    vocab = random_params(1, declare_target(TARGET)).vocab
    if not stacked:
        layers = tuple(single_layers(stack) for stack in drafter.layers)
        drafter = dataclasses.replace(drafter, layers=layers)
    rng = np.random.default_rng(2)
    declared = declare_context(DRAFTER, Room(3, 16, 4, jnp.float32))
    context = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32),
        declared if stacked else unstacked(declared),
    )
    anchor_B, position_B = jnp.array([3, 4, 5]), jnp.array([6, 0, 13])
    trained = jax.jit(block_hidden, static_argnums=5)
    decoded = jax.jit(slot_hidden, static_argnums=5)
    np.testing.assert_allclose(
        decoded(drafter, vocab, anchor_B, position_B, context, DRAFTER),
        trained(drafter, vocab, anchor_B[:, None], position_B[:, None], context, DRAFTER)[:, 0],
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("case", [c for c in CASES if not c.bidirectional], ids=lambda c: c.name)
def test_the_library_that_the_benchmark_compares_with_computes_the_same(case):
    case = case.small()
    given = case.arguments(jnp.float32)
    out = jax.jit(functools.partial(library, window=case.window))(**library_arguments(case, given))
    ours = run(**given, groups=case.grouping, window=case.window)
    np.testing.assert_allclose(out.reshape(ours.shape), ours, rtol=1e-5, atol=1e-5)


def test_bytes_and_flops_of_a_case_count_what_its_rows_see():
    case = Case("", 2, 2, 64, 4, 2, 64)
    assert case.limits().tolist() == [1, 2, 63, 64]
    assert case.cost(itemsize=2) == (2 * 64 * (2 * 2 * 66 + 2 * 2 * 2 * 4), 4 * 130 * 4 * 64)
    seen = dataclasses.replace(case, window=10)
    assert seen.cost()[1] == 4 * (1 + 2 + 10 + 10) * 4 * 64
    assert seen.cost()[0] == 2 * 64 * (2 * 2 * (2 + 11) + 2 * 2 * 2 * 4)
    drafted = dataclasses.replace(case, bidirectional=True)
    assert drafted.limits().tolist() == [0, 0, 62, 62]
    assert drafted.cost()[1] == 4 * (2 * 62 + 2 * 2 * 2) * 4 * 64


def test_key_value_heads_are_split_over_devices(emulated_devices):
    q, k, v, groups, limit_T = small_case()
    mesh = jax.sharding.Mesh(np.array(emulated_devices[:2]), ("tensor",))
    attend = jax.shard_map(
        lambda q, k, v, limit_T: ragged_attention(q, k, v, groups, limit_T),
        mesh=mesh,
        in_specs=(P(None, "tensor"), P(None, "tensor"), P(None, "tensor"), P()),
        out_specs=P(None, "tensor"),
        check_vma=False,
    )
    step = jax.jit(attend)
    np.testing.assert_allclose(
        step(q, k, v, limit_T), ragged_attention(q, k, v, groups, limit_T), rtol=1e-5, atol=1e-6
    )
    assert "all-" not in step.lower(q, k, v, limit_T).compile().as_text()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q": (6, 3, WIDTH)}, "3 query heads of 16 cannot read 2 key heads"),
        ({"q": (6, 4, 8)}, "cannot read 2 key heads of 16"),
        ({"q": (4, WIDTH)}, r"give \[T, N, H\]"),
        ({"q": (5, 4, WIDTH)}, "5 rows, 6 of them placed"),
        ({"limit_T": (5,)}, "limits"),
        ({"groups": group_runs(None, 2, 3)}, "2 groups without slots, and 3 slots"),
        ({"own": (np.zeros((3, 1, 2, WIDTH)), np.zeros((3, 2, 2, WIDTH)))}, "own keys"),
        ({"window": 0}, "window is 0"),
        ({"layer": 0}, r"\[L, B, K, S, H\] with a layer"),
        ({"page_BX": jnp.zeros((3, 1), jnp.int32)}, "pages have 64"),
        ({"implementation": "triton"}, "choose one of xla, mosaic_gpu"),
    ],
)
def test_wrong_inputs_are_refused(change, match):
    q, k, v, groups, limit_T = small_case()
    given = {"q_TNH": q, "k_BKSH": k, "v_BKSH": v, "groups": groups, "limit_T": limit_T}
    if "q" in change:
        change = {"q_TNH": jnp.zeros(change["q"])}
    if "limit_T" in change:
        change = {"limit_T": jnp.zeros(change["limit_T"], jnp.int32)}
    with pytest.raises(ValueError, match=match):
        ragged_attention(**given | change)


def test_dtypes_must_agree():
    q, k, v, groups, limit_T = small_case()
    with pytest.raises(ValueError, match="dtypes differ"):
        ragged_attention(q.astype(jnp.bfloat16), k, v, groups, limit_T)


@pytest.mark.skipif(dispatch.version_problem() is None, reason="this jax has Mosaic GPU kernels")
def test_an_old_jax_is_named_as_the_reason():
    with pytest.raises(RuntimeError, match=r"needs jax >= 0\.11\.2"):
        ragged_attention(*small_case(), implementation="mosaic_gpu")
