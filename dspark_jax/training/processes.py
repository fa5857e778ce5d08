"""A training of several processes: how each of them finds the others."""

from __future__ import annotations

import jax


def join_processes(
    coordinator: str | None, processes: int | None, process: int | None, distributed: bool
) -> None:
    """Make this one of several processes, if it is to be one.

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
