"""Rounds of Qwen3-8B with its released drafter, and the least that each of them has to move."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from dspark_jax.axes import is_param, partition
from dspark_jax.config import DrafterConfig
from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.inputs import Asks
from dspark_jax.engine.pages import pages_for
from dspark_jax.engine.state import StateConfig, declare_state
from dspark_jax.models.drafters.dspark import declare_drafter
from dspark_jax.models.targets.llama import Config as TargetConfig
from dspark_jax.models.targets.llama import declare as declare_target
from tests import hlo_bytes

SIZES = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_heads": 32,
    "num_kv_heads": 8,
    "head_dim": 128,
    "max_positions": 40960,
}
FEATURE_LAYERS = (1, 9, 17, 25, 33)


@dataclass(frozen=True)
class Case:
    """One round.

    Attributes:
        slots, positions: of the state, of one data shard.
        layers: of the target.
        kernels: implementation of the operations.
        tensor: devices over which heads, MLP and vocabulary are split.
        draft: drafts that are verified for every slot; 0 for a round without a draft.
        chunks, chunk_rows: pieces of prompts, and positions of each.
        valid: share of the positions that the slots hold.
        contiguous: whether every slot has room for all positions, in place of pages.
        asks: of ``RoundConfig``.
    """

    slots: int = 8
    positions: int = 1024
    layers: int = 36
    kernels: str = "mosaic_gpu"
    tensor: int = 1
    draft: int = 7
    chunks: int = 0
    chunk_rows: int = 32
    valid: float = 0.5
    contiguous: bool = False
    asks: Asks = "greedy"

    @property
    def target(self) -> TargetConfig:
        """Sizes of the target."""
        return TargetConfig(**SIZES, num_layers=self.layers, qk_norm=True)

    @property
    def drafter(self) -> DrafterConfig:
        """Sizes of the drafter; as many of its features as there are layers."""
        features = tuple(layer for layer in FEATURE_LAYERS if layer < self.layers - 2)
        return DrafterConfig(
            **SIZES,
            num_layers=5,
            num_target_layers=self.layers,
            target_layer_ids=features or (0,),
            mask_token_id=151669,
            markov_rank=256,
            confidence=True,
        )

    @property
    def config(self) -> EngineConfig:
        """Of an engine with as many pages as its slots could need."""
        pages = 0 if self.contiguous else self.slots * pages_for(self.positions)
        return EngineConfig(chunk_rows=self.chunk_rows, pages=pages)

    @property
    def num_rows(self) -> int:
        """Rows that are verified: anchors and drafts."""
        return self.slots * (self.draft + 1)


SIZES_OF_ROUNDS = (1, 1024), (1, 8192), (8, 1024), (64, 4096)
ROUNDS = {
    f"{slots} x {positions}" + (f", tensor {tensor}" if tensor > 1 else ""): Case(
        slots, positions, tensor=tensor
    )
    for tensor in (1, 8)
    for slots, positions in SIZES_OF_ROUNDS
}


def floor(case: Case, mesh: Mesh | None) -> float:
    """Bytes of one device that no round does without: each weight read once, but one row of an
    embedding a token and the bias of a draft's tokens once for each of them, one after the other;
    the valid keys and values; logits written and read."""
    target, drafter = declare_target(case.target), declare_drafter(case.drafter)

    def of(tree: Any, itemsize: int = 2) -> float:
        leaves = jax.tree.leaves(tree, is_leaf=is_param)
        return sum(itemsize * math.prod(_shard(leaf.axes, leaf.shape, mesh)) for leaf in leaves)

    embeddings = of(target.vocab.embed_VD) + of(drafter.head.w1_ZR)
    weights = of(target) + of(drafter) - embeddings
    layers = case.target.num_layers + case.drafter.num_layers
    caches = 2 * layers * valid_keys(case, case.slots)
    logits = case.num_rows
    if case.draft:
        slots = case.drafter.block_size
        weights += of(target.vocab.unembed_VD) + (slots - 1) * of(drafter.head.w2_RU)
        logits += case.slots * slots
    vocabulary = _shard("V", (SIZES["vocab_size"],), mesh)[0]
    return weights + caches + 2 * 4 * logits * vocabulary


def _shard(axes: str, shape: tuple[int, ...], mesh: Mesh | None) -> tuple[int, ...]:
    """The part of an array that one device holds."""
    if mesh is None:
        return shape
    return NamedSharding(mesh, partition(axes, shape, mesh)).shard_shape(shape)


def valid_keys(case: Case, slots: int) -> float:
    """Bytes of the keys of one layer that some slots hold, on one device."""
    heads = SIZES["num_kv_heads"] // case.tensor
    return 2 * slots * heads * case.valid * case.positions * SIZES["head_dim"]


def kernel_bytes(case: Case, form: StateConfig) -> Callable[[list[str], str], float]:
    """What a Mosaic kernel moves: of a cache the valid part of one layer, for the slots whose
    queries it has; everything else once."""
    buffers = jax.tree.leaves(declare_state(form))
    kept = [buffer for buffer in buffers if buffer.axes.endswith(("BKSH", "QKXH"))]
    caches = {_one_layer(buffer.shape) for buffer in kept}
    caches = {_split_heads(shape, case.tensor) for shape in caches}

    def moved(operands: list[str], result: str) -> float:
        shapes = [shape for operand in operands for _, shape in hlo_bytes.arrays(operand)]
        held = [_one_layer(shape) in caches for shape in shapes]
        queries = [s for s, cache in zip(shapes, held, strict=True) if len(s) == 4 and not cache]
        slots = min([shape[0] for shape in queries] + [case.slots])
        read = [
            valid_keys(case, slots) if cache else hlo_bytes.num_bytes(operand)
            for operand, cache in zip(operands, held, strict=True)
        ]
        return hlo_bytes.num_bytes(result) + sum(read)

    return moved


def _one_layer(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[B, K, S, H] of a cache, or of its pages; layers may be stacked."""
    return shape[-4:]


def _split_heads(shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
    return (shape[0], shape[1] // parts, *shape[2:])
