"""Drafters of a training that goes on, by decoding: what ``fit`` asks now and then.

Expected lengths of a training are those of its own mathematics: teacher-forced, at temperature 1.
What is here is what a user would see: whole blocks drafted and verified, greedily and sampled.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.checkpoints.deepspec import bind_vocab
from dspark_jax.checkpoints.load import load_target
from dspark_jax.checkpoints.tokenizer import chat_prompt_ids
from dspark_jax.config import TrainConfig
from dspark_jax.engine.decoder import Decoder, make_decoder, with_drafter
from dspark_jax.engine.request import Request
from dspark_jax.evaluation.acceptance import bench_acceptance
from dspark_jax.evaluation.prompts import read_prompt_sets
from dspark_jax.models.vocab import Vocab
from dspark_jax.training.fit import Decode
from dspark_jax.training.run import Run

# Temperature -> what metrics call it.
KINDS = {0.0: "greedy", 1.0: "sampled"}


def decoding(
    prompts: Sequence[str | Path], *, limit: int | None = None, max_new_tokens: int = 64,
    seed: int = 0, batch: int = 8,
) -> Decode:  # fmt: skip
    """An evaluation by decoding, for ``fit``.

    The target is read once more, onto one device, when it is first used.

    Args:
        prompts: JSON-lines files of prompts; each is a set of its own.
        limit: use the first prompts of each file; None uses all.
        max_new_tokens: of each text.
        seed: of the texts above temperature 0.
        batch: prompts decoded together.

    Returns:
        A function of a run and its weights. It gives ``decoded_length_greedy`` and
        ``decoded_length_sampled``, the accepted lengths at temperatures 0 and 1, bonus token
        counted, means over the sets; their mean ``decoded_length``, by which the
        best drafter is chosen; and, where there are several sets, those of each by its name.

    Raises:
        ValueError: a file cannot be read, or has no prompts.
    """
    sets = read_prompt_sets([str(path) for path in prompts], limit)
    limits = Request((0,), max_new_tokens=max_new_tokens)
    opened: list[tuple[Decoder, Vocab]] = []

    def decode(run: Run, params: Any) -> dict[str, Any]:
        if not opened:
            opened.append(_open(run.recipe))
        plain, vocab = opened[0]
        params = jax.tree.map(lambda leaf: jnp.asarray(leaf, run.recipe.dtype), params)
        bound = bind_vocab(run.cfg, run.own, run.target_cfg, vocab)
        decoder = with_drafter(plain, (run.cfg, params, bound), vocab)
        report = bench_acceptance(decoder, sets, limits, tuple(KINDS), seed=seed, batch=batch)
        return figures(report)

    return decode


def _open(recipe: TrainConfig) -> tuple[Decoder, Vocab]:
    """The target of a recipe, to decode with, and its vocabulary as it was read."""
    found = load_target(recipe.target, jnp.dtype(recipe.dtype))
    plain = make_decoder((found.cfg, found.params), None, found.tokenizer, donate=True)
    encode = partial(chat_prompt_ids, found.tokenizer, rendering=recipe.rendering())
    plain = dataclasses.replace(plain, encode=encode, stop_ids=found.stop_ids)
    return plain, found.params.vocab


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """The lengths in a report of ``bench_acceptance`` at both temperatures, as metrics."""
    means = {KINDS[row["temperature"]]: row["accepted_length"] for row in report["mean"]}
    found = {"decoded_length": round(statistics.mean(means.values()), 4)}
    found |= {f"decoded_length_{kind}": length for kind, length in means.items()}
    rows = report["rows"]
    if len(rows) > len(KINDS):
        for row in rows:
            kind = KINDS[row["temperature"]]
            found[f"decoded_length_{kind}_{row['set']}"] = row["accepted_length"]
    return found
