"""The arguments that commands share, and the forms of their values.

Imports nothing that takes time.
"""

from __future__ import annotations

import argparse
from typing import Any

from dspark_jax import prompts
from dspark_jax.characters import check_characters
from dspark_jax.scheduler.policy import check_name


def policy(text: str) -> str:
    """The name of a policy; empty, as argparse passes the default too, leaves it to the engine."""
    try:
        return check_name(text) if text else text
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count(text: str) -> int:
    """An argument that counts something, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def memory_size(text: str) -> int:
    """Bytes, of which K, M and G make many; 0 or more."""
    digits = text[:-1] if text[-1:] in tuple("KMG") else text
    if not digits.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: give bytes, or such as 500M, 2G")
    return int(digits) << 10 * " KMG".find(text[len(digits) :] or " ")


def counts(text: str) -> list[int]:
    """Several of them, with commas between."""
    return [count(part) for part in text.split(",")]


def mesh(text: str) -> dict[str, int]:
    """Sizes of a mesh by its axes."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        known = axis in ("data", "expert", "tensor") and axis not in sizes
        if not known or not size.isdecimal() or int(size) < 1:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no mesh: give some of data=N, expert=N and tensor=N, with commas "
                "between, each 1 or more"
            )
        sizes[axis] = int(size)
    return sizes


def names(text: str) -> list[str]:
    """Several names, with commas between."""
    return text.split(",")


def places(text: str) -> list[str]:
    """What acceptance is told apart by."""
    found = names(text)
    known = "position", "context", "turn"
    if not set(found) <= set(known):
        raise argparse.ArgumentTypeError(f"{text!r}: give some of {', '.join(known)}")
    return found


def drafters(text: str) -> dict[str, str]:
    """Several drafters by their names."""
    found: dict[str, str] = {}
    for part in names(text):
        name, equals, source = part.partition("=")
        source = source if equals else name
        if not name or not source or source == "none":
            raise argparse.ArgumentTypeError(
                f"{part!r} is no drafter: give NAME=DRAFTER, or a DRAFTER alone; none is there "
                "in any case"
            )
        if name in found or name == "none":
            raise argparse.ArgumentTypeError(f"{name!r} is there twice: give each its own NAME")
        found[name] = source
    return found


def prompt_file(text: str) -> str:
    """The path of a file of prompts, or of a set of our own."""
    try:
        return prompts.find(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def plain_text(value: str) -> str:
    """A text for models, unlike a path, which may hold any bytes."""
    try:
        check_characters("the text", value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return value


def add_command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    """A command, or a verb of one."""
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False
    )
    return command


def add_output(command: argparse.ArgumentParser) -> None:
    """Where a checkpoint is written."""
    command.add_argument("--out", required=True, metavar="DIR", help="where to; must not exist")


def add_prompt_files(command: argparse.ArgumentParser) -> None:
    """Files of prompts to measure with."""
    add = command.add_argument
    add("--prompts", action="append", type=prompt_file, required=True, metavar="FILE.jsonl",
        help="as for generate; may be repeated")  # fmt: skip
    add("--limit", type=count, metavar="N", help="use the first N prompts of each file")


def add_prefix_store(command: argparse.ArgumentParser) -> None:
    """Memory for what was read of texts that are over."""
    add, one = command.add_argument, memory_size("1G")
    add("--prefix-bytes", type=memory_size, default=one, metavar="SIZE",
        help="memory for what was read, so that texts that begin alike need not be read again; 0 "
        "for none, default 1G")  # fmt: skip


def add_server(command: argparse.ArgumentParser) -> None:
    """A server in place of a model."""
    add = command.add_argument
    add("--url", help="of a server with OpenAI's interface, for instance http://127.0.0.1:8000, in "
        "place of a model")  # fmt: skip
    add("--api-key-file", metavar="FILE", help="whose first line is the key that the server wants")


def add_models(command: argparse.ArgumentParser) -> None:
    """A target with its drafter."""
    add_target(command)
    command.add_argument(
        "--drafter",
        help="directory or hub id; the directory of a training run, for its best or last drafter, "
        "or RUN@STEP; lookup (no model: what followed the last tokens earlier in the "
        "text; lookup:1-3 matches 1 to 3 of them), both as default+lookup, first:8 (the target's "
        "own first 8 layers), lookahead (n-grams that the target guesses ahead; lookahead:5-7 are "
        "of 5 tokens in 7 columns), or none (default: the packaged one for the default target, the "
        "one inside a target's checkpoint, none for another)",
    )


def add_decoder(command: argparse.ArgumentParser) -> None:
    """A target with its drafter, to decode with."""
    add_models(command)
    add_weights(command)


def add_weights(command: argparse.ArgumentParser) -> None:
    """What the matrices are kept as."""
    command.add_argument(
        "--weights",
        choices=("plain", "int8", "fp8"),
        default="plain",
        help="of the layers' matrices, target and drafter alike; int8 and fp8 have a scale for "
        "every output (default %(default)s)",
    )


def add_profile(command: argparse.ArgumentParser, what: str) -> None:
    """A trace of what the devices do."""
    add = command.add_argument
    add("--profile", metavar="DIR", help=f"trace some {what} there, for XProf or Perfetto")
    add("--profile-count", type=count, default=10, metavar="N", help="how many (default "
        "%(default)s), behind the first three")  # fmt: skip


def add_processes(command: argparse.ArgumentParser) -> None:
    """How several processes find each other."""
    add = command.add_argument
    add(
        "--distributed",
        action="store_true",
        help="one of several processes, as Slurm or Kubernetes starts them",
    )
    add("--coordinator", metavar="HOST:PORT", help="of process 0, where nothing else says so")
    add("--processes", type=count, metavar="N", help="how many there are, where nothing says so")
    add("--process", type=int, metavar="I", help="which one this is, from 0")


def add_target(command: argparse.ArgumentParser) -> None:
    """A target, and where it is computed."""
    add = command.add_argument
    add(
        "--target",
        default="default",
        help="Hugging Face directory or hub id, or GGUF file (default: SmolLM2-135M-Instruct)",
    )
    add("--own-vocab", action="store_true", help="draft with the drafter's own "
        "embedding and head")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="default %(default)s")
    add(
        "--mesh",
        type=mesh,
        default={},
        metavar="data=N,tensor=N",
        help="devices that share requests, experts (expert=N) and weights (default: one device)",
    )
    add_processes(command)


