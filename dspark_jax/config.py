"""Frozen configurations: targets, drafters, training."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

from dspark_jax.recipe_rules import check_recipe
from dspark_jax.rendering import Rendering, parse_arguments

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding (``models/rope.py``), in the terms of transformers' ``rope_parameters``.

    Attributes:
        theta: base of the geometric series of frequencies.
        kind: how the frequencies are scaled; "dynamic" and "longrope" up to the original length.
        factor: how much the (low) frequencies are slowed down.
        low_freq_factor: where llama3's band begins that is interpolated between slowed and plain
            frequencies, in wavelengths per original context.
        high_freq_factor: where it ends.
        original_max_positions: context length before the scaling.
        beta_fast: where YaRN's band begins, in turns over the original context.
        beta_slow: where it ends.
        truncate: whether that band ends at whole channels.
        attention_factor: of cosines and sines.
        rotated: the part of the channels that "proportional" rotates.
        short_factors: longrope's divisors of the frequencies, one each.
    """

    theta: float = 10000.0
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    rotated: float = 1.0
    short_factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class TransformerConfig:
    """What target and drafter have in common: the sizes of a decoder block.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the MLP.
        num_layers: decoder blocks.
        num_heads: heads of queries.
        num_kv_heads: heads of keys and values, of which ``num_heads`` is a multiple.
        head_dim: channels of a head.
        rms_norm_eps: what norms add to the mean square.
        rope: the rotary embedding.
        max_positions: the longest context.
        qk_norm: whether the heads of queries and keys are normed.
        qkv_bias: whether their projections, and that of values, have biases.
        out_bias: whether the output projection of attention has one.
        windows: of every layer, the positions that a row sees up to its own; 0 for all. Empty: all
            in every layer.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    max_positions: int = 2048
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    windows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in (
            "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
            "num_kv_heads", "head_dim", "max_positions",
        ):  # fmt: skip
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{field} is {value!r}: it must be a positive integer")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads "
                f"{self.num_kv_heads}: every key/value head serves the same number of queries"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE rotates pairs")
        if self.windows and (len(self.windows) != self.num_layers or min(self.windows) < 0):
            raise ValueError(
                f"windows {self.windows} must name one of 0 or more for each of the "
                f"{self.num_layers} layers"
            )

    def window(self, layer: int) -> int:
        """How many positions a row of this layer sees; 0 for all."""
        return self.windows[layer] if self.windows else 0

    @property
    def sizes(self) -> dict[str, int]:
        """Axis letter -> size, for the declaration of parameters."""
        return {
            "L": self.num_layers,
            "D": self.hidden_size,
            "M": self.intermediate_size,
            "N": self.num_heads,
            "K": self.num_kv_heads,
            "H": self.head_dim,
            "V": self.vocab_size,
            "Z": self.vocab_size,
        }


@dataclass(frozen=True)
class TargetConfig(TransformerConfig):
    """What all targets have; each family (``models/targets``) has a class of its own.

    Attributes:
        tied: the LM head is the embedding.
        suppressed: ids that no text has: neither the target nor a drafter draws them.
    """

    tied: bool = False
    suppressed: tuple[int, ...] = ()


@dataclass(frozen=True)
class DrafterConfig(TransformerConfig):
    """A DSpark drafter (paper, section 3; DFlash where ``markov_rank`` is 0).

    ``vocab_size`` and ``hidden_size`` are the target's; everything else is the drafter's own.

    Attributes:
        blocks: whose layers the blocks are made of, by ``model_type``; empty for Qwen3's.
        block_size: draft tokens a round, the paper's gamma.
        anchor_predicts: the anchor's slot predicts the first draft; otherwise it predicts nothing,
            and the drafts are those of as many slots behind it (DFlash as its authors publish it).
        mask_token_id: the token that fills the block behind its anchor.
        target_layer_ids: strictly increasing feature layers; l is the residual stream after
            decoder layer l, -1 the embedding output.
        num_target_layers: layers of the target.
        markov_rank: rank of the sequential head, 0 for none.
        markov_head: which sequential head.
        confidence: whether there is a confidence head.
        confidence_with_markov: whether it sees the Markov embedding of the previous token.
        draft_vocab_size: size U of the reduced draft vocabulary, None for the whole vocabulary.
        value_is_key: the layers' values are the projected keys (blocks that know this).
        embed_scale: by which the target multiplies its embeddings.
        softcap: of the target's logits; None for no cap.
        owns_vocab: whether the checkpoint carries the target's embedding and head.
        owns_head: whether it carries a head of the drafter's own, to be used in its place.
        num_anchors: training blocks of a sequence; recorded in the checkpoint, read by nobody.

    >>> sizes = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 32, "num_layers": 1}
    >>> DrafterConfig(**sizes, num_heads=2, num_kv_heads=1, head_dim=8).block_size
    7
    """

    blocks: str = ""
    block_size: int = 7
    anchor_predicts: bool = True
    mask_token_id: int = 0
    target_layer_ids: tuple[int, ...] = (0,)
    num_target_layers: int = 2
    markov_rank: int = 0
    markov_head: Literal["vanilla", "gated", "rnn"] = "vanilla"
    confidence: bool = False
    confidence_with_markov: bool = True
    draft_vocab_size: int | None = None
    value_is_key: bool = False
    embed_scale: float = 1.0
    softcap: float | None = None
    owns_vocab: bool = True
    owns_head: bool = False
    num_anchors: int = 512
    qk_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        ids = self.target_layer_ids
        if not ids or any(b <= a for a, b in itertools.pairwise(ids)):
            raise ValueError(f"target_layer_ids {ids} must be strictly increasing and not empty")
        if ids[0] < -1 or ids[-1] > self.last_feature:
            last = f"{self.last_feature}, as the target has {self.num_target_layers} layers"
            raise ValueError(f"target_layer_ids {ids} must lie in -1..{last}")
        if not 1 <= self.block_size < self.max_positions:
            most = self.max_positions - 1
            raise ValueError(f"block_size {self.block_size} must lie in 1..{most}, in the context")
        if self.markov_rank < 0:
            raise ValueError(f"markov_rank {self.markov_rank} must be 0 (no head) or positive")
        if self.markov_head not in (heads := ("vanilla", "gated", "rnn")):
            raise ValueError(f"markov_head {self.markov_head!r} must be one of {heads}")
        if not 0 <= self.mask_token_id < self.vocab_size:
            most = self.vocab_size - 1
            raise ValueError(f"mask_token_id {self.mask_token_id} must lie in 0..{most}, an id")
        draft = self.draft_vocab_size
        if draft is not None and not 0 < draft <= self.vocab_size:
            raise ValueError(f"draft_vocab_size {draft} must lie in 1..{self.vocab_size}")

    @property
    def last_feature(self) -> int:
        """The last feature layer there can be: here the target's last layer is none."""
        return self.num_target_layers - 2

    @property
    def num_slots(self) -> int:
        """Slots of a block, the anchor's included."""
        return self.block_size + (not self.anchor_predicts)

    @property
    def sizes(self) -> dict[str, int]:
        """Axis letter -> size, for the declaration of parameters."""
        return super().sizes | {
            "F": len(self.target_layer_ids),
            "R": self.markov_rank,
            "U": self.draft_vocab_size or self.vocab_size,
        }


