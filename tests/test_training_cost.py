"""What a training step costs, said by the compiler and by the program: memory and FLOPs.

The step here is what a cached or an online run does once the target's features are there: blocks,
loss, gradient, AdamW. ``straightforward`` is the same mathematics as one writes it first: a mask of
all blocks against all context and all blocks, and the logits of all slots at once.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dspark_jax.axes import abstract_params
from dspark_jax.config import DrafterConfig, TrainConfig
from dspark_jax.models.drafters import dspark as drafter_module
from dspark_jax.models.drafters.dspark import declare_drafter
from dspark_jax.models.vocab import Vocab, unembed
from dspark_jax.training import losses, step
from dspark_jax.training.loss_terms import Decay
from dspark_jax.training.optimizer import learning_rate, make_optimizer
from dspark_jax.training.state import Batch, Frozen
from dspark_jax.training.teacher import make_teacher
from dspark_jax.training.utilisation import drafter_flops
from pallas_kernels import chunks

SMALL = DrafterConfig(
    vocab_size=4096, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
    num_kv_heads=2, head_dim=16, block_size=7, mask_token_id=1, target_layer_ids=(0, 1, 2),
    num_target_layers=6, markov_rank=16, confidence=True,
)  # fmt: skip
QWEN3_4B = DrafterConfig(
    vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_layers=5, num_heads=32,
    num_kv_heads=8, head_dim=128, qk_norm=True, block_size=7, mask_token_id=151669,
    target_layer_ids=(1, 9, 17, 25, 33), num_target_layers=36, markov_rank=256, confidence=True,
)  # fmt: skip
GB = 1e9


def update(params, optimizer_state, frozen, batch, feature_BSFD, hidden_BSD, cfg, recipe, gradient):
    """One optimiser update of a batch whose target features are given."""
    teacher = make_teacher(frozen.vocab, hidden_BSD, False)
    key = jax.random.key(0)
    blocks = step.choose_blocks(batch, (feature_BSFD, teacher), key, 0.0, cfg, recipe)
    gradients, metrics = gradient(params, frozen, blocks, cfg, recipe)
    optimizer = make_optimizer(recipe, learning_rate(recipe, 100))
    change, optimizer_state = optimizer.update(gradients, optimizer_state, params)
    return optax.apply_updates(params, change), optimizer_state, metrics["loss"]


def straightforward_gradient(params, frozen, blocks, cfg, recipe):
    """Dense mask, all logits: the loss as one reads it, differentiated by JAX."""

    def loss_of(params):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(drafter_module, "anchor_attention", dense_attention)
            keep_all = jax.checkpoint_policies.everything_saveable
            patch.setattr(drafter_module, "KEEP_PRODUCTS", keep_all)
            outputs = losses.draft_blocks(
                params, frozen.vocab, blocks.feature_BSFD, blocks.labels, blocks.anchor_BA,
                blocks.keep_BA, cfg,
            )  # fmt: skip
        code, labels = outputs.code_BAGR, blocks.labels
        w2_RU = None if params.head is None else params.head.w2_RU
        logits = losses.draft_logits(unembed(frozen.vocab, outputs.hidden_BAGD), w2_RU, code)
        batch_B11 = jnp.arange(len(labels.label_BAG))[:, None, None]
        target_BSV = jax.nn.softmax(unembed(frozen.vocab, blocks.teacher.hidden_BSD))
        law = target_BSV[batch_B11, labels.position_BAG]
        l1 = jnp.abs(jax.nn.softmax(logits) - law).sum(-1)
        ce = optax.softmax_cross_entropy_with_integer_labels(logits, labels.label_BAG)
        accept = jax.lax.stop_gradient(1 - l1 / 2)
        bce = optax.sigmoid_binary_cross_entropy(outputs.confidence_logit_BAG, accept)
        weight = Decay(recipe.loss_decay)(labels.supervised_BAG)
        total = weight * (recipe.ce_weight * ce + recipe.l1_weight * l1 + bce)
        return total.sum() / (weight.sum() + losses.EPSILON)

    loss, gradient = jax.value_and_grad(loss_of)(params)
    return gradient, {"loss": loss}


def dense_attention(q_BAGNH, k_BSKH, v_BSKH, own, anchor_BA, keep_BA, **_):
    """Every slot against the context and the slots of all blocks, under one boolean mask."""
    batch, anchors, slots, heads, dim = q_BAGNH.shape
    length, groups = k_BSKH.shape[1], heads // k_BSKH.shape[2]
    k, v = (
        jnp.repeat(
            jnp.concatenate([context, mine.reshape(batch, -1, *mine.shape[3:])], 1), groups, 2
        )
        for context, mine in zip((k_BSKH, v_BSKH), own, strict=True)
    )
    score = jnp.einsum("bqnh,bknh->bnqk", q_BAGNH.reshape(batch, -1, heads, dim), k)
    before = jnp.arange(length) < anchor_BA[..., None]
    same = jnp.repeat(jnp.eye(anchors, dtype=bool), slots, 1)
    visible = jnp.concatenate([before, jnp.broadcast_to(same, (batch, *same.shape))], -1)
    visible = jnp.repeat(visible, slots, 1)[:, None]
    weight = jax.nn.softmax(jnp.where(visible, score * dim**-0.5, -jnp.inf))
    out = jnp.einsum("bnqk,bknh->bqnh", weight, v).reshape(q_BAGNH.shape)
    return jnp.where(keep_BA[..., None, None, None], out, 0)


def arguments_of(cfg, length, num_anchors):
    """Abstract arguments of :func:`update` for one sequence, and its static part."""
    recipe = TrainConfig(
        num_anchors=num_anchors, max_length=length, length_buckets=(length,),
        tokens_per_batch=length, block_size=cfg.block_size,
    )  # fmt: skip

    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype)

    width = cfg.hidden_size
    params = abstract_params(declare_drafter(cfg))
    optimizer_state = jax.eval_shape(
        make_optimizer(recipe, learning_rate(recipe, 100)).init, params
    )
    vocab = Vocab(shape(cfg.vocab_size, width), shape(cfg.vocab_size, width))
    batch = Batch(shape(1, length, dtype=jnp.int32), shape(1, length, dtype=bool))
    feature = shape(1, length, len(cfg.target_layer_ids), width)
    arguments = (params, optimizer_state, Frozen(None, vocab, None), batch, feature)
    return (*arguments, shape(1, length, width)), {"cfg": cfg, "recipe": recipe}


def temporary_bytes(cfg, length, num_anchors, gradient=step.blocks_gradient):
    arguments, static = arguments_of(cfg, length, num_anchors)
    compiled = jax.jit(partial(update, gradient=gradient, **static), donate_argnums=(0, 1)).lower(
        *arguments
    )
    return compiled.compile().memory_analysis().temp_size_in_bytes


def inner_jaxprs(equation):
    """The programs inside an equation: bodies of loops, calls, derivatives."""
    values = list(equation.params.values())
    for value in jax.tree.leaves(values, is_leaf=lambda x: hasattr(x, "eqns")):
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner


def largest_array(jaxpr) -> int:
    """Elements of the largest array that a program names anywhere."""
    sizes = [math.prod(getattr(x.aval, "shape", ())) for e in jaxpr.eqns for x in e.outvars]
    inside = [largest_array(inner) for e in jaxpr.eqns for inner in inner_jaxprs(e)]
    return max([0, *sizes, *inside])


def flops_of(jaxpr) -> float:
    """Multiplications and additions of all dots, those in loops as often as they run."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            ((contract, _), _) = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contract)
            total += 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        inside = [flops_of(inner) for inner in inner_jaxprs(equation)]
        # Of the forms that different devices run, one.
        total += max(inside) if equation.primitive.name == "cond" else times * sum(inside)
    return total


