"""Training data: conversations as token sequences, in a stateless order of batches.

Batches have few shapes: sequences are padded to the next of some length buckets. Which sequences
make up batch number n is a function of the data, the recipe and n alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.checkpoints.chat import encode_conversation, find_chat_format, needs_format
from dspark_jax.checkpoints.conversations import Conversation
from dspark_jax.checkpoints.lines import account_for
from dspark_jax.checkpoints.tensors import LoadError
from dspark_jax.config import TrainConfig
from dspark_jax.files import read_json
from dspark_jax.rendering import PLAIN
from dspark_jax.training.cache import CachedSample
from dspark_jax.training.state import Batch

logger = logging.getLogger(__name__)

# How buckets are chosen: the fewest that keep the padding of an epoch below this, each of which
# costs a compilation; lengths are multiples that accelerators like.
MAX_PADDING = 0.1
MAX_BUCKETS = 8
BUCKET_STEP = 16


@dataclass(frozen=True)
class TokenSequence:
    """One tokenised conversation.

    Attributes:
        token_S: int32 ids.
        loss_mask_S: bool, the target's own tokens.
        cached: what a cache has of it, perhaps longer than ``token_S``; None where the target has
            yet to run.
        origin: where it was read, ``FILE:LINE`` or ``CACHE:SAMPLE``, for messages.
    """

    token_S: np.ndarray
    loss_mask_S: np.ndarray
    cached: CachedSample | None = None
    origin: str = ""


def tokenize(
    conversations: Sequence[Conversation], tokenizer: Any, end_id: int | None, recipe: TrainConfig
) -> tuple[list[TokenSequence], int]:
    """Conversations as sequences, cut at ``max_length``.

    Args:
        conversations: of :func:`~dspark_jax.checkpoints.conversations.read_answered`.
        tokenizer: the target's.
        end_id: the token that ends an answer, where the file does not say.
        recipe: limits, and how conversations are rendered.

    Returns:
        The sequences with at least ``min_loss_tokens`` supervised tokens, in file order, and how
        many were dropped for having fewer.

    Raises:
        ValueError: the tokenizer cannot take the conversations, or more of them than
            :func:`~dspark_jax.checkpoints.lines.account_for` leaves out; the message says where
            they were read.
    """
    rendering, chat, problem = recipe.rendering(), None, ""
    if any(map(needs_format, conversations)):
        try:
            chat = find_chat_format(tokenizer, rendering)
        except LoadError as error:  # an answer whose own ids are known is learnt all the same
            problem = str(error)
    kept, bad, short = [], list[tuple[str, str]](), 0
    for conversation in conversations:
        try:
            if problem and (conversation.response_ids is None or conversation.uses_tools):
                raise LoadError(problem)
            token_S, mask_S = encode_conversation(conversation, tokenizer, chat, end_id, rendering)
        except ValueError as error:
            bad.append((conversation.origin, str(error)))
            continue
        cut = slice(recipe.max_length)
        sequence = TokenSequence(token_S[cut], mask_S[cut], origin=conversation.origin)
        if sequence.loss_mask_S.sum() >= recipe.min_loss_tokens:
            kept.append(sequence)
        else:
            short += 1
    account_for(bad, len(conversations))
    return kept, short


def within_vocabulary(sequences: Sequence[TokenSequence], vocab_size: int) -> list[TokenSequence]:
    """The sequences that a target can read whose tokenizer has more tokens than it.

    Raises:
        ValueError: too many cannot be read, see
            :func:`~dspark_jax.checkpoints.lines.account_for`.
    """
    reason = f"the tokenizer writes an id beyond the target's, 0..{vocab_size - 1}"
    fits = [sequence.token_S.max() < vocab_size for sequence in sequences]
    bad = [(one.origin, reason) for one, fit in zip(sequences, fits, strict=True) if not fit]
    account_for(bad, len(sequences))
    return [one for one, fit in zip(sequences, fits, strict=True) if fit]


def check_answers(recipe: TrainConfig) -> None:
    """Warn of answers to prompts that the recipe renders otherwise: a drafter learns on the
    prompts that are decoded. What ``dspark prepare`` notes beside its output says how they were;
    their system turns lie in the data, so that another one is only a matter of those without.
    """
    noted: Any = None
    with contextlib.suppress(ValueError):  # there is none, or it is nothing of ours
        noted = read_json(Path(f"{recipe.data}.recipe.json"), "recipe")
    if not isinstance(noted, dict):
        return
    wanted = recipe.rendering()
    for name in ("system", "chat_template", "template_args"):
        before, now = noted.get(name, getattr(PLAIN, name)), getattr(wanted, name)
        if before != now and (name != "system" or (now and not before)):
            logger.warning(
                "%s answers prompts that were rendered with %s %r, and the configuration has %r: "
                "the drafter would be trained on other prompts",
                recipe.data,
                name,
                before,
                now,
            )


def frequent_tokens(sequences: Sequence[TokenSequence], count: int) -> np.ndarray:
    """The ``count`` most frequent answer tokens, as sorted int32 target ids.

    Where the answers have fewer distinct tokens, the smallest unseen ids fill up: in byte-level
    vocabularies these are the bytes and the commonest merges.
    """
    counts: Counter[int] = Counter()
    for sequence in sequences:
        counts.update(sequence.token_S[sequence.loss_mask_S].tolist())
    chosen = [token for token, _ in sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))]
    chosen = chosen[:count]
    unseen = (token for token in range(count + len(counts)) if token not in counts)
    chosen += [next(unseen) for _ in range(count - len(chosen))]
    return np.array(sorted(chosen), np.int32)


def choose_buckets(lengths: Sequence[int], recipe: TrainConfig) -> tuple[int, ...]:
    """The fewest length buckets with little padding; the last one is ``max_length``.

    Dynamic programming over the number of buckets finds those with the fewest positions in an
    epoch, the sequences that fill up last batches included.

    Args:
        lengths: of the sequences, at most ``max_length``.
        recipe: ``max_length`` and ``tokens_per_batch``.
    """
    edge_E = np.append(np.arange(0, recipe.max_length, BUCKET_STEP), recipe.max_length)
    below_E = np.searchsorted(np.sort(lengths), edge_E, side="right")
    size_E = np.array([batch_size(recipe, max(int(edge), 1)) for edge in edge_E])
    # Of a bucket for the sequences longer than edge i and at most as long as edge j.
    count_EE = below_E[None, :] - below_E[:, None]
    positions_EE = np.where(count_EE >= 0, -(-count_EE // size_E) * size_E * edge_E, np.inf)
    least_E, chosen = positions_EE[0], [(edge,) for edge in edge_E.tolist()]
    for _ in range(MAX_BUCKETS - 1):
        if least_E[-1] * (1 - MAX_PADDING) <= sum(lengths):
            break
        total_EE = least_E[:, None] + positions_EE
        last_E, better_E = total_EE.argmin(axis=0).tolist(), total_EE.min(axis=0) < least_E
        chosen = [
            (*chosen[last_E[j]], edge) if better_E[j] else chosen[j]
            for j, edge in enumerate(edge_E.tolist())
        ]
        least_E = np.minimum(least_E, total_EE.min(axis=0))
    return chosen[-1]


def with_buckets(recipe: TrainConfig, sequences: Sequence[TokenSequence]) -> TrainConfig:
    """A recipe whose ``length_buckets``, where it names none, suit the sequences."""
    if recipe.length_buckets:
        return recipe
    buckets = choose_buckets([len(sequence.token_S) for sequence in sequences], recipe)
    recipe = dataclasses.replace(recipe, length_buckets=buckets)
    logger.info("length buckets %s: %.1f %% padding", buckets, 100 * padding(sequences, recipe))
    return recipe


def padding(sequences: Sequence[TokenSequence], recipe: TrainConfig) -> float:
    """Share of an epoch's positions that hold no token."""
    batches = epoch_batches(sequences, recipe, 0)
    positions = sum(bucket * batch_size(recipe, bucket) for bucket, _ in batches)
    return 1 - sum(len(sequence.token_S) for sequence in sequences) / positions


