"""``dspark prepare --ray N``: the shares of a file as tasks of a Ray cluster (extra ``ray``).

What a task does is the command itself with ``--processes N --process I``, so that its output lies
where that of any other share does, and goes on where it stopped. When all shares are there, one
more task puts them together.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def prepare_spread(args: argparse.Namespace) -> int:
    """Have the machines of a cluster answer a share each; all of them see the same files.

    Raises:
        ValueError: Ray is not installed, or a path has a meaning here alone.
        RuntimeError: a share has failed; what was answered stays.
    """
    try:
        import ray
        import ray.data
        import ray.exceptions
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--ray needs {error.name}, which is not installed: pip install 'dspark-jax[ray]'"
        ) from None
    if args.ray < 0:
        raise ValueError(f"--ray is {args.ray}: give a number of shares")
    for name in ("input", "out"):
        if not Path(getattr(args, name)).is_absolute():
            raise ValueError(
                f"{name} is {getattr(args, name)}: with --ray give a whole path, which all "
                "machines of the cluster see"
            )
    number = str(args.ray)
    shares = [["--processes", number, "--process", str(i)] for i in range(args.ray)]
    if not ray.is_initialized():
        ray.init()
    gpus = 1 if ray.cluster_resources().get("GPU") else None
    together: list[list[str]] = [[]]
    for tasks in (shares, together):
        items = [{"words": [*args.words, "--ray", "0", *task]} for task in tasks]
        found = ray.data.from_items(items, override_num_blocks=len(items))
        try:
            compute = ray.data.TaskPoolStrategy(size=len(items))
            found.map(answer, num_gpus=gpus, compute=compute).materialize()
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"a share has failed: {_cause(error)}") from None
    print(args.out)
    return 0


def answer(row: dict[str, Any]) -> dict[str, Any]:
    """One task: the command with these words, in a process of the cluster."""
    from dspark_jax.cli.command import main

    code = main([str(word) for word in row["words"]])
    if code:
        raise RuntimeError(f"exit code {code}; its log says why")
    return {"code": code}


def _cause(error: BaseException) -> str:
    """The last line of what a task's process has said."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__
