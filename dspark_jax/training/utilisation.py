"""How much of a device's peak a training step uses: model FLOPs of the mathematics over time."""

from __future__ import annotations

import jax

from dspark_jax.config import DrafterConfig, TargetConfig, TrainConfig
from dspark_jax.models.drafters.table import drafter_of
from dspark_jax.training.state import Batch
from dspark_jax.training.step import anchors_of

# Dense matrix products a second, from the vendors' data sheets: (bfloat16, float32). The float32
# figures of the tensor cores are those of TF32, which XLA uses only where it is told to.
PEAK_FLOPS = {
    "NVIDIA A100": (312e12, 19.5e12),
    "NVIDIA H100": (989e12, 67e12),
    "NVIDIA H200": (989e12, 67e12),
    "NVIDIA B200": (2250e12, 80e12),
}


def peak_flops(device: jax.Device, dtype: str) -> float | None:
    """FLOP/s of one device in ``dtype``; None where this is not known (CPUs, other devices)."""
    for name, (half, single) in PEAK_FLOPS.items():
        if device.device_kind.startswith(name):
            return half if dtype == "bfloat16" else single
    return None


def drafter_flops(cfg: DrafterConfig, length: int, num_anchors: int) -> float:
    """FLOPs of one optimiser update for one sequence whose target features are given.

    Every product once forward and twice backward, but: the features take no gradient (fc has one
    product backward), the LM head is frozen (one), and the target's side has no backward pass. The
    entries of chains read features and tokens side by side.
    """
    rows = num_anchors * cfg.num_slots
    width, rank = cfg.hidden_size, cfg.markov_rank
    vocab = cfg.draft_vocab_size or cfg.vocab_size
    q, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    read = 2 * width if drafter_of(cfg).lessons == "chains" else width
    dense = read * (q + 2 * kv) + width * (q + 3 * cfg.intermediate_size)
    attention = 2 * q * (length + cfg.num_slots)
    layer = 3 * rows * (dense + attention) + 3 * length * read * 2 * kv
    features = 2 * length * len(cfg.target_layer_ids) * width * width
    head = rows * vocab * (2 * width + 3 * rank) + rows * vocab * width
    return 2.0 * (cfg.num_layers * layer + features + head)


def target_flops(cfg: TargetConfig, length: int, reduced: bool, cached: bool) -> float:
    """FLOPs of the target for one sequence: its pass, unless its outputs are ``cached``; under a
    reduced draft vocabulary its LM head normalises every position."""
    width = cfg.hidden_size
    q, kv = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    dense = width * (2 * q + 2 * kv + 3 * cfg.intermediate_size)
    head = cfg.vocab_size * width if reduced else 0
    layers = 0 if cached else cfg.num_layers * (dense + 2 * q * length)
    return 2.0 * length * (layers + head)


def step_flops(
    target_cfg: TargetConfig, cfg: DrafterConfig, recipe: TrainConfig, batch: Batch
) -> float:
    """FLOPs of one training step, padding included."""
    size, length = batch.token_BS.shape
    share = min(recipe.sequences_per_update or size, size) * recipe.updates_per_batch
    update = drafter_flops(cfg, length, anchors_of(recipe, length))
    cached = batch.feature_BSFD is not None
    target = target_flops(target_cfg, length, bool(cfg.draft_vocab_size), cached)
    return size * target + share * update