def bucket_of(sequence: TokenSequence, recipe: TrainConfig) -> int:
    """The smallest length bucket that holds a sequence."""
    return next(size for size in recipe.length_buckets if size >= len(sequence.token_S))


def epoch_batches(
    sequences: Sequence[TokenSequence], recipe: TrainConfig, epoch: int
) -> list[tuple[int, list[int]]]:
    """Batches (bucket, indices of sequences) of one epoch, a function of (seed, epoch) alone.

    The last batch of a bucket may have fewer sequences; it is filled with empty ones.
    """
    random = np.random.Generator(np.random.Philox([recipe.seed, epoch]))
    order = random.permutation(len(sequences)).tolist()
    batches = bucket_batches(sequences, order, recipe)
    return [batches[i] for i in random.permutation(len(batches))]


def bucket_batches(
    sequences: Sequence[TokenSequence], order: Iterable[int], recipe: TrainConfig
) -> list[tuple[int, list[int]]]:
    """Batches (bucket, indices of sequences), in each bucket in the given order."""
    members: dict[int, list[int]] = {bucket: [] for bucket in recipe.length_buckets}
    for index in order:
        members[bucket_of(sequences[index], recipe)].append(index)
    batches = []
    for bucket, indices in members.items():
        size = batch_size(recipe, bucket)
        batches += [(bucket, indices[i : i + size]) for i in range(0, len(indices), size)]
    return batches


