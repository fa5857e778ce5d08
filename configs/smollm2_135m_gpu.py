"""A quarter of an hour on one GPU: benchmarks of the kernels, answers, a drafter trained on them.

Command: dspark train configs/smollm2_135m_gpu.py --set data=answers.jsonl
    trains alone. This file is also a program that does everything, within ``--minutes`` (12.5):
    PYTHONPATH=. python configs/smollm2_135m_gpu.py --work work --out results \\
        --prompts prompts.jsonl --answered responses.jsonl
    ``bench`` times the kernels (at most 30 % of the time); ``answers`` has the target answer the
    prompts that no ``--answered`` file has (at most half of what is left); ``train`` gets the rest:
    it times a step, and chooses ``steps`` so that the learning rate has decayed in time. Each has a
    process of its own. Exit code 2 is wrong input; the same command goes on where it was stopped.

Without a network: jax for CUDA must be there; bring what else is missing, and the model in parts
    (one after the other if need be), made with
    pip download --no-deps --only-binary=:all: --python-version 3.12 \\
        --platform manylinux_2_17_x86_64 -d wheels gguf platformdirs
    split -n 2 ~/.cache/dspark-jax/SmolLM2-135M-Instruct.Q4_1.gguf model.
    and there, before the command above with ``--model-parts model.aa model.ab``:
    pip install --no-index --no-deps --target site wheels/*.whl; export PYTHONPATH=.:site

Results: in ``--work`` bench-KERNEL.json and .log, answers.jsonl, metrics.jsonl, recipe.json,
    drafter/, drafter_bfloat16/ (39 MB) and machine.json (date, device, versions, stages). ``--out``
    gets them in parts of 15 MB, anew after each stage: cat results/results.tar.gz.* | tar xz

Rehearsal on a CPU, every size an argument:
    JAX_PLATFORMS=cpu PYTHONPATH=. python configs/smollm2_135m_gpu.py --work rehearsal \\
        --out rehearsal/out --prompts prompts.jsonl --limit 12 --slots 2 --positions 191 \\
        --max-new-tokens 12 --dtype float32 --minutes 3 --only "verify 5" --set eval_sequences=2 \\
        --set tokens_per_batch=384 --set max_length=192 --set length_buckets=192 \\
        --set num_anchors=8 --set sequences_per_update=2 --set draft_vocab_size=512

Data: the target's answers to up to 35,622 prompts (math, code, chat), at temperature 0, 0.6 or 1.0
    by a hash of the prompt. ``--answered`` comes last: its last 24 answers are held out.
Hardware and time: one NVIDIA H200, 2026-11-27: 4,675 answers in two minutes, 27 M blocks in six.
    Four updates took 119 ms on 2026-11-28, and 76 ms with ``--kernels mosaic_gpu``.
Result: expected accepted length on 24 held-out answers 2.81; notebooks/measurements.md says more.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import itertools
import json
import logging
import multiprocessing
import os
import platform
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dspark_jax.axes import place
from dspark_jax.checkpoint import Checkpoints
from dspark_jax.checkpoints.conversations import read_answered
from dspark_jax.checkpoints.deepspec import save_drafter
from dspark_jax.checkpoints.default import join_target_parts
from dspark_jax.checkpoints.identity import trained_for
from dspark_jax.checkpoints.load import load_target, open_target, read_drafter
from dspark_jax.config import TrainConfig
from dspark_jax.engine.request import Request
from dspark_jax.evaluation.answers import Sizes, answer_until, questions
from dspark_jax.evaluation.output import check_recipe, open_lines, read_lines
from dspark_jax.evaluation.prompts import read_prompts
from dspark_jax.files import read_json, write_atomically
from dspark_jax.overrides import override
from dspark_jax.training.fit import batches_of, evaluate, fit
from dspark_jax.training.records import sha256
from dspark_jax.training.run import Run, check_kernels, open_source, start_run

logger = logging.getLogger("gpu")

config = dataclasses.replace(
    runpy.run_path(str(Path(__file__).with_name("smollm2_135m_dspark.py")))["config"],
    out="runs/smollm2_135m_gpu",
    dtype="bfloat16",
    kernels="xla",  # runs on every GPU; mosaic_gpu is faster where it can run
    length_buckets=(448,),  # a program less to compile
    num_layers=4,
    block_size=5,
    tokens_per_batch=56 * 448,
    num_anchors=128,
    updates_per_batch=6,
    sequences_per_update=28,
    average_decay=0.999,
    steps=0,
    epochs=4.0,
    eval_every=250,
    checkpoint_every=2000,
    log_every=25,
)

KERNELS = ("accept_block", "ragged_attention", "anchor_attention")
SHARES = {"bench": 0.3, "answers": 0.5}  # of the time left, where other stages come behind
PACK_S, EXPORT_S, GRACE_S = 15, 30, 20  # to pack, to export, and until a late stage is killed
MARGIN, PROBE_BATCHES = 0.9, 6  # share of the time to plan steps for; batches to time
PART_BYTES, MOST_PARTS = 15_000_000, 8
PACKED = ("machine.json", "bench-*", "metrics.jsonl", "curves.png", "recipe.json",
          "drafter_bfloat16", "answers.jsonl*")  # fmt: skip


def check(args: argparse.Namespace, _: float) -> None:
    """Refuse wrong input before time is spent, and note what machine this is."""
    recipe, work = recipe_of(args), Path(args.work)
    check_kernels(recipe)
    read_prompts(args.prompts)
    for path in args.answered:
        read_answered(path)
    check_recipe(
        work / "answers.jsonl",
        {name: getattr(args, name) for name in ("positions", "max_new_tokens", "seed")}
        | {"target": recipe.target, "dtype": recipe.dtype, "prompts": sha256(Path(args.prompts))},
    )
    open_target(recipe.target)
    query, driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], ""
    if shutil.which(query[0]):
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    date, device = datetime.now(UTC).isoformat(timespec="seconds"), jax.devices()[0].device_kind
    found = {"date": date, "device": device, "driver": driver, "cpus": os.cpu_count()}
    found |= {"jax": jax.__version__, "python": platform.python_version()}
    found |= {"arguments": vars(args), "stages": {}}
    path = work / "machine.json"
    runs = read_json(path, "record") if path.exists() else []
    write_atomically(path, json.dumps([*runs, found], indent=1) + "\n")


def recipe_of(args: argparse.Namespace) -> TrainConfig:
    """The recipe of training; its target, dtype and kernels are those of the answers too."""
    given = {name: getattr(args, name) for name in ("dtype", "kernels") if getattr(args, name)}
    given |= {"out": args.work, "data": str(Path(args.work) / "data.jsonl")}
    return dataclasses.replace(override(config, args.set), **given)


def bench(args: argparse.Namespace, end: float) -> None:
    """Time the kernels, each in a process that may take half of the time left, the last all."""
    work, missing = Path(args.work), []
    todo = [name for name in KERNELS if not (work / f"bench-{name}.json").exists()]
    for name in todo:
        limit = max(0.0, end - time.time()) / (1 if name == todo[-1] else 2)
        command = [sys.executable, "-m", f"pallas_kernels.{name}.bench"]
        command += ["--out", str((work / f"bench-{name}.json").resolve())]
        command += [word for text in args.only for word in ("--only", text)]
        try:
            with (work / f"bench-{name}.log").open("wb") as log:
                subprocess.run(
                    command, stdout=log, stderr=subprocess.STDOUT, timeout=limit, check=True,
                    cwd=Path(__file__).parent.parent,
                )  # fmt: skip
        except subprocess.SubprocessError as problem:
            missing.append(f"{name} ({type(problem).__name__})")
    if missing:
        raise RuntimeError(f"cases are missing of {', '.join(missing)}: bench-KERNEL.log says why")


def answers(args: argparse.Namespace, end: float) -> None:
    """Have the target answer the prompts that have no answer yet, until the time is up."""
    recipe, prompts = recipe_of(args), read_prompts(args.prompts, args.limit)
    elsewhere = [row for path in args.answered for row in read_answered(path)]
    with open_lines(Path(args.work) / "answers.jsonl") as (file, lines):
        todo = questions(prompts, lines, elsewhere)
        logger.info("%d prompts to answer, %d answered before", len(todo), len(lines))
        if not todo:
            return
        target = load_target(recipe.target, jnp.dtype(recipe.dtype))
        sizes = Sizes(args.slots, args.positions, kernels=recipe.kernels)
        limits = Request((0,), max_new_tokens=args.max_new_tokens, stop_ids=target.stop_ids)
        options = {"seed": args.seed, "least": recipe.min_loss_tokens}
        for line in answer_until(end, target, sizes, todo, limits, **options):
            file.write(line)
            file.flush()


def train(args: argparse.Namespace, end: float) -> None:
    """Train for as many steps as there is time for, or go on with those chosen before."""
    work, recipe = Path(args.work), recipe_of(args)
    target = open_target(recipe.target)[0]
    if not (work / "drafter").exists():
        end -= EXPORT_S
        if (work / "recipe.json").exists():
            steps, run = read_json(work / "recipe.json", "recipe")["steps"], None
        else:
            write_data(work, args.answered)
            run = start_run(recipe, open_source(recipe))
            seconds = probe(run)
            steps = plan_steps(end - time.time(), *seconds, recipe.eval_every)
            logger.info("%d steps of %.3f s, %.3f an evaluation", steps, *seconds)
            planned = dataclasses.replace(run.recipe, steps=steps)
            run = dataclasses.replace(run, recipe=planned, total=steps)
        recipe = dataclasses.replace(recipe, steps=steps)
        # At the end of the time fit saves its state and leaves.
        timer = threading.Timer(end - time.time(), os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()
        try:
            fit(recipe, run)
        except KeyboardInterrupt as problem:
            if time.time() < end:
                raise
            logger.warning("time is up, the learning rate has not decayed: %s", problem)
            with Checkpoints(work / "checkpoints", recipe.keep_checkpoints) as saved:
                if saved.latest is None:
                    raise
                run = start_run(recipe, open_source(recipe))
                params = saved.restore(saved.latest, run.state).params
            return save_rounded(work, run.cfg, params, run.own)
        timer.cancel()
    cfg, params, own, _ = read_drafter(target, work / "drafter")
    save_rounded(work, cfg, params, own)


def write_data(work: Path, answered: Sequence[str]) -> None:
    """What is trained on: the answers in the order of their prompts, then those of before."""
    lines = read_lines(work / "answers.jsonl")[0] if (work / "answers.jsonl").exists() else {}
    parts = [lines[number] for number in sorted(lines)]
    parts += [Path(path).read_bytes().rstrip(b"\n") + b"\n" for path in answered]
    if not parts:
        raise ValueError("there are no answers to train on: run the stage answers, or --answered")
    write_atomically(work / "data.jsonl", b"".join(parts))


def probe(run: Run) -> tuple[float, float]:
    """Seconds of a step and of an evaluation, as measured here; the run's own state is left alone.

    Everything runs twice: the first time has the compilation in it.
    """
    state, step_s, evaluation_s = jax.tree.map(jnp.copy, run.state), 0.0, 0.0
    for batch in itertools.islice(batches_of(run, 0), PROBE_BATCHES):
        for _ in range(2):
            placed = place(batch, run.programs.sequences)
            (state, _), second_s = timed(run.programs.step, state, run.frozen, placed, run.rate)
        step_s += second_s / PROBE_BATCHES
    if run.held_out:
        for _ in range(2):
            evaluation_s = timed(evaluate, run, state, "")[1]
    return step_s, evaluation_s


def timed(call: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What a call gives, and its seconds."""
    began = time.time()
    result = jax.block_until_ready(call(*arguments))
    return result, time.time() - began


