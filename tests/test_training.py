"""The training step: anchors, masks, the loss over a reduced vocabulary, the optimiser."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dspark_jax.checkpoints.deepspec import bind_vocab
from dspark_jax.config import TrainConfig
from dspark_jax.models.drafters.dspark import declare_drafter
from dspark_jax.models.targets.llama import declare as declare_target
from dspark_jax.models.vocab import Vocab, unembed
from dspark_jax.training import anchors, losses, step
from dspark_jax.training.loss_terms import Decay, Loss
from dspark_jax.training.optimizer import learning_rate, make_optimizer
from dspark_jax.training.run import draft_places
from dspark_jax.training.state import Batch, Frozen, TrainState
from dspark_jax.training.teacher import LAW_ELEMENTS, Teacher, laws_pay, make_teacher
from pallas_kernels import chunks
from tests.tiny_model import DRAFTER, TARGET, random_params

DATA = Path(__file__).parent / "data" / "optimizer_schedule"
LENGTH = 20
RECIPE = TrainConfig(
    max_length=LENGTH, length_buckets=(LENGTH,), num_anchors=4, warmup_fraction=0.5
)
REDUCED = np.array([3, 5, 8, 13, 21, 34, 55, 89], np.int32)


@pytest.fixture(scope="module")
def frozen():
    target = random_params(20, declare_target(TARGET))
    return Frozen(target, bind_vocab(DRAFTER, None, TARGET, target.vocab), None)


@pytest.fixture(scope="module")
def params():
    return random_params(21, declare_drafter(DRAFTER))


@pytest.fixture(scope="module")
def batch():
    """Two sequences, the second one shorter."""
    token_BS = np.random.default_rng(0).integers(0, TARGET.vocab_size, (2, LENGTH)).astype(np.int32)
    mask_BS = np.zeros((2, LENGTH), bool)
    mask_BS[0, 4:], mask_BS[1, 6:15] = True, True
    return Batch(np.where(np.arange(LENGTH) < [[LENGTH], [15]], token_BS, 0), mask_BS)


@pytest.fixture(scope="module")
def target(frozen, batch):
    return target_outputs(frozen, batch)


def loss_of(params, frozen, batch, target, anchor_BA, keep_BA):
    feature, teacher = target
    labels = anchors.block_labels(
        batch.token_BS, batch.loss_mask_BS, anchor_BA, keep_BA, DRAFTER.block_size
    )
    outputs = losses.draft_blocks(
        params, frozen.vocab, feature, labels, anchor_BA, keep_BA, DRAFTER
    )
    totals = losses.loss_totals(labels, frozen.t2d_V, Decay(4.0))
    loss, metrics = losses.dspark_loss(
        params, frozen.vocab, outputs, teacher, labels, totals, frozen.t2d_V
    )
    return loss, (metrics, outputs)


target_outputs = jax.jit(partial(step.target_outputs, target_cfg=TARGET, cfg=DRAFTER))
forward = jax.jit(loss_of)
gradient_of = jax.jit(jax.value_and_grad(loss_of, has_aux=True))


def assert_same(found, expected, atol=1e-6):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=atol), found, expected)


# Anchors.


def random_masks(seed, rows=200, length=30):
    random = np.random.default_rng(seed)
    return jnp.asarray(random.random((rows, length)) < random.random((rows, 1)))


def test_anchors_are_distinct_candidates_in_order_with_dummies_behind():
    mask_BS = random_masks(0)
    candidate_BP = np.asarray(anchors.anchor_candidates(mask_BS))
    np.testing.assert_array_equal(candidate_BP, mask_BS[:, 1:] & mask_BS[:, :-1])
    anchor_BA, keep_BA = map(np.asarray, anchors.sample_anchors(jax.random.key(1), mask_BS, 8))
    np.testing.assert_array_equal(keep_BA.sum(1), np.minimum(candidate_BP.sum(1), 8))
    for anchor_A, keep_A, candidate_P in zip(anchor_BA, keep_BA, candidate_BP, strict=True):
        kept = anchor_A[keep_A]
        assert (np.diff(kept) > 0).all()
        assert candidate_P[kept].all()
        assert not anchor_A[~keep_A].any()
        assert (np.diff(keep_A.astype(int)) <= 0).all()


def test_more_anchors_than_positions_leave_dummies():
    mask_BS = random_masks(0, rows=3, length=5)
    anchor_BA, keep_BA = anchors.sample_anchors(jax.random.key(1), mask_BS, 9)
    assert anchor_BA.shape == keep_BA.shape == (3, 9)
    np.testing.assert_array_equal(keep_BA.sum(1), anchors.anchor_candidates(mask_BS).sum(1))


def test_every_candidate_is_drawn_equally_often():
    mask_BS = jnp.zeros((4000, 12), bool).at[:, 3:].set(True)
    anchor_BA, keep_BA = anchors.sample_anchors(jax.random.key(2), mask_BS, 2, turn=0.7)
    assert keep_BA.all()
    count = np.bincount(np.asarray(anchor_BA).ravel(), minlength=12)
    assert not count[:3].any()
    assert not count[11:].any()
    np.testing.assert_allclose(count[3:11], 1000, atol=5 * 1000**0.5)


def test_evenly_spaced_turns_hardly_overlap():
    mask_BS, turns, each = jnp.ones((4, 401), bool), 8, 20
    draws = [
        np.asarray(anchors.sample_anchors(jax.random.key(3), mask_BS, each, turn / turns)[0])
        for turn in range(turns)
    ]
    for row in range(4):
        distinct = len({int(x) for draw in draws for x in draw[row]})
        assert distinct >= 0.95 * turns * each


def test_a_block_is_supervised_up_to_the_first_gap(batch):
    anchor_BA = jnp.array([[4, 17], [12, 0]])
    keep_BA = jnp.array([[True, True], [True, False]])
    labels = anchors.block_labels(batch.token_BS, batch.loss_mask_BS, anchor_BA, keep_BA, 3)
    supervised = [[[1, 1, 1], [1, 1, 0]], [[1, 1, 0], [0, 0, 0]]]
    np.testing.assert_array_equal(labels.supervised_BAG, np.array(supervised, bool))
    np.testing.assert_array_equal(labels.label_BAG[0, 0], batch.token_BS[0, 5:8])
    np.testing.assert_array_equal(labels.previous_BAG[0, 0], batch.token_BS[0, 4:7])


# Blocks do not see each other, dummies, or padding.


def test_many_anchors_in_one_call_are_separate_calls(frozen, params, batch, target):
    anchor_BA = jnp.array([[4, 7, 8, 16], [6, 9, 10, 13]])
    keep_BA = jnp.ones_like(anchor_BA, bool)
    _, (_, together) = forward(params, frozen, batch, target, anchor_BA, keep_BA)
    for one in range(4):
        pick = slice(one, one + 1)
        _, (_, alone) = forward(params, frozen, batch, target, anchor_BA[:, pick], keep_BA[:, pick])
        assert_same(alone, jax.tree.map(lambda x, pick=pick: x[:, pick], together), atol=1e-5)


def test_dummy_blocks_and_padding_change_nothing(frozen, params, batch, target):
    anchor_BA = jnp.array([[4, 9, 0, 0], [6, 0, 0, 0]])
    keep_BA = jnp.array([[True, True, False, False], [True, False, False, False]])
    (loss, (metrics, _)), gradient = gradient_of(params, frozen, batch, target, anchor_BA, keep_BA)
    assert float(metrics["blocks"]) == 3
    # Other tokens behind the end, and dummies elsewhere.
    other = batch.replace(
        token_BS=np.where(np.arange(LENGTH) < [[LENGTH], [15]], batch.token_BS, 9)
    )
    moved_BA = jnp.where(keep_BA, anchor_BA, 11)
    found, gradient_found = gradient_of(
        params, frozen, other, target_outputs(frozen, other), moved_BA, keep_BA
    )
    assert_same((found[0], found[1][0]), (loss, metrics))
    assert_same(gradient_found, gradient)
    # No dummies and no padding at all, as far as that is possible.
    packed = forward(params, frozen, batch, target, anchor_BA[:, :2], keep_BA[:, :2])
    assert_same((packed[0], packed[1][0]), (loss, metrics))


def test_a_batch_of_dummies_has_no_loss_and_no_gradient(frozen, params, batch, target):
    nothing = jnp.zeros((2, 4), jnp.int32)
    (loss, (metrics, _)), gradient = gradient_of(
        params, frozen, batch, target, nothing, nothing.astype(bool)
    )
    assert float(loss) == 0
    assert float(metrics["blocks"]) == float(metrics["accepted_length"]) == 0
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradient))


def test_the_confidence_label_carries_no_gradient(params, frozen):
    """Without CE and L1, only the confidence head's inputs matter, not the drafts' law."""
    keep_BA = jnp.ones((2, 1), bool)
    labels = anchors.block_labels(
        jnp.ones((2, LENGTH), int), jnp.ones((2, LENGTH), bool), 7 * keep_BA, keep_BA, 3
    )
    random = np.random.default_rng(0)
    shape = labels.label_BAG.shape
    teacher = Teacher(jnp.asarray(random.normal(size=(2, LENGTH, 16)), jnp.float32), None)
    totals = losses.loss_totals(labels, None, Decay(4.0))

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(hidden_BAGD):
        code = jnp.zeros((*shape, DRAFTER.markov_rank))
        outputs = losses.BlockOutputs(hidden_BAGD, code, jnp.zeros(shape))
        return losses.dspark_loss(
            params, frozen.vocab, outputs, teacher, labels, totals, None,
            loss=Loss(()),
        )[0]  # fmt: skip

    hidden = random.normal(size=(*shape, 16)).astype(np.float32)
    loss, gradient = loss_and_gradient(hidden)
    assert loss > 0
    assert not gradient.any()


# The loss over a reduced vocabulary, in chunks, in micro-batches.


@pytest.mark.parametrize("elements", [chunks.CHUNK_ELEMENTS, 100])
def test_reduced_vocabulary_against_the_whole_one(frozen, monkeypatch, elements):
    """Brute force over V: a draft law that is 0 outside, labels outside without cross-entropy."""
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", elements)
    random = np.random.default_rng(2)
    token_BS = random.integers(0, TARGET.vocab_size, (2, LENGTH))
    token_BS[:, 5:9] = REDUCED[:4]  # some labels must lie inside
    anchor_BA, keep_BA = jnp.array([[4, 11], [6, 0]]), jnp.array([[True, True], [True, False]])
    labels = anchors.block_labels(
        jnp.asarray(token_BS), jnp.ones((2, LENGTH), bool), anchor_BA, keep_BA, 3
    )
    hidden_BAGD = random.normal(size=(2, 2, 3, 16)).astype(np.float32)
    confidence_BAG = random.normal(size=(2, 2, 3))
    hidden_BSD = random.normal(size=(2, LENGTH, 16)).astype(np.float32)
    embed_VD = np.asarray(frozen.target.vocab.embed_VD)
    vocab = Vocab(embed_VD, embed_VD[REDUCED], jnp.asarray(REDUCED))
    outputs = losses.BlockOutputs(jnp.asarray(hidden_BAGD), None, jnp.asarray(confidence_BAG))
    t2d_V = draft_places(TARGET.vocab_size, REDUCED)
    headless = random_params(21, declare_drafter(dataclasses.replace(DRAFTER, markov_rank=0)))

    @jax.jit
    def loss_of_outputs(outputs):
        teacher = make_teacher(frozen.target.vocab, jnp.asarray(hidden_BSD), True)
        totals = losses.loss_totals(labels, t2d_V, Decay(4.0))
        return losses.dspark_loss(headless, vocab, outputs, teacher, labels, totals, t2d_V)

    loss, metrics = loss_of_outputs(outputs)
    logits_BAGU = hidden_BAGD.astype(np.float64) @ embed_VD[REDUCED].T
    logits = hidden_BSD.astype(np.float64) @ embed_VD.T
    target_BSV = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    sums, weights = np.zeros(3), np.zeros(3)
    for b, a in ((0, 0), (0, 1), (1, 0)):
        for k in range(3):
            law_V = np.zeros(TARGET.vocab_size)
            law_V[REDUCED] = np.exp(logits_BAGU[b, a, k]) / np.exp(logits_BAGU[b, a, k]).sum()
            position, weight = int(anchor_BA[b, a]) + k, np.exp(-k / 4)
            label = token_BS[b, position + 1]
            l1 = np.abs(law_V - target_BSV[b, position]).sum()
            accept, c = 1 - l1 / 2, 1 / (1 + np.exp(-confidence_BAG[b, a, k]))
            bce = -accept * np.log(c) - (1 - accept) * np.log(1 - c)
            inside = label in REDUCED
            ce = -np.log(law_V[label]) if inside else 0.0
            sums += weight * np.array([ce, l1, bce])
            weights += weight * np.array([inside, 1, 1])
    assert 0 < weights[0] < weights[1]
    ce, l1, bce = sums / (weights + 1e-6)
    assert float(metrics["ce"]) == pytest.approx(ce, rel=1e-5)
    assert float(metrics["l1"]) == pytest.approx(l1, rel=1e-5)
    assert float(metrics["confidence"]) == pytest.approx(bce, rel=1e-5)
    assert float(loss) == pytest.approx(0.1 * ce + 0.9 * l1 + bce, rel=1e-5)


def test_the_gradient_of_the_chunked_loss_is_that_of_the_plain_one(params, frozen):
    """``head_loss`` states its own derivative: here it is that of the loss as one reads it."""
    random = np.random.default_rng(3)
    shape = (2, 3, 3)
    hidden, teacher = random.normal(size=(2, *shape, 16)).astype(np.float32)
    code = random.normal(size=(*shape, 4)).astype(np.float32)
    label = random.integers(0, TARGET.vocab_size, shape)
    weights = random.random((3, *shape)).astype(np.float32)
    ce_weight, l1_weight, soft_weight = weights
    slots = losses._Slots(None, teacher, None, label, *weights, None)
    w2_RU = jnp.asarray(params.head.w2_RU)

    def plain(w2_RU, hidden, code):
        logits = losses.draft_logits(unembed(frozen.vocab, hidden), w2_RU, code)
        law = jax.nn.softmax(unembed(frozen.vocab, teacher))
        l1 = jnp.abs(jax.nn.softmax(logits) - law).sum(-1)
        ce = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        soft = optax.softmax_cross_entropy(logits, law)
        return (ce_weight * ce + l1_weight * l1 + soft_weight * soft).sum()

    def chunked(w2_RU, hidden, code):
        return 2.0 * losses.head_loss((2, 2), (), w2_RU, hidden, code, frozen.vocab, None, slots)[0]

    expected = jax.jit(jax.value_and_grad(plain, (0, 1, 2)))(w2_RU, hidden, code)
    found = jax.jit(jax.value_and_grad(chunked, (0, 1, 2)))(w2_RU, hidden, code)
    assert_same(found, jax.tree.map(lambda x: 2 * x, expected))


@pytest.mark.parametrize("reduced", [pytest.param(False, marks=pytest.mark.full), True])
@pytest.mark.parametrize("micro_batches", [1, pytest.param(2, marks=pytest.mark.full)])
def test_laws_computed_once_a_batch_change_nothing(
    frozen, params, batch, monkeypatch, reduced, micro_batches
):
    """Six updates of one or two of the sequences, with the target's laws spelt out ahead, in
    pieces, and from its hidden states in every update."""
    cfg = dataclasses.replace(DRAFTER, draft_vocab_size=len(REDUCED) if reduced else None)
    vocab, places = frozen.vocab, None
    if reduced:
        vocab = bind_vocab(cfg, Vocab(None, None, REDUCED), TARGET, frozen.target.vocab)
        params = random_params(21, declare_drafter(cfg))
        places = draft_places(TARGET.vocab_size, REDUCED)
    frozen = Frozen(frozen.target, vocab, places)
    recipe = dataclasses.replace(
        RECIPE, updates_per_batch=6, sequences_per_update=micro_batches,
        micro_batches=micro_batches, tokens_per_batch=2 * LENGTH,
    )  # fmt: skip
    optimizer = make_optimizer(recipe, learning_rate(recipe, 6))
    monkeypatch.setattr("dspark_jax.training.teacher.LAW_ROWS", 7)
    found = []
    for elements in (LAW_ELEMENTS, 0):
        monkeypatch.setattr("dspark_jax.training.teacher.LAW_ELEMENTS", elements)
        assert laws_pay(cfg, recipe, batch.token_BS.size) == bool(elements)
        state = TrainState(jnp.int32(0), params, optimizer.init(params))
        train = partial(step.train_step, target_cfg=TARGET, cfg=cfg, recipe=recipe)
        found.append(jax.jit(partial(train, optimizer=optimizer))(state, frozen, batch))
    (state, metrics), (expected_state, expected) = found
    assert_same(metrics, expected)
    assert_same(state.params, expected_state.params)


def test_micro_batches_change_nothing(frozen, params, batch):
    """Denominators are the whole batch's: the second sequence has far fewer blocks."""
    found = []
    for count in (1, 2):
        recipe = dataclasses.replace(RECIPE, micro_batches=count, tokens_per_batch=2 * LENGTH)

        @jax.jit
        def gradient(params, recipe=recipe):
            target = step.target_outputs(frozen, batch, TARGET, DRAFTER)
            blocks = step.choose_blocks(batch, target, jax.random.key(0), 0.0, DRAFTER, recipe)
            return step.blocks_gradient(params, frozen, blocks, DRAFTER, recipe)

        found.append(gradient(params))
    assert float(found[0][1]["blocks"]) == 8
    assert_same(found[1], found[0])


