"""Policies under load: closed loops of more and more clients, each policy in turn.

A client sends its next request when its last is over, so that the engine always has exactly as
many requests as there are clients; the clock stops when enough of them are over, and what is not
counts for the tokens that it has by then. All policies of a concurrency serve the same requests
with the same weights, one after the other within every repeat: a machine that slows down slows
all of them, and they are compared by the ratios of each repeat. Programs are compiled, and have
run, before the clock starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
from tqdm import tqdm

from dspark_jax.engine.config import EngineConfig, round_up
from dspark_jax.engine.decoder import Decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.programs import num_shards
from dspark_jax.engine.request import Request
from dspark_jax.engine.setting import device_name
from dspark_jax.engine.stream import Stream
from dspark_jax.engine.timing import measure_profile
from dspark_jax.evaluation.latency import (
    LATENCY,
    Watch,
    client_row,
    format_latency,
    median_interval,
)
from dspark_jax.evaluation.prompts import Prompt, make_request_sets
from dspark_jax.evaluation.results import sound
from dspark_jax.progress import progress
from dspark_jax.scheduler.policy import make_policy
from dspark_jax.scheduler.profile import Profile
from pallas_kernels.dispatch import Kernels

logger = logging.getLogger(__name__)

REPLAYS = 8  # of a profile
STATIC = ("none", "fixed", "block")  # kinds of policies that verify the same at every load


@dataclass(frozen=True)
class Run:
    """A policy that has served for a while.

    Attributes:
        tokens_per_s: new tokens of all requests a second.
        tokens_per_s_user: of one request, from its submission to its end.
        accepted_length: tokens that a request committed in a round.
        verification_length: drafts that it verified in a round.
        undrafted_share: of these rounds, those that did not draft.
        watches: of all requests, those that were not over too.
    """

    tokens_per_s: float
    tokens_per_s_user: float
    accepted_length: float
    verification_length: float
    undrafted_share: float
    watches: tuple[Watch, ...] = ()


def bench_load(
    decoder: Decoder,
    sets: Mapping[str, Sequence[Prompt]],
    limits: Request,
    *,
    concurrency: Sequence[int],
    policies: Sequence[str],
    seed: int = 0,
    repeats: int = 5,
    requests_per_client: int = 2,
    acceptance: Literal["rejection", "coupled"] = "rejection",
    kernels: Kernels = "auto",
) -> dict[str, Any]:
    """Serve the same prompts under every policy at every concurrency, several times.

    Args:
        decoder: weights with a drafter.
        sets: the prompts of each file; they take turns.
        limits: all of a request but prompt and key.
        concurrency: numbers of clients.
        policies: names; a fixed length beyond the block is the whole block.
        seed: root of the keys; each set counts its prompts from 0.
        repeats: how often every policy serves at each concurrency.
        requests_per_client: requests that must be over before the clock stops.
        acceptance: of the engines.
        kernels: likewise.

    Returns:
        The measurements as JSON values.

    Raises:
        ValueError: a prompt, a policy or an option cannot be used.
        FloatingPointError: the target's logits are not finite.
    """
    assert decoder.drafter is not None
    names = fitting_policies(policies, decoder.drafter.block_size)
    groups = make_request_sets(sets, decoder, limits, seed).values()
    requests = [r for turn in itertools.zip_longest(*groups) for r in turn if r is not None]
    config = EngineConfig(
        positions=max(len(one.prompt_ids) + one.max_new_tokens for one in requests),
        acceptance=acceptance,
        kernels=kernels,
        stop_ids=max(1, len(limits.stop_ids) + len(decoder.stop_ids)),
    )
    rows, to_none, to_best = [], [], []
    with progress(total=len(concurrency) * len(names) * (1 + repeats)) as bar:
        for clients in concurrency:
            bar.set_description(f"{clients} clients")
            count = clients * requests_per_client
            with _engines(decoder, names, clients, config) as engines:
                runs = _measure(engines, requests, clients, count, repeats, bar)
            rows += [{"concurrency": clients, **summarise(name, runs[name])} for name in names]
            if not any(row["accepted_length"] for row in rows):
                raise ValueError(
                    "bench load: no text has a round behind its first token, so that policies do "
                    "not differ: give other prompts or a larger max_new_tokens"
                )
            found = compare(runs)
            to_none += [{"concurrency": clients, **ratio} for ratio in found["to_none"]]
            to_best += [{"concurrency": clients, **ratio} for ratio in found["to_best"]]
    return {
        "rows": rows,
        "to_none": to_none,
        "to_best": to_best,
        "mean_to_none": mean_ratios(to_none),
        "prompts": len(requests),
        "requests_per_client": requests_per_client,
        "max_new_tokens": limits.max_new_tokens,
        "temperature": limits.temperature,
        "block_size": decoder.drafter.block_size,
        "repeats": repeats,
        "device": device_name(),
        "jax": jax.__version__,
    }


def fitting_policies(names: Iterable[str], block_size: int) -> tuple[str, ...]:
    """The policies without fixed lengths beyond the block, and nobody twice."""
    fitting = []
    for name in names:
        kind, _, value = name.partition(":")
        if kind == "fixed" and value.isdecimal() and int(value) > block_size:
            logger.info("%s: the block has %d drafts, all are verified", name, block_size)
            name = f"fixed:{block_size}"
        fitting.append(name)
    return tuple(dict.fromkeys(fitting))


@contextlib.contextmanager
def _engines(
    decoder: Decoder, names: Sequence[str], clients: int, config: EngineConfig
) -> Iterator[dict[str, Engine]]:
    """An engine for each policy, compiled, with a slot for each client.

    Policies that weigh seconds share one profile, so that they differ in nothing else.
    """
    shards = num_shards(decoder.mesh)
    slots = round_up(clients, shards)
    config = dataclasses.replace(
        config, slots=slots, slot_buckets=(slots // shards,), queue=clients
    )
    profile: Profile | None = None
    with contextlib.ExitStack() as stack:
        engines = {}
        for name in names:
            own = dataclasses.replace(config, policy=name)
            if profile is None and make_policy(name, decoder.drafter).needs_seconds:
                profile = measure_profile(decoder, own, REPLAYS)
            engines[name] = stack.enter_context(Engine(decoder, own, profile))
            engines[name].compile()
        yield engines


def _measure(
    engines: Mapping[str, Engine],
    requests: Sequence[Request],
    clients: int,
    count: int,
    repeats: int,
    bar: tqdm,
) -> dict[str, list[Run]]:
    """Runs of each policy; every repeat has requests of its own and another order."""
    names = list(engines)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for name in names:
        serve(engines[name], _endless(requests, 0), clients, 1)
        bar.update()
    for repeat in range(repeats):
        first = repeat % len(names)
        for name in (*names[first:], *names[:first]):
            given = _endless(requests, repeat * count)
            runs[name].append(serve(engines[name], given, clients, count))
            bar.update()
    return runs


def _endless(requests: Sequence[Request], start: int) -> Iterator[Request]:
    return itertools.islice(itertools.cycle(requests), start % len(requests), None)


def serve(engine: Engine, requests: Iterator[Request], clients: int, count: int) -> Run:
    """Let clients send requests until ``count`` of them are over; the others are cancelled.

    Raises:
        FloatingPointError: the target's logits are not finite.
    """
    began = now = time.perf_counter()
    since = {engine.submit(next(requests)): Watch(began) for _ in range(clients)}
    over: list[tuple[Stream, float]] = []
    watches = list(since.values())
    while len(over) < count:
        engine.step()
        now = time.perf_counter()
        for stream, watch in since.items():
            watch.news(now, len(stream.result.token_ids))
        for stream in [stream for stream in since if stream.finished]:
            over.append((stream, now - since.pop(stream).began_s))
            since[engine.submit(next(requests))] = watch = Watch(now)
            watches.append(watch)
    for stream in since:
        stream.cancel()
    engine.run()
    results = [sound(stream.result) for stream, _ in over]
    seconds = sum(seconds for _, seconds in over)
    tokens_over = sum(len(result.token_ids) for result in results)
    results += [stream.result for stream in since]
    rounds = max(1, sum(result.rounds for result in results))
    return Run(
        tokens_per_s=sum(len(result.token_ids) for result in results) / (now - began),
        tokens_per_s_user=tokens_over / seconds,
        accepted_length=sum(sum(result.accepted_lengths) for result in results) / rounds,
        verification_length=sum(sum(result.verified_lengths) for result in results) / rounds,
        undrafted_share=sum(result.undrafted_rounds for result in results) / rounds,
        watches=tuple(watches),
    )


def summarise(name: str, runs: Sequence[Run]) -> dict[str, Any]:
    """The row of a policy: medians of speeds, means of the rest."""
    speeds = [run.tokens_per_s for run in runs], [run.tokens_per_s_user for run in runs]
    return {
        "policy": name,
        **client_row(*speeds, [watch for run in runs for watch in run.watches]),
        "accepted_length": round(statistics.fmean(run.accepted_length for run in runs), 4),
        "verification_length": round(statistics.fmean(run.verification_length for run in runs), 4),
        "undrafted_share": round(statistics.fmean(run.undrafted_share for run in runs), 4),
    }


def compare(runs: Mapping[str, Sequence[Run]]) -> dict[str, list[dict[str, Any]]]:
    """Ratios of tokens a second, paired by repeat.

    Returns:
        ``to_none``: of every policy to not drafting. ``to_best``: of every policy that adapts to
        the better of ``none`` and the best fixed length.
    """
    speeds = {name: [run.tokens_per_s for run in runs[name]] for name in runs}

    def ratio(name: str, over: str) -> dict[str, Any]:
        pairs = zip(speeds[name], speeds[over], strict=True)
        middle, low, high = median_interval([mine / other for mine, other in pairs])
        numbers = {"ratio": middle, "ratio_low": low, "ratio_high": high}
        rounded = {key: round(value, 4) for key, value in numbers.items()}
        return {"policy": name, "over": over, **rounded}

    static = [name for name in runs if name.partition(":")[0] in STATIC]
    best = max(static, key=lambda name: statistics.median(speeds[name]), default=None)
    adaptive = [name for name in runs if name not in static]
    return {
        "to_none": [ratio(name, "none") for name in runs if name != "none" and "none" in runs],
        "to_best": [ratio(name, best) for name in adaptive if best is not None],
    }


def mean_ratios(ratios: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The mean over concurrencies of each policy's ratio."""
    names = dict.fromkeys(row["policy"] for row in ratios)
    return {
        name: round(statistics.fmean(row["ratio"] for row in ratios if row["policy"] == name), 4)
        for name in names
    }


