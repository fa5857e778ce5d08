"""Compressed entries of DeepSeek-V4: one key for a window of positions, and which of them are seen.

Entry w of a layer with the ratio m is a weighted sum over positions w m .. w m + m - 1, for every
channel with weights of its own; in sparse layers over those of the window before, too, in another
projection. It exists when all of its positions have been read. In sparse layers an indexer, which
has entries of its own, chooses the best for every row.

Source: DeepSeek-V4 (2026), sections 2.3.1 (sparse) and 2.3.2 (heavily compressed).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dspark_jax.models.layers import project, rms_norm
from dspark_jax.models.rope import Table, rope_table, rotate_pairs
from dspark_jax.models.targets.deepseek_v4_config import Config
from dspark_jax.models.targets.deepseek_v4_layers import Compressor, Indexer, Kind


def window_table(window_X: jax.Array, kind: Kind, cfg: Config) -> Table:
    """RoPE of entries: at the first position of each."""
    return rope_table(window_X * kind.ratio, cfg.compressed_rope, cfg.rope_dim)


def raw_inputs(compressor: Compressor, u_XD: jax.Array) -> jax.Array:
    """What a position adds to its entries, float32 [X, 2 O]: the summands, then their weights."""
    u32 = u_XD.astype(jnp.float32)
    parts = (compressor.value_DO, compressor.weight_DO)
    both = [jnp.matmul(u32, part_DO, precision="highest") for part_DO in parts]
    return jnp.concatenate(both, axis=-1)


def overlap(kind: Kind) -> int:
    """Positions before its window that an entry is made of."""
    return kind.ratio if kind.sparse else 0


def compress(
    compressor: Compressor, raw_PSX: jax.Array, window_PK: jax.Array, kind: Kind, cfg: Config
) -> jax.Array:
    """Entries of neighbouring windows.

    Args:
        compressor: weights.
        raw_PSX: of :func:`raw_inputs`, float32, of the positions of K windows, after those of the
            window before them where windows overlap; what stands for positions below 0 may be
            anything.
        window_PK: int32 numbers of the windows.
        kind: of the layer.
        cfg: sizes.

    Returns:
        float32 [P, K, H], normalised and rotated.
    """
    groups, windows = window_PK.shape
    value_PSO, weight_PSO = jnp.split(raw_PSX, 2, axis=-1)

    def by_window(x_PSO: jax.Array) -> jax.Array:
        return x_PSO.reshape(groups, windows, kind.ratio, -1)

    if kind.sparse:
        real_PK11 = (window_PK > 0)[..., None, None]
        bias_a, bias_b = jnp.split(compressor.bias_XO, 2, axis=-1)

        def halves(x_PSO: jax.Array) -> tuple[jax.Array, jax.Array]:
            before, own = jnp.split(x_PSO, 2, axis=-1)
            return by_window(before[:, : -kind.ratio]), by_window(own[:, kind.ratio :])

        (value_a, value_b), (weight_a, weight_b) = halves(value_PSO), halves(weight_PSO)
        value_a = jnp.where(real_PK11, value_a, 0)
        weight_a = jnp.where(real_PK11, weight_a + bias_a, -jnp.inf)
        value_PKXH = jnp.concatenate([value_a, value_b], axis=2)
        weight_PKXH = jnp.concatenate([weight_a, weight_b + bias_b], axis=2)
    else:
        value_PKXH, weight_PKXH = by_window(value_PSO), by_window(weight_PSO) + compressor.bias_XO
    entry_PKH = (jax.nn.softmax(weight_PKXH, axis=2) * value_PKXH).sum(2)
    entry_PKH = rms_norm(entry_PKH, compressor.norm_H.astype(jnp.float32), cfg.rms_norm_eps)
    return rotate_pairs(entry_PKH[:, :, None], window_table(window_PK, kind, cfg))[:, :, 0]


def complete(position_X: jax.Array, num_entries: int, kind: Kind) -> jax.Array:
    """Which entries rows at some positions may see, bool [X, S]: those that are complete."""
    window_S = jnp.arange(num_entries)
    return (window_S + 1) * kind.ratio <= position_X[..., None] + 1


def index_queries(
    indexer: Indexer, u_XD: jax.Array, latent_XI: jax.Array, table: Table, cfg: Config
) -> tuple[jax.Array, jax.Array]:
    """The queries of an indexer [X, N, H], rotated, and float32 weights of their heads [X, N].

    Args:
        indexer: weights.
        u_XD: normed inputs of some rows.
        latent_XI: their queries' latent.
        table: RoPE at their positions.
        cfg: sizes.
    """
    q_XNH = rotate_pairs(project(latent_XI, indexer.query_IXH), table)
    head_XN = jnp.matmul(u_XD.astype(jnp.float32), indexer.head_DX, precision="highest")
    return q_XNH, head_XN * (cfg.index_dim * cfg.index_heads) ** -0.5


def choose(
    q_PCNH: jax.Array, head_PCN: jax.Array, key_PSH: jax.Array, visible_PCS: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """The entries that rows attend to: the best of the visible ones.

    Args:
        q_PCNH: of :func:`index_queries`, of C rows of P groups.
        head_PCN: likewise.
        key_PSH: the indexer's own entries of every group.
        visible_PCS: those that are complete.
        count: K, how many are chosen; there are more.

    Returns:
        int32 [P, C, K] in no order, and which of them are visible, bool [P, C, K].
    """
    score_PCNS = jnp.einsum("pcnh,psh->pcns", q_PCNH, key_PSH, preferred_element_type=jnp.float32)
    score_PCS = jnp.einsum("pcn,pcns->pcs", head_PCN, jax.nn.relu(score_PCNS), precision="highest")
    score_PCS = jnp.where(visible_PCS, score_PCS, -jnp.inf)
    _, best_PCK = jax.lax.top_k(score_PCS, count)
    return best_PCK, jnp.take_along_axis(
        jnp.broadcast_to(visible_PCS, score_PCS.shape), best_PCK, axis=-1
    )


def chosen_keys(key_PSH: jax.Array, best_PCK: jax.Array) -> jax.Array:
    """The entries that rows have chosen, [P, C, K, H]."""
    groups, rows, count = best_PCK.shape
    flat_PI = best_PCK.reshape(groups, rows * count)
    found_PIH = jnp.take_along_axis(key_PSH, flat_PI[..., None], axis=1, mode="clip")
    return found_PIH.reshape(groups, rows, count, -1)