def plan_steps(left: float, step_s: float, evaluation_s: float, every: int) -> int:
    """How many steps end within the seconds left, at least one."""
    return max(1, int(MARGIN * left / (step_s + evaluation_s / every)))


def save_rounded(work: Path, cfg: Any, params: Any, own: Any) -> None:
    """Write the drafter in bfloat16."""
    shutil.rmtree(work / "drafter_bfloat16", ignore_errors=True)
    rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    record = trained_for(work / "drafter")
    save_drafter(work / "drafter_bfloat16", cfg, rounded, own, record)


def pack(work: Path, out: Path) -> list[Path]:
    """The results as parts of one compressed archive."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz", compresslevel=6) as archive:
        for path in (path for pattern in PACKED for path in sorted(work.glob(pattern))):
            archive.add(path, path.name)
    content = whole.getvalue()
    parts = [content[start : start + PART_BYTES] for start in range(0, len(content), PART_BYTES)]
    paths = [out / f"results.tar.gz.{number:02}" for number in range(len(parts))]
    if len(parts) > MOST_PARTS:
        logger.warning("the results are %d parts, more than %d", len(parts), MOST_PARTS)
    for path, part in zip(paths, parts, strict=True):
        write_atomically(path, part)
    for path in set(out.glob("results.tar.gz.*")) - set(paths):
        path.unlink()
    return paths


# Each takes the arguments, and the time at which it must have ended.
STAGES = {stage.__name__: stage for stage in (check, bench, answers, train)}


def stage_seconds(stage: str, left: float, last: bool) -> float:
    """What a stage may take of the seconds left."""
    return left if last else left * SHARES.get(stage, 1.0)


def run_stage(stage: str, args: argparse.Namespace, end: float) -> int:
    """Run a stage in a process of its own, which is ended if it is late; returns its exit code."""
    process = multiprocessing.get_context("spawn").Process(target=child, args=(stage, args, end))
    process.start()
    code = None
    try:
        process.join(max(0.0, end + GRACE_S - time.time()))
    except KeyboardInterrupt:
        code = 130
    process.terminate()
    process.join(GRACE_S)
    process.kill()
    process.join()
    return code or process.exitcode or 0


def child(stage: str, args: argparse.Namespace, end: float) -> None:
    """What the process of a stage does; it ends with its parent."""
    start_log()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=end_with_parent, daemon=True).start()
    jax.config.update("jax_compilation_cache_dir", str(Path(args.work) / "compiled"))
    try:
        STAGES[stage](args, end)
    except (ValueError, OSError) as problem:
        sys.exit(refuse(problem))
    except KeyboardInterrupt:
        sys.exit(130)


def end_with_parent() -> None:
    """End this process at once when the one that started it is gone."""
    multiprocessing.parent_process().join()
    os._exit(1)


def start_log() -> None:
    """Say on stderr what happens, whatever log libraries have set up."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.ERROR, force=True)
    for name in ("gpu", "dspark_jax"):
        logging.getLogger(name).setLevel(logging.INFO)


