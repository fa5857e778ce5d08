"""What a recipe of a drafter must say for it to be trained."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from typing import Any

_NO_BLOCKS: Mapping[str, Any] = {
    "markov_rank": 0,
    "confidence": False,
    "sliding_window": 0,
    "bigram_init": False,
    "local_init": False,
}
# What other methods than DSpark have no part for: fields and their only values.
LACKS: Mapping[str, Mapping[str, Any]] = {
    "dspark": {},
    "eagle3": {"num_layers": 1, **_NO_BLOCKS},
    "mtp": {"num_layers": 1, **_NO_BLOCKS},
    "medusa": _NO_BLOCKS,
    "blockwise": {"num_layers": 1, **_NO_BLOCKS},
    "early_exit": _NO_BLOCKS,
}


def check_recipe(recipe: Any) -> None:
    """Check the fields of a ``TrainConfig``.

    Raises:
        ValueError: one is wrong, or contradicts another; names it, its value and the remedy.
    """
    choices_of = typing.get_type_hints(type(recipe))
    for field in ("method", "markov_head", "dtype", "kernels"):
        choices = typing.get_args(choices_of[field])
        if getattr(recipe, field) not in choices:
            raise ValueError(
                f"{field} is {getattr(recipe, field)!r}: choose one of {', '.join(choices)}"
            )
    wrong = [
        f"{field}={value!r}"
        for field, value in LACKS[recipe.method].items()
        if getattr(recipe, field) != value
    ]
    if wrong:
        raise ValueError(f"method is {recipe.method!r}: set {', '.join(wrong)}")
    _check_integers(recipe, -1, "mask_token_id")
    _check_integers(
        recipe,
        0, "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "sliding_window",
        "draft_vocab_size", "markov_rank", "steps", "seed", "eval_sequences",
        "sequences_per_update",
    )  # fmt: skip
    _check_integers(
        recipe,
        1, "num_layers", "block_size", "tokens_per_batch", "num_anchors", "updates_per_batch",
        "micro_batches", "eval_every", "checkpoint_every", "log_every", "keep_checkpoints",
        "data_parallel", "fsdp", "tensor_parallel",
    )  # fmt: skip
    _check_integers(recipe, 2, "max_length", "min_loss_tokens")  # an anchor takes two tokens
    for field in ("learning_rate", "clip_norm", "epochs"):
        if not 0 < getattr(recipe, field) < math.inf:
            raise ValueError(f"{field} is {getattr(recipe, field)}: it must be positive")
    for field in (
        "ce_weight", "l1_weight", "soft_weight", "confidence_weight", "weight_decay",
        "loss_decay", "cache_gb",
    ):  # fmt: skip
        if not 0 <= getattr(recipe, field) < math.inf:
            raise ValueError(f"{field} is {getattr(recipe, field)}: it must not be negative")
    if not recipe.ce_weight and not recipe.l1_weight and not recipe.soft_weight:
        raise ValueError(
            "ce_weight, l1_weight and soft_weight are all 0: nothing would train the drafts"
        )
    for field in ("warmup_fraction", "average_decay"):
        if not 0 <= getattr(recipe, field) < 1:
            raise ValueError(f"{field} {getattr(recipe, field)} must lie in [0, 1)")
    buckets = recipe.length_buckets
    if buckets and (list(buckets) != sorted(set(buckets)) or buckets[-1] != recipe.max_length):
        raise ValueError(
            f"length_buckets {buckets} must increase and end with max_length {recipe.max_length}"
        )
    if buckets and buckets[0] < 2:
        raise ValueError(f"length_buckets {buckets} must be at least 2: an anchor takes two")
    if recipe.cache_gb and not recipe.cache:
        raise ValueError(f"cache_gb is {recipe.cache_gb}, but cache is empty: name a directory")
    for bucket in buckets:
        batch = max(1, recipe.tokens_per_batch // bucket)
        share = min(recipe.sequences_per_update or batch, batch)
        if share % recipe.micro_batches:
            raise ValueError(
                f"micro_batches {recipe.micro_batches} must divide the {share} sequences of an "
                f"update in the length bucket {bucket}: change it, sequences_per_update or "
                "tokens_per_batch"
            )
        for count, what in ((batch, "batch"), (share // recipe.micro_batches, "micro-batch")):
            if count % (recipe.data_parallel * recipe.fsdp):
                raise ValueError(
                    f"data_parallel {recipe.data_parallel} x fsdp {recipe.fsdp} must divide the "
                    f"{count} sequences of a {what} in the length bucket {bucket}: change "
                    "them, sequences_per_update or tokens_per_batch"
                )
    if recipe.init_drafter and (recipe.bigram_init or recipe.local_init):
        raise ValueError(
            f"init_drafter {recipe.init_drafter!r} brings its own weights: set bigram_init and "
            "local_init to false"
        )
    if recipe.bigram_init and (recipe.markov_head != "vanilla" or recipe.markov_rank < 2):
        raise ValueError(
            "bigram_init needs markov_head 'vanilla' with a markov_rank of at least 2, not "
            f"{recipe.markov_head!r} with {recipe.markov_rank}: set bigram_init to false"
        )


def _check_integers(recipe: Any, least: int, *fields: str) -> None:
    for field in fields:
        value = getattr(recipe, field)
        if type(value) is not int or not least <= value < 2**63:
            raise ValueError(f"{field} {value!r} must be an integer in {least}..2^63-1")
