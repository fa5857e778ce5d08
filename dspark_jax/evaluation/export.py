"""Drafters exported in the layouts that other programs read, each checked after writing.

The check reads the new files back and measures the teacher-forced acceptance of drafts, position
by position, on given answers: ``1 - TV`` of draft and target distribution behind the same anchors.
It must be what it was before. Another feature layer, another slot or another token table shows at
position 1 already; a checkpoint that fails never appears under its name. Where nothing was measured
there is no check: no place for an answer behind the template, or drafts that never agree.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dspark_jax.checkpoints.deepspec import bind_vocab
from dspark_jax.checkpoints.export import save_layout
from dspark_jax.checkpoints.identity import trained_for
from dspark_jax.checkpoints.load import Target, load_target, read_drafter
from dspark_jax.checkpoints.provenance import read_provenance, write_card, write_provenance
from dspark_jax.checkpoints.template import check_rendering
from dspark_jax.checkpoints.tokenizer import chat_prompt_ids
from dspark_jax.config import DrafterConfig, TargetConfig
from dspark_jax.models.drafters.full_vocabulary import with_full_vocabulary
from dspark_jax.models.drafters.table import drafter_of
from dspark_jax.models.targets.family import TargetParams
from dspark_jax.models.vocab import Vocab
from dspark_jax.rendering import PLAIN, Rendering
from dspark_jax.training.anchors import sample_lessons
from dspark_jax.training.data import TokenSequence, make_batch
from dspark_jax.training.loss_terms import Loss, l1_distance
from dspark_jax.training.losses import draft_blocks, dspark_loss, loss_totals
from dspark_jax.training.state import Batch, Frozen
from dspark_jax.training.step import read_target
from dspark_jax.training.teacher import make_teacher

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5
NUM_ANCHORS = 16  # of each answer: the drafts' logits over a large vocabulary take the memory
LENGTH = 96  # tokens of an answer, at most
LENGTH_STEP = 32
ANSWERS = (
    (
        "Why is the sky blue?",
        "The sky looks blue because molecules in the air scatter the short wavelengths of "
        "sunlight more strongly than the long ones, and blue light reaches us from all sides.",
    ),
    (
        "A box holds 12 eggs. How many eggs are in 7 boxes?",
        "Each box holds 12 eggs, so 7 boxes hold 7 * 12 = 84 eggs. The answer is 84.",
    ),
    (
        "Write a Python function that adds two numbers.",
        "Here is the function: def add(a, b): return a + b. Call it with add(2, 3) to get 5.",
    ),
)


def write_drafter(
    target: str | Path,
    drafter: str | Path,
    layout: str,
    out: str | Path,
    *,
    dtype: Any = "float32",
    full_vocabulary: bool = False,
    own_vocab: bool = False,
    mesh: Mesh | None = None,
    rendering: Rendering = PLAIN,
) -> Path:
    """Write a drafter's checkpoint in a layout, in the dtype of its own file, with a model card.

    Args:
        target: what ``load_target`` takes; its embedding and head are written where the layout
            wants them, and the check compares with its distributions.
        drafter: ``"default"``, a directory or a hub id, in any of the layouts.
        layout: as for :func:`~dspark_jax.checkpoints.export.save_layout`.
        out: the directory to write, which must not exist yet.
        dtype: of the target and of the check.
        full_vocabulary: make a drafter over a reduced vocabulary one over the whole of it.
        own_vocab: write the drafter's own embedding and head, where it has them, in place of the
            target's.
        mesh: for the check, as in ``load_target``.
        rendering: of the prompts of the check.

    Returns:
        ``out``.

    Raises:
        ValueError: ``out`` exists, a source cannot be read, they do not fit, the layout cannot
            hold the drafter, the check failed or had nothing to look at; nothing is written then.
        FloatingPointError: the drafter's or the target's numbers are not finite.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists already: remove it, or write to another directory")
    loaded = load_target(target, jnp.dtype(dtype), mesh)
    check_rendering(loaded.tokenizer, rendering, loaded.name)
    batch = check_batch(loaded, rendering)
    cfg, params, own, directory = read_drafter(loaded, drafter, mesh)
    vocab = bind_vocab(cfg, own, loaded.cfg, loaded.params.vocab, own_vocab=own_vocab)
    before_G = acceptance(loaded, cfg, params, vocab, batch)
    if full_vocabulary and vocab.d2t_U is not None:
        if own_vocab:
            raise ValueError("--full-vocabulary takes the target's head: leave --own-vocab out")
        cfg, params = with_full_vocabulary(cfg, params, vocab.d2t_U)
        vocab = loaded.params.vocab
    own_vocab &= own is not None
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        written = Path(folder) / out.name
        save_layout(
            written, layout, (cfg, params, vocab), (target, loaded.cfg), trained_for(directory),
            own_vocab=own_vocab,
        )  # fmt: skip
        cfg, params, own, _ = read_drafter(loaded, written, mesh)
        vocab = bind_vocab(cfg, own, loaded.cfg, loaded.params.vocab, own_vocab=own_vocab)
        check_same(before_G, acceptance(loaded, cfg, params, vocab, batch), layout)
        provenance, record = read_provenance(directory), trained_for(directory)
        if provenance:
            write_provenance(written, provenance)
        write_card(written, provenance, record, layout, before_G.tolist())
        written.rename(out)
    logger.info("acceptance at position 1 is %.4f, before and after", before_G[0])
    return out


