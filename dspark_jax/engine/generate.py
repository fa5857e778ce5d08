"""Offline generation: a batch of requests through jitted rounds, read one round late."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from dspark_jax.axes import param_shardings
from dspark_jax.config import DrafterConfig, TargetConfig
from dspark_jax.engine.round import RoundConfig, RoundReport, Weights, decode_round, prefill
from dspark_jax.engine.state import DecodeState, Request, make_state, state_shardings
from dspark_jax.models.drafter import DrafterParams, declare_drafter
from dspark_jax.models.layers import unstack_layers
from dspark_jax.models.target import TargetParams, Vocab, by_columns, declare_target, lm_head
from dspark_jax.models.tokenizer import TextStream

PREFILL_ROWS = 128
POSITION_STEP = 128


@dataclass(frozen=True)
class Decoder:
    """Weights in the form that decoding likes best, with their sizes.

    Attributes:
        weights: on a single CPU device with unstacked layers (1.3x faster there) and the LM heads
            by columns; elsewhere stacked, with heads by rows.
        target, drafter: sizes; drafter None decodes plainly.
        tokenizer: of the target; None returns ids without text.
        mesh: None for one device.
    """

    weights: Weights
    target: TargetConfig
    drafter: DrafterConfig | None
    tokenizer: Any
    mesh: Mesh | None


def make_decoder(
    target: tuple[TargetConfig, TargetParams],
    drafter: tuple[DrafterConfig, DrafterParams, Vocab] | None = None,
    tokenizer: Any = None,
    mesh: Mesh | None = None,
) -> Decoder:
    """Place the weights on the device or the mesh.

    Args:
        target: sizes and weights, layers stacked.
        drafter: sizes, weights and the drafter's vocabulary; None decodes plainly.
        tokenizer: of the target.
        mesh: a (data, tensor) mesh; axes that do not divide are replicated.
    """
    target_cfg, target_params = target
    drafter_cfg, drafter_params, vocab = drafter if drafter is not None else (None, None, None)
    if mesh is not None:
        target_params = jax.device_put(
            target_params, param_shardings(declare_target(target_cfg), mesh)
        )
        if drafter_cfg is not None:
            drafter_params = jax.device_put(
                drafter_params, param_shardings(declare_drafter(drafter_cfg), mesh)
            )
            vocab = _share_embedding(vocab, target_params, mesh)
    elif jax.default_backend() == "cpu":
        rows, columns = target_params.vocab, by_columns(target_params.vocab)
        target_params = _unstacked(target_params).replace(vocab=columns)
        if drafter_params is not None and vocab is not None:
            drafter_params = _unstacked(drafter_params)
            same_head = lm_head(vocab) is lm_head(rows)
            vocab = columns if same_head else by_columns(vocab)
    return Decoder(
        Weights(target_params, drafter_params, vocab), target_cfg, drafter_cfg, tokenizer, mesh
    )


def _unstacked(params: Any) -> Any:
    if isinstance(params.layers, tuple):
        return params
    return params.replace(layers=unstack_layers(params.layers))


def _share_embedding(vocab: Any, target: TargetParams, mesh: Mesh) -> Vocab:
    """The drafter's vocabulary on the mesh; the embedding is the target's array, not a copy."""
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = jax.device_put(vocab, replicated)
    return placed.replace(embed_VD=target.vocab.embed_VD)


@functools.lru_cache(maxsize=64)
def _prefill_fn(cfg: RoundConfig, num_rows: int, shardings: Any) -> Callable[..., DecodeState]:
    step = functools.partial(prefill, cfg=cfg, num_rows=num_rows)
    return jax.jit(step, donate_argnums=1, out_shardings=_unwrap(shardings))


@functools.lru_cache(maxsize=64)
def _round_fn(cfg: RoundConfig, shardings: Any) -> Callable[..., tuple[DecodeState, RoundReport]]:
    step = functools.partial(decode_round, cfg=cfg)
    out = None if shardings is None else (_unwrap(shardings), None)
    return jax.jit(step, donate_argnums=1, out_shardings=out)


@dataclass(frozen=True)
class _HashableShardings:
    """Shardings of a state as a key of the caches of compiled programs."""

    leaves: tuple[Any, ...]
    structure: Any


def _unwrap(shardings: _HashableShardings | None) -> Any:
    return None if shardings is None else shardings.structure.unflatten(shardings.leaves)


@dataclass
class Generation:
    """The continuation of one request, growing while it is decoded.

    Attributes:
        prompt_tokens: tokens of the prompt.
        token_ids: new tokens; the stop token is not among them.
        text: decoded, cut before a stop string; empty without a tokenizer.
        accepted_lengths: tokens that each round after the first token committed, the bonus token
            counted and an overshoot past the limit too (spec section 1).
        verified_lengths: drafts that each of these rounds verified.
        accepted_drafts: drafts that each of these rounds accepted.
        finish_reason: ``"stop"`` (a stop id or string), ``"length"`` or ``"error"`` (the target's
            logits were not finite); empty while it runs.
    """

    prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    accepted_lengths: list[int] = field(default_factory=list)
    verified_lengths: list[int] = field(default_factory=list)
    accepted_drafts: list[int] = field(default_factory=list)
    finish_reason: str = ""

    @property
    def rounds(self) -> int:
        """Rounds after the first token, which comes with the prompt."""
        return len(self.accepted_lengths)

    @property
    def accepted_length(self) -> float:
        """Mean committed tokens a round, the paper's tau; 0 before the first round."""
        return sum(self.accepted_lengths) / max(self.rounds, 1)


