"""Training data: answered conversations as token sequences, in a stateless order of batches.

A line of the file is one conversation: ``conversations`` (turns with ``role`` and ``content``, the
last one the target's answer) and optionally ``response_ids``, the answer's own token ids, and
``finish`` (``"stop"``: the answer ended with the end-of-turn token, which is then supervised too).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dspark_jax.config import TrainConfig
from dspark_jax.training.cache import CachedSample
from dspark_jax.training.step import Batch


@dataclass(frozen=True)
class TokenSequence:
    """One tokenised conversation: int32 ids, and where the supervised answer begins.

    One out of a cache brings its features, and a loss mask that may have gaps.
    """

    token_S: np.ndarray
    answer_start: int
    cached: CachedSample | None = None

    @property
    def loss_mask_S(self) -> np.ndarray:
        """bool: the supervised tokens."""
        if self.cached is not None:
            return self.cached.loss_mask_S[: len(self.token_S)] > 0
        return np.arange(len(self.token_S)) >= self.answer_start


def read_conversations(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Where it was read (``FILE:LINE``) and object of every conversation in a JSON-lines file.

    Raises:
        ValueError: the file is missing, or a line is not a conversation.
    """
    try:
        # Not splitlines: it also cuts at separators that JSON allows inside a string.
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise ValueError(
            f"training data {path} does not exist: set data to a JSON-lines file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"training data {path} is not readable: {error}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            origin = f"{path}:{number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{origin}: not JSON ({error})") from None
            problem = _problem(row)
            if problem:
                raise ValueError(f"{origin}: {problem}")
            rows.append((origin, row))
    return rows


def _problem(row: Any) -> str | None:
    """What keeps a line from being a conversation; None where nothing does."""
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or len(turns) < 2:
        return 'needs "conversations", a list of at least two turns'
    for turn in turns:
        if not isinstance(turn, dict) or not all(
            isinstance(turn.get(key), str) for key in ("role", "content")
        ):
            return 'every turn needs the strings "role" and "content"'
    if turns[-1]["role"] != "assistant":
        return f"the last turn is the {turns[-1]['role']}'s, not the assistant's answer"
    ids = row.get("response_ids")
    if ids is not None and not (isinstance(ids, list) and all(type(id) is int for id in ids)):
        return '"response_ids" must be a list of token ids'
    if not isinstance(row.get("finish", "stop"), str):
        return '"finish" must be a string, "stop" where the answer ended by itself'
    return None


def tokenize(
    rows: Sequence[tuple[str, dict[str, Any]]],
    tokenizer: Any,
    prompt_ids: Any,
    end_id: int,
    recipe: TrainConfig,
) -> tuple[list[TokenSequence], int]:
    """Conversations as sequences, cut at ``max_length``.

    Args:
        rows: of :func:`read_conversations`.
        tokenizer: the target's.
        prompt_ids: ``(tokenizer, turns) -> ids`` up to where the answer begins.
        end_id: the token that ends an answer.
        recipe: limits.

    Returns:
        The sequences with at least ``min_loss_tokens`` supervised tokens, in file order, and how
        many were dropped for having fewer.

    Raises:
        ValueError: the tokenizer cannot take a conversation; the message says where it was read.
    """
    kept, dropped, count = [], 0, len(tokenizer)
    for origin, row in rows:
        *turns, answer = row["conversations"]
        try:
            prompt = list(prompt_ids(tokenizer, turns))
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None
        ids = row.get("response_ids")
        if ids is None:
            ids = tokenizer.encode(answer["content"], add_special_tokens=False)
        elif ids and not 0 <= min(ids) <= max(ids) < count:
            bad = min(ids) if min(ids) < 0 else max(ids)
            raise ValueError(
                f'{origin}: {bad} in "response_ids" is no token of the target, whose ids are '
                f"0..{count - 1}: were these the answers of another model?"
            )
        if row.get("finish", "stop") == "stop":
            ids = [*ids, end_id]
        token_S = np.array([*prompt, *ids][: recipe.max_length], np.int32)
        if len(token_S) - len(prompt) < recipe.min_loss_tokens:
            dropped += 1
        else:
            kept.append(TokenSequence(token_S, len(prompt)))
    return kept, dropped


def frequent_tokens(sequences: Sequence[TokenSequence], count: int) -> np.ndarray:
    """The ``count`` most frequent answer tokens, as sorted int32 target ids.

    Where the answers have fewer distinct tokens, the smallest unseen ids fill up: in byte-level
    vocabularies these are the bytes and the commonest merges.
    """
    counts: Counter[int] = Counter()
    for sequence in sequences:
        counts.update(sequence.token_S[sequence.answer_start :].tolist())
    chosen = [token for token, _ in sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))]
    chosen = chosen[:count]
    unseen = (token for token in range(count + len(counts)) if token not in counts)
    chosen += [next(unseen) for _ in range(count - len(chosen))]
    return np.array(sorted(chosen), np.int32)


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