def check_batch(target: Target, rendering: Rendering = PLAIN) -> Batch:
    """The answers on which acceptance is compared, tokenised for a target, behind their prompts
    however long its template makes these.

    Raises:
        ValueError: the prompts leave no place for an answer in the target's context.
    """
    most = target.cfg.max_positions
    sequences = []
    for prompt, answer in ANSWERS:
        start = chat_prompt_ids(target.tokenizer, prompt, rendering)
        ids = start + target.tokenizer.encode(answer, add_special_tokens=False)[:LENGTH]
        token_S = np.array(ids[:most], np.int32)
        sequences.append(TokenSequence(token_S, np.arange(len(token_S)) >= len(start)))
    if max(int(sequence.loss_mask_S.sum()) for sequence in sequences) < 2:
        longest = max(len(sequence.token_S) for sequence in sequences)
        raise ValueError(
            f"could not check the export: the chat template's prompts take all of {longest} "
            f"positions, and the context has {most}; nothing is written"
        )
    longest = max(len(sequence.token_S) for sequence in sequences)
    length = min(-(-longest // LENGTH_STEP) * LENGTH_STEP, most)
    return make_batch(sequences, range(len(sequences)), length, len(sequences))


def acceptance(
    target: Target, cfg: DrafterConfig, params: Any, vocab: Vocab, batch: Batch
) -> np.ndarray:
    """Teacher-forced acceptance of a drafter by position of the block, in the target's dtype.

    Args:
        target: the target.
        cfg: of the drafter.
        params: of the drafter.
        vocab: that it is bound to.
        batch: the sequences; anchors depend on nothing else.

    Returns:
        Mean of ``1 - TV`` over the anchors, float32 [G].

    Raises:
        FloatingPointError: it is not finite.
        ValueError: it is 0 at position 1, which any other drafter's could be, too.
    """
    params = jax.tree.map(lambda leaf: leaf.astype(target.params.norm_D.dtype), params)
    cfg = replace(
        cfg, owns_vocab=False, owns_head=False
    )  # says nothing about numbers: one program for both
    rate_G = np.asarray(_acceptance(target.params, params, vocab, batch, target.cfg, cfg))
    if not np.isfinite(rate_G).all():
        raise FloatingPointError("the drafts' probabilities are not finite: broken weights")
    if rate_G[0] <= TOLERANCE:
        raise ValueError(
            "could not check the export: the target accepts none of the drafts at position 1 "
            "(acceptance 0), so that right and wrong look the same; use the target that the "
            "drafter was trained for"
        )
    return rate_G


@partial(jax.jit, static_argnums=(4, 5))
def _acceptance(
    target: TargetParams,
    params: Any,
    vocab: Vocab,
    batch: Batch,
    target_cfg: TargetConfig,
    cfg: DrafterConfig,
) -> jax.Array:
    """``accept_rate_G`` of the training metrics."""
    feature_BSFD, hidden_BSD = read_target(Frozen(target, vocab, None), batch, target_cfg, cfg)
    teacher = make_teacher(target.vocab, hidden_BSD, vocab.d2t_U is not None)
    given = batch.token_BS, batch.loss_mask_BS, jax.random.key(0), 0.0
    sizes, lessons = (NUM_ANCHORS, cfg.block_size), drafter_of(cfg).lessons
    anchor_BA, keep_BA, labels = sample_lessons(*given, sizes, lessons)
    outputs = draft_blocks(params, vocab, feature_BSFD, labels, anchor_BA, keep_BA, cfg)
    loss = Loss(((l1_distance, 1.0),), confidence=0.0)
    totals = loss_totals(labels, None, loss.slot_weights)
    _, metrics = dspark_loss(params, vocab, outputs, teacher, labels, totals, None, loss=loss)
    return metrics["accept_rate_G"]


def check_same(before_G: np.ndarray, after_G: np.ndarray, layout: str) -> None:
    """Refuse an export that drafts otherwise than what it was made of.

    Raises:
        ValueError: acceptance differs at a position, or there are more or fewer positions.
    """
    same = before_G.shape == after_G.shape
    if not same or not np.allclose(before_G, after_G, rtol=0, atol=TOLERANCE):
        before, after = (np.round(rate_G, 5).tolist() for rate_G in (before_G, after_G))
        raise ValueError(
            f"self-check of the format {layout} failed, nothing is written: read back, the "
            f"drafter's acceptance by position is {after}, but it was {before}; please report it"
        )
