"""Whether drafts pay on this machine: predicted from costs and a sample, then checked by a run.

Seconds of rounds are measured (``engine/timing.py``), confidences and accepted drafts sampled by
verifying whole blocks of the prompts below. Policies are then replayed over the sample at each
concurrency, with the engine's own scheduler: tokens a second follow without running anything. The
check runs the engine in turns with and without drafts, over the same stretches of the same texts;
prompts are read before the clock starts. Both are about an engine that has served such texts for a
while: the scheduler remembers what earlier ones said of the drafts.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from dspark_jax.engine.config import POSITION_STEP, EngineConfig, round_up
from dspark_jax.engine.decoder import Decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.programs import num_shards
from dspark_jax.engine.request import Request
from dspark_jax.engine.setting import device_name
from dspark_jax.engine.stream import Stream
from dspark_jax.engine.timing import measure_profiles
from dspark_jax.evaluation.prompts import Prompt, make_requests
from dspark_jax.evaluation.replay import replay_record, survivals
from dspark_jax.evaluation.results import require_drafts, served
from dspark_jax.evaluation.rounds import RecordedRequest, recorded_request
from dspark_jax.progress import progress
from dspark_jax.scheduler.budget import MARGIN, WINDOW, DraftSwitch, RoundCosts
from dspark_jax.scheduler.calibration import Calibration
from dspark_jax.scheduler.choice import DELAY
from dspark_jax.scheduler.shape import Shape, Sizes

logger = logging.getLogger(__name__)

# Of our own writing, the domains in turns: math, code, chat.
PROMPTS = (
    "A baker sells 14 loaves in the morning and twice as many in the afternoon. Each costs 3 "
    "dollars. How much does she earn in a day?",
    "Write a Python function that returns the second largest number of a list.",
    "What should I pack for a weekend by the sea?",
    "A train covers 180 km in 2.5 hours. How far does it go in 4 hours at the same speed?",
    "Write a Python function that counts the vowels of a string, with an example.",
    "Explain to a child why leaves change their colour in autumn.",
    "Lena has 5 boxes of 12 pencils. She gives 17 pencils away and shares the rest among 4 "
    "friends. How many does each get, and how many are left?",
    "Write a Python class for a stack with push, pop and a method that tells its size.",
    "Suggest three ways to make a small kitchen feel larger.",
    "Solve 3x + 7 = 25 and explain each step.",
    "Write a Python function that checks whether a word reads the same backwards.",
    "Write a short letter that thanks a neighbour for watering the plants.",
)
REPLAYS = 5  # of the profile
PAIRS = 3  # stretches of every text that both engines decode in turns, at each concurrency
ROUNDS = 512  # of a replayed policy, about
AHEAD = 3  # times the decoded tokens are what every text might have
LEAST = 8  # tokens of a text that say anything


@dataclass(frozen=True)
class Stretch:
    """A piece of one or several texts, and how long it took."""

    tokens: int
    seconds: float


def diagnose(
    decoder: Decoder, concurrencies: Sequence[int], max_new_tokens: int = 48
) -> dict[str, Any]:
    """Predict and measure what drafts are worth at some concurrencies, for greedy texts.

    Args:
        decoder: models with a drafter that has a confidence head.
        concurrencies: requests at once; on a mesh rounded up to a multiple of its data shards.
        max_new_tokens: that are decoded of each text, in the sample and in the check.

    Returns:
        The report as JSON values; ``rows`` has one for each concurrency.

    Raises:
        ValueError: there is no drafter with a confidence head, or a text does not fit the target.
    """
    if decoder.drafter is None:
        raise ValueError("doctor compares decoding with and without drafts: give --drafter")
    if max_new_tokens < LEAST:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: give at least {LEAST}")
    shards = num_shards(decoder.mesh)
    concurrencies = sorted({round_up(count, shards) for count in concurrencies})
    prompts = [Prompt(text, f"built-in prompt {i}") for i, text in enumerate(PROMPTS, 1)]
    asked = make_requests(prompts, decoder, Request((0,), max_new_tokens=1), seed=0)
    max_new_tokens = _within_context(asked, decoder.target.max_positions, max_new_tokens)
    # Longer than what is decoded, so that nobody ends early.
    longer = AHEAD * max_new_tokens
    requests = [dataclasses.replace(request, max_new_tokens=longer) for request in asked]
    config = _engine_config(decoder, requests, concurrencies)
    plain_config = dataclasses.replace(config, policy="none")
    profile, plain = measure_profiles([(decoder, config), (decoder, plain_config)], REPLAYS)
    sample = _sample(decoder, config, requests, max_new_tokens)
    rows = []
    with Engine(decoder, config, profile) as drafting, Engine(decoder, plain_config) as undrafted:
        # From the most on: what the scheduler remembers then is of many texts.
        for concurrency in reversed(concurrencies):
            sizes = Sizes(concurrency // shards, config.position_buckets[-1])
            plain_s = plain.round_s[Shape(sizes, 0, sizes.slots, 0)]
            weighed = profile.costs(sizes, num_shards=shards), plain_s, decoder.calibration
            predicted = predict_speedups(sample, concurrency, *weighed)
            groups = [
                _decode_in_turns(
                    (undrafted, drafting), [requests[i] for i in group], max_new_tokens
                )
                for group in _groups(len(requests), concurrency)
            ]
            pairs = [_total(turn) for turn in zip(*groups, strict=True)]
            rows.append(_row(concurrency, predicted, pairs))
    rows.reverse()
    drafts = np.concatenate([request.accepted_N for request in sample])
    return {
        "verdict": "use" if any(row["verdict"] == "use" for row in rows) else "do not use",
        "rows": rows,
        "accepted_length": round(1 + float(drafts.mean()), 4),
        "max_new_tokens": max_new_tokens,
        "device": device_name(),
        "jax": jax.__version__,
    }


def _within_context(requests: Sequence[Request], context: int, max_new_tokens: int) -> int:
    """As many new tokens as there is room for behind every prompt; says where that is fewer."""
    room = context - max(len(request.prompt_ids) for request in requests)
    most = room // AHEAD
    if most < LEAST:
        raise ValueError(
            f"the target's context of {context} leaves room for {room} tokens behind the built-in "
            f"prompts, and the doctor needs {AHEAD * LEAST}: name a target with a longer one"
        )
    if max_new_tokens > most:
        logger.warning(
            "max_new_tokens is %d, and the target's context of %d leaves room for %d of each text: "
            "they end there",
            *(max_new_tokens, context, most),
        )
    return min(max_new_tokens, most)


def _engine_config(
    decoder: Decoder, requests: Sequence[Request], concurrencies: Sequence[int]
) -> EngineConfig:
    """An engine for these requests, with few sizes."""
    assert decoder.drafter is not None
    longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
    return EngineConfig(
        slots=concurrencies[-1],
        positions=longest,
        policy="delayed",
        chunk_buckets=(4,),
        slot_buckets=tuple(count // num_shards(decoder.mesh) for count in concurrencies),
        position_buckets=(round_up(longest + decoder.drafter.block_size + 1, POSITION_STEP),),
    )


def _sample(
    decoder: Decoder, config: EngineConfig, requests: Sequence[Request], max_new_tokens: int
) -> list[RecordedRequest]:
    """The rounds of the first tokens of each text, with whole blocks verified."""
    short = [dataclasses.replace(request, max_new_tokens=max_new_tokens) for request in requests]
    with (
        Engine(decoder, dataclasses.replace(config, policy="block")) as engine,
        progress(desc="sample", total=len(short), unit="request") as bar,
    ):
        results = list(served(engine, short, bar))
    require_drafts(results, "doctor")
    return [recorded_request("built-in", "rejection", 0.0, result) for result in results]


def predict_speedups(
    sample: Sequence[RecordedRequest],
    concurrency: int,
    costs: RoundCosts,
    plain_s: float,
    calibration: Calibration | None,
) -> dict[str, float]:
    """Tokens a second of policies over those without a drafter.

    Args:
        sample: requests that are decoded again and again, one after the other in every slot.
        concurrency: requests decoded together.
        costs: of rounds with the drafter, in a state with as many slots.
        plain_s: seconds of a round without the drafter.
        calibration: of the confidences.
    """
    num_rounds = sum(len(request.accepted_N) for request in sample)
    endless = [*sample] * -(-ROUNDS * concurrency // num_rounds)
    chosen = {f"fixed:{k}": f"fixed:{k}" for k in (r // concurrency - 1 for r in costs.buckets)}
    chosen[f"delayed:{DELAY}"] = "delayed"
    plain_per_s = concurrency / plain_s
    return {
        chosen[row["policy"]]: row["tokens_per_s"] / plain_per_s
        for row in replay_record(
            endless, [concurrency], lambda *_: costs, calibration, _experienced(sample, calibration)
        )
        if row["policy"] in chosen
    }


def _experienced(sample: Sequence[RecordedRequest], calibration: Calibration | None) -> DraftSwitch:
    """A switch that has seen all of the sample, as evenly as it can remember."""
    seen_NG = np.concatenate(survivals(sample, calibration))
    kept_N = np.linspace(0, len(seen_NG) - 1, min(WINDOW, len(seen_NG))).astype(int)
    return DraftSwitch(seen=tuple(map(tuple, seen_NG[kept_N].tolist())))


def _groups(num_requests: int, concurrency: int) -> list[list[int]]:
    """Which requests are decoded together: all of them in turn, as often as that takes."""
    count = -(-num_requests // concurrency)
    return [
        [(group * concurrency + i) % num_requests for i in range(concurrency)]
        for group in range(count)
    ]


def _decode_in_turns(
    engines: Sequence[Engine], requests: Sequence[Request], max_new_tokens: int
) -> list[list[Stretch]]:
    """`PAIRS` stretches of the same texts, each by all engines in turn.

    Another stretch comes before them, so that prompts are read and the scheduler has history.
    """
    streams = [[engine.submit(request) for request in requests] for engine in engines]
    length = max(1, max_new_tokens // (PAIRS + 1)) * len(requests)
    pairs: list[list[Stretch]] = []
    for turn in range(PAIRS + 1):
        ways = list(zip(engines, streams, strict=True))
        order = range(len(ways)) if turn % 2 else range(len(ways))[::-1]
        found = {way: _decode(*ways[way], (turn + 1) * length) for way in order}
        pairs.append([found[way] for way in range(len(ways))])
    for stream in itertools.chain(*streams):
        stream.cancel()
    return pairs[1:]


def _decode(engine: Engine, streams: Sequence[Stream], until: int) -> Stretch:
    """Decode until the texts have so many tokens together."""

    def count() -> int:
        return sum(len(stream.result.token_ids) for stream in streams)

    before, began = count(), time.perf_counter()
    while count() < max(until, before + 1) and engine.step():
        pass
    engine.settle()
    return Stretch(count() - before, time.perf_counter() - began)


def _total(turn: Sequence[Sequence[Stretch]]) -> tuple[float, ...]:
    """Tokens a second of each engine in one turn, over the stretches of all groups."""
    if not all(any(stretch.tokens for stretch in parts) for parts in zip(*turn, strict=True)):
        raise ValueError(
            "doctor: the target ends its texts too early to measure their speed: give a smaller "
            "max_new_tokens"
        )
    return tuple(
        sum(stretch.tokens for stretch in parts) / sum(stretch.seconds for stretch in parts)
        for parts in zip(*turn, strict=True)
    )


def _row(
    concurrency: int, predicted: dict[str, float], pairs: Sequence[tuple[float, ...]]
) -> dict[str, Any]:
    """What was found at one concurrency."""
    speedups = {policy: round(speedup, 4) for policy, speedup in predicted.items()}
    policy = max(speedups, key=lambda name: speedups[name])
    pays = speedups[policy] > 1 + MARGIN
    return {
        "concurrency": concurrency,
        "verdict": "use" if pays else "do not use",
        "policy": policy if pays else "none",
        "predicted_speedup": speedups,
        "measured_speedup": round(statistics.median(fast / slow for slow, fast in pairs), 4),
        "none_tokens_per_s": round(statistics.median(slow for slow, _ in pairs), 2),
        "delayed_tokens_per_s": round(statistics.median(fast for _, fast in pairs), 2),
    }


def format_report(report: dict[str, Any]) -> str:
    """A report as a short table for people."""
    lines = [
        f"{report['target']} + {report['drafter']} on {report['device']}, jax {report['jax']}",
        f"{report['max_new_tokens']} tokens of each text, greedy; accepted length of whole blocks "
        f"{report['accepted_length']:.2f}",
        "",
        f"{'':<12}{'':<12}{'best':<10}{'predicted':>10}{'delayed:':>12}{'predicted':>11}"
        f"{'measured':>10}{'none/s':>9}{'delayed/s':>11}",
    ]
    for row in report["rows"]:
        predicted = row["predicted_speedup"] | {"none": 1.0}
        lines.append(
            f"{row['concurrency']:<12}{row['verdict']:<12}{row['policy']:<10}"
            f"{predicted[row['policy']]:>9.2f}x{'':>12}{predicted['delayed']:>10.2f}x"
            f"{row['measured_speedup']:>9.2f}x{row['none_tokens_per_s']:>9.1f}"
            f"{row['delayed_tokens_per_s']:>11.1f}"
        )
    return "\n".join([*lines, "", f"drafts on this machine: {report['verdict']}"])
