"""The drafters inside DeepSeek-V4's checkpoints, against the inference programs that ship there."""

import contextlib
import functools
import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.axes import empty_buffers
from dspark_jax.checkpoints.tensor_names import renamed
from dspark_jax.checkpoints.tensors import Tensors, read_params
from dspark_jax.checkpoints.weight_files import read_tensors
from dspark_jax.models.cache import Room, Rows
from dspark_jax.models.drafters import deepseek_v4 as drafters
from dspark_jax.models.drafters import deepseek_v4_mtp as mtp
from dspark_jax.models.drafters import ring
from dspark_jax.models.targets import deepseek_v4 as targets
from dspark_jax.models.targets import deepseek_v4_layers as layers
from dspark_jax.models.targets.deepseek_v4_names import declared_name
from dspark_jax.models.vocab import unembed
from pallas_kernels.accept_block.xla import first_argmax

GOLDEN = Path(__file__).parent / "data" / "deepseek_v4"
TOLERANCE = {"atol": 2e-4, "rtol": 0}  # of the golden: its programs differ by 6e-5
WINDOW, STAGES, BLOCK = 8, 3, 5
ANCHORS = 2, 5, 8, 9, 11, 21, 39


def own_tensors(path, prefix="mtp."):
    tensors = read_tensors(path)
    shapes = {name: shape for name, shape in tensors.shapes.items() if name.startswith(prefix)}
    return Tensors(tensors.origin, shapes, tensors.read)


@functools.cache
def models():
    """Target and drafter: (cfg, weights) each."""
    hf = json.loads((GOLDEN / "checkpoint" / "config.json").read_text())
    cfg = targets.config(hf)
    tensors = renamed(read_tensors(GOLDEN / "checkpoint"), declared_name)
    target = read_params(targets.declare(cfg), tensors, jnp.float32)
    own = drafters.config(hf, cfg, STAGES)
    declared = drafters.declare_drafter(own)
    drafter = read_params(declared, own_tensors(GOLDEN / "checkpoint"), jnp.float32)
    return (cfg, target), (own, drafter)


@functools.cache
def golden(name):
    return dict(np.load(GOLDEN / f"{name}.npz"))


@functools.partial(jax.jit, static_argnums=(0, 1))
def observe(family, own, drafter, vocab, context, rows, feature_TFD, token_BS, length_B):
    return family.observe(drafter, vocab, context, rows, feature_TFD, token_BS, length_B, own)


def observed(family, own, drafter, feature_BSFD, token_BS, start, end, context=None):
    """The context after positions start..end-1 of both sequences were read and committed, and the
    token behind them; 40 rows, of which the others are padding."""
    if context is None:
        context = empty_buffers(family.declare_context(own, Room(2, 64, 8, jnp.float32)))
    slot_BS, position_BS = np.indices((2, 40))
    slot_BS[:, :start] = slot_BS[:, end:] = 2
    rows = Rows(token_BS.reshape(-1), slot_BS.reshape(-1), position_BS.reshape(-1))
    feature_TFD = feature_BSFD.reshape(-1, *feature_BSFD.shape[2:])
    given = context, rows, feature_TFD, token_BS, jnp.full(2, end + 1, jnp.int32)
    return observe(family, own, drafter, models()[0][1].vocab, *given)


@functools.cache
def features():
    feature_BSI = golden("target")["features"]
    return jnp.asarray(feature_BSI.reshape(2, 40, STAGES, -1))


def greedy_block(family, own, drafter, context, anchor_B, position_B):
    choose = lambda logits, slot: first_argmax(logits)  # noqa: E731
    laws = choose, lambda logits, slot: logits
    vocab = models()[0][1].vocab
    return family.draft(drafter, vocab, context, anchor_B, position_B, *laws, own, kernels="xla")


@functools.cache
def compiled_draft():
    own, drafter = models()[1]

    def draft(drafter, context, anchor_B, position_B):
        return greedy_block(drafters, own, drafter, context, anchor_B, position_B)

    return functools.partial(jax.jit(draft), drafter)


@pytest.mark.parametrize("anchor", ANCHORS)
def test_drafts_and_confidences_are_those_of_the_inference_program(anchor):
    """Anchors before, at and behind the end of the first window."""
    own, drafter = models()[1]
    record = {name: golden("draft")[f"p{anchor}/{name}"] for name in (
        "anchor_token", "context_keys", "logits", "drafts", "confidence",
    )}  # fmt: skip
    token_BS = jnp.asarray(golden("target")["input_ids"], jnp.int32)
    context = observed(drafters, own, drafter, features(), token_BS, 0, anchor)
    position_BS = np.asarray(ring.positions(jnp.full(2, anchor), WINDOW))
    for place, position in enumerate(position_BS[0]):
        if position >= 0:
            expected = record["context_keys"][:, :, position - max(anchor - WINDOW, 0)]
            np.testing.assert_allclose(context[:, :, place], expected, **TOLERANCE)
    assert (position_BS >= 0).sum() == 2 * record["context_keys"].shape[2]
    block = compiled_draft()(context, record["anchor_token"], jnp.full(2, anchor))
    np.testing.assert_allclose(block.logits_BGU, record["logits"], **TOLERANCE)
    np.testing.assert_array_equal(block.token_BG, record["drafts"])
    np.testing.assert_allclose(block.confidence_logit_BG, record["confidence"], **TOLERANCE)