def add_rendering(command: argparse.ArgumentParser) -> None:
    """How prompts are rendered."""
    add = command.add_argument
    add("--system", type=plain_text, default="", metavar="TEXT", help="the system turn of prompts "
        "that have none")  # fmt: skip
    add("--no-chat-template", dest="chat_template", action="store_false", help="decode prompts as "
        "plain text")  # fmt: skip
    add("--template-arg", type=plain_text, action="append", default=[], metavar="KEY=VALUE",
        dest="template_args", help="an argument of the chat template, JSON or a string, for "
        "instance enable_thinking=false; may be repeated")  # fmt: skip


def add_decoding(command: argparse.ArgumentParser) -> None:
    """How prompts are continued, the policy of drafting included."""
    add_policy(command)
    add_limits(command)


def add_policy(command: argparse.ArgumentParser) -> None:
    """Which drafts are verified."""
    command.add_argument(
        "--policy",
        type=policy,
        default="",
        help="drafts to verify: block (all), fixed:K (the first K), threshold:P (those before the "
        "first confidence below P), gate:P (all, or none where the first confidence is below P), "
        "causal or delayed (as many as pay), or none (default: delayed; block for a drafter "
        "without confidences)",
    )


def add_limits(command: argparse.ArgumentParser) -> None:
    """How prompts are continued, where policies are compared."""
    command.add_argument(
        "--temperature", type=float, default=0.0, metavar="F", help="default 0: greedy"
    )
    add_rule(command)


def add_rule(command: argparse.ArgumentParser) -> None:
    """How prompts are continued, where temperatures are compared."""
    add = command.add_argument
    add("--max-new-tokens", type=int, default=128, metavar="N", help="default %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="each prompt gets its own key from it")
    add_acceptance(command)


def add_acceptance(command: argparse.ArgumentParser) -> None:
    """How drafts are accepted, and by which operations."""
    add = command.add_argument
    add(
        "--acceptance",
        choices=("rejection", "coupled"),
        default="rejection",
        help="lossless rule for drafts; the text under coupled is the same with any drafter",
    )
    add(
        "--kernels",
        choices=("auto", "xla", "mosaic_gpu"),
        default="auto",
        help="default %(default)s: mosaic_gpu, for NVIDIA GPUs from Hopper on, where it can run",
    )


def add_filters(command: argparse.ArgumentParser) -> None:
    """Filters of the target's distribution."""
    add = command.add_argument
    add("--top-k", type=int, default=0, metavar="N", help="keep the N best tokens (0: all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="keep this mass of best tokens")
    add("--min-p", type=float, default=0.0, metavar="P", help="keep tokens at least P x the best")
