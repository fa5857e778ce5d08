"""The arguments of the ``dspark`` command, and what can be said against them at a glance.

Imports nothing that takes time: ``--help`` and usage errors answer at once.
"""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from dspark_jax.cli.measurements import add_bench
from dspark_jax.cli.options import (
    add_acceptance,
    add_command,
    add_decoder,
    add_decoding,
    add_filters,
    add_models,
    add_output,
    add_policy,
    add_prefix_store,
    add_processes,
    add_profile,
    add_rendering,
    add_server,
    add_target,
    count,
    counts,
    plain_text,
    prompt_file,
)
from dspark_jax.cli.recipes import settings_help

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
EXAMPLES = """
examples:
  dspark generate "Why is the sky blue?"
  dspark chat --url http://127.0.0.1:8000
  dspark generate --prompts prompts.jsonl --temperature 0.7 --seed 1 --json
  dspark bench speed --prompts prompts.jsonl --limit 8
  dspark serve --slots 8
  dspark doctor --concurrency 1,8,32
  dspark bench acceptance --prompts math.jsonl --prompts code.jsonl --temperature 0
  dspark prepare prompts.jsonl --out answers.jsonl --temperature 0.7 --mesh data=8 --batch 256
  dspark cache estimate smollm2_135m_dspark
  dspark train smollm2_135m_dspark --set data=answers.jsonl
  dspark export --format speculators --out exported
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose usage errors take one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"dspark: {' '.join(message.split())} (see {self.prog} --help)\n")


def make_parser(version: str) -> argparse.ArgumentParser:
    """The parser; ``command`` of its result is the words of the command, e.g. ``bench speed``."""
    parser = _Parser(
        prog="dspark",
        description="Speculative decoding with DSpark drafters: generate, measure, train.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dspark {version}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_generate(commands, "continue a prompt, showing text as soon as it is verified")
    _add_serve(commands, "serve OpenAI's interface over HTTP")
    _add_chat(commands, "talk to a model, or to a server")
    add_bench(add_command(commands, "bench", "measure speed and acceptance"))
    _add_doctor(commands, "say whether drafts pay on this machine, and with which policy")
    _add_calibrate(commands, "fit the drafter's confidences to what is accepted")
    _add_replay(commands, "compare policies on recorded rounds; needs no accelerator")
    _add_profile(commands, "measure the seconds of an engine's rounds, for its scheduler")
    _add_plan(commands, "say what models take on each device, and what fits; reads no weights")
    _add_prepare(commands, "have the target answer prompts, as training data; resumes where it was")
    _add_train(commands, "train a drafter, or go on where an interrupted run stopped")
    _add_cache(commands)
    _add_export(commands, "write a drafter in a layout that other programs read")
    _add_convert(commands, "write a drafter of another program in the layout of this one")
    return parser


def _add_generate(commands: Any, summary: str) -> None:
    command = add_command(commands, "generate", summary)
    command.set_defaults(command="generate")
    add = command.add_argument
    add("prompt", nargs="?", type=plain_text, metavar="PROMPT", help="the user's message; - or "
        "nothing reads stdin")  # fmt: skip
    add(
        "--prompts",
        type=prompt_file,
        metavar="FILE.jsonl",
        help='one JSON object a line with "prompt", or "turns" of which the first is used; or a '
        "set of our own, own:math, own:code or own:chat",
    )
    add_decoder(command)
    add_rendering(command)
    add_decoding(command)
    add_filters(command)
    add("--stop", type=plain_text, action="append", default=[], metavar="TEXT", help="end there; "
        "may be repeated")  # fmt: skip
    add("--json-schema", metavar="FILE.json", help="every text is JSON that follows this schema")
    add("--batch", type=count, default=1, metavar="N", help="prompts decoded together, unstreamed")
    add_profile(command, "rounds")
    add("--json", action="store_true", help="print one JSON object a prompt")


def _add_serve(commands: Any, summary: str) -> None:
    command = add_command(commands, "serve", summary)
    command.set_defaults(command="serve")
    add = command.add_argument
    add("--host", default="127.0.0.1", metavar="NAME", help="to listen at; default %(default)s, "
        "which other machines cannot reach")  # fmt: skip
    add("--port", type=int, default=8000, metavar="N", help="default %(default)s; 0 takes a free "
        "one")  # fmt: skip
    add("--name", default="", metavar="NAME", help="of the model (default: the target's)")
    keys = command.add_mutually_exclusive_group()
    keys.add_argument("--api-key", default="", metavar="KEY", help="that clients must show; others "
        "on this machine can see it, which they cannot of a file")  # fmt: skip
    keys.add_argument("--api-key-file", metavar="FILE", help="whose first line it is")
    add("--slots", type=count, default=8, metavar="N", help="answers at once; default %(default)s")
    add("--positions", type=count, default=2048, metavar="N", help="most tokens of a prompt and "
        "its answer; default %(default)s")  # fmt: skip
    add("--queue", type=count, default=256, metavar="N", help="most requests that wait; default "
        "%(default)s")  # fmt: skip
    add("--timeout", type=float, default=600.0, metavar="S", help="for an answer; default "
        "%(default)g s")  # fmt: skip
    add("--drain-s", type=float, default=30.0, metavar="S", help="for answers on their way when "
        "the server is told to stop; default %(default)g")  # fmt: skip
    add("--max-body-bytes", type=count, default=4 << 20, metavar="N", help="of a request; default "
        "%(default)s")  # fmt: skip
    add("--cors-origin", default="", metavar="ORIGIN", help="whose pages may call the server "
        "(default: nobody's)")  # fmt: skip
    add_prefix_store(command)
    add_decoder(command)
    add_rendering(command)
    add_policy(command)
    add_acceptance(command)


def _add_chat(commands: Any, summary: str) -> None:
    command = add_command(commands, "chat", summary)
    command.set_defaults(command="chat")
    add_server(command)
    add_decoder(command)
    add_rendering(command)
    add_decoding(command)
    add_filters(command)
    command.add_argument("--stop", type=plain_text, action="append", default=[], metavar="TEXT",
        help="end answers there; may be repeated")  # fmt: skip
    command.set_defaults(max_new_tokens=512)


def _add_doctor(commands: Any, summary: str) -> None:
    command = add_command(commands, "doctor", summary)
    command.set_defaults(command="doctor")
    add = command.add_argument
    add("--concurrency", type=counts, default=[1, 8, 32], metavar="N,N,...", help="requests at "
        "once; default 1,8,32")  # fmt: skip
    add("--max-new-tokens", type=count, default=48, metavar="N", help="of each text; default 48")
    add_decoder(command)
    add_rendering(command)
    add("--json", action="store_true", help="print one JSON object instead of a table")


def _add_profile(commands: Any, summary: str) -> None:
    command = add_command(commands, "profile", summary)
    command.set_defaults(command="profile")
    add = command.add_argument
    add("--out", metavar="FILE.json", help="where the profile goes, for engines on this machine")
    add("--slots", type=count, default=8, metavar="N", help="of the engine; default %(default)s")
    add("--positions", type=count, default=1024, metavar="N", help="default %(default)s")
    add("--replays", type=count, default=20, metavar="N", help="default %(default)s")
    add_decoder(command)
    add("--json", action="store_true", help="print one JSON object instead of a table")


def _add_plan(commands: Any, summary: str) -> None:
    command = add_command(commands, "plan", summary)
    command.set_defaults(command="plan")
    add = command.add_argument
    add("--slots", type=count, default=8, metavar="N", help="requests at once; default %(default)s")
    add("--positions", type=count, default=1024, metavar="N", help="default %(default)s")
    add("--memory", type=count, default=80, metavar="GB", help="of a device; default %(default)s")
    add_decoder(command)
    command.set_defaults(dtype="bfloat16")
    add("--json", action="store_true", help="print one JSON object instead of a table")


def _add_calibrate(commands: Any, summary: str) -> None:
    command = add_command(commands, "calibrate", summary)
    command.set_defaults(command="calibrate")
    add = command.add_argument
    rounds = command.add_mutually_exclusive_group(required=True)
    rounds.add_argument("--prompts", action="append", type=prompt_file, metavar="FILE.jsonl",
        help="to decode, as "
        "for generate; may be repeated")  # fmt: skip
    rounds.add_argument("--from", action="append", default=[], dest="records", metavar="RECORD",
        help="rounds that were recorded before; may be repeated")  # fmt: skip
    add("--limit", type=count, metavar="N", help="use the first N prompts of each file")
    add("--temperature", type=float, action="append", metavar="F", help="may be repeated, a table "
        "each (default: 0 and 1)")  # fmt: skip
    add("--acceptance", choices=("rejection", "coupled"), action="append",
        help="may be repeated, tables each (default: rejection)")  # fmt: skip
    add("--max-new-tokens", type=count, default=128, metavar="N", help="default %(default)s")
    add("--batch", type=count, default=16, metavar="N", help="decoded together; default 16")
    add("--seed", type=int, default=0, metavar="N", help="each prompt gets its own key from it")
    add("--out", metavar="FILE.json", help="the tables (default: calibration.json in the drafter's "
        "directory, where the engine looks for it)")  # fmt: skip
    add("--record", metavar="FILE.jsonl", help="keep the rounds, for replay and --from, and to go "
        "on after an interruption")  # fmt: skip
    add("--plot", metavar="FILE.png", help="accepted against predicted, by position")
    add_decoder(command)
    add_rendering(command)
    add("--json", action="store_true", help="print one JSON object instead of a table")


def _add_replay(commands: Any, summary: str) -> None:
    command = add_command(commands, "replay", summary)
    command.set_defaults(command="replay")
    add = command.add_argument
    add("record", metavar="RECORD", help="of dspark calibrate --record")
    add("--concurrency", type=counts, default="1,4,16,64", metavar="N,N,...", help="requests "
        "decoded together (default %(default)s)")  # fmt: skip
    costs = command.add_mutually_exclusive_group()
    costs.add_argument("--profile", metavar="FILE.json", help="costs of dspark profile")
    costs.add_argument("--costs", choices=("staircase", "smooth"), default="staircase",
        help="of an imagined device (default %(default)s)")  # fmt: skip
    add("--calibration", metavar="FILE.json", help="of dspark calibrate")
    add("--json", action="store_true", help="print one JSON object instead of a table")


def _add_prepare(commands: Any, summary: str) -> None:
    command = add_command(commands, "prepare", summary)
    command.set_defaults(command="prepare")
    add = command.add_argument
    add(
        "input",
        type=prompt_file,
        metavar="INPUT.jsonl",
        help='one JSON object a line with "prompt", "turns", "conversations" or "messages"; '
        "answers in it are dropped",
    )
    add("--out", required=True, metavar="FILE.jsonl", help="the conversations with their answers")
    add("--limit", type=count, metavar="N", help="use the first N lines")
    add("--batch", type=count, default=8, metavar="N", help="decoded together; default 8")
    add("--ray", type=int, default=0, metavar="N",
        help="N shares on the machines of a Ray cluster, which all see these files")  # fmt: skip
    add_decoder(command)
    add_rendering(command)
    add_decoding(command)
    add_filters(command)
    command.set_defaults(max_new_tokens=512)


def _add_train(commands: Any, summary: str) -> None:
    command = add_command(commands, "train", summary)
    command.set_defaults(command="train")
    add = command.add_argument
    add("config", nargs="?", metavar="RECIPE", help="name of a recipe, or a Python file that "
        "defines config = TrainConfig(...)")  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    questions = command.add_mutually_exclusive_group()
    for word, summary in (
        ("list", "print the recipes that there are"),
        ("show", "print the recipe"),
        ("dry-run", "print steps, blocks, memory and disk, and train nothing"),
    ):
        questions.add_argument(f"--{word}", action="store_const", const=f"train {word}",
            dest="command", default=argparse.SUPPRESS, help=summary)  # fmt: skip
    add("--prompts", action="append", default=[], metavar="FILE.jsonl", help="to decode at "
        "every evaluation, greedily and sampled; the drafter that does best is kept; may be "
        "repeated")  # fmt: skip
    add("--limit", type=count, metavar="N", help="use the first N prompts of each file")
    add("--max-new-tokens", type=count, default=64, metavar="N", help="of each (default "
        "%(default)s)")  # fmt: skip
    add("--track", choices=TRACKERS, action="append", default=[], help="send metrics there, too; "
        "may be repeated; each needs the extra of its name")  # fmt: skip
    add_profile(command, "steps")
    add_processes(command)
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = settings_help()


def _add_cache(commands: Any) -> None:
    cache = add_command(commands, "cache", "target features on disk, for training")
    verbs = cache.add_subparsers(title="verbs", metavar="VERB", required=True)
    for verb, summary in (
        ("estimate", "print how many bytes a cache takes, and write nothing"),
        ("write", "run the target over the data of a configuration, or go on with it"),
    ):
        command = add_command(verbs, verb, summary)
        command.set_defaults(command=f"cache {verb}")
        add = command.add_argument
        add("config", metavar="RECIPE", help="as for train")
        add("--set", action="append", default=[], metavar="KEY=VALUE", help="as for train")
    add("--out", required=True, metavar="DIR", help="where the cache goes")
    add_processes(command)
    check = add_command(verbs, "check", "read all of a cache and say what it holds")
    check.set_defaults(command="cache check")
    check.add_argument("directory", metavar="DIR")


def _add_export(commands: Any, summary: str) -> None:
    command = add_command(commands, "export", summary)
    command.set_defaults(command="export")
    add = command.add_argument
    add("--format", choices=("deepspec", "speculators"), required=True, help="of the reference "
        "implementation, with embedding and head, or of vllm-project/speculators")  # fmt: skip
    add("--full-vocabulary", action="store_true", help="draft over the target's whole vocabulary")
    add_output(command)
    add_models(command)
    add_rendering(command)


def _add_convert(commands: Any, summary: str) -> None:
    command = add_command(commands, "convert", summary)
    command.set_defaults(command="convert")
    add = command.add_argument
    add("source", metavar="DRAFTER", help="directory or hub id, in any known layout")
    add_output(command)
    add_target(command)
    add_rendering(command)
