"""A recipe made ready to train: sizes, data, programs, frozen weights, the state to begin with."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from dspark_jax.axes import gather, init_params, place
from dspark_jax.checkpoints.chat import end_of_answer
from dspark_jax.checkpoints.conversations import Conversation, read_answered
from dspark_jax.checkpoints.deepspec import bind_vocab
from dspark_jax.checkpoints.load import Target, open_target, read_drafter
from dspark_jax.checkpoints.template import check_rendering
from dspark_jax.checkpoints.tokenizer import unused_token
from dspark_jax.config import DrafterConfig, TargetConfig, TrainConfig
from dspark_jax.models.drafters.table import drafter_of, trained_form
from dspark_jax.models.targets.table import family_of
from dspark_jax.models.vocab import Vocab
from dspark_jax.training import data
from dspark_jax.training.bigram import start_from_bigrams
from dspark_jax.training.cache import MANIFEST, CacheReader
from dspark_jax.training.features import cache_spec, cached_sequences
from dspark_jax.training.growth import check_same_sizes, with_layers_of
from dspark_jax.training.local_heads import start_with_local_heads
from dspark_jax.training.loss_terms import Loss
from dspark_jax.training.optimizer import Optimizer, check_optimizer, learning_rate
from dspark_jax.training.programs import UNREAD, Programs, mesh_of, programs_of
from dspark_jax.training.state import Frozen, TrainState, on_mesh
from pallas_kernels.dispatch import require_kernels

logger = logging.getLogger(__name__)

# Sequences whose features start the local heads: a direction needs no more.
LOCAL_INIT_SEQUENCES = 8

# Sequences come from conversations, or out of a cache.
Source = list[Conversation] | CacheReader


def default_feature_layers(num_target_layers: int, count: int = 5) -> tuple[int, ...]:
    """Layers spread evenly from 1 to L - 3; fewer where the target is shallow."""
    last = max(num_target_layers - 3, 0)
    first = min(1, last)
    return tuple(sorted({round(x) for x in np.linspace(first, last, count)}))


def drafter_config(recipe: TrainConfig, target: Target) -> DrafterConfig:
    """The drafter that a recipe describes, with the target's sizes where it names none."""
    cfg = target.cfg
    mask = recipe.mask_token_id
    if mask < 0:  # others have no use for one
        blocks = recipe.method == "dspark"
        mask = unused_token(target.tokenizer, cfg.vocab_size) if blocks else 0
    fields = {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": recipe.intermediate_size or cfg.intermediate_size,
        "num_layers": recipe.num_layers,
        "num_heads": recipe.num_heads or cfg.num_heads,
        "num_kv_heads": recipe.num_kv_heads or cfg.num_kv_heads,
        "head_dim": recipe.head_dim or cfg.head_dim,
        "rms_norm_eps": cfg.rms_norm_eps,
        "windows": (recipe.sliding_window,) * recipe.num_layers if recipe.sliding_window else (),
        "max_positions": cfg.max_positions,
        "block_size": recipe.block_size,
        "mask_token_id": mask,
        "target_layer_ids": recipe.target_layer_ids or default_feature_layers(cfg.num_layers),
        "num_target_layers": cfg.num_layers,
        "num_anchors": recipe.num_anchors,
        "markov_rank": recipe.markov_rank,
        "markov_head": recipe.markov_head,
        "confidence": recipe.confidence,
        "confidence_with_markov": recipe.confidence_with_markov,
        "draft_vocab_size": recipe.draft_vocab_size or None,
        "owns_vocab": False,
    }
    return trained_form(recipe.method, fields | family_of(cfg).draft_fields(cfg), cfg)


def draft_places(vocab_size: int, d2t_U: np.ndarray) -> jax.Array:
    """int32 [V]: the place of every token in the draft vocabulary, -1 outside it."""
    t2d_V = np.full(vocab_size, -1, np.int32)
    t2d_V[d2t_U] = np.arange(len(d2t_U))
    return jnp.asarray(t2d_V)