def program(cfg, length, num_anchors, gradient=step.blocks_gradient):
    """The jaxpr of :func:`update`, forward and backward."""
    arguments, static = arguments_of(cfg, length, num_anchors)
    return jax.make_jaxpr(partial(update, gradient=gradient, **static))(*arguments).jaxpr


def step_flops(cfg, length, num_anchors):
    return flops_of(program(cfg, length, num_anchors))


@pytest.fixture
def small_chunks(monkeypatch):
    """In proportion to the small model."""
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 2**17)


@pytest.mark.full
def test_memory_hardly_grows_with_the_vocabulary(small_chunks):
    double = dataclasses.replace(SMALL, vocab_size=2 * SMALL.vocab_size)
    base = temporary_bytes(SMALL, 512, 64)
    vocabulary = 4 * SMALL.vocab_size * 2 * SMALL.markov_rank  # the gradient of W1 and W2
    assert temporary_bytes(double, 512, 64) < 1.15 * base + vocabulary
    assert temporary_bytes(SMALL, 512, 64, straightforward_gradient) > 3 * base


@pytest.mark.full
def test_memory_grows_no_faster_than_the_anchors(small_chunks):
    assert temporary_bytes(SMALL, 512, 128) < 2 * temporary_bytes(SMALL, 512, 64)


