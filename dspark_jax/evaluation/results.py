"""Generated texts in numbers, one by one and all together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dspark_jax.engine.reader import Generation


def result_row(result: Generation, seconds: float) -> dict[str, Any]:
    """One result as JSON; ``seconds`` are those of its whole batch."""
    return {
        "text": result.text,
        "prompt_tokens": result.prompt_tokens,
        "new_tokens": len(result.token_ids),
        "rounds": result.rounds,
        "accepted_length": round(result.accepted_length, 4),
        "seconds": round(seconds, 4),
        "tokens_per_s": round(len(result.token_ids) / seconds, 2),
        "finish_reason": result.finish_reason,
    }


def summary(results: Sequence[Generation], seconds: float) -> str:
    """All results in one line for people."""
    tokens = sum(len(result.token_ids) for result in results)
    lengths = [length for result in results for length in result.accepted_lengths]
    mean = sum(lengths) / max(len(lengths), 1)
    return (
        f"{tokens} tokens, {tokens / seconds:.1f} tokens/s, accepted length {mean:.2f}, "
        f"{len(lengths)} rounds"
    )
