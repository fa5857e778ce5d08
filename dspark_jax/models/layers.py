"""Building blocks that targets and drafter share: norm, projections, attention, gated MLP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.axes import Param, declare
from dspark_jax.config import TransformerConfig
from dspark_jax.models.by_outputs import ByOutputs, product
from dspark_jax.models.quantised import InBlocks, PerOutput, in_blocks_product
from dspark_jax.models.rope import Table, rotate

# Forms of a matrix in a product.
Matrix = jax.Array | ByOutputs | PerOutput | InBlocks


@struct.dataclass
class Merged:
    """Matrices of the same input as one, in the place of the first of them; the others are None.

    Attributes:
        weight_DX: [D, K, J, H] for queries, keys and values: of every key head its query heads,
            itself and its values; [D, M, J] for gate and up. So each is one product, and split over
            the devices of a mesh as the single matrices are.
    """

    weight_DX: Any


@struct.dataclass
class Layer:
    """Weights of one decoder block, or of several stacked on a leading L.

    Optional parts are None: biases, norms of q and k. For decoding q, k and v may be
    :class:`Merged`.
    """

    input_norm_D: Any
    q_DNH: Any
    k_DKH: Any
    v_DKH: Any
    o_NHD: Any
    q_bias_NH: Any
    k_bias_KH: Any
    v_bias_KH: Any
    o_bias_D: Any
    q_norm_H: Any
    k_norm_H: Any
    mlp_norm_D: Any
    mlp: Any


@struct.dataclass
class Mlp:
    """Weights of a gated MLP; biases may be None. For decoding gate and up may be
    :class:`Merged`."""

    gate_DM: Any
    up_DM: Any
    down_MD: Any
    gate_bias_M: Any = None
    up_bias_M: Any = None
    down_bias_D: Any = None


def declare_layers(cfg: TransformerConfig, prefix: str, layers: range, mlp: Any = None) -> Layer:
    """Declaration of blocks, stacked on L, under the Hugging Face names ``prefix.{layer}``.

    Args:
        cfg: sizes.
        prefix: of the names.
        layers: which ones are stacked.
        mlp: declaration of what stands in the place of a gated MLP without biases.
    """

    def param(axes: str, name: str, out: str = "", init: str = "normal") -> Param:
        name = f"{prefix}.{{layer}}.{name}"
        return declare("L" + axes, cfg.sizes, name, out=out, init=init, layers=layers)

    def optional(present: bool, axes: str, name: str, init: str) -> Param | None:
        if not present:
            return None
        bias = name.endswith("bias")
        return param(axes, name, out=axes if bias and len(axes) > 1 else "", init=init)

    attention = "self_attn"
    return Layer(
        input_norm_D=param("D", "input_layernorm.weight", init="ones"),
        q_DNH=param("DNH", f"{attention}.q_proj.weight", out="NH"),
        k_DKH=param("DKH", f"{attention}.k_proj.weight", out="KH"),
        v_DKH=param("DKH", f"{attention}.v_proj.weight", out="KH"),
        o_NHD=param("NHD", f"{attention}.o_proj.weight", out="D"),
        q_bias_NH=optional(cfg.qkv_bias, "NH", f"{attention}.q_proj.bias", "zeros"),
        k_bias_KH=optional(cfg.qkv_bias, "KH", f"{attention}.k_proj.bias", "zeros"),
        v_bias_KH=optional(cfg.qkv_bias, "KH", f"{attention}.v_proj.bias", "zeros"),
        o_bias_D=optional(cfg.out_bias, "D", f"{attention}.o_proj.bias", "zeros"),
        q_norm_H=optional(cfg.qk_norm, "H", f"{attention}.q_norm.weight", "ones"),
        k_norm_H=optional(cfg.qk_norm, "H", f"{attention}.k_norm.weight", "ones"),
        mlp_norm_D=param("D", "post_attention_layernorm.weight", init="ones"),
        mlp=mlp or declare_mlp(cfg.sizes, prefix, layers),
    )


def declare_mlp(sizes: Mapping[str, int], prefix: str, layers: range, *, bias: bool = False) -> Mlp:
    """Declaration of the gated MLPs of some layers; arguments as in :func:`declare_layers`."""

    def param(axes: str, name: str, out: str, init: str = "normal") -> Param:
        name = f"{prefix}.{{layer}}.mlp.{name}"
        return declare("L" + axes, sizes, name, out=out, init=init, layers=layers)

    return Mlp(
        param("DM", "gate_proj.weight", "M"),
        param("DM", "up_proj.weight", "M"),
        param("MD", "down_proj.weight", "D"),
        param("M", "gate_proj.bias", "", "zeros") if bias else None,
        param("M", "up_proj.bias", "", "zeros") if bias else None,
        param("D", "down_proj.bias", "", "zeros") if bias else None,
    )


def rms_norm(x_XD: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis: statistics in float32, result in the dtype of ``x_XD``."""
    x32 = x_XD.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return weight_D * (x32 * scale).astype(x_XD.dtype)