# The optimiser.


def rates(recipe, total):
    return np.asarray(learning_rate(recipe, total)(jnp.arange(200)))[:total]


def test_learning_rates_are_the_recorded_ones():
    recorded = np.load(DATA / "schedules.npz")
    for index, case in enumerate(json.loads((DATA / "schedules.json").read_text())):
        recipe = dataclasses.replace(
            RECIPE, learning_rate=case["lr"], warmup_fraction=case["warmup_ratio"]
        )
        total = case["total_steps"]
        expected = recorded[f"schedule_{index}/lr"][:total]
        np.testing.assert_allclose(rates(recipe, total), expected, rtol=0, atol=1e-9)


def test_learning_rate_rises_overshoots_and_ends_at_zero():
    recipe = dataclasses.replace(RECIPE, learning_rate=1e-3, warmup_fraction=0.1)
    rate = rates(recipe, 50)
    np.testing.assert_allclose(rate[:5], 1e-3 * np.arange(1, 6) / 5, rtol=1e-6)
    t, decay = np.arange(45), 45
    closed = 1e-3 * (1 + np.cos(np.pi * t / decay)) / (1 + np.cos(np.pi / decay))
    np.testing.assert_allclose(rate[5:], closed, rtol=1e-4, atol=1e-9)
    assert 1e-3 < rate[5] < 1.005e-3
    assert rate[6] == pytest.approx(1e-3, rel=1e-6)
    schedule = learning_rate(recipe, 50)
    assert float(schedule(50)) == pytest.approx(0, abs=1e-10)
    assert float(schedule(70)) == pytest.approx(0, abs=1e-10)  # never rises again


