"""Whether drafts pay on this machine: predicted from costs and a sample, then checked by a run.

Seconds of rounds are measured (``engine/replays.py``), confidences and accepted drafts sampled by
verifying whole blocks of the prompts below. Policies are then replayed over the sample at each
concurrency, with the engine's own scheduler: tokens a second follow without running anything. The
check runs the engine in turns with and without drafts, over the same stretches of the same texts;
prompts are read before the clock starts.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dspark_jax.decoding.budget import MARGIN, RoundCosts
from dspark_jax.engine.calibration import Calibration
from dspark_jax.engine.config import POSITION_STEP, EngineConfig, round_up
from dspark_jax.engine.decoder import Decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.plan import Shape, Sizes
from dspark_jax.engine.profile import device_name
from dspark_jax.engine.replays import measure_profiles
from dspark_jax.engine.scheduler import DELAY
from dspark_jax.engine.state import Request
from dspark_jax.engine.stream import Stream
from dspark_jax.evaluation.prompts import Prompt
from dspark_jax.evaluation.replay import replay_record
from dspark_jax.evaluation.rounds import RecordedRequest, record_rounds
from dspark_jax.evaluation.speed import make_requests
from dspark_jax.evaluation.steps import plain_decoder

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
PAIRS = 6  # stretches of text that both engines decode in turns, at each concurrency
ROUNDS = 512  # of a replayed policy
LEAST = 8  # tokens of a text that say anything


def diagnose(
    decoder: Decoder, concurrencies: Sequence[int], max_new_tokens: int = 40
) -> dict[str, Any]:
    """Predict and measure what drafts are worth at some concurrencies, for greedy texts.

    Args:
        decoder: models with a drafter that has a confidence head.
        concurrencies: requests at once.
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
    concurrencies = sorted(set(concurrencies))
    prompts = [Prompt(text, f"built-in prompt {i}") for i, text in enumerate(PROMPTS, 1)]
    limits = Request((0,), max_new_tokens=max_new_tokens)
    longer = dataclasses.replace(limits, max_new_tokens=3 * max_new_tokens)  # nobody ends early
    requests = make_requests(prompts, decoder, longer, seed=0)
    config = _engine_config(decoder, requests, concurrencies)
    plain_config = dataclasses.replace(config, policy="none")
    profile, plain = measure_profiles(
        [(decoder, config), (plain_decoder(decoder), plain_config)], REPLAYS
    )
    sets = {"built-in": prompts}
    recorded = record_rounds(decoder, sets, limits, ("rejection",), (0.0,), slots=len(prompts))
    sample = [request for _, request in recorded]
    rows = []
    with Engine(decoder, config, profile) as drafting, Engine(decoder, plain_config) as undrafted:
        for concurrency in concurrencies:
            groups = _groups(len(requests), concurrency)
            sizes = Sizes(concurrency, config.position_buckets[-1])
            plain_s = plain.round_s[Shape(sizes, 0, concurrency, 0)]
            weighed = profile.costs(sizes), plain_s, decoder.calibration
            predicted = [predict_speedups([sample[i] for i in group], *weighed) for group in groups]
            pairs = [
                pair
                for group in groups
                for pair in _decode_in_turns(
                    (undrafted, drafting),
                    [requests[i] for i in group],
                    max_new_tokens,
                    -(-PAIRS // len(groups)),
                )
            ]
            rows.append(_row(concurrency, predicted, pairs))
    drafts = np.concatenate([request.accepted_N for request in sample])
    return {
        "verdict": "use" if any(row["verdict"] == "use" for row in rows) else "do not use",
        "rows": rows,
        "accepted_length": round(1 + float(drafts.mean()), 4),
        "max_new_tokens": max_new_tokens,
        "device": device_name(),
        "jax": jax.__version__,
    }


def _engine_config(
    decoder: Decoder, requests: Sequence[Request], concurrencies: Sequence[int]
) -> EngineConfig:
    """An engine for these requests, with few sizes."""
    assert decoder.drafter is not None
    longest = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
    if longest > decoder.target.max_positions:
        raise ValueError(
            f"the texts take {longest} positions and the target's context has "
            f"{decoder.target.max_positions}: give a smaller max_new_tokens"
        )
    return EngineConfig(
        slots=concurrencies[-1],
        positions=longest,
        policy="delayed",
        chunk_buckets=(4,),
        slot_buckets=tuple(concurrencies),
        position_buckets=(round_up(longest + decoder.drafter.block_size + 1, POSITION_STEP),),
    )


def _groups(num_requests: int, concurrency: int) -> list[list[int]]:
    """Which requests are decoded together: at most `PAIRS` groups, all requests in turn."""
    count = min(PAIRS, -(-num_requests // concurrency))
    return [
        [(group * concurrency + i) % num_requests for i in range(concurrency)]
        for group in range(count)
    ]


def predict_speedups(
    requests: Sequence[RecordedRequest],
    costs: RoundCosts,
    plain_s: float,
    calibration: Calibration | None,
) -> dict[str, float]:
    """Tokens a second of policies over those without a drafter.

    Args:
        requests: decoded together; their rounds are gone through again and again.
        costs: of rounds with the drafter, in a state with as many slots.
        plain_s: seconds of a round without the drafter.
        calibration: of the confidences.
    """
    block_size = requests[0].logit_NG.shape[1]
    endless = [
        dataclasses.replace(
            request,
            logit_NG=np.resize(request.logit_NG, (ROUNDS, block_size)),
            verified_N=np.resize(request.verified_N, ROUNDS),
            accepted_N=np.resize(request.accepted_N, ROUNDS),
        )
        for request in requests
    ]
    chosen = {f"fixed:{k}": f"fixed:{k}" for k in (r // len(requests) - 1 for r in costs.buckets)}
    chosen[f"delayed:{DELAY}"] = "delayed"
    plain_per_s = len(requests) / plain_s
    return {
        chosen[row["policy"]]: row["tokens_per_s"] / plain_per_s
        for row in replay_record(endless, [len(requests)], lambda *_: costs, calibration)
        if row["policy"] in chosen
    }


def _decode_in_turns(
    engines: Sequence[Engine], requests: Sequence[Request], max_new_tokens: int, turns: int
) -> list[tuple[float, ...]]:
    """Tokens a second of each engine, over the same stretches of the same texts.

    A stretch comes before the first turn, so that prompts are read and the scheduler has history.
    """
    streams = [[engine.submit(request) for request in requests] for engine in engines]
    stretch = max(1, max_new_tokens // (turns + 1)) * len(requests)
    per_s: list[tuple[float, ...]] = []
    for turn in range(turns + 1):
        ways = list(zip(engines, streams, strict=True))
        order = range(len(ways)) if turn % 2 else range(len(ways))[::-1]
        found = {way: _stretch_per_s(*ways[way], (turn + 1) * stretch) for way in order}
        per_s.append(tuple(found[way] for way in range(len(ways))))
    for stream in itertools.chain(*streams):
        stream.cancel()
    return per_s[1:]


def _stretch_per_s(engine: Engine, streams: Sequence[Stream], until: int) -> float:
    """Tokens a second until the texts have so many tokens together."""

    def count() -> int:
        return sum(len(stream.result.token_ids) for stream in streams)

    before, began = count(), time.perf_counter()
    while count() < max(until, before + 1) and engine.step():
        pass
    engine.settle()
    return (count() - before) / (time.perf_counter() - began)


def _row(
    concurrency: int,
    predicted: Sequence[dict[str, float]],
    pairs: Sequence[tuple[float, ...]],
) -> dict[str, Any]:
    """What was found at one concurrency."""
    speedups = {
        policy: round(statistics.median(group[policy] for group in predicted), 4)
        for policy in predicted[0]
    }
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