def matmul(x_XI: jax.Array, w_IO: Matrix) -> jax.Array:
    """``x @ w``, accumulated in float32, in the dtype of ``x_XI``."""
    if isinstance(w_IO, ByOutputs):
        return product(x_XI, w_IO).astype(x_XI.dtype)
    if isinstance(w_IO, InBlocks):
        return in_blocks_product(x_XI, w_IO)
    if isinstance(w_IO, PerOutput):
        out_XO = _matmul(x_XI, w_IO.value.astype(x_XI.dtype))
        return (out_XO * w_IO.scale[0]).astype(x_XI.dtype)
    return _matmul(x_XI, w_IO)


@jax.custom_vjp
def _matmul(x_XI: jax.Array, w_IO: jax.Array) -> jax.Array:
    """:func:`matmul` with its derivative.

    Saying so matters on CPUs: XLA widens the operands of a bfloat16 product with a bfloat16 result,
    which is half as fast as this. Other devices accumulate like that in any case, and where a mesh
    adds up the parts of a product, a result that is float32 first is twice the bytes to send. The
    derivative is stated for the CPUs' sake too: of the two matrices behind the weights' gradient
    XLA transposes the first, fused with all that it is computed from, so here the first is the
    narrower one.
    """
    stated = jnp.float32 if jax.default_backend() == "cpu" else None
    return jnp.matmul(x_XI, w_IO, preferred_element_type=stated).astype(x_XI.dtype)


def _matmul_forward(x_XI: jax.Array, w_IO: jax.Array) -> tuple[jax.Array, Any]:
    return _matmul(x_XI, w_IO), (x_XI, w_IO)


