"""Generated texts, as they come and in numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from dspark_jax.engine.engine import Engine
from dspark_jax.engine.generate import serve
from dspark_jax.engine.reader import Generation
from dspark_jax.engine.request import Request
from dspark_jax.scheduler.history import decided_drafts


def served(engine: Engine, requests: Sequence[Request], bar: tqdm) -> Iterator[Generation]:
    """The results of all requests in order, noted in a progress bar.

    Raises:
        FloatingPointError: the target's logits are not finite.
    """
    for result in serve(engine, requests):
        bar.update()
        yield sound(result)


def sound(result: Generation) -> Generation:
    """A result that did not end in an error.

    Raises:
        FloatingPointError: it did, because the target's logits are not finite.
        RuntimeError: it did, for another reason.
    """
    error = result.error
    if isinstance(error, FloatingPointError):
        raise error
    if error is not None:
        raise RuntimeError(f"a request failed: {type(error).__name__}: {error}") from error
    return result


def mean_accepted_length(results: Sequence[Generation]) -> float:
    """Committed tokens of a round, the paper's tau, over all rounds; 0 where there is none."""
    lengths = [length for result in results for length in result.accepted_lengths]
    return round(sum(lengths) / max(len(lengths), 1), 4)


def require_drafts(results: Sequence[Generation], what: str) -> None:
    """Checks that there are rounds in which a draft was decided about.

    Raises:
        ValueError: there are none, so that any drafter would look the same.
    """
    if not any(accepts for result in results for accepts in result.accepted_lengths):
        raise ValueError(
            f"{what}: no text has a round behind its first token, so that nothing was measured: "
            "give other prompts or a larger max_new_tokens"
        )


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
            decided[: min(accepts + 1, decided_drafts(length, accepts, verified))] += 1
            accepted[:accepts] += 1
    return [
        round(float(hits / tries), 4) if tries else None
        for hits, tries in zip(accepted, decided, strict=True)
    ]


def format_rates(rates: Sequence[float | None]) -> str:
    """Rates of :func:`accept_rates` with two digits."""
    return " ".join("-" if rate is None else f"{rate:.2f}" for rate in rates)


def result_row(result: Generation) -> dict[str, Any]:
    """One result as JSON; ``seconds`` since the request got a slot."""
    return {
        "text": result.text,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": len(result.token_ids),
        "rounds": result.rounds,
        "accepted_length": round(result.accepted_length, 4),
        "seconds": round(result.seconds, 4),
        "tokens_per_s": round(len(result.token_ids) / result.seconds, 2) if result.seconds else 0.0,
        "finish_reason": result.finish_reason,
    }


def summary(results: Sequence[Generation], seconds: float) -> str:
    """All results in one line for people."""
    tokens = sum(len(result.token_ids) for result in results)
    return (
        f"{tokens} tokens, {tokens / seconds:.1f} tokens/s, accepted length "
        f"{mean_accepted_length(results):.2f}, {sum(result.rounds for result in results)} rounds"
    )