class _Reader:
    """Turns the reports of one slot into a :class:`Generation`."""

    def __init__(self, request: Request, limit: int, tokenizer: Any) -> None:
        self.request = request
        self.limit = limit
        self.result = Generation(prompt_tokens=len(request.prompt_ids))
        self._stream = None if tokenizer is None else TextStream(tokenizer)
        self._held = ""

    def read(self, report: RoundReport, slot: int, first: bool) -> str:
        """Take in one round; returns the text that may be shown now."""
        result = self.result
        count = int(report.count_B[slot])
        if result.finish_reason or not count:
            return ""
        if not first:
            result.accepted_lengths.append(count)
            result.verified_lengths.append(int(report.verified_B[slot]))
            result.accepted_drafts.append(int(report.accepted_B[slot]))
        if not report.finite_B[slot]:
            result.finish_reason = "error"
            return self._finish()
        for token in report.token_BC[slot, :count].tolist():
            if token in self.request.stop_ids:
                result.finish_reason = "stop"
                break
            result.token_ids.append(token)
            if self._find_stop_string(token):
                result.finish_reason = "stop"
                break
            if len(result.token_ids) == self.limit:
                result.finish_reason = "length"
                break
        return self._finish() if result.finish_reason else self._show()

    def may_outlast(self, most: int, first: bool) -> bool:
        """Whether the request surely goes on after the round in flight, stop tokens aside."""
        left = self.limit - len(self.result.token_ids)
        return not self.result.finish_reason and left > (1 if first else most)

    def _find_stop_string(self, token: int) -> bool:
        if self._stream is None:
            return False
        self._held += self._stream.push([token])
        ends = [self._held.find(text) for text in self.request.stop_strings if text in self._held]
        if ends:
            self._held = self._held[: min(ends)]
            self._stream = None
        return bool(ends)

    def _show(self) -> str:
        """What cannot be the beginning of a stop string any more."""
        keep = max(
            (
                size
                for text in self.request.stop_strings
                for size in range(1, len(text))
                if self._held.endswith(text[:size])
            ),
            default=0,
        )
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        self.result.text += shown
        return shown

    def _finish(self) -> str:
        if self._stream is not None:
            self._held += self._stream.finish()
        shown, self._held = self._held, ""
        self.result.text += shown
        return shown


