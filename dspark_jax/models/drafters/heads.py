"""Sequential heads, confidence head, and drafting a block token by token (paper, section 3.2).

The backbone gives every slot its hidden state in parallel; the sequential head adds a bias that
depends on the tokens already in the block, of rank R in the vocabulary:

    vanilla  B_k = W1[x_{k-1}] W2
    gated    g = sigmoid(W_g [h_k; W1[x_{k-1}]] + b),  B_k = (g * W1[x_{k-1}]) W2
    rnn      [gate, cand, out] = W_j [s_{k-1}; W1[x_{k-1}]; h_k] + b
             s_k = sigmoid(gate) * s_{k-1} + (1 - sigmoid(gate)) * tanh(cand),  B_k = tanh(out) W2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dspark_jax.axes import declare
from dspark_jax.config import DrafterConfig
from dspark_jax.models.layers import add
from dspark_jax.models.vocab import Vocab, unembed
from pallas_kernels.accept_block.rule import OneHot

# Of a slot: token_B, index_B and the logits_BU that it was drawn from.
Drawn = tuple[jax.Array, jax.Array, jax.Array]


@struct.dataclass
class MarkovHead:
    """Weights of a sequential head; ``mix`` is the gate (gated) or joint projection (rnn)."""

    w1_ZR: Any
    w2_RU: Any
    mix_IO: Any = None
    mix_bias_O: Any = None


@struct.dataclass
class ConfidenceHead:
    """Weights of the confidence head, ``c_k = sigmoid(w . [h_k; W1[x_{k-1}]] + b)``."""

    w_IO: Any
    bias_O: Any  # None for none


@struct.dataclass
class DraftBlock:
    """A drafted block: what was drawn, and from which law.

    Attributes:
        token_BG: int32 target ids.
        index_BG: int32 places of these tokens in the draft vocabulary.
        logits_BGU: float32 corrected logits, before temperature; ``ONE_HOT`` where the drafts were
            not drawn.
        confidence_logit_BG: float32, large and negative for a draft that there is not; None without
            a confidence head.
        count_B: int32 how many drafts there are; None where all blocks are full. By the tokens
            before the block alone, like a confidence.
    """

    token_BG: jax.Array
    index_BG: jax.Array
    logits_BGU: jax.Array | OneHot
    confidence_logit_BG: Any
    count_B: Any = None


def declare_markov_head(cfg: DrafterConfig, prefix: str = "") -> MarkovHead | None:
    """Declaration of the sequential head; None where ``markov_rank`` is 0. Its names in a file have
    the prefix."""
    if not cfg.markov_rank:
        return None
    rank = cfg.markov_rank
    mix = mix_bias = None
    if cfg.markov_head != "vanilla":
        gated = cfg.markov_head == "gated"
        sizes = {
            "I": cfg.hidden_size + (rank if gated else 2 * rank),
            "O": rank if gated else 3 * rank,
        }
        name = f"{prefix}markov_head." + ("gate_proj" if gated else "joint_proj")
        mix = declare("IO", sizes, f"{name}.weight", out="O")
        mix_bias = declare("O", sizes, f"{name}.bias", out="O", init="zeros")
    return MarkovHead(
        w1_ZR=declare("ZR", cfg.sizes, f"{prefix}markov_head.markov_w1.weight", init="embed"),
        w2_RU=declare("RU", cfg.sizes, f"{prefix}markov_head.markov_w2.weight", out="U"),
        mix_IO=mix,
        mix_bias_O=mix_bias,
    )


def declare_confidence_head(
    cfg: DrafterConfig, prefix: str = "", *, biased: bool = True
) -> ConfidenceHead | None:
    """Declaration of the confidence head; None where the drafter has none. Its names in a file have
    the prefix."""
    if not cfg.confidence:
        return None
    sizes = {"I": cfg.hidden_size + (cfg.markov_rank if cfg.confidence_with_markov else 0), "O": 1}
    name = f"{prefix}confidence_head.proj"
    bias_O = declare("O", sizes, f"{name}.bias", out="O", init="zeros") if biased else None
    return ConfidenceHead(declare("IO", sizes, f"{name}.weight", out="O"), bias_O)


def start_state(head: MarkovHead | None, lead: tuple[int, ...]) -> Any:
    """``s_0 = 0`` [lead, R], which only the rnn head reads; None without a head."""
    return None if head is None else jnp.zeros((*lead, head.w1_ZR.shape[1]), head.w1_ZR.dtype)


def head_step(
    head: MarkovHead, state_XR: jax.Array, previous_X: jax.Array, hidden_XD: jax.Array, kind: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One slot of the sequential head.

    Args:
        head: weights.
        state_XR: ``s_{k-1}``.
        previous_X: int32 ``x_{k-1}``, the anchor for the first slot.
        hidden_XD: ``h_k``.
        kind: ``"vanilla"``, ``"gated"`` or ``"rnn"``.

    Returns:
        state_XR, code_XR whose product with W2 is the bias, and embedding_XR ``W1[x_{k-1}]``.
    """
    embedding_XR = jnp.take(head.w1_ZR, previous_X, axis=0, mode="clip")
    if kind == "vanilla":
        return state_XR, embedding_XR, embedding_XR
    if kind == "gated":
        mixed = jnp.concatenate([hidden_XD, embedding_XR], axis=-1) @ head.mix_IO + head.mix_bias_O
        return state_XR, jax.nn.sigmoid(mixed) * embedding_XR, embedding_XR
    joint = jnp.concatenate([state_XR, embedding_XR, hidden_XD], axis=-1)
    gate, candidate, out = jnp.split(joint @ head.mix_IO + head.mix_bias_O, 3, axis=-1)
    keep = jax.nn.sigmoid(gate)
    return keep * state_XR + (1 - keep) * jnp.tanh(candidate), jnp.tanh(out), embedding_XR