@pytest.mark.parametrize("total", [1, 2, 3])
def test_learning_rate_of_the_shortest_runs_is_finite_and_positive(total):
    for warmup in (0.0, 0.5, 0.9):
        rate = rates(dataclasses.replace(RECIPE, warmup_fraction=warmup), total)
        assert np.isfinite(rate).all()
        assert (rate > 0).all()


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_optimiser_follows_the_recorded_weights(kind):
    """The weights themselves, or the float32 masters of weights that are used in bfloat16.

    The recorded norm of bfloat16 gradients is a bfloat16 number, ours is not: there the recorded
    clipped gradients are fed.
    """
    record = np.load(DATA / f"prescribed_grads_{kind}.npz")
    names = ("w1", "b1", "w2", "scale")
    bfloat16 = kind == "bf16"
    recipe = dataclasses.replace(
        RECIPE, learning_rate=0.006, warmup_fraction=0.1, clip_norm=1e9 if bfloat16 else 1.0
    )
    optimizer = make_optimizer(recipe, learning_rate(recipe, 30))
    params = {name: jnp.asarray(record[f"init/{name}"]) for name in names}
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, gradient):
        change, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, change), state

    for i in range(20):
        given = "clipped_grad" if bfloat16 else "grad"
        gradient = {name: jnp.asarray(record[f"{given}/{name}"][i]) for name in names}
        params, state = update(params, state, gradient)
        for name in names:
            found, note = np.asarray(params[name]), f"{name} {i}"
            master, used = record[f"master/{name}"][i], record[f"param/{name}"][i]
            np.testing.assert_allclose(found, master, rtol=0, atol=2e-6, err_msg=note)
            # What the forward pass sees: where a master lies between two bfloat16 numbers, the
            # last float32 bit decides.
            rounded = found.astype(jnp.bfloat16) if bfloat16 else found
            rtol = 2.0**-7 if bfloat16 else 0
            np.testing.assert_allclose(np.float32(rounded), used, rtol, atol=2e-6, err_msg=note)
            assert not bfloat16 or np.mean(np.float32(rounded) == used) > 0.9


