"""Rounds by hand: a state whose prompts were read, for experiments that look at every array."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from dspark_jax.engine.config import POSITION_STEP, EngineConfig, round_up
from dspark_jax.engine.decoder import state_config
from dspark_jax.engine.engine import Loaded
from dspark_jax.engine.inputs import Chunks, RoundConfig, RoundInput, Weights
from dspark_jax.engine.request import Request
from dspark_jax.engine.round import decode_round
from dspark_jax.engine.shaping import is_shaped
from dspark_jax.engine.state import DecodeState, make_state


def read_prompts(
    model: Loaded, requests: Sequence[Request]
) -> tuple[Weights, DecodeState, RoundInput, RoundConfig]:
    """What ``decode_round`` takes, after a round that read prompts and committed a token of each.

    The engine does the same in pieces, for requests that come and go; here they stay in their
    slots, in their order.

    Args:
        model: of ``dspark_jax.load``, on one device.
        requests: B of them, one a slot.

    Returns:
        The weights; the state of B slots; the input of a round in which all of them go on; and the
        static part, which verifies whole blocks.

    Raises:
        ValueError: a request cannot be used; names the field and the remedy.

    >>> weights, state, given, cfg = read_prompts(load(), [Request(prompt="Hello!")])
    >>> state.length_B.shape, given.keep_B.shape
    ((1,), (1,))
    """
    decoder = model.decoder
    found = [one.resolve(decoder.encode, decoder.stop_ids) for one in requests]
    for one in found:
        one.check(decoder.target.max_positions, decoder.target.vocab_size)
        if is_shaped(one):
            raise ValueError("a request has penalties, biases or a grammar: submit it to an Engine")
    drafts = 0 if decoder.drafter is None else decoder.drafter.block_size
    read = max(max(len(one.prompt_ids) for one in found) - 1, 1)
    longest = max(len(one.prompt_ids) + one.max_new_tokens for one in found)
    config = EngineConfig(
        slots=len(found),
        chunk_rows=read,
        chunk_buckets=(len(found),),
        stop_ids=max(1, *(len(one.stop_ids) for one in found)),
    )
    positions = round_up(longest + drafts + 1, POSITION_STEP)
    form = state_config(decoder, len(found), positions, config)
    slot_B = jnp.arange(len(found), dtype=jnp.int32)
    count_B = jnp.array([len(one.prompt_ids) - 1 for one in found], jnp.int32)
    everybody_B = jnp.ones_like(slot_B, bool)
    chunks = Chunks(slot_B, jnp.zeros_like(slot_B), count_B, everybody_B)
    cfg = RoundConfig(decoder.target, decoder.drafter, drafts)
    first = partial(
        decode_round, cfg=replace(cfg, num_draft=0), num_rows=len(found), rows_per_chunk=read
    )
    state, _ = jax.jit(first)(
        decoder.weights, make_state(found, form), RoundInput(everybody_B, chunks)
    )
    return decoder.weights, state, RoundInput(everybody_B), cfg
