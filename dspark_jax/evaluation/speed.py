"""Plain against speculative decoding of the same prompts, by the same engine and weights.

Both ways take turns prompt by prompt, so that a machine that slows down slows both, and the
speed-up is the median over these pairs. Times are of whole requests, the prompt included;
compilation happens before the clock starts.
"""

from __future__ import annotations

import dataclasses
import statistics
import string
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from dspark_jax.checkpoints.tokenizer import chat_prompt_ids
from dspark_jax.engine.decoder import Decoder
from dspark_jax.engine.generate import PREFILL_ROWS, generate, round_config
from dspark_jax.engine.inputs import RoundConfig
from dspark_jax.engine.reader import Generation
from dspark_jax.engine.request import Request
from dspark_jax.engine.setting import device_name
from dspark_jax.evaluation.prompts import Prompt
from dspark_jax.evaluation.steps import plain_decoder, step_seconds
from pallas_kernels import random
from pallas_kernels.dispatch import Implementation

# ``generate`` with everything but the requests (and ``on_text``) filled in.
Decode = Callable[..., list[Generation]]


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


def make_requests(
    prompts: Sequence[Prompt], decoder: Decoder, limits: Request, seed: int
) -> list[Request]:
    """A request for every prompt; number i has the key ``fold_in(seed_key(seed), i)``.

    Args:
        prompts: the user's messages.
        decoder: whose tokenizer and context length are used.
        limits: all but prompt and key.
        seed: root of the keys.

    Raises:
        ValueError: a prompt is empty or too long; the message says where it was read.
    """
    keys_B2 = np.asarray(random.fold_in(random.seed_key(seed), jnp.arange(len(prompts))))
    requests = []
    for prompt, key_2 in zip(prompts, keys_B2, strict=True):
        try:
            ids = chat_prompt_ids(decoder.tokenizer, prompt.text)
            request = dataclasses.replace(limits, prompt_ids=ids, key=key_2)
            request.check(decoder.target.max_positions, decoder.target.vocab_size)
        except ValueError as error:
            raise ValueError(f"{prompt.origin}: {error}") from None
        requests.append(request)
    return requests


def fill_up(requests: Sequence[Request], size: int) -> list[Request]:
    """A batch of always the same size, as its shape is compiled: requests of one token are
    cheaper than another shape.

    Args:
        requests: at least one, at most ``size``.
        size: of the batch.
    """
    spare = dataclasses.replace(requests[0], max_new_tokens=1)
    return [*requests, *[spare] * (size - len(requests))]


def warm_up(decode: Decode, requests: Sequence[Request]) -> None:
    """Compile everything that decoding this batch needs, in as few steps as will do.

    The programs depend on the number of requests, on the length of the longest text to come, and
    on the rows of the last chunk of the prompt. So prompts are cut by whole chunks, their texts
    get as much more room, and end with the first printable character.
    """
    unread = max(len(request.prompt_ids) for request in requests) - 1
    keep = 1 + unread % PREFILL_ROWS + (PREFILL_ROWS if unread >= PREFILL_ROWS else 0)
    total = max(len(request.prompt_ids) + request.max_new_tokens for request in requests)
    decode(
        [
            dataclasses.replace(
                request,
                prompt_ids=request.prompt_ids[:keep],
                max_new_tokens=total - keep,
                stop_strings=tuple(string.printable),
            )
            for request in requests
        ]
    )


def bench_speed(
    decoder: Decoder,
    sets: Mapping[str, Sequence[Prompt]],
    limits: Request,
    *,
    seed: int = 0,
    repeats: int = 3,
    policy: str = "",
    acceptance: Literal["rejection", "coupled"] = "rejection",
    kernels: Implementation = "xla",
) -> dict[str, Any]:
    """Decode every prompt plainly and with drafts, several times.

    Args:
        decoder: weights with a drafter.
        sets: the prompts of each file.
        limits: all of a request but prompt and key.
        seed: root of the keys; each set counts its prompts from 0.
        repeats: how often every prompt is decoded either way.
        policy, acceptance, kernels: of ``generate``.

    Returns:
        The measurements as JSON values; ``sets`` holds those of each file where there are several.

    Raises:
        ValueError: a prompt or an option cannot be used.
        FloatingPointError: the target's logits are not finite.
    """
    assert decoder.drafter is not None
    requests = {name: make_requests(sets[name], decoder, limits, seed) for name in sets}
    decode = partial(generate, acceptance=acceptance, kernels=kernels)
    ways: dict[str, Decode] = {
        "plain": partial(decode, plain_decoder(decoder)),
        "dspark": partial(decode, decoder, policy=policy),
    }
    pairs = _measure(ways, requests, repeats)
    first = next(request for group in requests.values() for request in group)
    cfg = round_config(decoder, [first], policy, acceptance, kernels)
    seconds = step_seconds(decoder, first, cfg)
    break_even = (seconds["verify"] + seconds["draft"]) / seconds["plain"]
    report = {
        **summarise([pair for name in sets for pair in pairs[name]], cfg),
        "step_seconds": seconds,
        "break_even_accepted_length": round(break_even, 4),
        "prompts": sum(len(group) for group in requests.values()),
        "max_new_tokens": limits.max_new_tokens,
        "temperature": limits.temperature,
        "repeats": repeats,
        "device": device_name(),
        "jax": jax.__version__,
    }
    if len(sets) > 1:
        report["sets"] = {
            name: {**summarise(pairs[name], cfg), "prompts": len(requests[name])} for name in sets
        }
    return report