def refuse(problem: Exception) -> int:
    """Say in one line what is wrong; returns the exit code."""
    logger.error(" ".join(str(problem).split()))
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; returns the first exit code that is not 0."""
    began = time.time()
    parser = argparse.ArgumentParser(description="See the file's first lines.", allow_abbrev=False)
    add = parser.add_argument
    add("--work", required=True, metavar="DIR", help="what is done so far, and goes on")
    add("--out", metavar="DIR", help="the results in a few small files")
    add("--prompts", required=True, metavar="FILE.jsonl", help="to answer")
    add("--answered", action="append", default=[], metavar="FILE.jsonl", help="answers of before")
    add("--model-parts", nargs="+", default=[], metavar="FILE", help="of the default model")
    add("--stage", default="bench,answers,train", metavar="NAME,NAME", help="default %(default)s")
    add("--minutes", type=float, default=12.5, metavar="F", help="of everything")
    add("--only", action="append", default=[], metavar="TEXT", help="of the benchmarks' cases")
    add("--limit", type=int, metavar="N", help="answer the first N prompts")
    add("--slots", type=int, default=512, metavar="N", help="answered together")
    add("--positions", type=int, default=447, metavar="N", help="of a prompt and its answer")
    add("--max-new-tokens", type=int, default=384, metavar="N", help="of an answer")
    add("--seed", type=int, default=0, metavar="N", help="of the answers")
    add("--dtype", choices=("float32", "bfloat16"), help="default: the recipe's")
    add("--kernels", choices=("xla", "mosaic_gpu"), help="default: the recipe's")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the recipe")
    args = parser.parse_args(argv)
    start_log()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    work, codes, end = Path(args.work), [], began + 60 * args.minutes - PACK_S
    stages = ["check", *args.stage.split(",")]
    try:
        if unknown := set(stages) - set(STAGES):
            raise ValueError(f"--stage {unknown.pop()}: choose of bench, answers and train")
        recipe_of(args)
        work.mkdir(parents=True, exist_ok=True)
        if args.model_parts:
            join_target_parts(args.model_parts)
        for stage in stages:
            start = time.time()
            seconds = stage_seconds(stage, end - start, last=stage == stages[-1])
            code = run_stage(stage, args, start + seconds)
            codes.append(code)
            if stage == "check" and code:
                break
            runs = read_json(work / "machine.json", "record")
            runs[-1]["stages"][stage] = {"seconds": round(time.time() - start, 1), "exit": code}
            write_atomically(work / "machine.json", json.dumps(runs, indent=1) + "\n")
            logger.info("%s: %s", stage, runs[-1]["stages"][stage])
            if args.out:
                pack(work, Path(args.out))
            if code == 130:
                break
    except (ValueError, OSError) as problem:
        return refuse(problem)
    return next(filter(None, codes), 0)


if __name__ == "__main__":
    sys.exit(main())