def open_source(recipe: TrainConfig) -> Source:
    """Where a recipe's sequences come from.

    Raises:
        ValueError: the data or the cache cannot be used.
    """
    if recipe.cache and not recipe.cache_gb:
        return CacheReader(recipe.cache)
    if recipe.cache and (Path(recipe.cache) / MANIFEST).exists():
        raise ValueError(
            f"cache {recipe.cache} holds a whole cache: set cache_gb to 0 to train on it, or name "
            "another directory"
        )
    return read_answered(recipe.data)


def load_sequences(
    source: Source, target: Target, cfg: DrafterConfig, recipe: TrainConfig
) -> tuple[Sequence[data.TokenSequence], Sequence[data.TokenSequence]]:
    """The sequences to train on and the held-out ones, the last of the file or the cache.

    Raises:
        ValueError: the data or the cache does not suit the target, or there is too little of it.
    """
    sequences: Sequence[data.TokenSequence]
    if recipe.max_length > target.cfg.max_positions:
        raise ValueError(
            f"max_length {recipe.max_length} is beyond the context of {target.name}: "
            f"set it to at most {target.cfg.max_positions}"
        )
    if isinstance(source, CacheReader):
        source.require(cache_spec(recipe, cfg))
        sequences, dropped = cached_sequences(source, cfg.vocab_size, recipe)
    else:
        check_rendering(target.tokenizer, recipe.rendering(), target.name)
        data.check_answers(recipe)
        end_id = end_of_answer(target.tokenizer, target.stop_ids, recipe.rendering())
        sequences, dropped = data.tokenize(source, target.tokenizer, end_id, recipe)
        sequences = data.within_vocabulary(sequences, cfg.vocab_size)
    if len(sequences) <= recipe.eval_sequences:
        name = source.directory if isinstance(source, CacheReader) else recipe.data
        raise ValueError(
            f"{name} has {len(sequences)} usable conversations ({dropped} more are too "
            f"short, or their prompts too long), and eval_sequences takes {recipe.eval_sequences} "
            "of them: give more data or lower eval_sequences"
        )
    cut = len(sequences) - recipe.eval_sequences
    logger.info("%d sequences, %d dropped", cut, dropped)
    data.require_blocks(sequences[:cut], "training")
    if recipe.eval_sequences:
        data.require_blocks(sequences[cut:], "held-out")
    return sequences[:cut], sequences[cut:]


def total_steps(recipe: TrainConfig, train_set: Sequence[data.TokenSequence]) -> int:
    """Batches of a run of a recipe with its buckets."""
    batches = len(data.epoch_batches(train_set, recipe, 0))
    return recipe.steps or max(1, round(recipe.epochs * batches))


def starting_point(
    recipe: TrainConfig,
    cfg: DrafterConfig,
    target: Target,
    train_set: Sequence[data.TokenSequence],
) -> tuple[Any, np.ndarray | None]:
    """The drafter before the first step, float32, and its draft vocabulary ``d2t_U``.

    Raises:
        ValueError: ``init_drafter`` cannot be read, or is not of the recipe's sizes.
    """
    if recipe.init_drafter:
        found, params, own, _ = read_drafter(target, recipe.init_drafter)
        check_same_sizes(recipe.init_drafter, cfg, found)
        if found.owns_head:
            logger.warning(
                "%s has an LM head: the target's is trained with, and is the result's",
                recipe.init_drafter,
            )
        ids = None if own is None or own.d2t_U is None else np.asarray(own.d2t_U)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        if found.num_layers < cfg.num_layers:
            params = with_layers_of(params, fresh_params(recipe, cfg))
        return params, ids
    params = fresh_params(recipe, cfg)
    d2t_U = t2d_V = None
    if cfg.draft_vocab_size is not None:
        d2t_U = data.frequent_tokens(train_set, cfg.draft_vocab_size)
        t2d_V = draft_places(cfg.vocab_size, d2t_U)
    if recipe.bigram_init:
        params = start_from_bigrams(params, train_set, t2d_V, cfg)
    if recipe.local_init and type(cfg) is not DrafterConfig:
        raise ValueError("local_init is of other layers than this target's drafters have: drop it")
    if recipe.local_init:
        some = next(data.batches_from(train_set, recipe, 0))
        rows = min(len(some.token_BS), LOCAL_INIT_SEQUENCES)
        token_BS, supervised_BS = some.token_BS[:rows], some.loss_mask_BS[:rows]
        feature_BSFD = some.feature_BSFD
        if feature_BSFD is None:
            encode = partial(
                family_of(target.cfg).encode,
                cfg=target.cfg,
                feature_layers=cfg.target_layer_ids,
                kernels=recipe.kernels,
            )
            read = jax.jit(on_mesh(encode, mesh_of(recipe)))
            feature_BSFD = gather(read(target.params, token_BS)[1])
        params = start_with_local_heads(
            params,
            dataclasses.replace(target.params.vocab, embed_VD=gather(target.params.vocab.embed_VD)),
            feature_BSFD[:rows][supervised_BS].astype(jnp.float32),
            jnp.asarray(token_BS[supervised_BS]),
            cfg,
        )
    return params, d2t_U


