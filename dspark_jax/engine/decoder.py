"""Models where decoding wants them: weights placed on a device or a mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dspark_jax.axes import declared_shardings, partition
from dspark_jax.config import DrafterConfig, TargetConfig
from dspark_jax.engine.config import EngineConfig
from dspark_jax.engine.inputs import Weights
from dspark_jax.engine.request import Prompt
from dspark_jax.engine.state import StateConfig
from dspark_jax.models.by_outputs import matrices_by_outputs
from dspark_jax.models.drafters.dspark import DrafterParams, declare_drafter
from dspark_jax.models.stacks import is_unstacked, unstack_layers
from dspark_jax.models.targets.family import TargetParams
from dspark_jax.models.targets.table import family_of
from dspark_jax.models.vocab import Vocab, head_by_outputs, lm_head
from dspark_jax.scheduler.calibration import Calibration


@dataclass(frozen=True)
class Decoder:
    """Weights in the form that decoding likes best, with their sizes.

    Attributes:
        weights: on a single CPU device with unstacked layers (1.3x faster there) and the matrices
            by their outputs (:mod:`~dspark_jax.models.by_outputs`); elsewhere stacked, by their
            inputs.
        target, drafter: sizes; drafter None decodes plainly.
        tokenizer: of the target; None returns ids without text.
        mesh: None for one device.
        calibration: of the drafter's confidences; None leaves them as they are.
        encode: a message or a conversation -> ids, by the chat template; None takes ids alone.
        stop_ids: ids that end every text.
    """

    weights: Weights
    target: TargetConfig
    drafter: DrafterConfig | None
    tokenizer: Any
    mesh: Mesh | None
    calibration: Calibration | None = None
    encode: Callable[[Prompt], Sequence[int]] | None = None
    stop_ids: tuple[int, ...] = ()


def make_decoder(
    target: tuple[TargetConfig, TargetParams],
    drafter: tuple[DrafterConfig, DrafterParams, Vocab] | None = None,
    tokenizer: Any = None,
    mesh: Mesh | None = None,
    calibration: Calibration | None = None,
) -> Decoder:
    """Place the weights on the device or the mesh; what lies right already is not copied.

    Args:
        target: sizes and weights, layers stacked.
        drafter: sizes, weights and the drafter's vocabulary; None decodes plainly.
        tokenizer: of the target.
        mesh: a (data, tensor) mesh; axes that do not divide are replicated.
        calibration: of the drafter's confidences.
    """
    target_cfg, target_params = target
    drafter_cfg, drafter_params, vocab = drafter if drafter is not None else (None, None, None)
    if mesh is not None:
        declared = family_of(target_cfg).declare(target_cfg)
        given = target_params.vocab
        target_params = jax.device_put(target_params, declared_shardings(declared, mesh))
        if drafter_cfg is not None and vocab is not None:
            drafter_params = jax.device_put(
                drafter_params, declared_shardings(declare_drafter(drafter_cfg), mesh)
            )
            vocab = _shared_vocab(vocab, given, target_params.vocab, mesh)
    elif jax.default_backend() == "cpu":
        rows, own = target_params.vocab, head_by_outputs(target_params.vocab)
        target_params = matrices_by_outputs(_unstacked(target_params)).replace(vocab=own)
        if drafter_params is not None and vocab is not None:
            drafter_params = matrices_by_outputs(_unstacked(drafter_params))
            same_head = lm_head(vocab) is lm_head(rows)
            vocab = replace(own, embed_VD=vocab.embed_VD) if same_head else head_by_outputs(vocab)
    weights = Weights(target_params, drafter_params, vocab)
    return Decoder(weights, target_cfg, drafter_cfg, tokenizer, mesh, calibration)


def without_drafter(decoder: Decoder) -> Decoder:
    """The same target, decoded plainly: no features are extracted either."""
    return replace(decoder, weights=Weights(decoder.weights.target), drafter=None)


def _unstacked(params: Any) -> Any:
    if is_unstacked(params.layers):
        return params
    return params.replace(layers=unstack_layers(params.layers))


def _shared_vocab(vocab: Vocab, given: Vocab, placed: Vocab, mesh: Mesh) -> Vocab:
    """The drafter's vocabulary on the mesh: the target's arrays, and rows of a head by its shards.

    Args:
        vocab: of the drafter.
        given, placed: of the target, before and after it was placed.
        mesh: that everything goes to.
    """
    embed, head, d2t_U = placed.embed_VD, vocab.unembed_VD, vocab.d2t_U
    if vocab.embed_VD is not given.embed_VD:  # the drafter's own
        where = NamedSharding(mesh, partition("VD", vocab.embed_VD.shape, mesh))
        embed = jax.device_put(vocab.embed_VD, where)
    if head is given.unembed_VD:
        head = placed.unembed_VD
    elif head is not None:
        head = jax.device_put(head, NamedSharding(mesh, partition("UD", head.shape, mesh)))
    if d2t_U is not None:
        d2t_U = jax.device_put(d2t_U, NamedSharding(mesh, PartitionSpec()))
    return replace(vocab, embed_VD=embed, unembed_VD=head, d2t_U=d2t_U)


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
            drafter is not None and not is_unstacked(drafter.layers),
        ),
    )


def _cache_dtype(params: Any, decoder: Decoder) -> Any:
    """Of keys and values; None without parameters. XLA has no writes into bfloat16 arrays for a CPU
    and converts the whole cache there and back, so it is float32 there."""
    if params is None:
        return None
    on_cpu = decoder.mesh is None and jax.default_backend() == "cpu"
    return jnp.dtype(jnp.float32) if on_cpu else params.norm_D.dtype