def test_updates_of_a_batch_are_so_many_optimiser_updates(frozen, params, batch, target):
    count = 3
    batch, target = jax.tree.map(lambda x: x[:1], (batch, target))
    recipe = dataclasses.replace(RECIPE, updates_per_batch=count)
    optimizer = make_optimizer(recipe, learning_rate(recipe, 4 * count))
    state = TrainState(jnp.int32(5), params, jax.jit(optimizer.init)(params))
    static = {"target_cfg": TARGET, "cfg": DRAFTER}
    train = jax.jit(partial(step.train_step, recipe=recipe, optimizer=optimizer, **static))
    after, metrics = train(state, frozen, batch)

    @jax.jit
    def update(params, optimizer_state, turn):
        key = jax.random.fold_in(jax.random.key(recipe.seed), 5)
        blocks = step.choose_blocks(batch, target, key, turn, DRAFTER, recipe)
        gradient, seen = step.blocks_gradient(params, frozen, blocks, DRAFTER, recipe)
        change, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        params = optax.apply_updates(params, change)
        return params, optimizer_state, seen["loss"], seen["blocks"]

    expected, optimizer_state, losses_seen, blocks = params, state.optimizer, [], 0.0
    for i in range(count):
        expected, optimizer_state, loss, kept = update(expected, optimizer_state, i / count)
        losses_seen.append(float(loss))
        blocks += float(kept)
    assert int(after.step) == 6
    counts = optax.tree_utils.tree_get_all_with_path(after.optimizer, "count")
    assert {int(value) for _, value in counts} == {count}
    assert float(metrics["blocks"]) == blocks == 4 * count
    assert float(metrics["loss"]) == pytest.approx(np.mean(losses_seen), rel=1e-5)
    assert np.isfinite(metrics["gradient_norm"])
    # Adam divides by the gradient's size: where that is near 0, the last bits decide.
    assert_same(after.params, expected, atol=3e-5)


