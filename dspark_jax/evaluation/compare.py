"""Drafters of one target side by side: what each of them makes of the same conversations.

Each drafter takes turns with plain decoding, talk by talk, so that a machine that slows down slows
both, and speedups are ratios of these pairs. (All drafters at once would be more programs than a
process has room for on a CPU.) Seconds are whole ones, prompts included; programs are compiled, and
what rounds cost is measured, before the clock starts.

The rules are those of a fair comparison of chains: one target, one loop, exact acceptance, and the
rows that a method adds are counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from dspark_jax.drafting import AnyDrafterConfig
from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.decoder import Decoder, without_drafter
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.generate import config_for
from dspark_jax.engine.reader import Generation
from dspark_jax.engine.request import Request
from dspark_jax.engine.setting import device_name
from dspark_jax.engine.timing import measure_profiles
from dspark_jax.evaluation.latency import Watch, latencies, median_interval
from dspark_jax.evaluation.results import accept_rates, format_rates, mean_accepted_length
from dspark_jax.evaluation.talks import Played, Talk, groups, longest_request, play
from dspark_jax.models.drafters.table import rows_beside
from dspark_jax.progress import progress
from dspark_jax.rules import Rule
from pallas_kernels import random
from pallas_kernels.accept_block.api import Acceptance
from pallas_kernels.dispatch import Kernels

PLAIN = "none"
REPLAYS = 8  # of a profile
ALL = "all"  # the category of everything


@dataclass(frozen=True)
class Run:
    """A group of talks that one way of decoding has played.

    Attributes:
        played: the talks.
        seconds: until all were over.
    """

    played: Sequence[Played]
    seconds: float

    @property
    def results(self) -> list[Generation]:
        """Of all turns."""
        return [result for talk in self.played for result in talk.results]

    @property
    def watches(self) -> list[Watch]:
        """Of all turns."""
        return [watch for talk in self.played for watch in talk.watches]

    @property
    def tokens_per_s(self) -> float:
        """New tokens a second; a text that ends at once counts as one token."""
        return sum(max(len(one.token_ids), 1) for one in self.results) / self.seconds

    @property
    def texts(self) -> list[list[str]]:
        """By talk and turn."""
        return [[result.text for result in talk.results] for talk in self.played]


# The runs of both ways, by the category and the group that they played.
Runs = dict[str, list[dict[str, Run]]]


def bench_compare(
    decoders: Mapping[str, Decoder],
    talks: Mapping[str, Sequence[Talk]],
    limits: Request,
    temperatures: Sequence[float] = (0.0,),
    concurrency: Sequence[int] = (1,),
    *,
    seed: int = 0,
    repeats: int = 1,
    policy: str = "",
    acceptance: Literal["rejection", "coupled"] = "rejection",
    kernels: Kernels = "auto",
    synthetic_acceptance: float | None = None,
) -> dict[str, Any]:
    """Play all talks with every drafter and with none.

    Args:
        decoders: by the names of their drafters; the target's weights are the same arrays.
        talks: by category.
        limits: all of a request but prompt, key and temperature.
        temperatures: to decode at.
        concurrency: how many talks are played at the same time.
        seed: root of the keys.
        repeats: how often every talk is played by each.
        policy: of ``EngineConfig``.
        acceptance: likewise.
        kernels: likewise.
        synthetic_acceptance: the chance that every draft is accepted with, whatever it is, for
            studies of throughput; texts are not the target's then.

    Returns:
        ``rows``, one for each drafter, category (and ``all`` of them), temperature and number of
        talks at once; ``drafters``; and the setting, as JSON values.

    Raises:
        ValueError: a talk or an option cannot be used.
        FloatingPointError: the target's logits are not finite.
    """
    check_synthetic(synthetic_acceptance)
    some = next(iter(decoders.values()))
    if some.encode is None:
        raise ValueError("bench compare plays conversations: give a model with a tokenizer")
    everything = [talk for of_category in talks.values() for talk in of_category]
    longest = longest_request(everything, some.encode, limits)
    rows: list[dict[str, Any]] = []
    turns = sum(len(talk.turns) for talk in everything)
    total = 2 * turns * repeats * len(decoders) * len(temperatures) * len(concurrency)
    with progress(total=total, unit="turn") as bar:
        for clients in concurrency:
            config = config_for(
                some, [longest] * clients, acceptance=acceptance, kernels=kernels, slots=clients
            )
            for name, decoder in decoders.items():
                assert decoder.drafter is not None
                bar.set_description(f"{name}, {clients} at once: compile and measure rounds")
                ways = {PLAIN: without_drafter(some), name: decoder}
                with _engines(ways, config, policy, synthetic_acceptance) as (engines, draft_s):
                    for temperature in temperatures:
                        bar.set_description(f"{name}, {clients} at once, {temperature:g}")
                        asked = dataclasses.replace(limits, temperature=temperature)
                        runs = _play_all(engines, talks, asked, clients, seed, repeats, bar)
                        setting = {"temperature": temperature, "concurrency": clients}
                        greedy = temperature == 0 and synthetic_acceptance is None
                        rows += _rows(name, runs, setting, draft_s, decoder.drafter, greedy)
    order = {name: number for number, name in enumerate(decoders)}
    rows.sort(key=lambda row: (row["concurrency"], row["temperature"], order[row["drafter"]]))
    report: dict[str, Any] = {
        "rows": rows,
        "drafters": {
            name: {"parameters": num_parameters(decoder)} for name, decoder in decoders.items()
        },
        "talks": {name: len(of_category) for name, of_category in talks.items()},
        "turns": turns,
        "max_new_tokens": limits.max_new_tokens,
        "policy": policy,
        "acceptance": acceptance,
        "repeats": repeats,
        "seed": seed,
        "device": device_name(),
        "jax": jax.__version__,
    }
    if synthetic_acceptance is not None:
        report["synthetic_acceptance"] = synthetic_acceptance
    return report


def check_synthetic(chance: float | None) -> None:
    """Refuse what is no chance.

    Raises:
        ValueError: it does not lie in 0..1.
    """
    if chance is not None and not 0 <= chance <= 1:
        raise ValueError(f"synthetic acceptance is {chance}: give a chance in 0..1")


def num_parameters(decoder: Decoder) -> int:
    """Of a drafter, without what it shares with the target."""
    leaves: list[Any] = jax.tree.leaves(decoder.weights.drafter)
    return sum(int(leaf.size) for leaf in leaves)


def synthetic(chance: float) -> Rule:
    """Accepts every draft with the same chance, by the noise that a real acceptance draws."""

    def judge(
        logits_TV: jax.Array, floor_T: jax.Array, plan: Any, drafts: Any, requests: Any
    ) -> Acceptance:
        num_slots = drafts.index_BG.shape[1]
        slot_G = jnp.arange(num_slots)
        key_BG2 = random.stream_key(
            requests.key_B2[:, None], random.ACCEPT, requests.anchor_position_B[:, None], slot_G
        )
        lucky_BG = random.uniform(key_BG2, 1)[..., 0] < chance
        lucky_BG &= slot_G < plan.length_B[:, None]
        accepted_B = jnp.sum(jnp.cumprod(lucky_BG, axis=1), axis=1, dtype=jnp.int32)
        best_T = jnp.argmax(logits_TV, axis=-1).astype(jnp.int32)
        row_B = jnp.take_along_axis(plan.row_BC, accepted_B[:, None], axis=1)[:, 0]
        chance_BG = jnp.full(drafts.index_BG.shape, chance)
        return Acceptance(accepted_B, best_T[row_B], chance_BG, jnp.ones(len(row_B), bool))

    return Rule(judge, lossless=False)


@contextlib.contextmanager
def _engines(
    ways: Mapping[str, Decoder], config: EngineConfig, policy: str, chance: float | None
) -> Iterator[tuple[dict[str, Engine], float]]:
    """Compiled engines of plain decoding and of a drafter, and the seconds of a draft."""
    rule: dict[str, Any] = {} if chance is None else {"acceptance": synthetic(chance)}
    configs = {
        name: dataclasses.replace(config, policy=PLAIN if name == PLAIN else policy, **rule)
        for name in ways
    }
    profiles = measure_profiles([(ways[name], configs[name]) for name in ways], REPLAYS)
    draft_s = max((seconds for one in profiles for seconds in one.draft_s.values()), default=0.0)
    with contextlib.ExitStack() as stack:
        engines = {}
        for (name, decoder), profile in zip(ways.items(), profiles, strict=True):
            engines[name] = stack.enter_context(Engine(decoder, configs[name], profile))
            engines[name].compile()
        yield engines, draft_s


def _play_all(
    engines: Mapping[str, Engine],
    talks: Mapping[str, Sequence[Talk]],
    limits: Request,
    clients: int,
    seed: int,
    repeats: int,
    bar: Any,
) -> Runs:
    """Runs of every group; which way goes first changes with every group and every repeat."""
    names = list(engines)
    runs: Runs = {category: [] for category in talks}
    _, _, group = next(groups(talks, clients))
    for name in names:
        play(engines[name], group, limits, seed, 0)  # warm-up
    for turn, (category, number, group) in enumerate(
        one for _ in range(repeats) for one in groups(talks, clients)
    ):
        found: dict[str, Run] = {}
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            found[name] = Run(*play(engines[name], group, limits, seed, number))
            bar.update(sum(len(talk.turns) for talk in group))
        runs[category].append(found)
    return runs


def _rows(
    name: str,
    runs: Runs,
    setting: Mapping[str, Any],
    draft_s: float,
    drafter: AnyDrafterConfig,
    greedy: bool,
) -> Iterator[dict[str, Any]]:
    """One row a category, and one of all where there are several."""
    several = {ALL: [one for found in runs.values() for one in found]} if len(runs) > 1 else {}
    for category, found in {**runs, **several}.items():
        pairs = [(one[name], one[PLAIN]) for one in found]
        own = [run for run, _ in pairs]
        results = [result for run in own for result in run.results]
        middle, low, high = median_interval([a.tokens_per_s / b.tokens_per_s for a, b in pairs])
        yield {
            "drafter": name,
            "category": category,
            **setting,
            "speedup": round(middle, 4),
            "speedup_low": round(low, 4),
            "speedup_high": round(high, 4),
            "accepted_length": mean_accepted_length(results),
            "accept_rate_by_position": accept_rates(results, drafter.block_size),
            "draft_share": round(_draft_share(own, draft_s, setting["concurrency"]), 4),
            "rows_per_token": round(_rows_per_token(results, rows_beside(drafter)), 4),
            "same_text": _same_text(pairs) if greedy else None,
            "tokens_per_s": round(statistics.median(run.tokens_per_s for run in own), 2),
            **latencies(watch for run in own for watch in run.watches),
        }


def _draft_share(runs: Sequence[Run], draft_s: float, clients: int) -> float:
    """Of the seconds, those of drafts, which all requests of a round share alike."""
    drafted = sum(one.rounds - one.undrafted_rounds for run in runs for one in run.results)
    return drafted * draft_s / clients / sum(run.seconds for run in runs)


def _rows_per_token(results: Sequence[Generation], beside: int) -> float:
    """Rows that the target has read behind the prompts, for each token that was committed there:
    the anchor of every round, the drafts that were verified, and of rounds that draft those
    ``beside`` the text."""
    rows = sum(one.rounds + sum(one.verified_lengths) for one in results)
    rows += beside * sum(one.rounds - one.undrafted_rounds for one in results)
    return rows / max(sum(sum(one.accepted_lengths) for one in results), 1)


def _same_text(pairs: Sequence[tuple[Run, Run]]) -> float:
    same = [a == b for run, plain in pairs for a, b in zip(run.texts, plain.texts, strict=True)]
    return round(sum(same) / len(same), 4)


def format_compare(report: Mapping[str, Any]) -> str:
    """A report as tables for people, one for each temperature and number of talks at once."""
    lines = [f"{report['target']} on {report['device']}, jax {report['jax']}"]
    if "synthetic_acceptance" in report:
        lines.append(label_of(report))
    lines.append(
        f"{report['turns']} turns of {sum(report['talks'].values())} talks, "
        f"{report['max_new_tokens']} new tokens each, {report['repeats']} repeats"
    )
    for name, about in report["drafters"].items():
        lines.append(f"{name}: {about['source']}, {about['parameters'] / 1e6:.1f} M parameters")
    before = None
    for row in report["rows"]:
        setting = row["temperature"], row["concurrency"]
        if setting != before:
            before = setting
            lines += [
                "",
                f"temperature {setting[0]:g}, {setting[1]} at once",
                f"{'drafter':<14}{'category':<18}{'speedup':>8}{'95 %':>14}{'length':>8}"
                f"{'draft':>7}{'rows':>6}{'same':>6}  accepted by position",
            ]
        same = "-" if row["same_text"] is None else f"{row['same_text']:.0%}"
        interval = f"{row['speedup_low']:.2f} .. {row['speedup_high']:.2f}"
        lines.append(
            f"{row['drafter']:<14}{row['category']:<18}{row['speedup']:>7.2f}x{interval:>14}"
            f"{row['accepted_length']:>8.2f}{row['draft_share']:>7.0%}{row['rows_per_token']:>6.2f}"
            f"{same:>6}  {format_rates(row['accept_rate_by_position'])}"
        )
    return "\n".join(lines)


def label_of(report: Mapping[str, Any]) -> str:
    """What every output says of acceptance that is made up; empty for a real one."""
    chance = report.get("synthetic_acceptance")
    if chance is None:
        return ""
    return (
        f"SYNTHETIC: every draft is accepted with a chance of {chance:g}; no text is the target's"
    )
