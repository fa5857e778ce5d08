"""How many drafts a target keeps, by where they stand: in the block, the context, the conversation.

Whole conversations are played, every block is verified whole, and each round counts by the tokens
that stood before its drafts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax

from dspark_jax.engine.decoder import Decoder
from dspark_jax.engine.engine import Engine
from dspark_jax.engine.generate import config_for
from dspark_jax.engine.reader import Generation
from dspark_jax.engine.request import Request
from dspark_jax.engine.setting import device_name
from dspark_jax.evaluation.acceptance import summarise
from dspark_jax.evaluation.results import format_rates, require_drafts
from dspark_jax.evaluation.talks import Talk, groups, longest_request, play
from dspark_jax.progress import progress
from pallas_kernels.dispatch import Kernels

BY = ("position", "context", "turn")
SHORTEST = 128  # contexts up to this many tokens are one class; each further class is twice as long


def bench_acceptance_by(
    decoder: Decoder,
    talks: Mapping[str, Sequence[Talk]],
    limits: Request,
    temperatures: Sequence[float],
    by: Sequence[str],
    *,
    seed: int = 0,
    batch: int = 8,
    acceptance: Literal["rejection", "coupled"] = "rejection",
    kernels: Kernels = "auto",
) -> dict[str, Any]:
    """Play all talks at every temperature.

    Args:
        decoder: weights with a drafter, and a tokenizer.
        talks: by category.
        limits: all of a request but prompt, key and temperature.
        temperatures: to decode at.
        by: what rows are told apart by, of :data:`BY`; the position in the block always is.
        seed: root of the keys.
        batch: talks played at the same time.
        acceptance: of ``EngineConfig``.
        kernels: likewise.

    Returns:
        ``rows``, one for each category, temperature and class that has a round: ``context`` (fewest
        and most tokens) and ``turn`` (from 1) as far as they are asked for, ``tokens``, ``rounds``,
        ``accepted_length``, ``accept_rate_by_position``; and the setting, as JSON values.

    Raises:
        ValueError: a talk cannot be used, or nothing was drafted.
        FloatingPointError: the target's logits are not finite.
    """
    assert decoder.drafter is not None
    if decoder.encode is None:
        raise ValueError("bench acceptance --by plays conversations: give a model with a tokenizer")
    everything = [talk for of_category in talks.values() for talk in of_category]
    longest = longest_request(everything, decoder.encode, limits)
    config = config_for(
        decoder,
        [longest] * batch,
        policy="block",
        acceptance=acceptance,
        kernels=kernels,
        slots=batch,
    )
    rows: list[dict[str, Any]] = []
    total = len(temperatures) * len(everything)
    with Engine(decoder, config) as engine, progress(total=total, unit="talk") as bar:
        for temperature in temperatures:
            asked = dataclasses.replace(limits, temperature=temperature)
            found: dict[tuple[Any, ...], Generation] = {}
            for category, number, group in groups(talks, batch):
                bar.set_description(f"{category}, temperature {temperature:g}")
                played, _ = play(engine, group, asked, seed, number)
                for talk in played:
                    _sort(talk.results, category, by, found)
                bar.update(len(group))
            require_drafts(list(found.values()), f"temperature {temperature:g}")
            for (category, *where), rounds in sorted(found.items()):
                row = {"set": category, "temperature": temperature, **dict(where)}
                rows.append(row | summarise([rounds], decoder.drafter.block_size))
    return {
        "rows": rows,
        "by": list(by),
        "talks": {name: len(of_category) for name, of_category in talks.items()},
        "max_new_tokens": limits.max_new_tokens,
        "acceptance": acceptance,
        "seed": seed,
        "device": device_name(),
        "jax": jax.__version__,
    }


def _sort(
    turns: Sequence[Generation],
    category: str,
    by: Sequence[str],
    found: dict[tuple[Any, ...], Generation],
) -> None:
    """Add the rounds of a talk to those of their classes."""
    for number, turn in enumerate(turns):
        context = turn.prompt_tokens + 1  # the first token comes with the prompt
        for length, verified, accepted in zip(
            turn.accepted_lengths, turn.verified_lengths, turn.accepted_drafts, strict=True
        ):
            classes = {"context": class_of(context), "turn": number + 1}
            key = category, *((name, classes[name]) for name in classes if name in by)
            rounds = found.setdefault(key, Generation(0))
            rounds.accepted_lengths.append(length)
            rounds.verified_lengths.append(verified)
            rounds.accepted_drafts.append(accepted)
            rounds.token_ids += [0] * length  # only their number is told
            context += length


def class_of(context: int) -> tuple[int, int]:
    """The fewest and the most tokens of the class that a context is in."""
    most = SHORTEST
    while context > most:
        most *= 2
    return (1 if most == SHORTEST else most // 2 + 1), most


def format_by(report: Mapping[str, Any]) -> str:
    """A report as a table for people."""
    columns = [name for name in ("context", "turn") if name in report["by"]]
    lines = [
        f"{report['target']} + {report['drafter']} on {report['device']}, jax {report['jax']}",
        f"{sum(report['talks'].values())} talks, {report['max_new_tokens']} new tokens a turn, "
        f"whole blocks verified, {report['acceptance']}",
        "",
        f"{'':<16}{'temperature':>12}{''.join(f'{name:>13}' for name in columns)}{'rounds':>8}"
        f"{'length':>8}  accepted by position",
    ]
    for row in report["rows"]:
        texts = {"turn": str(row.get("turn"))}
        if "context" in row:
            texts["context"] = "{} .. {}".format(*row["context"])
        lines.append(
            f"{row['set']:<16}{row['temperature']:>12g}"
            f"{''.join(f'{texts[name]:>13}' for name in columns)}{row['rounds']:>8}"
            f"{row['accepted_length']:>8.2f}  {format_rates(row['accept_rate_by_position'])}"
        )
    return "\n".join(lines)