def test_an_update_that_is_not_finite_is_found_before_it_spoils_the_others(frozen, params, batch):
    """Too large a learning rate: the first update still has its numbers, the second has not."""
    recipe = dataclasses.replace(RECIPE, updates_per_batch=3, learning_rate=1e38, clip_norm=1e9)
    optimizer = make_optimizer(recipe, learning_rate(recipe, 3))
    state = TrainState(jnp.int32(0), params, optimizer.init(params))
    static = {"target_cfg": TARGET, "cfg": DRAFTER, "recipe": recipe, "optimizer": optimizer}
    _, metrics = jax.jit(partial(step.train_step, **static))(state, frozen, batch)
    assert int(metrics["finite_updates"]) == 1
    assert not np.isfinite(metrics["loss"])
    assert int(metrics["blocks"]) == 3 * 8


@pytest.mark.full
def test_the_running_mean_is_that_of_the_weights_after_each_update(frozen, params, batch):
    """Four updates; the weights themselves are those of a run without a mean."""
    recipe = dataclasses.replace(RECIPE, average_decay=0.2)
    optimizer = make_optimizer(recipe, learning_rate(recipe, 4))
    state = TrainState(jnp.int32(0), params, optimizer.init(params))

    def run(state, recipe, steps):
        static = {"target_cfg": TARGET, "cfg": DRAFTER, "recipe": recipe, "optimizer": optimizer}
        advance = jax.jit(partial(step.train_step, **static))
        for _ in range(steps):
            state, _ = advance(state, frozen, batch)
            seen.append(state.result)
        return state

    seen = []
    plain = run(state, dataclasses.replace(recipe, average_decay=0), 4)
    after = run(state.replace(average=params), recipe, 4)
    assert_same(after.params, plain.params)
    mean = params
    for count, weights in enumerate(seen[:4]):
        kept = min(0.2, (1 + count) / (10 + count))
        mean = jax.tree.map(
            lambda old, new, kept=kept: kept * old + (1 - kept) * new, mean, weights
        )
    assert_same(after.result, mean)
    with pytest.raises(AssertionError):
        assert_same(after.result, after.params)
