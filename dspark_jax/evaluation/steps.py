"""Seconds of the parts of one decoding round, each timed as a program of its own.

    plain    a whole round of the target alone: one token
    draft    a block of the drafter
    verify   the rest of a round with drafts: the target over ``num_draft + 1`` rows, its LM head,
             acceptance, and the drafter's context

Plain rounds cost ``plain`` a token, rounds with drafts ``draft + verify`` for as many tokens as
are accepted: the quotient is the accepted length at which drafting begins to pay.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.engine import verify
from dspark_jax.engine.decoder import Decoder, make_decoder, state_config
from dspark_jax.engine.generate import POSITION_STEP
from dspark_jax.engine.inputs import RoundConfig, RoundInput, Weights
from dspark_jax.engine.request import Request
from dspark_jax.engine.round import accept, decode_round, draft
from dspark_jax.engine.rows import flat_rows, inject_rows, read_rows
from dspark_jax.engine.state import DecodeState, make_state
from dspark_jax.models.drafters.heads import DraftBlock

REPLAYS, WARM_REPLAYS = 30, 3


def plain_decoder(decoder: Decoder) -> Decoder:
    """The same weights without the drafter: no features are extracted for it either."""
    return make_decoder(
        (decoder.target, decoder.weights.target), None, decoder.tokenizer, decoder.mesh
    )


def step_seconds(
    decoder: Decoder, request: Request, cfg: RoundConfig, replays: int = REPLAYS
) -> dict[str, float]:
    """Median seconds of the parts of a round of one request, each a program of its own.

    Args:
        decoder: weights with a drafter.
        request: gives the sizes.
        cfg: of the rounds with drafts.
        replays: how often each program is timed; they take turns.

    Returns:
        ``plain``, ``verify`` and ``draft``, which is 0 where ``cfg`` drafts nothing.
    """
    plain = plain_decoder(decoder)
    plain_cfg = dataclasses.replace(cfg, drafter=None, num_draft=0, threshold=0.0, gate=0.0)
    plain_fn = jax.jit(partial(_plain_step, cfg=plain_cfg), donate_argnums=1)
    draft_fn = jax.jit(partial(_draft_step, cfg=cfg))
    verify_fn = jax.jit(partial(_verify_step, cfg=cfg), donate_argnums=1)
    plain_state = _single_state(plain, request, 0)
    state = _single_state(decoder, request, cfg.num_draft)

    seconds: dict[str, list[float]] = {"plain": [], "verify": [], "draft": []}

    def clocked(name: str, function: Callable[..., Any], *args: Any) -> Any:
        began = time.perf_counter()
        out = jax.block_until_ready(function(*args))
        seconds[name].append(time.perf_counter() - began)
        return out

    block = None
    for _ in range(WARM_REPLAYS + replays):
        plain_state, _ = clocked("plain", plain_fn, plain.weights, plain_state)
        if cfg.num_draft:
            block = clocked("draft", draft_fn, decoder.weights, state)
        state, _ = clocked("verify", verify_fn, decoder.weights, state, block)
    return {
        name: round(statistics.median(values[WARM_REPLAYS:]), 6) if values else 0.0
        for name, values in seconds.items()
    }


def _single_state(decoder: Decoder, request: Request, num_draft: int) -> DecodeState:
    """A state of the shape that ``generate`` gives the request; the time of a step does not
    depend on what is in its caches."""
    total = len(request.prompt_ids) + request.max_new_tokens
    room = min(total, decoder.target.max_positions) + num_draft + 1
    num_positions = -(-room // POSITION_STEP) * POSITION_STEP
    return make_state([request], state_config(decoder, 1, num_positions, len(request.stop_ids)))


# Each step can be replayed: the request stays where it is, only cache rows are overwritten.


def _plain_step(
    weights: Weights, state: DecodeState, cfg: RoundConfig
) -> tuple[DecodeState, jax.Array]:
    given = RoundInput(keep_B=jnp.ones(1, bool))
    after, report = decode_round(weights, state, given, cfg, num_rows=1)
    return state.replace(target_cache=after.target_cache), report.token_BC  # type: ignore[attr-defined]


def _draft_step(weights: Weights, state: DecodeState, cfg: RoundConfig) -> DraftBlock:
    position_B = state.length_B - 1
    return draft(weights, state, state.token_BS[:, position_B[0]], position_B, cfg)


def _verify_step(
    weights: Weights, state: DecodeState, block: DraftBlock | None, cfg: RoundConfig
) -> tuple[DecodeState, jax.Array]:
    num_rows, position_B = cfg.num_draft + 1, state.length_B - 1
    token_BC = state.token_BS[:, position_B[0], None]
    if block is not None:
        token_BC = jnp.concatenate([token_BC, block.token_BG[:, : cfg.num_draft]], axis=1)
    length_B = jnp.full(1, cfg.num_draft, jnp.int32)
    plan = verify.plan_rows(length_B, state.active_B, num_rows, num_rows)
    rows = flat_rows(token_BC, position_B, plan)
    logits_TV, feature_TFD, target_cache = read_rows(weights, state, rows, None, length_B, cfg)
    acceptance = accept(weights, state, block, logits_TV, plan, position_B, cfg)
    context_cache = inject_rows(weights, state, feature_TFD, rows, None, cfg)
    after = state.replace(target_cache=target_cache, context_cache=context_cache)  # type: ignore[attr-defined]
    return after, acceptance.next_B
