"""The decoding state of DeepSeek-V4: drafts that are rejected leave no trace in it, prompts are
read in any pieces, and the text is that of the inference program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dspark_jax.axes import empty_buffers
from dspark_jax.models import cache as kv
from dspark_jax.models.cache import Room, Rows
from dspark_jax.models.stacks import stacks_of
from dspark_jax.models.targets import deepseek_v4 as family
from dspark_jax.models.vocab import unembed
from tests.test_deepseek_v4 import TOLERANCE, checkpoint, golden

POSITIONS, DRAFTS = 206, 5
ROWS = DRAFTS + 1


@pytest.fixture(autouse=True)
def short_rings(monkeypatch):
    monkeypatch.setattr(kv, "RING_STEP", 1)


@functools.partial(jax.jit, donate_argnums=1)
def step(target, cache, rows, chunks=None):
    cfg, _ = checkpoint()
    hidden_TD, _, cache = family.extend(target, cache, rows, cfg, rows_per_slot=ROWS, chunks=chunks)
    return unembed(target.vocab, hidden_TD), cache


def new_state(slots, ahead=ROWS):
    """One whose every place holds what nothing may be computed from: no numbers."""
    cfg, _ = checkpoint()
    room = Room(slots, POSITIONS, ahead, jnp.float32, drafts=DRAFTS)
    return jax.tree.map(lambda x: x + jnp.nan, empty_buffers(family.declare_cache(cfg, room)))


def rows_of(token_BC, start_B, count_B):
    """The first ``count_B`` of some tokens, from position ``start_B`` on."""
    slots, columns = token_BC.shape
    slot_BC = np.broadcast_to(np.arange(slots)[:, None], token_BC.shape)
    slot_BC = np.where(np.arange(columns) < count_B[:, None], slot_BC, slots)
    parts = token_BC, slot_BC, start_B[:, None] + np.arange(columns)
    return Rows(*(jnp.asarray(part.reshape(-1), jnp.int32) for part in parts))


def visible(cache, length_B):
    """What the next row of every slot can see, and what its entries are made of."""
    cfg, _ = checkpoint()
    for stack, state in zip(stacks_of(family.sections(cfg)), cache, strict=True):
        ratio, span = stack.kind.ratio, stack.kind.ratio * (1 + stack.kind.sparse)
        for slot, length in enumerate(length_B):
            window = np.arange(max(0, length - cfg.window(0) + 1), length)
            yield state.key[:, slot, window % state.key.shape[2]]
            for entries in (state.entries, state.index):
                if entries is not None:
                    latest = np.arange(max(0, length - span + 1), length)
                    yield entries.raw[:, slot, latest % entries.raw.shape[2]]
                    yield entries.key[:, slot, : length // ratio]


def decode(token_BS, draws=None):
    """The logits of every position, and the state, after rounds whose drafts are those of the text
    up to the first that is rejected.

    Args:
        token_BS: texts.
        draws: of how many drafts are right; None decodes without any.
    """
    _, target = checkpoint()
    slots, length = token_BS.shape
    cache = new_state(slots)
    done_B, logits_BSV = np.zeros(slots, int), np.zeros((slots, length, 131), np.float32)
    while (done_B < length).any():
        most = 1 if draws is None else ROWS
        right_B = np.ones(slots, int) if draws is None else draws.integers(1, ROWS + 1, slots)
        right_B = np.minimum(right_B, length - done_B)
        column_C = np.arange(ROWS)
        place_BC = np.minimum(done_B[:, None] + column_C, length - 1)
        token_BC = np.take_along_axis(token_BS, place_BC, axis=1)
        token_BC = np.where(column_C < right_B[:, None], token_BC, (token_BC + 7) % 131)
        rows = rows_of(token_BC, done_B, np.where(done_B < length, most, 0))
        logits_TV, cache = step(target, cache, rows)
        read_BCV = np.asarray(logits_TV).reshape(slots, ROWS, -1)
        for slot, (start, right) in enumerate(zip(done_B, right_B, strict=True)):
            logits_BSV[slot, start : start + right] = read_BCV[slot, :right]
        done_B = done_B + right_B
    return logits_BSV, jax.device_get(cache)


def check_patterns(seed, slots, length):
    """As many patterns as there are slots, against texts that were never drafted."""
    draws = np.random.default_rng(seed)
    token_BS = draws.integers(0, 131, (slots, length))
    plain_BSV, plain = decode(token_BS)
    logits_BSV, cache = decode(token_BS, draws)
    np.testing.assert_allclose(logits_BSV, plain_BSV, atol=1e-5, rtol=0)
    length_B = np.full(slots, length)
    for found, expected in zip(visible(cache, length_B), visible(plain, length_B), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


def test_rejected_rows_leave_no_trace_whatever_is_accepted():
    check_patterns(0, 8, 60)


@pytest.mark.full
def test_rejected_rows_leave_no_trace_in_500_patterns_over_200_positions():
    for seed in range(10):
        check_patterns(1 + seed, 50, 200)


@pytest.mark.parametrize("width", [16, pytest.param(5, marks=pytest.mark.full)])
def test_a_prompt_in_pieces_and_then_greedy_text_are_those_of_the_inference_program(width):
    """Two pieces a pass, longer than the rings of raw inputs, or shorter than a window."""
    _, target = checkpoint()
    input_BS, start = golden()["input_ids"], int(golden()["greedy_prompt_len"])
    texts = []
    for row in range(2):
        cache, slot = new_state(2, 2 * width), 1 - row
        nothing = rows_of(np.zeros((2, ROWS), int), np.zeros(2, int), np.zeros(2, int))
        logits = []
        for first in range(0, start, 2 * width):
            position_PW = first + np.arange(2 * width).reshape(2, width)
            slot_PW = np.where(position_PW < start, slot, 2)
            token_PW = input_BS[row][np.minimum(position_PW, start - 1)]
            parts = token_PW, slot_PW, position_PW
            chunks = Rows(*(jnp.asarray(part, jnp.int32) for part in parts))
            logits_TV, cache = step(target, cache, nothing, chunks)
            logits.append(np.asarray(logits_TV[2 * ROWS :]))
        logits_SV = np.concatenate(logits)[:start]
        np.testing.assert_allclose(logits_SV, golden()["logits"][row, :start], **TOLERANCE)
        text, start_B = [int(logits_SV[-1].argmax())], np.zeros(2, int)
        for position in range(start, start + 31):
            token_BC, count_B = np.full((2, ROWS), text[-1]), np.zeros(2, int)
            start_B[slot], count_B[slot] = position, 1
            logits_TV, cache = step(target, cache, rows_of(token_BC, start_B, count_B))
            text.append(int(logits_TV[slot * ROWS].argmax()))
        texts.append(text)
    np.testing.assert_array_equal(texts, golden()["greedy"])