@functools.cache
def compiled_stages():
    """The last states of blocks, and all that is recorded while the stages run."""
    (_, target), (own, drafter) = models()

    def run(drafter, context, anchor_B, position_B):
        seen = {}

        def recorded(module, name):
            function = getattr(module, name)

            def record(*args, **options):
                seen.setdefault(name, []).append(function(*args, **options))
                return seen[name][-1]

            return mock.patch.object(module, name, record)

        def held(layer, index):
            return context[index], ring.positions(position_B, WINDOW) >= 0

        with contextlib.ExitStack() as stack:
            for module, names in (
                (layers, ("output", "experts", "route")),
                (drafters, ("read_layer",)),
            ):
                for name in names:
                    stack.enter_context(recorded(module, name))
            given = anchor_B, position_B, held, own
            x_BGJD = drafters.block_streams(drafter, target.vocab, *given)
        return drafters.read_out(drafter, x_BGJD, own), seen

    single = drafters.for_decoding(drafter, donate=False)
    return functools.partial(jax.jit(run), single)


@pytest.mark.parametrize("anchor", [5, 21])
def test_every_stage_is_that_of_the_inference_program(anchor):
    """Streams, outputs of attention and experts, and routes."""
    (_, target), (own, drafter) = models()
    token_BS = jnp.asarray(golden("target")["input_ids"], jnp.int32)
    context = observed(drafters, own, drafter, features(), token_BS, 0, anchor)
    (state_BGD, hidden_BGD), seen = compiled_stages()(
        context, token_BS[:, anchor], jnp.full(2, anchor)
    )
    expected = {
        name.partition("/")[2]: value
        for name, value in golden("draft").items()
        if name.startswith(f"p{anchor}/")
    }
    context_BSD = drafters.context_inputs(drafter, features(), own)
    first = max(anchor - WINDOW, 0)
    np.testing.assert_allclose(context_BSD[:, first:anchor], expected["context"], **TOLERANCE)
    for stage in range(STAGES):
        np.testing.assert_allclose(
            seen["read_layer"][stage][0], expected["streams"][stage], **TOLERANCE
        )
        np.testing.assert_allclose(seen["output"][stage], expected["attn_out"][stage], **TOLERANCE)
        np.testing.assert_allclose(seen["experts"][stage], expected["ffn_out"][stage], **TOLERANCE)
        expert_BGC, weight_BGC = seen["route"][stage]
        order, known = np.argsort(expert_BGC), np.argsort(expected["route_idx"][stage])
        for found, name in ((expert_BGC, "route_idx"), (weight_BGC, "route_weight")):
            found = np.take_along_axis(np.asarray(found), order, -1)
            wanted = np.take_along_axis(expected[name][stage], known, -1)
            np.testing.assert_allclose(found, wanted, **TOLERANCE)
    np.testing.assert_allclose(state_BGD, expected["head_hidden"], **TOLERANCE)
    np.testing.assert_allclose(
        unembed(target.vocab, hidden_BGD), expected["base_logits"], **TOLERANCE
    )


@functools.cache
def compiled_round():
    """A block is drafted, and the rows that verify it are observed, most of them rejected."""
    own, drafter = models()[1]
    vocab = models()[0][1].vocab

    def step(drafter, context, token_1S, position, feature_CFD, length):
        position_B = jnp.full(1, position)
        block = greedy_block(drafters, own, drafter, context, token_1S[0, position_B], position_B)
        rows = Rows(None, jnp.zeros(BLOCK + 1, int), position + jnp.arange(BLOCK + 1))
        given = context, rows, feature_CFD, token_1S, jnp.full(1, length)
        return block, drafters.observe(drafter, vocab, *given, own)

    return functools.partial(jax.jit(step), drafter)


@pytest.mark.parametrize("run", range(3))
def test_a_whole_text_round_by_round(run):
    """What is observed of rejected drafts is of no consequence, whatever it is."""
    (cfg, target), (own, drafter) = models()
    record = {name: golden("draft")[f"run{run}/{name}"] for name in (
        "tokens", "prompt_len", "anchors", "drafts", "confidence", "accepted",
    )}  # fmt: skip
    token_1S = jnp.asarray(record["tokens"], jnp.int32)[None]
    encode = jax.jit(targets.encode, static_argnums=(2, 3))
    _, feature_1SFD = encode(target, token_1S, cfg, own.target_layer_ids)
    prompt, random = int(record["prompt_len"]), np.random.default_rng(run)
    declared = drafters.declare_context(own, Room(1, 64, 8, jnp.float32))
    rows = Rows(None, jnp.zeros(prompt, int), jnp.arange(prompt))
    given = rows, feature_1SFD[0, :prompt], token_1S, jnp.full(1, prompt + 1)
    context = drafters.observe(drafter, target.vocab, empty_buffers(declared), *given, own)
    rounds = zip(*(record[name] for name in ("anchors", "drafts", "confidence", "accepted")),
                 strict=True)  # fmt: skip
    for anchor, drafts, confidence, accepted in rounds:
        feature_CFD = random.normal(size=(BLOCK + 1, *feature_1SFD.shape[2:])).astype(np.float32)
        feature_CFD[: accepted + 1] = feature_1SFD[0, anchor : anchor + accepted + 1]
        length = anchor + accepted + 2
        block, context = compiled_round()(context, token_1S, anchor, feature_CFD, length)
        np.testing.assert_array_equal(block.token_BG[0], drafts)
        np.testing.assert_allclose(block.confidence_logit_BG[0], confidence, **TOLERANCE)


