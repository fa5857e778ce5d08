"""Several processes of one command: how each finds the others, and how they share its work.

A training is one program over the devices of all processes. Everything else is decoding, which is
planned by the host: there each process has a share of the work, an engine and devices of its own,
and nothing to say to the others once it knows which of them it is. One that dies or is late stops
nobody.
"""

from __future__ import annotations

import argparse

import jax
from jax.extend.backend import clear_backends

SHARED = ("prepare", "cache write")  # commands whose processes each do a share


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
        jax.distributed.initialize(*places)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"this process could not join the others ({reason}): start it where Slurm, Open MPI or "
            "Kubernetes (with jax[k8s]) say who is who, or give --coordinator, --processes and "
            "--process"
        ) from None


def find_share(args: argparse.Namespace) -> None:
    """Set ``args.process`` and ``args.processes``, the share of this process in the work.

    With ``--distributed`` or ``--coordinator`` the processes meet, and part again: each goes on
    with the devices that are its own, as if it were alone. Must come before any computation.

    Raises:
        ValueError: there are several and the command is the work of one, or see
            :func:`join_processes`.
    """
    if args.distributed or args.coordinator is not None:
        join_processes(args.coordinator, args.processes, args.process, args.distributed)
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
