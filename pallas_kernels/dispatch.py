"""Names of implementations, and what this machine can run of them.

``xla`` is the meaning of an operation, complete on every device. ``mosaic_gpu`` is a Pallas kernel
for NVIDIA GPUs. A name that is asked for runs or is refused: there is no silent fallback. As a
setting, ``auto`` leaves the choice to whoever knows the models. All probing of versions and devices
is in this file.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

Implementation = Literal["xla", "mosaic_gpu"]
Kernels = Literal["auto", "xla", "mosaic_gpu"]  # a setting
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation)
MOSAIC_JAX = (0, 11, 2)  # the first release whose Mosaic GPU interface the kernels are written for
MOSAIC_CAPABILITY = 9.0  # Hopper: asynchronous copies by TMA
MOSAIC_WIDTHS = 64, 128  # of heads
MOSAIC_STEP = 64  # of cache lengths, in positions

# XLA adds up several sums in one loop over vectors only where it may change the order of additions
# everywhere: 60 pairs of 576 x 1536 float32 matrices times 5 rows take 20 ms on two cores with that
# and 125 without. Values of exp, log, sin and the like stay as they are, and so do infinities.
_CPU_OPTIONS: dict[str, Any] = {
    "xla_cpu_enable_fast_math": True,
    "xla_cpu_prefer_vector_width": 512,
}


def check_name(implementation: str) -> None:
    """Refuses what is no implementation.

    Raises:
        ValueError: with the names to choose from.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}: choose one of {', '.join(IMPLEMENTATIONS)}"
        )


def check_setting(kernels: str) -> None:
    """Refuses what is no setting of ``kernels``.

    Raises:
        ValueError: with the names to choose from.
    """
    choices = get_args(Kernels)
    if kernels not in choices:
        raise ValueError(f"kernels is {kernels!r}: choose one of {', '.join(choices)}")


def program_options() -> dict[str, Any]:
    """How XLA is to compile a round.

    Returns:
        ``compiler_options`` of :func:`jax.jit`; empty where XLA's own choice is the best known.
    """
    return dict(_CPU_OPTIONS) if sums_are_fast() else {}


def sums_are_fast() -> bool:
    """Whether many sums at once are a loop over vectors under :func:`program_options`."""
    return jax.default_backend() == "cpu" and _options_are_known()


@functools.cache
def _options_are_known() -> bool:
    """Whether this XLA has these options: they are no part of its interface."""
    try:
        jax.jit(lambda x: x, compiler_options=_CPU_OPTIONS).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def version_problem() -> str | None:
    """Why this jax has no Mosaic GPU kernels; None where it has."""
    found = tuple(int(part) for part in re.findall(r"\d+", jax.__version__)[:3])
    if found < MOSAIC_JAX:
        wanted = ".".join(map(str, MOSAIC_JAX))
        return (
            f"mosaic_gpu needs jax >= {wanted} (Python >= 3.12) and this is jax "
            f"{jax.__version__}: install a newer jax, or choose xla"
        )
    return None


def device_problem(device: jax.Device | None = None) -> str | None:
    """Why a device cannot run Mosaic GPU kernels; None where it can."""
    device = jax.devices()[0] if device is None else device
    if device.platform != "gpu":
        return f"mosaic_gpu needs an NVIDIA GPU and the device is {device.device_kind}: choose xla"
    capability = float(getattr(device, "compute_capability", 0.0))
    if capability < MOSAIC_CAPABILITY:
        return (
            f"mosaic_gpu needs compute capability {MOSAIC_CAPABILITY} and {device.device_kind} "
            f"has {capability}: choose xla"
        )
    return None


def attention_problem(
    dtype: Any, head_dim: int, softcap: float | None, positions: Sequence[int]
) -> str | None:
    """What layers have that the attention kernels for GPUs have no form for; None for nothing.

    Args:
        dtype: of weights and caches.
        head_dim: H.
        softcap: of the scores; None for none.
        positions: lengths of the caches.
    """
    if dtype != jnp.bfloat16:
        return f"{jnp.dtype(dtype)} weights and mosaic_gpu takes bfloat16: choose that dtype or xla"
    if head_dim not in MOSAIC_WIDTHS:
        widths = " or ".join(map(str, MOSAIC_WIDTHS))
        return f"heads of {head_dim} and mosaic_gpu takes {widths}: choose xla"
    if softcap is not None:
        return f"scores with a soft cap of {softcap}, which mosaic_gpu has no form for: choose xla"
    uneven = [length for length in positions if length % MOSAIC_STEP]
    if uneven:
        return (
            f"a cache of {uneven[0]} positions and mosaic_gpu reads {MOSAIC_STEP} at a time: give "
            "multiples of that, or choose xla"
        )
    return None


def require(implementation: str, *, device: jax.Device | None = None) -> None:
    """Checks, once at start-up, that an implementation runs here.

    Args:
        implementation: "xla" or "mosaic_gpu".
        device: that is to run it; None for the default one.

    Raises:
        ValueError: there is no such implementation.
        RuntimeError: it does not run on this jax or this device, with the reason.
    """
    check_name(implementation)
    if implementation == "mosaic_gpu":
        problem = version_problem() or device_problem(device)
        if problem:
            raise RuntimeError(problem)


def require_kernels(kernels: str) -> None:
    """:func:`require` for a setting named ``kernels``: what does not run here is a wrong setting.

    Raises:
        ValueError: it does not run, or there is no such implementation; the message says why.
    """
    try:
        require(kernels)
    except RuntimeError as problem:
        raise ValueError(f"kernels is {kernels!r}: {problem}") from problem