def test_a_long_chunk_leaves_its_last_positions_and_padding_nothing():
    window, places = 4, 3
    rows = Rows(None, jnp.array([0] * 6 + [1, 1, 2, 2]), jnp.array([0, 1, 2, 3, 4, 5, 7, 8, 0, 1]))
    kept = ring.kept_slots(rows, jnp.array([6, 10]), window)
    # Of slot 0 its anchor is at 5, of slot 1 at 9; slot 2 is padding.
    np.testing.assert_array_equal(kept, [2, 0, 0, 0, 0, 2, 1, 1, 2, 2])
    held = ring.positions(jnp.array([0, 2, 5]), places)
    np.testing.assert_array_equal(held, [[-3, -2, -1], [0, 1, -1], [3, 4, 2]])


@functools.cache
def chained():
    """The drafter for the next token but one: (cfg, weights)."""
    own = mtp.config(models()[0][0])
    tensors = own_tensors(GOLDEN / "mtp1")
    return own, read_params(mtp.declare_drafter(own), tensors, jnp.float32)


def test_entries_of_a_known_text_are_those_of_the_inference_program():
    own, drafter = chained()
    vocab = models()[0][1].vocab
    stream_BSJD = jnp.asarray(golden("target")["streams"][-1])[:, :-1]
    token_BS = jnp.asarray(golden("target")["input_ids"], jnp.int32)
    x_BSJD = mtp.entry_inputs(drafter, vocab, token_BS[:, 1:], stream_BSJD, own)
    position_BS = jnp.broadcast_to(jnp.arange(39), (2, 39))
    key_BSH = mtp.entry_keys(drafter, x_BSJD, position_BS, own)

    def flat(x_BSX):
        return x_BSX.reshape(78, *x_BSX.shape[2:])

    @jax.jit
    def entries(x_PJD, token_P, position_P, key_PSH):
        found = []
        place_PS = jnp.broadcast_to(jnp.arange(39), (78, 39))
        given = x_PJD, token_P, position_P + 1, key_PSH, place_PS
        mtp.chain(
            drafter, vocab, *given, lambda x_PJD, slot: found.append(x_PJD),
            replace(own, block_size=1),
        )  # fmt: skip
        return found[0]

    key_PSH = jnp.repeat(key_BSH, 39, axis=0)
    x_PJD = entries(flat(stream_BSJD), flat(token_BS[:, 1:]), flat(position_BS), key_PSH)
    np.testing.assert_allclose(x_PJD, flat(golden("mtp1")["teacher_streams"]), **TOLERANCE)
    logits_PV = unembed(vocab, mtp.read_out(drafter, x_PJD, own)[1])
    np.testing.assert_allclose(logits_PV, flat(golden("mtp1")["teacher_logits"]), **TOLERANCE)


@functools.cache
def compiled_chain():
    """The blocks behind anchors, and the streams of their steps."""
    own, drafter = chained()

    def draft(drafter, context, anchor_B, position_B):
        found, read_out = [], mtp.read_out

        def recorded(drafter, x_XJD, cfg):
            found.append(x_XJD)
            return read_out(drafter, x_XJD, cfg)

        with mock.patch.object(mtp, "read_out", recorded):
            block = greedy_block(mtp, own, drafter, context, anchor_B, position_B)
        return block, jnp.stack(found, axis=1)

    return functools.partial(jax.jit(draft), drafter)


@pytest.mark.parametrize("anchor", [12, 20, 38])
def test_chains_are_those_of_the_inference_program(anchor):
    own, drafter = chained()
    stream_BSJD = jnp.asarray(golden("target")["streams"][-1])
    token_BS = jnp.asarray(golden("target")["input_ids"], jnp.int32)
    # In two pieces, of which the second is the last position before the anchor alone.
    given = mtp, own, drafter, stream_BSJD, token_BS
    context = observed(*given, 0, anchor - 1)
    context = observed(*given, anchor - 1, anchor, context)
    block, stream_BGJD = compiled_chain()(context, token_BS[:, anchor], jnp.full(2, anchor))
    record = {name: golden("mtp1")[f"p{anchor}/{name}"] for name in ("drafts", "logits", "streams")}
    np.testing.assert_array_equal(block.token_BG, record["drafts"])
    np.testing.assert_allclose(block.logits_BGU, record["logits"], **TOLERANCE)
    np.testing.assert_allclose(stream_BGJD, record["streams"], **TOLERANCE)