def generate(
    decoder: Decoder,
    requests: Sequence[Request],
    *,
    num_draft: int | None = None,
    threshold: float = 0.0,
    gate: float = 0.0,
    acceptance: Literal["rejection", "coupled"] = "rejection",
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """Continue a batch of prompts of different lengths, all decoded together.

    Args:
        decoder: weights; without a drafter every round commits one token.
        requests: the batch.
        num_draft: verify at most this many drafts a round; None for the whole block, 0 for none.
        threshold, gate: see ``RoundConfig``; 0 and 0 verify ``num_draft`` always.
        acceptance: see ``RoundConfig``.
        on_text: called with (request, new text) as text is verified.

    Returns:
        One result a request, in their order.

    Raises:
        ValueError: a request cannot be decoded; the message names the field and the remedy.
    """
    if not requests:
        return []
    for request in requests:
        request.check(decoder.target.max_positions)
    cfg = _round_config(decoder, requests, num_draft, threshold, gate, acceptance)
    state, shardings = _start(decoder, requests, cfg)
    plain = dataclasses.replace(cfg, num_draft=0, threshold=0.0, gate=0.0)
    longest = max(len(request.prompt_ids) for request in requests)
    for start in range(0, longest - 1, PREFILL_ROWS):
        rows = min(PREFILL_ROWS, _round_up(longest - 1 - start, 16))
        state = _prefill_fn(plain, rows, shardings)(decoder.weights, state, np.int32(start))

    num_slots = state.length_B.shape[0]
    stop_at = np.asarray(state.stop_at_B).tolist()
    readers = [
        _Reader(request, stop_at[slot] - len(request.prompt_ids), decoder.tokenizer)
        for slot, request in enumerate(requests)
    ]

    def read(report: RoundReport, first: bool) -> None:
        report = jax.device_get(report)
        for slot, reader in enumerate(readers):
            text = reader.read(report, slot, first)
            if text and on_text is not None:
                on_text(slot, text)

    def cancelled() -> np.ndarray:
        done = [bool(reader.result.finish_reason) for reader in readers]
        return np.array(done + [False] * (num_slots - len(done)))

    # The host reads a round while the next one runs, unless that one might be the last.
    state, report = _round_fn(plain, shardings)(decoder.weights, state, cancelled())
    first, step = True, _round_fn(cfg, shardings)
    while True:
        late = None
        if any(reader.may_outlast(cfg.num_draft + 1, first) for reader in readers):
            state, late = step(decoder.weights, state, cancelled())
        read(report, first)
        first = False
        if late is None and not cancelled()[: len(readers)].all():
            state, late = step(decoder.weights, state, cancelled())
        if late is None:
            return [reader.result for reader in readers]
        report = late


def _round_config(
    decoder: Decoder,
    requests: Sequence[Request],
    num_draft: int | None,
    threshold: float,
    gate: float,
    acceptance: Literal["rejection", "coupled"],
) -> RoundConfig:
    """The static part of a round.

    Raises:
        ValueError: a value is out of range, or needs what is not there.
    """
    block = 0 if decoder.drafter is None else decoder.drafter.block_size
    if num_draft is None:
        num_draft = block
    if not 0 <= num_draft <= block:
        raise ValueError(f"num_draft is {num_draft}: it must lie in 0..{block}, the block size")
    for name, value in (("threshold", threshold), ("gate", gate)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}: it must lie in [0, 1]")
        if value and num_draft and not (decoder.drafter and decoder.drafter.confidence):
            raise ValueError(f"{name} is {value}, but the drafter has no confidence head: use 0")
    if acceptance not in ("rejection", "coupled"):
        raise ValueError(f"acceptance is {acceptance!r}: choose 'rejection' or 'coupled'")
    return RoundConfig(
        target=decoder.target,
        drafter=decoder.drafter,
        num_draft=num_draft,
        threshold=threshold if num_draft else 0.0,
        gate=gate if num_draft else 0.0,
        acceptance=acceptance,
        greedy=all(request.temperature == 0 for request in requests),
    )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _start(
    decoder: Decoder, requests: Sequence[Request], cfg: RoundConfig
) -> tuple[DecodeState, _HashableShardings | None]:
    """A fresh state on the device or the mesh. Its sizes are rounded up, so that batches alike in
    size share a program."""
    longest = max(len(r.prompt_ids) + r.max_new_tokens for r in requests)
    num_positions = _round_up(
        min(longest, decoder.target.max_positions) + cfg.num_draft + 1, POSITION_STEP
    )
    num_slots = len(requests)
    if decoder.mesh is not None:
        num_slots = _round_up(num_slots, decoder.mesh.shape["data"])
    weights = decoder.weights
    drafter_dtype = None if weights.drafter is None else weights.drafter.fc_FED.dtype
    drafter_layers = None if weights.drafter is None else weights.drafter.layers
    state = make_state(
        requests,
        num_slots,
        num_positions,
        decoder.target,
        decoder.drafter,
        (weights.target.norm_D.dtype, drafter_dtype),
        (not isinstance(weights.target.layers, tuple), not isinstance(drafter_layers, tuple)),
    )
    if decoder.mesh is None:
        return state, None
    shardings = state_shardings(state, decoder.mesh)
    leaves, structure = jax.tree.flatten(shardings)
    return jax.device_put(state, shardings), _HashableShardings(tuple(leaves), structure)
