"""Hyper-connections: a residual of several streams, mixed around every part of a layer.

A part f of a layer reads one input, a weighted sum of the streams, and its output goes to all of
them, while they are mixed by a matrix C that is nearly doubly stochastic:

    X'_j = post_j f(sum_i pre_i X_i) + sum_i C_ij X_i

All weights depend on the streams. Everything here is computed in float32.

Sources: Manifold-constrained hyper-connections (Xie et al. 2025), DeepSeek-V4 (2026), section 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.axes import declare


@dataclass(frozen=True)
class Streams:
    """How streams are mixed.

    Attributes:
        count: J.
        steps: of the Sinkhorn iteration.
        eps: added to the weights, and to what they are divided by.
        norm_eps: of the norm of the streams.
    """

    count: int
    steps: int
    eps: float
    norm_eps: float


@struct.dataclass
class Mixing:
    """Weights of a mixing, float32.

    Attributes:
        weight_JDO: of all streams together; O is (2 + J) J, or J of a :func:`read_out`.
        base_O: added.
        scale_X: [3], of pre, post and C; or [1].
    """

    weight_JDO: Any
    base_O: Any
    scale_X: Any


@struct.dataclass
class Mix:
    """The weights of some rows, float32: pre and post [X, J], and C_ij as [X, i, j]."""

    pre_XJ: jax.Array
    post_XJ: jax.Array
    comb_XJJ: jax.Array


def declare_mixing(sizes: Mapping[str, int], name: str, layers: range | None = None) -> Mixing:
    """Declaration of a mixing, or without ``layers`` of a :func:`read_out`.

    Args:
        sizes: axis letter -> size; J and D.
        name: of the tensors, before ``_fn``, ``_base`` and ``_scale``.
        layers: which are stacked.
    """
    streams = sizes["J"]
    outputs, parts = (streams, 1) if layers is None else ((2 + streams) * streams, 3)

    def param(letters: str, end: str, out: str, init: str) -> Any:
        letters = letters if layers is None else f"L{letters}"
        own = {**sizes, "O": outputs, "X": parts}
        options = {"out": out, "init": init, "dtype": jnp.float32, "layers": layers or range(0)}
        return declare(letters, own, f"{name}_{end}", **options)

    return Mixing(
        param("JDO", "fn", "O", "normal"),
        param("O", "base", "", "zeros"),
        param("X", "scale", "", "ones"),
    )


def start(x_XD: jax.Array, streams: Streams) -> jax.Array:
    """The streams [X, J, D] before the first layer: copies of the embedding."""
    shape = *x_XD.shape[:-1], streams.count, x_XD.shape[-1]
    return jnp.broadcast_to(x_XD[..., None, :], shape)


def mix(mixing: Mixing, x_XJD: jax.Array, streams: Streams) -> Mix:
    """The weights of a part of a layer."""
    count = streams.count
    pre_XJ, post_XJ, comb_XI = jnp.split(
        _products(mixing, x_XJD, streams), (count, 2 * count), axis=-1
    )
    base_pre, base_post, base_comb = jnp.split(mixing.base_O, (count, 2 * count))
    scale = mixing.scale_X
    comb_XJJ = (comb_XI * scale[2] + base_comb).reshape(*comb_XI.shape[:-1], count, count)
    return Mix(
        jax.nn.sigmoid(pre_XJ * scale[0] + base_pre) + streams.eps,
        2 * jax.nn.sigmoid(post_XJ * scale[1] + base_post),
        _sinkhorn(comb_XJJ, streams),
    )


def _products(mixing: Mixing, x_XJD: jax.Array, streams: Streams) -> jax.Array:
    """The matrix times the streams [X, O], over their norm, which is one of all of them."""
    x32 = x_XJD.astype(jnp.float32)
    square_X1 = jnp.mean(x32 * x32, axis=(-2, -1))[..., None]
    product_XO = jnp.einsum("...jd,jdo->...o", x32, mixing.weight_JDO, precision="highest")
    return product_XO * jax.lax.rsqrt(square_X1 + streams.norm_eps)


def _sinkhorn(comb_XJJ: jax.Array, streams: Streams) -> jax.Array:
    """Nearly doubly stochastic: the last step is one of the columns, which add up to 1."""
    eps = streams.eps

    def columns(comb_XJJ: jax.Array) -> jax.Array:
        return comb_XJJ / (comb_XJJ.sum(-2, keepdims=True) + eps)

    def step(_: int, comb_XJJ: jax.Array) -> jax.Array:
        return columns(comb_XJJ / (comb_XJJ.sum(-1, keepdims=True) + eps))

    first = columns(jax.nn.softmax(comb_XJJ, axis=-1) + eps)
    return jax.lax.fori_loop(0, streams.steps - 1, step, first)


def join(mix: Mix, x_XJD: jax.Array) -> jax.Array:
    """What a part of a layer reads [X, D], in the dtype of the streams."""
    return _sum(mix.pre_XJ, x_XJD)


def part(mix: Mix, x_XJD: jax.Array, y_XD: jax.Array) -> jax.Array:
    """The streams after a part of a layer whose output is ``y``."""
    mixed_XJD = jnp.einsum(
        "...ij,...id->...jd", mix.comb_XJJ, x_XJD.astype(jnp.float32), precision="highest"
    )
    new_XJD = mix.post_XJ[..., None] * y_XD.astype(jnp.float32)[..., None, :] + mixed_XJD
    return new_XJD.astype(x_XJD.dtype)


def read_out(mixing: Mixing, x_XJD: jax.Array, streams: Streams) -> jax.Array:
    """The hidden state [X, D] at the end of a model, before its norm."""
    weight_XJ = _products(mixing, x_XJD, streams) * mixing.scale_X + mixing.base_O
    return _sum(jax.nn.sigmoid(weight_XJ) + streams.eps, x_XJD)


def mean(x_XJD: jax.Array) -> jax.Array:
    """The mean over the streams [X, D], in their dtype: what drafters read of a layer."""
    return jnp.mean(x_XJD.astype(jnp.float32), axis=-2).astype(x_XJD.dtype)


def _sum(weight_XJ: jax.Array, x_XJD: jax.Array) -> jax.Array:
    sum_XD = jnp.einsum(
        "...j,...jd->...d", weight_XJ, x_XJD.astype(jnp.float32), precision="highest"
    )
    return sum_XD.astype(x_XJD.dtype)
