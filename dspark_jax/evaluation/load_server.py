"""A server under load, measured as its clients see it: closed loops of more and more of them.

As in ``load.py``, a client sends its next request when its last is over, and the clock stops when
enough of them are. What is not over then counts for the tokens that it has; a server says only at
the end of a text how many it has, so that a piece of such a text counts for as many as a piece of
the others had.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dspark_jax.client import Client, ServerError
from dspark_jax.engine.request import Request
from dspark_jax.evaluation.latency import LATENCY, Watch, client_row, format_latency
from dspark_jax.evaluation.prompts import Prompt
from dspark_jax.progress import progress
from dspark_jax.rendering import PLAIN, Rendering

Body = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A server that has been used for a while.

    Attributes:
        tokens_per_s: new tokens of all requests a second.
        tokens_per_s_user: of one request, from when it was sent to its end.
        watches: of the requests that did not fail.
        failed: requests that did.
    """

    tokens_per_s: float
    tokens_per_s_user: float
    watches: tuple[Watch, ...]
    failed: int


def bench_server(
    client: Client,
    sets: Mapping[str, Sequence[Prompt]],
    limits: Request,
    *,
    concurrency: Sequence[int],
    seed: int = 0,
    repeats: int = 5,
    requests_per_client: int = 2,
    rendering: Rendering = PLAIN,
) -> dict[str, Any]:
    """Send the same prompts from more and more clients.

    Args:
        client: of the server; it is closed afterwards.
        sets: the prompts of each file; they take turns.
        limits: new tokens and temperature.
        concurrency: numbers of clients.
        seed: of the first request; the others count on.
        repeats: how often each number of clients is measured.
        requests_per_client: requests that must be over before the clock stops.
        rendering: the system turn, and arguments of the server's chat template.

    Returns:
        The measurements as JSON values.

    Raises:
        ServerError: the server cannot be reached, or answers nothing at all.
    """

    async def measure() -> dict[str, Any]:
        async with client:
            name = await client.model()
            bodies = make_bodies(name, sets, limits, seed, rendering)
            async for _ in client.answer(bodies[0]):  # its programs are there from now on
                pass
            rows = []
            with progress(total=len(concurrency) * repeats) as bar:
                for clients in concurrency:
                    bar.set_description(f"{clients} clients")
                    count, runs = clients * requests_per_client, []
                    for repeat in range(repeats):
                        start = repeat * count % len(bodies)
                        given = itertools.islice(itertools.cycle(bodies), start, None)
                        runs.append(await serve(client, given, clients, count))
                        bar.update()
                    rows.append({"concurrency": clients, **summarise(runs)})
            return {"url": client.url, "model": name, "rows": rows, "prompts": len(bodies)}

    return asyncio.run(measure()) | {
        "requests_per_client": requests_per_client,
        "max_new_tokens": limits.max_new_tokens,
        "temperature": limits.temperature,
        "repeats": repeats,
    }


def make_bodies(
    model: str,
    sets: Mapping[str, Sequence[Prompt]],
    limits: Request,
    seed: int,
    rendering: Rendering,
) -> list[Body]:
    """A request for every prompt."""
    turns = itertools.zip_longest(*sets.values())
    prompts = [prompt for turn in turns for prompt in turn if prompt is not None]
    return [
        chat_body(model, [{"role": "user", "content": one.text}], limits, seed + i, rendering)
        for i, one in enumerate(prompts)
    ]


def chat_body(
    model: str,
    turns: Sequence[Mapping[str, Any]],
    limits: Request,
    seed: int,
    rendering: Rendering,
) -> Body:
    """The body of a request for a chat completion. What says nothing is left out, for servers that
    know less."""
    body: Body = {
        "model": model,
        "messages": rendering.turns(turns),
        "max_tokens": limits.max_new_tokens,
        "temperature": limits.temperature,
        "seed": seed,
    }
    plain = Request((0,))
    for name in ("top_k", "top_p", "min_p"):
        if getattr(limits, name) != getattr(plain, name):
            body[name] = getattr(limits, name)
    if limits.stop_strings:
        body["stop"] = list(limits.stop_strings)
    if rendering.template_args:
        body["chat_template_kwargs"] = dict(rendering.template_args)
    return body


async def serve(client: Client, bodies: Iterator[Body], clients: int, count: int) -> Run:
    """Let clients send requests until ``count`` of them are over; the others are given up.

    Raises:
        ServerError: every one of them failed; with what the last one was told.
    """
    enough = asyncio.Event()
    watches: list[Watch] = []
    over: list[tuple[Watch, int | None]] = []
    errors: list[ServerError] = []

    async def send() -> None:
        while not enough.is_set():
            watch, tokens, pieces = Watch(time.perf_counter()), None, 0
            watches.append(watch)
            try:
                async for piece in client.answer(next(bodies)):
                    pieces += bool(piece.text or piece.thought)
                    watch.news(time.perf_counter(), pieces)
                    tokens = piece.tokens if piece.tokens is not None else tokens
                over.append((watch, tokens))
                seconds.append(time.perf_counter() - watch.began_s)
            except ServerError as error:
                errors.append(error)
                watches.remove(watch)
            if len(over) + len(errors) >= count:
                enough.set()

    seconds: list[float] = []
    began_s = time.perf_counter()
    tasks = [asyncio.ensure_future(send()) for _ in range(clients)]
    await enough.wait()
    total_s = time.perf_counter() - began_s
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result
    if not over:
        raise errors[-1]
    # A server that does not count has a token in every piece, as far as anybody knows.
    tokens = sum(watch.tokens if known is None else known for watch, known in over)
    a_piece = tokens / max(sum(watch.tokens for watch, _ in over), 1)
    done = {id(watch) for watch, _ in over}
    rest = sum(watch.tokens for watch in watches if id(watch) not in done)
    return Run(
        (tokens + rest * a_piece) / total_s, tokens / sum(seconds), tuple(watches), len(errors)
    )


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """The row of a number of clients."""
    watches = [watch for run in runs for watch in run.watches]
    speeds = [run.tokens_per_s for run in runs], [run.tokens_per_s_user for run in runs]
    return client_row(*speeds, watches) | {"failed": sum(run.failed for run in runs)}


def format_server(report: Mapping[str, Any]) -> str:
    """A report as a table for people."""
    lines = [
        f"{report['model']} at {report['url']}",
        f"{report['prompts']} prompts, {report['max_new_tokens']} new tokens, temperature "
        f"{report['temperature']:g}, {report['repeats']} repeats; latencies in ms",
        "",
        f"{'clients':>7}{'tokens/s':>10}{'95 %':>20}{'a user':>9}{LATENCY}{'failed':>8}",
    ]
    for row in report["rows"]:
        interval = f"{row['tokens_per_s_low']:.1f} .. {row['tokens_per_s_high']:.1f}"
        lines.append(
            f"{row['concurrency']:>7}{row['tokens_per_s']:>10.1f}{interval:>20}"
            f"{row['tokens_per_s_user']:>9.1f}{format_latency(row)}{row['failed']:>8}"
        )
    return "\n".join(lines)