def _matmul_backward(kept: Any, slope_XO: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_XI, w_IO = kept
    x_TI, slope_TO = (x.reshape(-1, x.shape[-1]) for x in (x_XI, slope_XO))
    widens = w_IO.shape[0] <= w_IO.shape[1]
    first, second = (x_TI, slope_TO) if widens else (slope_TO, x_TI)
    gradient = jnp.matmul(first.T, second, preferred_element_type=jnp.float32).astype(w_IO.dtype)
    return matmul(slope_XO, w_IO.T), gradient if widens else gradient.T


_matmul.defvjp(_matmul_forward, _matmul_backward)


def project_qkv(
    layer: Layer, x_XD: jax.Array, table: Table | None, cfg: TransformerConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [X, N, H], keys and values [X, K, H] of normalised inputs; rotated, where there is a
    table."""
    q_XNH, k_XKH, v_XKH = project_heads(layer, x_XD)
    q_XNH = add(q_XNH, layer.q_bias_NH)
    if layer.q_norm_H is not None:
        q_XNH = rms_norm(q_XNH, layer.q_norm_H, cfg.rms_norm_eps)
    k_XKH, v_XKH = finish_kv(layer, k_XKH, v_XKH, table, cfg)
    return q_XNH if table is None else rotate(q_XNH, table), k_XKH, v_XKH


def project_heads(layer: Any, x_XD: jax.Array) -> tuple[jax.Array, Any, Any]:
    """The products with a layer's matrices of queries [X, N, H], keys and values [X, K, H], and
    None for those that it lacks."""
    if not isinstance(layer.q_DNH, Merged):
        return project(x_XD, layer.q_DNH), *project_kv(layer, x_XD)
    out_XKJH = project_for_many(x_XD, layer.q_DNH.weight_DX)
    num_heads, dim = layer.o_NHD.shape[:2]
    kv_heads, count = out_XKJH.shape[-3:-1]
    shared = num_heads // kv_heads
    q_XNH = out_XKJH[..., :shared, :].reshape(*x_XD.shape[:-1], num_heads, dim)
    has_values = count - shared == 2
    return q_XNH, out_XKJH[..., shared, :], out_XKJH[..., -1, :] if has_values else None


def project_kv(layer: Any, x_XD: jax.Array) -> tuple[Any, Any]:
    """The products with a layer's matrices of keys and values, [X, K, H], and None for those that
    it lacks."""
    weights = layer.k_DKH, layer.v_DKH
    k, v = (None if w_DKH is None else project(x_XD, w_DKH) for w_DKH in weights)
    return k, v


def flat(w_X: Matrix, num_inputs: int) -> Matrix:
    """A matrix of several axes as one of two, for :func:`matmul`."""
    if isinstance(w_X, ByOutputs | InBlocks):
        return w_X
    if isinstance(w_X, PerOutput):
        return PerOutput(w_X.value.reshape(num_inputs, -1), w_X.scale.reshape(1, -1))
    return w_X.reshape(num_inputs, -1)


def project(x_XD: jax.Array, w_DNH: Matrix) -> jax.Array:
    """[X, N, H] from a matrix product of two axes: with three, XLA copies the weights on a CPU
    (30 layers: 41 ms instead of 24)."""
    out_XI = matmul(x_XD, flat(w_DNH, x_XD.shape[-1]))
    return out_XI.reshape(*x_XD.shape[:-1], *w_DNH.shape[1:])


def project_for_many(x_XD: jax.Array, w_DKJH: Matrix) -> jax.Array:
    """:func:`project` where many read parts of the result.

    On a GPU the product of a few rows comes in parts, in float32, and without the barrier XLA adds
    these up again for everybody who reads: four times for queries, keys and values.
    """
    return jax.lax.optimization_barrier(project(x_XD, w_DKJH))


def grouped(x_XKI: jax.Array, w_KXO: jax.Array | InBlocks) -> jax.Array:
    """[X, K, O] of K groups with a matrix each."""
    if isinstance(w_KXO, InBlocks):
        return jax.vmap(matmul, in_axes=(-2, 0), out_axes=-2)(x_XKI, w_KXO)
    w_KIO = w_KXO.reshape(*x_XKI.shape[-2:], -1)
    return jnp.einsum("...ki,kio->...ko", x_XKI, w_KIO).astype(x_XKI.dtype)


def finish_kv(
    layer: Layer,
    k_XKH: jax.Array,
    v_XKH: jax.Array,
    table: Table | None,
    cfg: TransformerConfig,
) -> tuple[jax.Array, jax.Array]:
    """Keys and values after their products: biases, and the keys normalised, where there is a norm,
    and rotated."""
    k_XKH, v_XKH = add(k_XKH, layer.k_bias_KH), add(v_XKH, layer.v_bias_KH)
    if layer.k_norm_H is not None:
        k_XKH = rms_norm(k_XKH, layer.k_norm_H, cfg.rms_norm_eps)
    return k_XKH if table is None else rotate(k_XKH, table), v_XKH


def cap(x_X: jax.Array, softcap: float | None) -> jax.Array:
    """``softcap * tanh(x / softcap)``; None leaves ``x`` as it is."""
    return x_X if softcap is None else softcap * jnp.tanh(x_X / softcap)


def output(attended_XNH: jax.Array, o_NHD: Matrix) -> jax.Array:
    """The output projection of attention, [X, D]."""
    flat_XI = attended_XNH.reshape(*attended_XNH.shape[:-2], -1)
    return matmul(flat_XI, flat(o_NHD, flat_XI.shape[-1]))


def add(x_X: jax.Array, bias: jax.Array | None) -> jax.Array:
    """``x`` with a bias, where there is one."""
    return x_X if bias is None else x_X + bias


def gated(
    gate_XM: jax.Array,
    up_XM: jax.Array,
    activation: Callable[[jax.Array], jax.Array],
    limit: float | None = None,
) -> jax.Array:
    """``activation(gate) * up``, of a gate of at most ``limit``, and an ``up`` within it on both
    sides."""
    if limit is not None:
        gate_XM, up_XM = jnp.minimum(gate_XM, limit), jnp.clip(up_XM, -limit, limit)
    return activation(gate_XM) * up_XM


def gated_mlp(
    mlp: Mlp,
    x_XD: jax.Array,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
    limit: float | None = None,
) -> jax.Array:
    """``down(activation(gate(x)) * up(x))``; ``limit`` as in :func:`gated`."""
    if isinstance(mlp.gate_DM, Merged):
        out_XMJ = project(x_XD, mlp.gate_DM.weight_DX)
        gate_XM, up_XM = out_XMJ[..., 0], out_XMJ[..., 1]
    else:
        gate_XM, up_XM = matmul(x_XD, mlp.gate_DM), matmul(x_XD, mlp.up_DM)
    gate_XM, up_XM = add(gate_XM, mlp.gate_bias_M), add(up_XM, mlp.up_bias_M)
    return add(matmul(gated(gate_XM, up_XM, activation, limit), mlp.down_MD), mlp.down_bias_D)


def finish_layer(
    layer: Layer,
    x_XD: jax.Array,
    attended_XNH: jax.Array,
    cfg: TransformerConfig,
    mlp: Callable[[Any, jax.Array], jax.Array] = gated_mlp,
) -> jax.Array:
    """The rest of a block after attention: output projection, residual, MLP, residual.

    ``mlp`` is what ``layer.mlp`` holds the weights of.
    """
    x_XD = x_XD + add(output(attended_XNH, layer.o_NHD), layer.o_bias_D)
    return x_XD + mlp(layer.mlp, rms_norm(x_XD, layer.mlp_norm_D, cfg.rms_norm_eps))
