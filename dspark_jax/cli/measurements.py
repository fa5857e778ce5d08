"""Which measurements ``dspark bench`` has, and what each takes.

Imports nothing that takes time.
"""

from __future__ import annotations

import argparse
from typing import Any

from dspark_jax.cli.options import (
    add_command,
    add_decoder,
    add_decoding,
    add_limits,
    add_policy,
    add_prompt_files,
    add_rendering,
    add_rule,
    add_server,
    add_target,
    add_weights,
    count,
    counts,
    drafters,
    names,
    places,
    prompt_file,
)

LOADS = "1,2,4,8,16,32,64"
LOAD_POLICIES = "none,fixed:2,fixed:4,fixed:7,causal,delayed"


def add_bench(bench: argparse.ArgumentParser) -> None:
    """All of them."""
    measurements = bench.add_subparsers(title="measurements", metavar="MEASUREMENT", required=True)
    _add_speed(measurements, "plain against speculative decoding of the same prompts")
    _add_acceptance(measurements, "how many drafts the target keeps, by prompts and temperature")
    _add_compare(measurements, "drafters of one target against each other, and without any")
    _add_quality(measurements, "how far quantised weights are from plain ones")
    _add_load(measurements, "policies, or a server, with more and more requests at once")


def _add_speed(commands: Any, summary: str) -> None:
    command = add_command(commands, "speed", summary)
    command.set_defaults(command="bench speed")
    add = command.add_argument
    add_prompt_files(command)
    add("--repeats", type=count, default=3, metavar="N", help="default %(default)s")
    add_decoder(command)
    add_rendering(command)
    add_decoding(command)
    add("--json", action="store_true", help="print one JSON object instead of a table")


def _add_acceptance(commands: Any, summary: str) -> None:
    command = add_command(commands, "acceptance", summary)
    command.set_defaults(command="bench acceptance")
    add = command.add_argument
    add_prompt_files(command)
    add(
        "--temperature",
        type=float,
        action="append",
        metavar="F",
        help="may be repeated (default: 0 and 1)",
    )
    add("--batch", type=count, default=8, metavar="N", help="decoded together; default 8")
    add("--by", type=places, default=[], metavar="position,context,turn", help="tell the rounds of "
        "whole conversations apart by the tokens before them and by their turn")  # fmt: skip
    add_decoder(command)
    add_rendering(command)
    add_rule(command)
    add("--json", action="store_true", help="print one JSON object instead of a table")


def _add_compare(commands: Any, summary: str) -> None:
    command = add_command(commands, "compare", summary)
    command.set_defaults(command="bench compare")
    add = command.add_argument
    add("--drafters", type=drafters, required=True, metavar="NAME=DRAFTER,...", help="each as for "
        "generate --drafter, under a name of its own; lookup alone names itself")  # fmt: skip
    add("--prompts", action="append", type=prompt_file, required=True, metavar="FILE.jsonl",
        help="may be repeated; "
        'all "turns" of a line are played, and a "category" in it counts by itself')  # fmt: skip
    add("--limit", type=count, metavar="N", help="use the first N lines of each category")
    add("--temperature", type=float, action="append", metavar="F", help="may be repeated "
        "(default: 0)")  # fmt: skip
    add("--concurrency", type=counts, default=[1], metavar="N,N,...", help="conversations that are "
        "played at the same time (default: 1)")  # fmt: skip
    add("--repeats", type=count, default=1, metavar="N", help="default %(default)s")
    add("--synthetic-acceptance", type=float, metavar="P", help="accept every draft with this "
        "chance, whatever it is: for throughput alone, the texts are not the target's")  # fmt: skip
    add("--plot", metavar="FILE.png", help="speedups by category")
    add("--html", metavar="FILE.html", help="a page with the picture and the table")
    add_target(command)
    add_weights(command)
    add_rendering(command)
    add_policy(command)
    add_rule(command)
    add("--json", action="store_true", help="print one JSON object instead of a table")


def _add_quality(commands: Any, summary: str) -> None:
    command = add_command(commands, "quality", summary)
    command.set_defaults(command="bench quality")
    add = command.add_argument
    add_prompt_files(command)
    add("--batch", type=count, default=8, metavar="N", help="decoded together; default 8")
    add_decoder(command)
    add_rendering(command)
    add_rule(command)
    add("--json", action="store_true", help="print one JSON object instead of a table")


def _add_load(commands: Any, summary: str) -> None:
    command = add_command(commands, "load", summary)
    command.set_defaults(command="bench load")
    add = command.add_argument
    add_prompt_files(command)
    add("--concurrency", type=counts, default=LOADS, metavar="N,N,...", help="clients that each "
        "have one request under way (default: %(default)s)")  # fmt: skip
    add("--policies", type=names, default=LOAD_POLICIES, metavar="NAME,NAME,...", help="a fixed "
        "length beyond the block is the whole block (default: %(default)s)")  # fmt: skip
    add("--requests", type=count, default=2, metavar="N", dest="requests_per_client",
        help="of each client, on average (default %(default)s)")  # fmt: skip
    add("--repeats", type=count, default=5, metavar="N", help="default %(default)s")
    add("--plot", metavar="FILE.png", help="throughput against interactivity, and lengths")
    add_server(command)
    add_decoder(command)
    add_rendering(command)
    add_limits(command)
    add("--json", action="store_true", help="print one JSON object instead of a table")