def format_load(report: Mapping[str, Any]) -> str:
    """A report as a table for people."""
    ratios = {
        (key, row["concurrency"], row["policy"]): f"{row['ratio']:.3f}"
        for key in ("to_none", "to_best")
        for row in report[key]
    }
    lines = [
        f"{report['target']} + {report['drafter']} on {report['device']}, jax {report['jax']}",
        f"{report['prompts']} prompts, {report['max_new_tokens']} new tokens, temperature "
        f"{report['temperature']:g}, {report['repeats']} repeats; latencies in ms",
        "",
        f"{'clients':>7}  {'policy':<14}{'tokens/s':>9}{'95 %':>22}{'a user':>8}{'length':>8}"
        f"{'verified':>9}{'undrafted':>10}{'/ none':>8}{'/ best':>8}{LATENCY}",
    ]
    for row in report["rows"]:
        key = row["concurrency"], row["policy"]
        interval = f"{row['tokens_per_s_low']:.1f} .. {row['tokens_per_s_high']:.1f}"
        lines.append(
            f"{row['concurrency']:>7}  {row['policy']:<14}{row['tokens_per_s']:>9.1f}"
            f"{interval:>22}{row['tokens_per_s_user']:>8.1f}{row['accepted_length']:>8.2f}"
            f"{row['verification_length']:>9.2f}{row['undrafted_share']:>10.0%}"
            f"{ratios.get(('to_none', *key), '-'):>8}{ratios.get(('to_best', *key), '-'):>8}"
            f"{format_latency(row)}"
        )
    means = ", ".join(f"{name} {value:.3f}" for name, value in report["mean_to_none"].items())
    return "\n".join([*lines, "", f"mean over concurrencies of the ratio to none: {means}"])
