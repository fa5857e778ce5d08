"""Building blocks that targets and drafter share: norm, RoPE, attention, gated MLP, layer loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.axes import Param, declare
from dspark_jax.config import TransformerConfig
from dspark_jax.models.rope import rotate
from pallas_kernels.chunks import by_sequences

Tree = Any

ATTENTION_ROWS = 128  # queries at a time where whole sequences are read


@struct.dataclass
class Layer:
    """Weights of one decoder block, or of all of them stacked on a leading L.

    Optional parts are None: biases (Qwen2), norms of q and k (Qwen3).
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
    gate_DM: Any
    up_DM: Any
    down_MD: Any


def declare_layers(cfg: TransformerConfig, prefix: str) -> Layer:
    """Declaration of all blocks, stacked on L, under the Hugging Face names ``prefix.{layer}``."""

    def param(axes: str, name: str, out: str = "", init: str = "normal") -> Param:
        return declare("L" + axes, cfg.sizes, f"{prefix}.{{layer}}.{name}", out=out, init=init)

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
        gate_DM=param("DM", "mlp.gate_proj.weight", out="M"),
        up_DM=param("DM", "mlp.up_proj.weight", out="M"),
        down_MD=param("MD", "mlp.down_proj.weight", out="D"),
    )


def unstack_layers(layers: Layer) -> tuple[Layer, ...]:
    """Stacked blocks as a tuple of single ones; decoding on a CPU is 1.3x faster with these."""
    count = layers.input_norm_D.shape[0]
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(count))


def loop_layers(
    body: Callable[[Tree, Layer, Any], Tree], carry: Tree, layers: Layer | tuple[Layer, ...]
) -> Tree:
    """``carry = body(carry, layer, index)`` over all blocks.

    Stacked blocks are scanned (``index`` is traced), a tuple of blocks is unrolled (``index`` is
    an ``int``). State that is written per layer, like a cache, belongs in the carry: a scan that
    takes it in and gives it out per layer copies all of it each step.
    """
    if isinstance(layers, tuple):
        for index, layer in enumerate(layers):
            carry = body(carry, layer, index)
        return carry
    count = layers.input_norm_D.shape[0]

    def step(carry: Tree, xs: tuple[Layer, jax.Array]) -> tuple[Tree, None]:
        layer, index = xs
        return body(carry, layer, index), None

    return jax.lax.scan(step, carry, (layers, jnp.arange(count, dtype=jnp.int32)))[0]


