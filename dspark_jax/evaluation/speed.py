"""Plain against speculative decoding of the same prompts, by engines with the same weights.

Both ways take turns prompt by prompt, so that a machine that slows down slows both, and the
speed-up is the median over these pairs. Times are of whole requests, the prompt included; programs
are compiled, and what rounds cost is learnt, before the clock starts.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax

from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.decoder import Decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.generate import config_for
from dspark_jax.engine.reader import Generation
from dspark_jax.engine.request import Request
from dspark_jax.engine.setting import device_name
from dspark_jax.engine.timing import measure_profiles
from dspark_jax.evaluation.prompts import Prompt, make_request_sets
from dspark_jax.evaluation.results import (
    accept_rates,
    format_rates,
    mean_accepted_length,
    require_drafts,
    sound,
)
from dspark_jax.progress import progress
from dspark_jax.scheduler.shape import Shape, Sizes
from pallas_kernels.dispatch import Kernels

REPLAYS = 8  # of a profile
WARM_UP = 3  # prompts that are decoded before the clock starts


@dataclass(frozen=True)
class Timed:
    """One request decoded alone, and the seconds that it took."""

    result: Generation
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second; a text that ends at once counts as one token."""
        return max(len(self.result.token_ids), 1) / self.seconds


@dataclass(frozen=True)
class Pair:
    """One prompt decoded both ways."""

    plain: Timed
    dspark: Timed


def bench_speed(
    decoder: Decoder,
    sets: Mapping[str, Sequence[Prompt]],
    limits: Request,
    *,
    seed: int = 0,
    repeats: int = 3,
    policy: str = "",
    acceptance: Literal["rejection", "coupled"] = "rejection",
    kernels: Kernels = "auto",
) -> dict[str, Any]:
    """Decode every prompt plainly and with drafts, several times, one at a time.

    Args:
        decoder: weights with a drafter.
        sets: the prompts of each file.
        limits: all of a request but prompt and key.
        seed: root of the keys; each set counts its prompts from 0.
        repeats: how often every prompt is decoded either way.
        policy: of ``EngineConfig``.
        acceptance: likewise.
        kernels: likewise.

    Returns:
        The measurements as JSON values; ``sets`` holds those of each file where there are several.

    Raises:
        ValueError: a prompt or an option cannot be used, or no text has a round.
        FloatingPointError: the target's logits are not finite.
    """
    assert decoder.drafter is not None
    requests = make_request_sets(sets, decoder, limits, seed)
    flat = [request for group in requests.values() for request in group]
    config = config_for(
        decoder, flat, policy=policy, acceptance=acceptance, kernels=kernels, slots=1
    )
    plain = dataclasses.replace(config, policy="none")
    seconds = _step_seconds(decoder, config, plain)
    with Engine(decoder, plain) as without, Engine(decoder, config) as drafting:
        num_draft = drafting.policy.num_draft
        pairs = _measure({"plain": without, "dspark": drafting}, requests, repeats)
    everything = [pair.dspark.result for name in sets for pair in pairs[name]]
    require_drafts(everything, "bench speed")
    greedy = limits.temperature == 0
    break_even = (seconds["verify"] + seconds["draft"]) / seconds["plain"]
    report = {
        **summarise([pair for name in sets for pair in pairs[name]], num_draft, greedy),
        "step_seconds": seconds,
        "break_even_accepted_length": round(break_even, 4),
        "prompts": len(flat),
        "max_new_tokens": limits.max_new_tokens,
        "temperature": limits.temperature,
        "repeats": repeats,
        "device": device_name(),
        "jax": jax.__version__,
    }
    if len(sets) > 1:
        report["sets"] = {
            name: {**summarise(pairs[name], num_draft, greedy), "prompts": len(requests[name])}
            for name in sets
        }
    return report