def block_codes(
    head: MarkovHead, previous_XG: jax.Array, hidden_XGD: jax.Array, kind: str
) -> tuple[jax.Array, jax.Array]:
    """:func:`head_step` over a block whose tokens are known (teacher forcing).

    Returns:
        code_XGR and embedding_XGR.
    """
    if kind != "rnn":  # no state: all slots at once
        _, code, embedding = head_step(head, jnp.zeros(()), previous_XG, hidden_XGD, kind)
        return code, embedding

    def step(state: jax.Array, xs: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
        state, code, embedding = head_step(head, state, *xs, kind)
        return state, (code, embedding)

    slots = (jnp.moveaxis(previous_XG, -1, 0), jnp.moveaxis(hidden_XGD, -2, 0))
    _, outputs = jax.lax.scan(step, start_state(head, previous_XG.shape[:-1]), slots)
    code, embedding = (jnp.moveaxis(out, 0, -2) for out in outputs)
    return code, embedding


def bias_logits(head: MarkovHead, code_XR: jax.Array) -> jax.Array:
    """``B_k`` [X, U], float32."""
    return jnp.matmul(code_XR, head.w2_RU, preferred_element_type=jnp.float32)


def confidence_logit(
    head: ConfidenceHead, hidden_XD: jax.Array, embedding_XR: jax.Array | None, cfg: DrafterConfig
) -> jax.Array:
    """Logit of ``c_k`` [X], float32: it sees the tokens before slot k, never ``d_k`` itself.

    This is condition (c) of a lossless schedule (``scheduler/schedule.py``).
    """
    parts = [hidden_XD]
    if cfg.confidence_with_markov and embedding_XR is not None:
        parts.append(embedding_XR)
    inputs_XI = jnp.concatenate(parts, axis=-1)
    logit = jnp.matmul(inputs_XI, head.w_IO, preferred_element_type=jnp.float32)
    logit = add(logit, head.bias_O)
    return logit[..., 0].astype(jnp.float32)


def law_confidence(logits_XU: jax.Array) -> jax.Array:
    """Logit of the largest probability of a draft's law [X], float32: the confidence in drafts of
    those who have no head for it.

    Like a head's it is settled before ``d_k`` is drawn. How far it can be believed is for past
    rounds to say, which calibrate it.
    """
    logits_XU = logits_XU.astype(jnp.float32)
    others_X = jnp.sum(jnp.exp(logits_XU - jnp.max(logits_XU, -1, keepdims=True)), -1) - 1
    return -jnp.log(jnp.maximum(others_X, jnp.finfo(jnp.float32).eps))


def teach_heads(
    drafter: Any, previous_XG: jax.Array, hidden_XGD: jax.Array, cfg: DrafterConfig
) -> tuple[Any, Any]:
    """What the heads say of blocks whose tokens are known.

    Returns:
        code_XGR of :func:`block_codes`, and float32 confidence_logit_XG; None without such a head.
    """
    code = embedding = confidence = None
    if drafter.head is not None:
        code, embedding = block_codes(drafter.head, previous_XG, hidden_XGD, cfg.markov_head)
    if drafter.confidence is not None:
        confidence = confidence_logit(drafter.confidence, hidden_XGD, embedding, cfg)
    return code, confidence


def sample_block(
    drafter: Any,
    vocab: Vocab,
    hidden_BGD: jax.Array,
    anchor_B: jax.Array,
    choose: Callable[[jax.Array, int], jax.Array],
    cfg: DrafterConfig,
    law: Callable[[jax.Array, int], jax.Array] = lambda logits_BU, slot: logits_BU,
    seen_BGD: jax.Array | None = None,
) -> DraftBlock:
    """Draft a block left to right: bias, token, confidence (paper, section 3.2).

    Args:
        drafter: ``DrafterParams``, of which the heads are read.
        vocab: the drafter's vocabulary.
        hidden_BGD: backbone states of the block.
        anchor_B: int32 anchors.
        choose: ``(logits_BU, slot) -> index_B``, the draw from the law that the caller verifies
            against (greedy, from the draft stream, or from the coupled noise field).
        cfg: sizes.
        law: ``(logits_BU, slot) -> logits_BU``, other laws to draw from.
        seen_BGD: states that the heads see in place of those of the LM head.

    Returns:
        The block; its token at slot k was drawn from ``logits_BGU[:, k]`` after temperature.
    """
    base_BGU = unembed(vocab, hidden_BGD)
    seen_BGD = hidden_BGD if seen_BGD is None else seen_BGD
    previous_B, state_BR = anchor_B, start_state(drafter.head, anchor_B.shape)
    drawn: list[Drawn] = []
    confidences = []
    for slot in range(hidden_BGD.shape[1]):
        hidden_BD, logits_BU, embedding_BR = seen_BGD[:, slot], base_BGU[:, slot], None
        if drafter.head is not None:
            state_BR, code_BR, embedding_BR = head_step(
                drafter.head, state_BR, previous_B, hidden_BD, cfg.markov_head
            )
            logits_BU = logits_BU + bias_logits(drafter.head, code_BR)
        if drafter.confidence is not None:
            confidences.append(confidence_logit(drafter.confidence, hidden_BD, embedding_BR, cfg))
        drawn.append(draw_slot(vocab, logits_BU, slot, choose, law))
        previous_B = drawn[-1][0]
    return block_of(drawn, confidences)


def draw_slot(
    vocab: Vocab,
    logits_BU: jax.Array,
    slot: int,
    choose: Callable[[jax.Array, int], jax.Array],
    law: Callable[[jax.Array, int], jax.Array],
) -> Drawn:
    """The draft of a slot, whose logits these are; ``choose`` and ``law`` as in
    :func:`sample_block`."""
    logits_BU = law(logits_BU, slot)
    index_B = choose(logits_BU, slot)
    return index_B if vocab.d2t_U is None else vocab.d2t_U[index_B], index_B, logits_BU


def block_of(drawn: Sequence[Drawn], confidences: Sequence[jax.Array] = ()) -> DraftBlock:
    """The block of the drafts of all slots, and of their confidences' logits [B], where there are
    some."""
    token_BG, index_BG, logits_BGU = (jnp.stack(each, 1) for each in zip(*drawn, strict=True))
    confidence_logit_BG = jnp.stack(confidences, 1) if confidences else None
    return DraftBlock(token_BG, index_BG, logits_BGU, confidence_logit_BG)


def block_by_law(drawn: Sequence[Drawn]) -> DraftBlock:
    """The block of those who have no head for confidences: each is that of its draft's law."""
    return block_of(drawn, [law_confidence(logits_BU) for _, _, logits_BU in drawn])