def test_no_logits_and_no_scores_of_all_blocks_exist(small_chunks):
    """Forward and backward; what is largest is a weight of the vocabulary."""
    length, num_anchors = 512, 64
    rows, weight = num_anchors * SMALL.block_size, SMALL.vocab_size * SMALL.hidden_size
    logits = rows * SMALL.vocab_size
    scores = rows * SMALL.num_heads * (length + SMALL.block_size)
    assert weight < min(logits, scores) / 3
    assert largest_array(program(SMALL, length, num_anchors)) <= weight
    assert largest_array(program(SMALL, length, num_anchors, straightforward_gradient)) >= logits
    no_heads = dataclasses.replace(SMALL, vocab_size=64, markov_rank=0)
    assert largest_array(program(no_heads, length, num_anchors)) < scores / 3
    assert largest_array(program(no_heads, length, num_anchors, straightforward_gradient)) >= scores


@pytest.mark.parametrize("length", [256, 1024])
def test_flops_are_those_of_the_mathematics(small_chunks, length):
    ratio = step_flops(SMALL, length, 64) / drafter_flops(SMALL, length, 64)
    assert 0.95 < ratio < 1.25


@pytest.mark.full
def test_the_straightforward_step_computes_the_same(small_chunks):
    """Otherwise the comparisons would say nothing."""
    arguments, static = arguments_of(SMALL, 64, 8)
    random = np.random.default_rng(0)
    arguments = jax.tree.map(
        lambda x: np.asarray(0.2 * random.normal(size=x.shape), x.dtype), arguments
    )
    params, _, frozen, _, feature, hidden = arguments
    batch = Batch(random.integers(0, 99, (1, 64)).astype(np.int32), np.arange(64)[None] > 20)
    optimizer_state = make_optimizer(static["recipe"], learning_rate(static["recipe"], 100)).init(
        params
    )
    found = [
        jax.jit(partial(update, gradient=gradient, **static))(
            params, optimizer_state, frozen, batch, feature, hidden
        )[1:]
        for gradient in (step.blocks_gradient, straightforward_gradient)
    ]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-6), *found)


@pytest.mark.full
def test_memory_of_the_4b_drafter():
    """One sequence of 4096 tokens, 512 anchors, blocks of 7, float32."""
    base = temporary_bytes(QWEN3_4B, 4096, 512)
    plain = temporary_bytes(QWEN3_4B, 4096, 512, straightforward_gradient)
    double = dataclasses.replace(QWEN3_4B, vocab_size=2 * QWEN3_4B.vocab_size)
    wide, many = temporary_bytes(double, 4096, 512), temporary_bytes(QWEN3_4B, 4096, 1024)
    assert base <= 8 * GB
    assert plain >= 5 * base
    assert wide <= 1.15 * base
    assert many <= 2 * base


@pytest.mark.full
@pytest.mark.parametrize("length", [1024, 2048, 4096])
def test_flops_of_the_4b_drafter(length):
    ratio = step_flops(QWEN3_4B, length, 512) / drafter_flops(QWEN3_4B, length, 512)
    assert 0.95 < ratio < 1.25, ratio