def fresh_params(recipe: TrainConfig, cfg: DrafterConfig) -> Any:
    """Random weights, float32."""
    return init_params(jax.random.key(recipe.seed), drafter_of(cfg).declare_drafter(cfg))


def check_kernels(recipe: TrainConfig) -> None:
    """Checks that the recipe's implementation of the kernels runs here.

    Raises:
        ValueError: it does not; the message says why.
    """
    require_kernels(recipe.kernels)
    if recipe.kernels != "xla" and recipe.dtype != "bfloat16":
        raise ValueError(
            f"kernels is {recipe.kernels!r}, which takes bfloat16, and dtype is {recipe.dtype!r}: "
            "set dtype to bfloat16, or choose xla"
        )


@dataclass(frozen=True)
class Run:
    """A recipe made ready: data, programs, frozen weights, the state to begin with, what the
    drafter records of its target, and the schedule in place of the recipe's; None for that."""

    recipe: TrainConfig
    target_cfg: TargetConfig
    cfg: DrafterConfig
    own: Vocab | None
    train_set: Sequence[data.TokenSequence]
    held_out: Sequence[data.TokenSequence]
    total: int
    programs: Programs
    frozen: Frozen
    state: TrainState
    trained_for: Mapping[str, str]
    schedule: optax.Schedule | None = None

    @property
    def rate(self) -> optax.Schedule:
        """Of all its updates; an argument of the programs."""
        if self.schedule is not None:
            return Partial(self.schedule)
        return learning_rate(self.recipe, self.total * self.recipe.updates_per_batch)


def start_run(
    recipe: TrainConfig,
    source: Source,
    *,
    optimizer: Optimizer | None = None,
    schedule: optax.Schedule | None = None,
    loss: Loss | None = None,
) -> Run:
    """Load, tokenise, initialise and place; nothing is written.

    Args:
        recipe: of the run.
        source: of :func:`open_source`; its last sequences are held out.
        optimizer: as for :func:`~dspark_jax.training.fit.fit`.
        schedule: likewise.
        loss: likewise.

    Raises:
        ValueError: bad data or configuration; the message names the field and the remedy.
    """
    check_optimizer(recipe, optimizer)
    target, read_weights = open_target(recipe.target)
    cfg = drafter_config(recipe, target)
    train_set, held_out = load_sequences(source, target, cfg, recipe)
    target = dataclasses.replace(
        target, params=read_weights(jnp.dtype(recipe.dtype), mesh_of(recipe))
    )
    recipe = data.with_buckets(recipe, train_set)
    total = total_steps(recipe, train_set)
    params, d2t_U = starting_point(recipe, cfg, target, train_set)
    own = t2d_V = None
    if d2t_U is not None:
        own, t2d_V = Vocab(None, None, d2t_U), draft_places(cfg.vocab_size, d2t_U)
    vocab = bind_vocab(cfg, own, target.cfg, target.params.vocab)
    frozen = Frozen(target.params, vocab, t2d_V)
    read = dataclasses.replace(recipe, **UNREAD)
    programs = programs_of(target.cfg, cfg, read, optimizer, loss)
    params = place(params, programs.state.params)
    moments = programs.init(params)
    average = jax.tree.map(jnp.copy, params) if recipe.average_decay else None  # both are donated
    state = TrainState(place(np.int32(0), programs.state.step), params, moments, average)
    frozen = place(frozen, programs.frozen)
    return Run(
        recipe, target.cfg, cfg, own, train_set, held_out, total, programs, frozen, state,
        target.identity(), schedule,
    )  # fmt: skip
