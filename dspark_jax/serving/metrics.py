"""What a server tells Prometheus: vLLM's names where they say the same, ``dspark:`` for the rest.

What rounds bring is read off the engine's own statistics whenever somebody asks; what clients see
is told by the application as it happens. Every sample has vLLM's label ``model_name``.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dspark_jax.engine.engine import Engine
from dspark_jax.engine.reader import Generation
from dspark_jax.engine.stats import Stats

FIRST_TOKEN_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
TOKEN_S = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5,
    7.5, 10, 20, 40, 80,
)  # fmt: skip
REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}


class Metrics(Collector):
    """The metrics of a server, in a registry of their own."""

    def __init__(self, engine: Engine, model: str) -> None:
        """Everything begins at 0 but what the engine has done before; ``model`` is the name that
        clients know."""
        self._named = {"model_name": model}
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self._queued = self._counter("dspark:requests", "Requests that were taken in")
        self._prompt_tokens = self._counter(
            "vllm:prompt_tokens", "Tokens of the prompts of requests that are over"
        )
        self._stores = engine.config.prefix_bytes > 0
        self._asked = self._counter(
            "vllm:prefix_cache_queries", "Tokens of these prompts, where prefixes are stored"
        )
        self._hits = self._counter(
            "vllm:prefix_cache_hits", "Those of them that were stored, and not read again"
        )
        self._success = Counter(
            "vllm:request_success",
            "Requests that are over, by how they ended",
            ["finished_reason"],
            registry=self._registry,
        )
        for reason in REASONS.values():
            self._success.labels(reason)  # each is there from the beginning
        self._first_token = self._histogram(
            "vllm:time_to_first_token_seconds",
            "Seconds from a request's arrival to its first token",
            FIRST_TOKEN_S,
        )
        self._token = self._histogram(
            "vllm:inter_token_latency_seconds",
            "Seconds from a piece of a text to the next; one has the tokens of one round",
            TOKEN_S,
        )

    def queued(self) -> None:
        """A request was taken in."""
        self._queued.inc()

    def first_token(self, seconds: float) -> None:
        """A request has its first token, so long after it came."""
        self._first_token.observe(seconds)

    def token(self, seconds_since_last: float) -> None:
        """A request has more tokens, so long after the last."""
        self._token.observe(seconds_since_last)

    def finished(self, generation: Generation) -> None:
        """A request is over."""
        self._success.labels(REASONS[generation.finish_reason]).inc()
        self._prompt_tokens.inc(generation.prompt_tokens)
        if self._stores:
            self._asked.inc(generation.prompt_tokens)
            self._hits.inc(generation.cached_tokens)

    def text(self) -> bytes:
        """All of it in Prometheus' text format, version 0.0.4."""
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        """All of it, each sample under the model's name."""
        for family in self._registry.collect():
            family.samples = [
                one._replace(labels=self._named | one.labels) for one in family.samples
            ]
            yield family

    def _counter(self, name: str, what: str) -> Counter:
        return Counter(name, what, registry=self._registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, what, buckets=buckets, registry=self._registry)


class _EngineCollector(Collector):
    """Reads an engine's statistics when it is asked."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        return families(self._engine.stats())

    def describe(self) -> Iterator[Metric]:
        """The names, without asking anybody."""
        return families(Stats(0, 0, 0.0, 0.0, ()))


def families(found: Stats) -> Iterator[Metric]:
    """An engine's statistics as metrics."""
    gauge, counter = GaugeMetricFamily, CounterMetricFamily
    accepted = found.accepted_drafts_by_position
    drafted_rounds = found.rounds - found.undrafted_rounds
    yield gauge("vllm:num_requests_running", "Requests that have a slot", found.running)
    yield gauge("vllm:num_requests_waiting", "Requests that have none yet", found.waiting)
    yield counter("vllm:generation_tokens", "Tokens that were committed", found.tokens)
    yield counter("dspark:prefix_queries", "Prompts that were looked up", found.prefix_queries)
    yield counter("dspark:prefix_hits", "Those of which something was there", found.prefix_hits)
    yield counter(
        "vllm:spec_decode_num_drafts", "Drafts: rounds of a request that had one", drafted_rounds
    )
    yield counter(
        "vllm:spec_decode_num_draft_tokens",
        "Drafted tokens that the target verified",
        found.verified_drafts,
    )
    yield counter("vllm:spec_decode_num_accepted_tokens", "Those that it accepted", sum(accepted))
    by_position = counter(
        "vllm:spec_decode_num_accepted_tokens_per_pos",
        "Those that it accepted, by position in the draft",
        labels=["position"],
    )
    rate = gauge(
        "dspark:accept_rate",
        "Share of the drafts of a position that were accepted, of those decided about",
        labels=["position"],
    )
    for place, value in enumerate(accepted):
        by_position.add_metric([str(place)], value)
    for place, share in enumerate(found.accept_rate_by_position):
        rate.add_metric([str(place)], share)
    yield by_position
    yield rate
    yield gauge("dspark:tokens_per_second", "Committed tokens, lately", found.tokens_per_s)
    yield gauge(
        "dspark:accepted_length", "Committed tokens of a request and round", found.accepted_length
    )
    rounds = max(found.rounds, 1)
    yield gauge(
        "dspark:verification_length",
        "Drafts of a request and round that were verified",
        found.verified_drafts / rounds,
    )
    yield gauge(
        "dspark:undrafted_share",
        "Share of the rounds of requests without a draft",
        found.undrafted_rounds / rounds,
    )
    yield counter("dspark:rounds", "Rounds of requests, the first of each aside", found.rounds)
    yield counter(
        "dspark:predicted_round_seconds",
        "Seconds of rounds by what the scheduler chose from",
        found.predicted_s,
    )
    yield counter("dspark:taken_round_seconds", "Seconds that the same rounds took", found.taken_s)
    error = found.calibration_error
    yield gauge(
        "dspark:confidence_calibration_error",
        "Expected calibration error of recent confidences; NaN before there are any",
        float("nan") if error is None else error,
    )
