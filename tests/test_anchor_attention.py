"""Training attention: against naive attention of one block at a time, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspark_jax.config import TrainConfig
from dspark_jax.training.fit import fit
from pallas_kernels import chunks, dispatch
from pallas_kernels.anchor_attention.api import anchor_attention
from pallas_kernels.anchor_attention.cases import Case, make_inputs


def naive(q_BAGNH, k_BSKH, v_BSKH, own, anchor_BA, keep_BA):
    """float64, one slot and head of one block after the other."""
    given = (np.asarray(x, np.float64) for x in (q_BAGNH, k_BSKH, v_BSKH, *own))
    q, k, v, own_k, own_v = given
    out = np.zeros(q.shape)
    repeat = q.shape[3] // k.shape[2]
    for b, a, g, n in np.ndindex(*q.shape[:4]):
        if not keep_BA[b, a]:
            continue
        end, m = anchor_BA[b, a], n // repeat
        keys = np.concatenate([k[b, :end, m], own_k[b, a, :, m]])
        values = np.concatenate([v[b, :end, m], own_v[b, a, :, m]])
        weight = np.exp(keys @ q[b, a, g, n] / np.sqrt(q.shape[-1]))
        out[b, a, g, n] = weight @ values / weight.sum()
    return out


def naive_jnp(q_BAGNH, k_BSKH, v_BSKH, own, anchor_BA, keep_BA):
    """What :func:`naive` computes, out of plain slices, so that it can be differentiated."""
    repeat = q_BAGNH.shape[3] // k_BSKH.shape[2]
    wide = [jnp.repeat(x, repeat, axis=-2) for x in (k_BSKH, v_BSKH, *own)]
    blocks = []
    for b, a in np.ndindex(*anchor_BA.shape):
        k, v, own_k, own_v = wide[0][b], wide[1][b], wide[2][b, a], wide[3][b, a]
        end = int(anchor_BA[b, a])
        keys, values = jnp.concatenate([k[:end], own_k]), jnp.concatenate([v[:end], own_v])
        score = jnp.einsum("gnh,snh->ngs", q_BAGNH[b, a], keys) / q_BAGNH.shape[-1] ** 0.5
        out = jnp.einsum("ngs,snh->gnh", jax.nn.softmax(score), values)
        blocks.append(out * float(keep_BA[b, a]))
    return jnp.stack(blocks).reshape(q_BAGNH.shape)


def with_chunks(elements, function, *arguments):
    """The function traced with other chunks than the usual ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_ELEMENTS", elements)
        return jax.jit(lambda *args: function(*args))(*arguments)


@st.composite
def inputs(draw):
    """Arguments of a small case: ragged anchors, one of them at 0, some blocks dropped."""
    kv_heads = draw(st.integers(1, 2))
    case = Case(
        batch=draw(st.integers(1, 2)),
        anchors=draw(st.integers(1, 5)),
        slots=draw(st.integers(1, 4)),
        positions=draw(st.sampled_from([5, 9])),
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        width=4,
        dtype="float32",
    )
    shape = case.batch, case.anchors
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    anchor_BA = np.sort(random.integers(0, case.positions + 1, shape), axis=1).astype(np.int32)
    if draw(st.booleans()):
        anchor_BA[0, 0] = 0
    keep_BA = random.random(shape) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    return *make_inputs(case, int(random.integers(99)))[:4], anchor_BA, keep_BA


@settings(max_examples=8, deadline=None)
@given(arguments=inputs(), elements=st.sampled_from([1, 150, 2**25]))
def test_every_block_attends_to_what_is_before_it_and_to_itself(arguments, elements):
    """Whatever the chunks: one block at a time, some (the last chunk filled up), all at once."""
    found = with_chunks(elements, anchor_attention, *arguments)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, naive(*arguments), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(found)[~arguments[5]], 0)


SMALL = Case(2, 5, 3, 8, 4, 2, 8, dtype="float32")
ANCHOR_BA = np.array([[0, 0, 3, 5, 8], [1, 2, 2, 7, 0]], np.int32)
KEEP_BA = np.array([[True, False, True, True, True], [True, True, True, True, False]])