def _measure(
    ways: Mapping[str, Decode], requests: Mapping[str, Sequence[Request]], repeats: int
) -> dict[str, list[Pair]]:
    """Pairs of each set; which way goes first changes with every prompt and every repeat."""
    flat = [(name, request) for name, group in requests.items() for request in group]
    pairs: dict[str, list[Pair]] = {name: [] for name in requests}
    with tqdm(total=len(flat) * (1 + repeats), unit="prompt", disable=None) as bar:
        bar.set_description("compile")
        for _, request in flat:
            for decode in ways.values():
                warm_up(decode, [request])
            bar.update()
        bar.set_description("measure")
        for repeat in range(repeats):
            for index, (name, request) in enumerate(flat):
                order = list(ways) if (repeat + index) % 2 else list(ways)[::-1]
                pairs[name].append(Pair(**{way: _timed(ways[way], request) for way in order}))
                bar.update()
    return pairs


def _timed(decode: Decode, request: Request) -> Timed:
    """One request, decoded against the clock."""
    began = time.perf_counter()
    (result,) = decode([request])
    seconds = time.perf_counter() - began
    if result.finish_reason == "error":
        raise FloatingPointError("the target's logits are not finite")
    return Timed(result, seconds)


def summarise(pairs: Sequence[Pair], cfg: RoundConfig) -> dict[str, Any]:
    """What some pairs say about speed, acceptance and agreement."""
    drafted = [pair.dspark.result for pair in pairs]
    same = [pair.plain.result.text == pair.dspark.result.text for pair in pairs]
    ratios = [pair.dspark.tokens_per_s / pair.plain.tokens_per_s for pair in pairs]
    return {
        "autoregressive": {"tokens_per_s": _throughput([pair.plain for pair in pairs])},
        "dspark": {"tokens_per_s": _throughput([pair.dspark for pair in pairs])},
        "speedup": round(statistics.median(ratios), 4),
        "accepted_length": mean_accepted_length(drafted),
        "accept_rate_by_position": accept_rates(drafted, cfg.num_draft),
        "same_text": round(sum(same) / len(same), 4) if cfg.greedy else None,
    }


def _throughput(runs: Sequence[Timed]) -> float:
    tokens = sum(len(run.result.token_ids) for run in runs)
    return round(tokens / sum(run.seconds for run in runs), 2)


def mean_accepted_length(results: Sequence[Generation]) -> float:
    """Committed tokens of a round, the paper's tau, over all rounds; 0 where there is none."""
    lengths = [length for result in results for length in result.accepted_lengths]
    return round(sum(lengths) / max(len(lengths), 1), 4)


def accept_rates(results: Sequence[Generation], num_draft: int) -> list[float | None]:
    """Share of the drafts of each slot that were accepted, of those that were decided about.

    A slot is decided about where all slots before it were accepted and it was verified itself;
    what lies behind an accepted stop token is not. None for a slot that never was.
    """
    decided, accepted = np.zeros(num_draft, int), np.zeros(num_draft, int)
    for result in results:
        for length, verified, accepts in zip(
            result.accepted_lengths, result.verified_lengths, result.accepted_drafts, strict=True
        ):
            stopped = length == accepts  # by a draft: no token of the target's own came after it
            decided[: accepts if stopped else min(accepts + 1, verified)] += 1
            accepted[:accepts] += 1
    return [
        round(float(hits / tries), 4) if tries else None
        for hits, tries in zip(accepted, decided, strict=True)
    ]


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


def format_rates(rates: Sequence[float | None]) -> str:
    """Rates of :func:`accept_rates` with two digits."""
    return " ".join("-" if rate is None else f"{rate:.2f}" for rate in rates)