@dataclass(frozen=True)
class TrainConfig:
    """Recipe of a drafter. Lengths in tokens, times in seconds.

    Attributes:
        method: what is trained: ``"dspark"`` (DFlash where ``markov_rank`` is 0); ``"eagle3"`` or
            ``"mtp"``, whose chains are as long as ``block_size`` and begin at ``num_anchors``
            positions; ``"medusa"``, ``block_size`` heads of ``num_layers`` blocks; ``"blockwise"``,
            one wide layer for ``block_size`` slots; or ``"early_exit"``, a norm behind the target's
            first ``num_layers`` layers.
        target: Hugging Face directory or hub id, GGUF file, or ``"default"``.
        data: JSON-lines file of conversations answered by the target.
        out: directory of checkpoints, metrics and the final drafter.
        system: a system turn for conversations that have none.
        chat_template: whether the target's template makes text of conversations. Prompts are
            decoded alike later.
        template_args: arguments of the template, as KEY=VALUE texts.
        num_layers: decoder blocks of the drafter.
        block_size: drafts of a block.
        markov_rank: of the sequential head; 0 for none, which makes it DFlash.
        markov_head: which sequential head.
        confidence: whether there is a confidence head.
        confidence_with_markov: whether it sees the sequential head's embedding of the token before.
        intermediate_size: width of the drafter's MLP; 0 is the target's.
        num_heads: its heads of queries; 0 is the target's.
        num_kv_heads: its heads of keys and values; 0 is the target's.
        head_dim: their channels; 0 is the target's.
        sliding_window: context positions before its anchor that a block sees; 0 for all.
        draft_vocab_size: 0 for the whole vocabulary, else the most frequent ids of the answers.
        target_layer_ids: empty for five layers spread evenly from 1 to L - 3.
        mask_token_id: -1 looks for an unused special token of the target's tokenizer.
        max_length: longest sequence; longer ones are cut.
        length_buckets: sequence lengths that are compiled; the last one is ``max_length``. Empty
            chooses the fewest, up to 8, that keep padding on the data below 10 %.
        bigram_init: start a vanilla sequential head from the bigrams of the answers.
        local_init: start the first layer's heads with their eyes on the last positions.
        tokens_per_batch: positions of one step: a bucket of length S takes tokens_per_batch // S
            sequences.
        num_anchors: training blocks a sequence, for a bucket of max_length; shorter buckets get
            proportionally fewer.
        updates_per_batch: optimiser updates that share one pass of the target.
        sequences_per_update: sequences of the batch that one update sees; 0 is all of them.
        micro_batches: parts of an update's sequences, computed one after the other, by the target
            as by the drafter: less memory.
        steps: batches; 0 is ``epochs`` passes over the data.
        epochs: passes over the data, where ``steps`` is 0; parts of one count too.
        learning_rate: of AdamW, at its height; it rises linearly, then falls along a cosine to 0.
        warmup_fraction: share of all updates in which it rises.
        weight_decay: of AdamW.
        clip_norm: longest gradient of an update; a longer one is cut to it.
        average_decay: of the exponential mean of the weights, which is evaluated and exported
            instead of them; 0 keeps none.
        ce_weight: of the cross-entropy with the answer's tokens, in the loss.
        l1_weight: of the distance of the drafter's law to the target's.
        soft_weight: of the cross-entropy with the target's law.
        confidence_weight: of the confidence head's loss.
        loss_decay: slots are weighted exp(-(k-1)/loss_decay); 0 is no decay.
        seed: of the first weights, of the order of the data and of the anchors.
        min_loss_tokens: conversations with fewer tokens of an answer are dropped.
        eval_sequences: held-out sequences (the last ones of the file); 0 holds none out.
        eval_every: steps between two evaluations.
        checkpoint_every: steps between two checkpoints.
        log_every: steps between two lines of metrics.
        keep_checkpoints: how many checkpoints stay.
        init_drafter: drafter to start from (directory, hub id or ``"default"``), of the recipe's
            sizes, or with fewer layers: new ones add nothing at first. Empty for fresh weights.
        data_parallel: parts of an update's sequences, over the devices. Loss and metrics depend on
            none of the three sizes of the mesh.
        fsdp: parts of these that share one copy of all weights.
        tensor_parallel: parts of heads, MLP and vocabulary.
        dtype: of the frozen target and of the drafter's forward pass; the drafter's parameters,
            their gradients and the optimiser's state are float32.
        kernels: the implementation of the operations of ``pallas_kernels``, of the target's pass
            as of the drafter's.
        cache: directory of a target cache, which has the sequences and their features, so that
            ``data`` is not read; empty runs the target in every step.
        cache_gb: above 0, ``cache`` is a place for at most so many GB (1e9 bytes), where the
            features of the coming batches are written, trained on and replaced in turns; every
            process has such a place, so that ``cache`` may be a host's own disk.

    Raises:
        ValueError: a field is wrong, or contradicts another; names it, its value and the remedy.

    Source: section 3.3 of the paper; ``notebooks/concepts/training.md``.

    >>> TrainConfig(data="answers.jsonl", steps=100).num_anchors
    128
    """

    method: Literal["dspark", "eagle3", "mtp", "medusa", "blockwise", "early_exit"] = "dspark"
    target: str = "default"
    data: str = "responses.jsonl"
    out: str = "runs/drafter"
    system: str = ""
    chat_template: bool = True
    template_args: tuple[str, ...] = ()
    num_layers: int = 2
    block_size: int = 7
    markov_rank: int = 64
    markov_head: Literal["vanilla", "gated", "rnn"] = "vanilla"
    confidence: bool = True
    confidence_with_markov: bool = True
    intermediate_size: int = 0
    num_heads: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    sliding_window: int = 0
    draft_vocab_size: int = 0
    target_layer_ids: tuple[int, ...] = ()
    mask_token_id: int = -1
    bigram_init: bool = False
    local_init: bool = False
    init_drafter: str = ""
    max_length: int = 448
    length_buckets: tuple[int, ...] = ()
    tokens_per_batch: int = 1792
    num_anchors: int = 128
    updates_per_batch: int = 1
    sequences_per_update: int = 0
    micro_batches: int = 1
    min_loss_tokens: int = 8
    steps: int = 0
    epochs: float = 1.0
    learning_rate: float = 6e-4
    warmup_fraction: float = 0.04
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    average_decay: float = 0.0
    ce_weight: float = 0.1
    l1_weight: float = 0.9
    soft_weight: float = 0.0
    confidence_weight: float = 1.0
    loss_decay: float = 4.0
    seed: int = 0
    eval_sequences: int = 64
    eval_every: int = 500
    checkpoint_every: int = 200
    log_every: int = 10
    keep_checkpoints: int = 2
    data_parallel: int = 1
    fsdp: int = 1
    tensor_parallel: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    kernels: Literal["xla", "mosaic_gpu"] = "xla"
    cache: str = ""
    cache_gb: float = 0.0

    def __post_init__(self) -> None:
        check_recipe(self)
        self.rendering()

    def rendering(self) -> Rendering:
        """How conversations become text; raises ValueError where that cannot be."""
        return Rendering(self.system, self.chat_template, parse_arguments(self.template_args))