@pytest.mark.parametrize("elements", [1, 2 * 2 * 3 * 4 * 11, 2**25], ids=["one", "two", "all"])
def test_gradients_are_those_of_the_naive_reference(elements):
    values = make_inputs(SMALL, 1)[:4]
    weight_BAGNH = jax.random.normal(jax.random.key(2), values[0].shape)

    def gradient_of(function):
        def total(*values):
            return jnp.vdot(weight_BAGNH, function(*values, ANCHOR_BA, KEEP_BA))

        return jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))

    found = with_chunks(elements, gradient_of(anchor_attention), *values)
    wanted = gradient_of(naive_jnp)(*values)
    close = {"rtol": 1e-5, "atol": 1e-5}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **close), found, wanted)
    for gradient_BAX in (found[0], *found[3]):
        np.testing.assert_array_equal(np.asarray(gradient_BAX)[~KEEP_BA], 0)
    assert not np.any(found[1][1, 7:])  # behind the last anchor of the second sequence


def test_context_behind_the_anchor_changes_nothing():
    q, k, v, own, _, keep_BA = make_inputs(SMALL, 3)
    anchor_BA = jnp.minimum(ANCHOR_BA, 5)
    other_k, other_v = k.at[:, 5:].set(1e4), v.at[:, 5:].set(-1e4)
    found = anchor_attention(q, other_k, other_v, own, anchor_BA, keep_BA)
    np.testing.assert_array_equal(found, anchor_attention(q, k, v, own, anchor_BA, keep_BA))


def test_bfloat16_is_close_to_float32():
    arguments = make_inputs(SMALL, 4)
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, arguments
    )
    found = anchor_attention(*half)
    assert found.dtype == jnp.bfloat16
    wanted = naive(*jax.tree.map(lambda x: np.asarray(x, np.float32), half[:4]), *half[4:])
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=0.03)


@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (0, lambda q: q[0], r"give \[B, A, G, N, H\]"),
        (2, lambda v: v[:, 1:], "twice"),
        (0, lambda q: q[:, :, :, :3], "3 query heads of 8 in 2 sequences cannot read 2 key heads"),
        (0, lambda q: q[:1], "in 1 sequences cannot read"),
        (3, lambda own: (own[0][:, 1:], own[1]), "own keys"),
        (1, lambda k: k.astype(jnp.bfloat16), "dtypes differ: bfloat16, float32"),
        (4, lambda anchor: anchor[:, 1:], "anchors"),
        (4, lambda anchor: anchor.astype(jnp.float32), "give int32 and bool"),
        (5, lambda keep: keep.astype(jnp.int32), "give int32 and bool"),
    ],
)
def test_wrong_inputs_are_refused(place, change, message):
    arguments = list(make_inputs(SMALL))
    arguments[place] = change(arguments[place])
    with pytest.raises(ValueError, match=message):
        anchor_attention(*arguments)


def test_no_name_falls_back():
    arguments = make_inputs(SMALL)
    with pytest.raises(ValueError, match="choose one of xla, mosaic_gpu"):
        anchor_attention(*arguments, implementation="cuda")
    # This jax is too old, or the kernels have no form for float32.
    with pytest.raises((RuntimeError, ValueError), match="choose xla"):
        anchor_attention(*arguments, implementation="mosaic_gpu")


def test_training_refuses_kernels_that_do_not_run(tmp_path):
    """At the start, before any data or weights are read."""
    recipe = TrainConfig(data="missing", target="missing", out=str(tmp_path), kernels="mosaic_gpu")
    with pytest.raises(ValueError, match=r"kernels is 'mosaic_gpu': .* choose xla"):
        fit(recipe)
    with pytest.raises(ValueError, match="kernels is 'cuda': choose one of xla, mosaic_gpu"):
        TrainConfig(kernels="cuda")


def test_training_refuses_a_dtype_that_kernels_do_not_take(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "require", lambda _: None)  # as on a GPU
    recipe = TrainConfig(data="missing", target="missing", out=str(tmp_path), kernels="mosaic_gpu")
    with pytest.raises(ValueError, match="dtype is 'float32': set dtype to bfloat16"):
        fit(recipe)
