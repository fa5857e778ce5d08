"""A batch of requests through an engine of its own: the one way to decode without serving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from dspark_jax.engine.config import POSITION_STEP, EngineConfig, round_up
from dspark_jax.engine.decoder import Decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.programs import num_shards
from dspark_jax.engine.reader import Generation
from dspark_jax.engine.request import Request, within_context
from dspark_jax.rules import AcceptanceRule, Rule
from dspark_jax.scheduler.profile import Profile
from pallas_kernels.dispatch import Kernels

MOST_SLOTS = 32  # decoded at once, where nobody says how many
POSITIONS = 512  # the lengths that states are made for are multiples of it


def generate(
    decoder: Decoder,
    requests: Sequence[Request],
    *,
    policy: str | Rule = "",
    acceptance: AcceptanceRule = "rejection",
    draft_law: Rule | None = None,
    kernels: Kernels = "auto",
    slots: int = MOST_SLOTS,
    profile: Profile | None = None,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """Continue prompts of different lengths, many at once.

    Args:
        decoder: weights; without a drafter every round commits one token.
        requests: in ids.
        policy: of ``EngineConfig``.
        acceptance: likewise.
        draft_law: likewise.
        kernels: likewise.
        slots: most requests that are decoded at once.
        profile: of ``Engine``.
        on_text: called with (request, new text) as text is verified.

    Returns:
        One result a request, in their order.

    Raises:
        ValueError: a request cannot be decoded; the message names the field and the remedy.
    """
    if not requests:
        return []
    requests = within_context(requests, decoder.target.max_positions)
    config = config_for(
        decoder,
        requests,
        policy=policy,
        acceptance=acceptance,
        draft_law=draft_law,
        kernels=kernels,
        slots=slots,
    )
    with Engine(decoder, config, profile) as engine:
        return list(serve(engine, requests, on_text))


def config_for(
    decoder: Decoder,
    requests: Sequence[Request],
    *,
    policy: str | Rule = "",
    acceptance: AcceptanceRule = "rejection",
    draft_law: Rule | None = None,
    kernels: Kernels = "auto",
    slots: int = MOST_SLOTS,
) -> EngineConfig:
    """An engine that holds these requests in one state of one size, so that few programs are
    compiled. Arguments are those of :func:`generate`."""
    context = decoder.target.max_positions
    longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
    positions = min(round_up(longest, POSITIONS), context)
    shards = num_shards(decoder.mesh)
    slots = round_up(min(slots, len(requests)), shards)
    room = round_up(positions + POSITION_STEP, POSITION_STEP)
    stop_ids = max(len(request.stop_ids) for request in requests) + len(decoder.stop_ids)
    return EngineConfig(
        slots=slots,
        positions=positions,
        queue=len(requests),
        policy=policy,
        acceptance=acceptance,
        draft_law=draft_law,
        chunk_buckets=tuple(sorted({1, 4, max(4, slots // (4 * shards))})),
        slot_buckets=(slots // shards,),
        position_buckets=(room,),
        stop_ids=max(8, stop_ids),
        kernels=kernels,
    )


def serve(
    engine: Engine,
    requests: Sequence[Request],
    on_text: Callable[[int, str], None] | None = None,
) -> Iterator[Generation]:
    """The results of requests, in their order, each as soon as it is over; none in a process that
    follows another one.

    Args:
        engine: whose queue holds them all.
        requests: in ids or texts.
        on_text: called with (request, new text) when its turn comes.
    """
    if engine.follows:
        engine.follow()
        return
    streams = [engine.submit(request) for request in requests]
    for number, stream in enumerate(streams):
        for event in stream:
            if on_text is not None and event.text:
                on_text(number, event.text)
        yield stream.result