def batch_size(recipe: TrainConfig, bucket: int) -> int:
    """Sequences a step in a bucket of this length."""
    return max(1, recipe.tokens_per_batch // bucket)


def origins(sequences: Sequence[TokenSequence], indices: Sequence[int]) -> str:
    """Where the sequences of a batch were read, as ``FILE:LINE,LINE,...`` in ascending order."""
    found = [sequences[index].origin.rpartition(":") for index in indices]
    return f"{found[0][0]}:{','.join(sorted((place for *_, place in found), key=int))}"


def make_batch(
    sequences: Sequence[TokenSequence], indices: Sequence[int], bucket: int, size: int
) -> Batch:
    """A batch of static shape [size, bucket], padded at the end of sequences and of the batch.

    It brings features where all of its sequences do.
    """
    chosen = [sequences[index] for index in indices]

    def pad(arrays: list[np.ndarray]) -> np.ndarray:
        padded = np.zeros((size, bucket, *arrays[0].shape[1:]), arrays[0].dtype)
        for row, (array, sequence) in enumerate(zip(arrays, chosen, strict=True)):
            length = len(sequence.token_S)
            padded[row, :length] = array[:length]
        return padded

    tokens = pad([sequence.token_S for sequence in chosen])
    masks = pad([sequence.loss_mask_S for sequence in chosen])
    cached = [sequence.cached for sequence in chosen if sequence.cached is not None]
    if len(cached) < len(chosen):
        return Batch(tokens, masks)
    features = pad([sample.feature_SFD for sample in cached])
    return Batch(tokens, masks, features, pad([sample.hidden_SD for sample in cached]))


def require_blocks(sequences: Sequence[TokenSequence], name: str) -> None:
    """Checks that a part of the data has a block: an anchor, and a token of the answer behind it.

    Raises:
        ValueError: it has none, so that losses and metrics would be those of nothing.
    """
    for sequence in sequences:
        mask_S = np.asarray(sequence.loss_mask_S, bool)
        if (mask_S[:-1] & mask_S[1:]).any():
            return
    raise ValueError(
        f"the {name} conversations have no two tokens of an answer in a row: there is nothing to "
        "draft; give longer answers, or more data"
    )


def batches_from(
    sequences: Sequence[TokenSequence], recipe: TrainConfig, start_step: int
) -> Iterator[Batch]:
    """The endless stream of batches from a step on; resuming needs no state but the step."""
    for bucket, indices in schedule_from(sequences, recipe, start_step):
        yield make_batch(sequences, indices, bucket, batch_size(recipe, bucket))


def schedule_from(
    sequences: Sequence[TokenSequence], recipe: TrainConfig, start_step: int
) -> Iterator[tuple[int, list[int]]]:
    """What the batches from a step on consist of, see :func:`epoch_batches`; endless."""
    step, epoch = 0, 0
    while True:
        batches = epoch_batches(sequences, recipe, epoch)
        yield from batches[max(0, start_step - step) :]
        step, epoch = step + len(batches), epoch + 1
