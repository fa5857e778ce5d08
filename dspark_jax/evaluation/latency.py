"""What clients see of an engine or a server: how fast texts come, and how evenly."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import binom

PERCENTILES = (50, 95, 99)


@dataclass
class Watch:
    """One request, as whoever waits for it sees it; seconds are of a monotonic clock.

    Attributes:
        began_s: when it was sent.
        first_s: when its first tokens came.
        last_s: when the last ones did.
        between_s: seconds from tokens to tokens. Those of one round come together and count once.
        tokens: that there are so far.
    """

    began_s: float
    first_s: float | None = None
    last_s: float = 0.0
    between_s: list[float] = field(default_factory=list)
    tokens: int = 0

    def news(self, now_s: float, tokens: int) -> None:
        """There are so many tokens now, and maybe new ones."""
        if tokens <= self.tokens:
            return
        if self.first_s is None:
            self.first_s = now_s
        else:
            self.between_s.append(now_s - self.last_s)
        self.last_s, self.tokens = now_s, tokens


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The median, and an interval that holds the true one with a probability of 95 %.

    The interval is that of order statistics, whatever the distribution; of fewer than six values
    it is their whole range, which holds it with a probability of 94 % (five) or less.
    """
    ordered = sorted(values)
    rank = max(1, int(binom.ppf(0.025, len(ordered), 0.5)))
    return statistics.median(ordered), ordered[rank - 1], ordered[-rank]


def client_row(
    speeds: Sequence[float], user_speeds: Sequence[float], watches: Iterable[Watch]
) -> dict[str, Any]:
    """What clients see, as JSON values.

    Args:
        speeds: tokens of all requests a second, of every repeat.
        user_speeds: of one request.
        watches: of the requests of all repeats.
    """
    middle, low, high = median_interval(speeds)
    return {
        "tokens_per_s": round(middle, 2),
        "tokens_per_s_low": round(low, 2),
        "tokens_per_s_high": round(high, 2),
        "tokens_per_s_user": round(statistics.median(user_speeds), 2),
        **latencies(watches),
    }


def latencies(watches: Iterable[Watch]) -> dict[str, Any]:
    """Percentiles of what was watched, as JSON values; requests without a token do not count."""
    watches = [one for one in watches if one.first_s is not None]
    return {
        "first_token_s": percentiles([one.first_s - one.began_s for one in watches]),  # type: ignore[operator]
        "between_tokens_s": percentiles([s for one in watches for s in one.between_s]),
    }


def percentiles(values_s: Sequence[float]) -> dict[str, float | None]:
    """By their names, such as ``p95``; None where there are no values."""
    found = np.percentile(values_s, PERCENTILES).tolist() if values_s else [None] * 3
    names = [f"p{share}" for share in PERCENTILES]
    return {n: None if s is None else round(s, 6) for n, s in zip(names, found, strict=True)}


def format_latency(row: dict[str, Any]) -> str:
    """The columns of :data:`LATENCY` of a row, in milliseconds."""
    shown = [row[name][share] for name in ("first_token_s", "between_tokens_s") for share in SHOWN]
    return "".join(f"{'-' if s is None else f'{1e3 * s:.1f}':>10}" for s in shown)


SHOWN = ("p50", "p99")
LATENCY = "".join(f"{name:>10}" for name in ("first p50", "p99", "next p50", "p99"))
