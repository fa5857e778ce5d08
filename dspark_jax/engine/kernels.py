"""Which implementation of the kernels an engine runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import jax

from dspark_jax.engine.decoder import Decoder
from dspark_jax.models.drafters.table import drafter_of
from dspark_jax.models.stacks import map_stacks
from dspark_jax.models.targets.table import family_of
from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation, Kernels

logger = logging.getLogger(__name__)

_said: set[str] = set()


def choose_kernels(
    decoder: Decoder, asked: Kernels, positions: Sequence[int] = ()
) -> Implementation:
    """The implementation that a setting stands for.

    "auto" is the kernels wherever they can run, else XLA; on a GPU it is logged once which and why.

    Args:
        decoder: whose weights and layers they work on, and where.
        asked: the setting.
        positions: lengths of the caches.

    Raises:
        ValueError: there is no such setting, or it is of kernels that cannot run; the message has
            the reason.
    """
    dispatch.check_setting(asked)
    if asked == "xla":
        return asked
    device = jax.devices()[0] if decoder.mesh is None else decoder.mesh.devices.flat[0]
    problem = dispatch.version_problem() or dispatch.device_problem(device)
    problem = problem or next(_problems(decoder, positions), None)
    if asked == "mosaic_gpu":
        if problem is not None:
            raise ValueError(f"kernels is {asked!r}: {problem}")
        return asked
    choice = "kernels: mosaic_gpu" if problem is None else f"kernels: xla ({problem})"
    if device.platform == "gpu" and choice not in _said:  # elsewhere there is nothing to choose
        _said.add(choice)
        logger.info("%s", choice)
    return "mosaic_gpu" if problem is None else "xla"


def _problems(decoder: Decoder, positions: Sequence[int]) -> Iterator[str]:
    """Why the kernels have no form for these models."""
    target, drafter = decoder.weights.target, decoder.weights.drafter
    models = [("target", target, family_of(decoder.target).sections(decoder.target))]
    if decoder.drafter is not None and drafter is not None:
        sections = drafter_of(decoder.drafter).sections(decoder.drafter)
        models.append(("drafter", drafter, sections))
    for name, params, sections in models:
        for own in map_stacks(lambda stack: stack.kind.attention, sections):
            if own.value_is_key:
                yield f"the {name} has attention whose values are its keys, with a sink"
            given = params.norm_D.dtype, own.head_dim, own.softcap, positions
            problem = dispatch.attention_problem(*given)
            if problem is not None:
                yield f"the {name} has {problem}"
