"""Models where decoding wants them: weights placed on a device or a mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from dspark_jax.axes import declared_shardings, partition, place
from dspark_jax.config import TargetConfig
from dspark_jax.drafting import AnyDrafterConfig
from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.inputs import Weights
from dspark_jax.engine.state import StateConfig
from dspark_jax.models.by_outputs import matrices_by_outputs
from dspark_jax.models.drafters.table import drafter_of
from dspark_jax.models.merged import single_layers
from dspark_jax.models.quantised import declare_like
from dspark_jax.models.stacks import is_unstacked
from dspark_jax.models.targets.family import TargetParams
from dspark_jax.models.targets.table import family_of
from dspark_jax.models.vocab import Vocab, embedding_axes, head_by_outputs, lm_head
from dspark_jax.scheduler.calibration import Calibration


@dataclass(frozen=True)
class Decoder:
    """Weights in the form that decoding likes best, with their sizes.

    Attributes:
        weights: single layers, which on a CPU, too, are 1.3x faster than stacks, and whose matrices
            of one input are one (:mod:`~dspark_jax.models.merged`); on a single CPU device by their
            outputs (:mod:`~dspark_jax.models.by_outputs`).
        target: its sizes.
        drafter: its sizes; None decodes plainly.
        tokenizer: of the target; None returns ids without text.
        mesh: None for one device.
        calibration: of the drafter's confidences; None leaves them as they are.
        encode: a message or a conversation -> ids, by the chat template, whose arguments may be
            given as ``variables``; None takes ids alone.
        stop_ids: ids that end every text.
    """

    weights: Weights
    target: TargetConfig
    drafter: AnyDrafterConfig | None
    tokenizer: Any
    mesh: Mesh | None
    calibration: Calibration | None = None
    encode: Callable[..., Sequence[int]] | None = None
    stop_ids: tuple[int, ...] = ()


def make_decoder(
    target: tuple[TargetConfig, TargetParams],
    drafter: tuple[AnyDrafterConfig, Any, Vocab] | None = None,
    tokenizer: Any = None,
    mesh: Mesh | None = None,
    calibration: Calibration | None = None,
    *,
    donate: bool = False,
) -> Decoder:
    """Place the weights on the device or the mesh, in the form for decoding.

    Args:
        target: sizes and weights, layers stacked.
        drafter: sizes, weights and the drafter's vocabulary; None decodes plainly.
        tokenizer: of the target.
        mesh: a (data, tensor) mesh; axes that do not divide are replicated.
        calibration: of the drafter's confidences.
        donate: whether the layers that are given may be deleted. Otherwise they are a second copy
            on the device for as long as the caller keeps them.
    """
    target_cfg, params = target
    placed = _placed(params, family_of(target_cfg).declare(target_cfg), mesh)
    layers = tuple(single_layers(stack, donate=donate) for stack in placed.layers)
    placed = replace(placed, layers=layers)
    if _on_cpu(mesh):
        placed = replace(matrices_by_outputs(placed), vocab=head_by_outputs(placed.vocab))
    decoder = Decoder(Weights(placed), target_cfg, None, tokenizer, mesh)
    if drafter is None:
        return decoder
    return with_drafter(decoder, drafter, params.vocab, calibration, donate=donate)


def with_drafter(
    decoder: Decoder,
    drafter: tuple[AnyDrafterConfig, Any, Vocab],
    target_vocab: Vocab,
    calibration: Calibration | None = None,
    *,
    donate: bool = False,
) -> Decoder:
    """The same target, whose weights stay where they are, with another drafter.

    Args:
        decoder: of the target.
        drafter: as for :func:`make_decoder`.
        calibration: likewise.
        donate: likewise.
        target_vocab: what the target was given with; rows of it that the drafter has, too, are
            not placed a second time.
    """
    (cfg, params, vocab), mesh = drafter, decoder.mesh
    family = drafter_of(cfg)
    placed = _placed(params, family.declare_drafter(cfg), mesh)
    params = family.for_decoding(placed, donate=donate)
    own, same_head = decoder.weights.target.vocab, lm_head(vocab) is lm_head(target_vocab)
    vocab = _shared_vocab(vocab, target_vocab, own, mesh)
    if _on_cpu(mesh):
        params = matrices_by_outputs(params)
        vocab = replace(own, embed_VD=vocab.embed_VD) if same_head else head_by_outputs(vocab)
    weights = Weights(decoder.weights.target, params, vocab)
    return replace(decoder, weights=weights, drafter=cfg, calibration=calibration)


def without_drafter(decoder: Decoder) -> Decoder:
    """The same target, decoded plainly: no features are extracted either."""
    return replace(decoder, weights=Weights(decoder.weights.target), drafter=None)


def _placed(params: Any, declared: Any, mesh: Mesh | None) -> Any:
    """Parameters on their devices; what lies right already is not copied."""
    if mesh is None:
        return jax.device_put(params)
    return place(params, declared_shardings(declare_like(declared, params), mesh))


def _shared_vocab(vocab: Vocab, given: Vocab, placed: Vocab, mesh: Mesh | None) -> Vocab:
    """The drafter's vocabulary on the devices: the target's arrays where it has them.

    Args:
        vocab: of the drafter.
        given: of the target, before it was placed.
        placed: the same afterwards.
        mesh: that everything goes to.
    """

    placed_of = {id(given.embed_VD): placed.embed_VD, id(given.unembed_VD): placed.unembed_VD}

    def put(array: Any, axes: str) -> Any:
        if array is None or id(array) in placed_of:
            return placed_of.get(id(array))
        if mesh is None:
            return jax.device_put(array)
        return place(array, NamedSharding(mesh, partition(axes, array.shape, mesh)))

    return replace(
        vocab,
        embed_VD=put(vocab.embed_VD, embedding_axes(vocab.unembed_VD is None)),
        unembed_VD=put(vocab.unembed_VD, "UD"),
        d2t_U=put(vocab.d2t_U, "X"),
    )


def state_config(
    decoder: Decoder, num_slots: int, num_positions: int, config: EngineConfig
) -> StateConfig:
    """The form of a state for these models."""
    block = 0 if decoder.drafter is None else decoder.drafter.block_size
    target, drafter = decoder.weights.target, decoder.weights.drafter
    return StateConfig(
        decoder.target,
        decoder.drafter,
        num_slots,
        num_positions,
        max(block + 1, config.chunk_rows * config.chunk_buckets[-1]),
        config.stop_ids,
        (_cache_dtype(target, decoder), _cache_dtype(drafter, decoder)),
        (
            not is_unstacked(target.layers),
            drafter is not None and not (drafter.layers and is_unstacked(drafter.layers)),
        ),
        config.pages,
    )


def _cache_dtype(params: Any, decoder: Decoder) -> Any:
    """Of keys and values; None without layers. XLA has no writes into bfloat16 arrays for a CPU
    and converts the whole cache there and back, so it is float32 there."""
    if params is None or not params.layers:
        return None
    return jnp.dtype(jnp.float32) if _on_cpu(decoder.mesh) else params.norm_D.dtype


def _on_cpu(mesh: Mesh | None) -> bool:
    """Whether a single CPU device decodes."""
    return mesh is None and jax.default_backend() == "cpu"
