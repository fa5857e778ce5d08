"""Offline generation: a batch of requests through jitted rounds, read one round late."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from dspark_jax.engine.decoder import Decoder, state_config
from dspark_jax.engine.inputs import RoundConfig, RoundInput, RoundReport
from dspark_jax.engine.programs import num_shards, prefill_program, round_program
from dspark_jax.engine.reader import Generation, Reader
from dspark_jax.engine.request import Request
from dspark_jax.engine.state import DecodeState, StateConfig, make_state
from dspark_jax.scheduler.calibration import confidence_temperatures
from dspark_jax.scheduler.policy import make_policy
from pallas_kernels.dispatch import Implementation, require_kernels

PREFILL_ROWS = 128
POSITION_STEP = 128


def generate(
    decoder: Decoder,
    requests: Sequence[Request],
    *,
    policy: str = "",
    acceptance: Literal["rejection", "coupled"] = "rejection",
    kernels: Implementation = "xla",
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """Continue a batch of prompts of different lengths, all decoded together.

    Args:
        decoder: weights; without a drafter every round commits one token.
        requests: the batch.
        policy: which drafts are verified, see ``policy.py``; one that needs no seconds. Empty is
            the whole block, or nothing without a drafter.
        acceptance, kernels: see ``RoundConfig``.
        on_text: called with (request, new text) as text is verified.

    Returns:
        One result a request, in their order.

    Raises:
        ValueError: a request cannot be decoded; the message names the field and the remedy.
    """
    if not requests:
        return []
    for request in requests:
        request.check(decoder.target.max_positions, decoder.target.vocab_size)
    cfg = round_config(decoder, requests, policy, acceptance, kernels)
    form = _form(decoder, requests, cfg)
    state = make_state(requests, form, decoder.mesh)
    plain = dataclasses.replace(cfg, num_draft=0, threshold=0.0, gate=0.0)
    longest = max(len(request.prompt_ids) for request in requests)
    for start in range(0, longest - 1, PREFILL_ROWS):
        rows = min(PREFILL_ROWS, _round_up(longest - 1 - start, 16))
        read_prompts = prefill_program(plain, form, rows, decoder.mesh)
        state = read_prompts(decoder.weights, state, np.int32(start))

    num_slots = state.length_B.shape[0]
    temperature_BG = _temperatures(decoder, requests, num_slots, acceptance)
    stop_at = np.asarray(state.stop_at_B).tolist()
    readers = [
        Reader(request, stop_at[slot] - len(request.prompt_ids), decoder.tokenizer)
        for slot, request in enumerate(requests)
    ]

    def read(report: RoundReport, first: bool) -> None:
        report = jax.device_get(report)
        for slot, reader in enumerate(readers):
            text = reader.read(report, slot, first)
            if text and on_text is not None:
                on_text(slot, text)

    def running() -> np.ndarray:
        goes_on = [not reader.result.finish_reason for reader in readers]
        return np.array(goes_on + [False] * (num_slots - len(goes_on)))

    def step(state: DecodeState, cfg: RoundConfig) -> tuple[DecodeState, RoundReport]:
        rows_per_shard = num_slots * (cfg.num_draft + 1) // num_shards(decoder.mesh)
        program = round_program(cfg, form, rows_per_shard, 0, decoder.mesh)
        given = RoundInput(jnp.asarray(running()), temperature_BG=temperature_BG)
        return program(decoder.weights, state, given)

    # The host reads a round while the next one runs, unless that one might be the last.
    state, report = step(state, plain)
    first = True
    while True:
        late = None
        if any(reader.may_outlast(1 if first else cfg.num_draft + 1) for reader in readers):
            state, late = step(state, cfg)
        read(report, first)
        first = False
        if late is None and running().any():
            state, late = step(state, cfg)
        if late is None:
            return [reader.result for reader in readers]
        report = late


def round_config(
    decoder: Decoder,
    requests: Sequence[Request],
    name: str,
    acceptance: Literal["rejection", "coupled"],
    kernels: Implementation = "xla",
) -> RoundConfig:
    """The static part of a round.

    Args:
        decoder, requests, acceptance, kernels: as for :func:`generate`.
        name: of the policy; empty as there.

    Raises:
        ValueError: a value is out of range, or needs what is not there.
    """
    require_kernels(kernels)
    whole = "none" if decoder.drafter is None else "block"
    policy = make_policy(name or whole, decoder.drafter)
    if policy.needs_seconds:
        raise ValueError(
            f"policy is {name!r}, which weighs the seconds of rounds: use an Engine, or choose "
            "none, block, fixed:K, threshold:P or gate:P"
        )
    if acceptance not in ("rejection", "coupled"):
        raise ValueError(f"acceptance is {acceptance!r}: choose 'rejection' or 'coupled'")
    return RoundConfig(
        target=decoder.target,
        drafter=decoder.drafter,
        num_draft=policy.num_draft,
        threshold=policy.threshold,
        gate=policy.gate,
        acceptance=acceptance,
        greedy=all(request.temperature == 0 for request in requests),
        kernels=kernels,
    )


def _temperatures(
    decoder: Decoder, requests: Sequence[Request], num_slots: int, acceptance: str
) -> Any:
    """float32 [B, G] of the calibration of confidences; None without one."""
    if decoder.calibration is None or decoder.drafter is None:
        return None
    block_size = decoder.drafter.block_size
    temperature_BG = np.ones((num_slots, block_size), np.float32)
    for slot, request in enumerate(requests):
        temperature_BG[slot] = confidence_temperatures(
            decoder.calibration, acceptance, request.temperature, block_size
        )
    return jnp.asarray(temperature_BG)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _form(decoder: Decoder, requests: Sequence[Request], cfg: RoundConfig) -> StateConfig:
    """Of the state: sizes are rounded up, so that batches alike in size share a program."""
    longest = max(len(r.prompt_ids) + r.max_new_tokens for r in requests)
    num_positions = _round_up(
        min(longest, decoder.target.max_positions) + cfg.num_draft + 1, POSITION_STEP
    )
    num_slots = _round_up(len(requests), num_shards(decoder.mesh))
    num_stop_ids = max(1, *(len(request.stop_ids) for request in requests))
    return state_config(decoder, num_slots, num_positions, num_stop_ids)