def _step_seconds(decoder: Decoder, config: EngineConfig, plain: EngineConfig) -> dict[str, float]:
    """Seconds of a plain round, of a draft, and of the rest of a round that verifies all drafts."""
    drafting, without = measure_profiles([(decoder, config), (decoder, plain)], REPLAYS)
    (positions,) = config.position_buckets
    sizes = Sizes(1, positions)
    shapes = [shape for shape in drafting.round_s if not shape.num_chunks]
    whole_s = drafting.round_s[max(shapes, key=lambda shape: shape.num_rows)]
    draft_s = drafting.draft_s.get(sizes, 0.0)
    seconds = {
        "plain": without.round_s[Shape(sizes, 0, 1, 0)],
        "verify": whole_s - draft_s,
        "draft": draft_s,
    }
    return {name: round(value, 6) for name, value in seconds.items()}


def _measure(
    ways: Mapping[str, Engine], requests: Mapping[str, Sequence[Request]], repeats: int
) -> dict[str, list[Pair]]:
    """Pairs of each set; which way goes first changes with every prompt and every repeat."""
    flat = [(name, request) for name, group in requests.items() for request in group]
    pairs: dict[str, list[Pair]] = {name: [] for name in requests}
    for engine in ways.values():
        engine.compile()
    with progress(total=WARM_UP + len(flat) * repeats, unit="prompt") as bar:
        bar.set_description("warm up")
        for number in range(WARM_UP):
            for engine in ways.values():
                _timed(engine, flat[number % len(flat)][1])
            bar.update()
        bar.set_description("measure")
        for repeat in range(repeats):
            for index, (name, request) in enumerate(flat):
                order = list(ways) if (repeat + index) % 2 else list(ways)[::-1]
                pairs[name].append(Pair(**{way: _timed(ways[way], request) for way in order}))
                bar.update()
    return pairs


def _timed(engine: Engine, request: Request) -> Timed:
    """One request, decoded against the clock."""
    began = time.perf_counter()
    result = sound(engine.submit(request).wait())
    seconds = time.perf_counter() - began
    engine.settle()
    return Timed(result, seconds)


def summarise(pairs: Sequence[Pair], num_draft: int, greedy: bool) -> dict[str, Any]:
    """What some pairs say about speed, acceptance and agreement."""
    drafted = [pair.dspark.result for pair in pairs]
    same = [pair.plain.result.text == pair.dspark.result.text for pair in pairs]
    ratios = [pair.dspark.tokens_per_s / pair.plain.tokens_per_s for pair in pairs]
    return {
        "autoregressive": {"tokens_per_s": _throughput(pair.plain for pair in pairs)},
        "dspark": {"tokens_per_s": _throughput(pair.dspark for pair in pairs)},
        "speedup": round(statistics.median(ratios), 4),
        "accepted_length": mean_accepted_length(drafted),
        "accept_rate_by_position": accept_rates(drafted, num_draft),
        "same_text": round(sum(same) / len(same), 4) if greedy else None,
    }


def _throughput(runs: Iterable[Timed]) -> float:
    runs = list(runs)
    tokens = sum(len(run.result.token_ids) for run in runs)
    return round(tokens / sum(run.seconds for run in runs), 2)


def format_report(report: Mapping[str, Any]) -> str:
    """A report as a short table for people."""
    seconds, sets = report["step_seconds"], report.get("sets", {})
    lines = [
        f"{report['target']} + {report['drafter']} on {report['device']}, jax {report['jax']}",
        f"{report['max_new_tokens']} new tokens, temperature {report['temperature']:g}, "
        f"{report['repeats']} repeats",
        "",
        f"{'':<16}{'prompts':>8}{'plain/s':>9}{'dspark/s':>10}{'speedup':>9}{'length':>8}{'same':>7}",
    ]
    for name, row in {**sets, "all": report}.items():
        same = "-" if row["same_text"] is None else f"{row['same_text']:.0%}"
        lines.append(
            f"{name:<16}{row['prompts']:>8}{row['autoregressive']['tokens_per_s']:>9.1f}"
            f"{row['dspark']['tokens_per_s']:>10.1f}{row['speedup']:>8.2f}x"
            f"{row['accepted_length']:>8.2f}{same:>7}"
        )
    rates = format_rates(report["accept_rate_by_position"])
    parts = ", ".join(f"{name} {1000 * value:.1f} ms" for name, value in seconds.items())
    return "\n".join(
        [
            *lines,
            "",
            f"accepted by position: {rates}",
            f"one step: {parts}",
            f"break-even at an accepted length of {report['break_even_accepted_length']:.2f}",
        ]
    )
