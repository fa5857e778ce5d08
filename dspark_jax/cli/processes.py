"""Several processes of one command: how each finds the others, and how they share its work.

A training is one program over the devices of all processes. Everything else is decoding, which is
planned by a host. Where the mesh fits into a process, each has a share of the work, an engine and
devices of its own, and nothing to say to the others once it knows which of them it is: one that
dies or is late stops nobody. A larger mesh is one engine over the devices of all.
"""

from __future__ import annotations

import argparse
import math
import os
import sys

import jax
from jax.extend.backend import clear_backends

SHARED = ("prepare", "cache write")  # commands whose processes each do a share
TOGETHER = (
    "prepare",
    "generate",
    "serve",
)  # commands that decode over the devices of several processes
HEARTBEAT_S = 30  # without a word, after which JAX ends the others


def join_processes(
    coordinator: str | None, processes: int | None, process: int | None, distributed: bool
) -> None:
    """Make this one of several processes of one program, if it is to be one.

    Args:
        coordinator: ``host:port`` of process 0, where nothing else says so.
        processes: how many there are.
        process: which one this is, from 0.
        distributed: whether JAX finds the others itself, under Slurm, Open MPI or Kubernetes.

    Raises:
        ValueError: the arguments do not go together, or the others cannot be reached.
    """
    places = (coordinator, processes, process)
    if places == (None, None, None) and not distributed:
        return
    if None in places and places != (None, None, None):
        raise ValueError("--coordinator, --processes and --process belong together: give all three")
    try:
        jax.distributed.initialize(*places, heartbeat_timeout_seconds=HEARTBEAT_S)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"this process could not join the others ({reason}): start it where Slurm, Open MPI or "
            "Kubernetes (with jax[k8s]) say who is who, or give --coordinator, --processes and "
            "--process"
        ) from None


def find_share(args: argparse.Namespace) -> None:
    """Set ``args.process`` and ``args.processes``, the share of this process in the work.

    With ``--distributed`` or ``--coordinator`` the processes meet. Where each has devices enough
    for the mesh, they part again, and go on as if they were alone; otherwise they stay together,
    and all of the work is that of one engine. Must come before any computation.

    Raises:
        ValueError: there are several and the command is the work of one, or see
            :func:`join_processes`.
    """
    if args.distributed or args.coordinator is not None:
        join_processes(args.coordinator, args.processes, args.process, args.distributed)
        args.together = _is_larger_than_a_process(args)
        if args.together:
            args.process, args.processes = 0, 1
            return
        args.process, args.processes = jax.process_index(), jax.process_count()
        jax.distributed.shutdown()
        clear_backends()  # whose devices are those of all processes
    args.process, args.processes = args.process or 0, args.processes or 1
    if (args.process, args.processes) != (0, 1) and args.command not in SHARED:
        raise ValueError(
            f"this is process {args.process} of {args.processes}, and {args.command} is the work "
            "of one: start it once, with --mesh for the devices of a machine (several processes "
            f"share {' and '.join(SHARED)})"
        )


def _is_larger_than_a_process(args: argparse.Namespace) -> bool:
    """Whether the mesh that is asked for takes the devices of several processes."""
    count = math.prod(getattr(args, "mesh", {}).values())
    together = args.command in TOGETHER and jax.process_count() > 1
    return together and jax.local_device_count() < count <= jax.device_count()


def end_at_once(args: argparse.Namespace, code: int) -> int:
    """End a process that works together with others, one of which is gone or has failed, without
    the end of JAX, which would wait for it; returns the exit code where there are no others."""
    if getattr(args, "together", False):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
