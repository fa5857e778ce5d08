"""The mesh that a function is traced under, for kernels: XLA does not know how to split them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax


def free_axes() -> dict[str, int]:
    """Sizes of the axes of the mesh in use, if any, that nobody has split arrays over by hand."""
    mesh = jax.sharding.get_abstract_mesh()
    return {
        name: mesh.shape[name]
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == jax.sharding.AxisType.Auto
    }


def split_over(axes: Iterable[str | None], length: int) -> tuple[str, ...] | None:
    """Those of some mesh axes that are free, where they divide a length; None to leave it whole."""
    free = free_axes()
    names = tuple(name for name in axes if name in free)
    return names if names and length % math.prod(free[name] for name in names) == 0 else None