def rms_norm(x_XD: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis: statistics in float32, result in the dtype of ``x_XD``."""
    x32 = x_XD.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return weight_D * (x32 * scale).astype(x_XD.dtype)


@jax.custom_vjp
def matmul(x_XI: jax.Array, w_IO: jax.Array) -> jax.Array:
    """``x @ w``, accumulated in float32, in the dtype of ``x_XI``.

    Saying so matters on CPUs: XLA widens the operands of a bfloat16 product with a bfloat16 result,
    which is half as fast as this. The derivative is stated for their sake too: of the two matrices
    behind the weights' gradient XLA transposes the first, fused with all that it is computed from,
    so here the first is the narrower one.
    """
    return jnp.matmul(x_XI, w_IO, preferred_element_type=jnp.float32).astype(x_XI.dtype)


def _matmul_forward(x_XI: jax.Array, w_IO: jax.Array) -> tuple[jax.Array, Any]:
    return matmul(x_XI, w_IO), (x_XI, w_IO)


def _matmul_backward(kept: Any, slope_XO: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_XI, w_IO = kept
    x_TI, slope_TO = (x.reshape(-1, x.shape[-1]) for x in (x_XI, slope_XO))
    widens = w_IO.shape[0] <= w_IO.shape[1]
    first, second = (x_TI, slope_TO) if widens else (slope_TO, x_TI)
    gradient = jnp.matmul(first.T, second, preferred_element_type=jnp.float32).astype(w_IO.dtype)
    return matmul(slope_XO, w_IO.T), gradient if widens else gradient.T


matmul.defvjp(_matmul_forward, _matmul_backward)


def project_qkv(
    layer: Layer, x_XD: jax.Array, table: tuple[jax.Array, jax.Array], cfg: TransformerConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries [X, N, H], keys and values [X, K, H] of normalised inputs, rotated."""
    q_XNH = _project(x_XD, layer.q_DNH)
    if layer.q_bias_NH is not None:
        q_XNH = q_XNH + layer.q_bias_NH
    if layer.q_norm_H is not None:
        q_XNH = rms_norm(q_XNH, layer.q_norm_H, cfg.rms_norm_eps)
    k_XKH, v_XKH = project_kv(layer, x_XD, table, cfg)
    return rotate(q_XNH, table), k_XKH, v_XKH


def _project(x_XD: jax.Array, w_DNH: jax.Array) -> jax.Array:
    """[X, N, H] from a matrix product of two axes: with three, XLA copies the weights on a CPU
    (30 layers: 41 ms instead of 24)."""
    out_XI = matmul(x_XD, w_DNH.reshape(w_DNH.shape[0], -1))
    return out_XI.reshape(*x_XD.shape[:-1], *w_DNH.shape[1:])


def project_kv(
    layer: Layer, x_XD: jax.Array, table: tuple[jax.Array, jax.Array], cfg: TransformerConfig
) -> tuple[jax.Array, jax.Array]:
    """Keys and values [X, K, H]; the keys normalised (Qwen3) and rotated."""
    k_XKH, v_XKH = _project(x_XD, layer.k_DKH), _project(x_XD, layer.v_DKH)
    if layer.k_bias_KH is not None:
        k_XKH, v_XKH = k_XKH + layer.k_bias_KH, v_XKH + layer.v_bias_KH
    if layer.k_norm_H is not None:
        k_XKH = rms_norm(k_XKH, layer.k_norm_H, cfg.rms_norm_eps)
    return rotate(k_XKH, table), v_XKH


def attend_causally(q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    """Grouped-query attention of whole sequences, each position to itself and those before it.

    ``ATTENTION_ROWS`` queries at a time against the keys before their last one: half of the scores
    are never computed.

    Args:
        q_BSNH: queries; N is a multiple of K, and query head n reads key head n // (N // K).
        k_BSKH, v_BSKH: keys and values.

    Returns:
        [B, S, N, H] in the dtype of the queries; softmax in float32.
    """
    return by_sequences(_attend_causally, q_BSNH, k_BSKH, v_BSKH)


def _attend_causally(q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
    batch, length, _, dim = q_BSNH.shape
    kv_heads = k_BSKH.shape[2]
    k_BKSH, v_BKSH = jnp.moveaxis(k_BSKH, 2, 1), jnp.moveaxis(v_BSKH, 2, 1)
    q = q_BSNH.reshape(batch, length, kv_heads, -1, dim)
    parts = []
    for first in range(0, length, ATTENTION_ROWS):
        end = min(first + ATTENTION_ROWS, length)
        k, v = k_BKSH[:, :, :end], v_BKSH[:, :, :end]
        part = jnp.moveaxis(q[:, first:end], 1, 3)
        score = jnp.einsum("bkrth,bksh->bkrts", part, k, preferred_element_type=jnp.float32)
        visible_TS = jnp.arange(end) <= jnp.arange(first, end)[:, None]
        score = jnp.where(visible_TS, score * dim**-0.5, -jnp.inf)
        weight = jax.nn.softmax(score, axis=-1).astype(v.dtype)
        # In the order of the product's own axes: another order makes a CPU copy the values first.
        out = jnp.einsum("bkrts,bksh->bkrth", weight, v, preferred_element_type=jnp.float32)
        parts.append(jnp.moveaxis(out.astype(v.dtype), 3, 1))
    return jnp.concatenate(parts, axis=1).reshape(q_BSNH.shape)


def finish_layer(
    layer: Layer, x_XD: jax.Array, attended_XNH: jax.Array, cfg: TransformerConfig
) -> jax.Array:
    """The rest of a block after attention: output projection, residual, SwiGLU MLP, residual."""
    flat_XI = attended_XNH.reshape(*attended_XNH.shape[:-2], -1)
    out_XD = matmul(flat_XI, layer.o_NHD.reshape(flat_XI.shape[-1], -1))
    if layer.o_bias_D is not None:
        out_XD = out_XD + layer.o_bias_D
    x_XD = x_XD + out_XD
    h_XD = rms_norm(x_XD, layer.mlp_norm_D, cfg.rms_norm_eps)
    gated_XM = jax.nn.silu(matmul(h_XD, layer.gate_DM)) * matmul(h_XD, layer.up_DM)
    return x_XD + matmul(gated_XM, layer.down_MD)
