"""Shapes of verification that tests and benchmarks share, and random inputs of these shapes."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels import random
from pallas_kernels.accept_block.rule import ONE_HOT, Drafts, OneHot, Requests, Rule, VerifyPlan


@dataclass(frozen=True)
class Case:
    """One shape.

    Attributes:
        requests: B; every request verifies its whole block, so that T = B * (G + 1).
        slots: G.
        vocabulary: V.
        draft_vocabulary: U; None where it is the target's.
        dtype: of all logits.
        rule: of acceptance.
        one_hot: whether the drafts are certain for their drafter.
    """

    requests: int
    slots: int
    vocabulary: int
    draft_vocabulary: int | None = None
    dtype: str = "bfloat16"
    rule: Rule = "rejection"
    one_hot: bool = False

    @property
    def rows(self) -> int:
        """T."""
        return self.requests * (self.slots + 1)

    @property
    def name(self) -> str:
        """For tables."""
        drafted = "" if self.draft_vocabulary is None else f" U={self.draft_vocabulary}"
        law = "one-hot " if self.one_hot else ""
        return f"{law}{self.rule} T={self.rows} V={self.vocabulary}{drafted} {self.dtype}"

    @property
    def least_bytes(self) -> int:
        """That have to be read: all logits once, and under rejection the rows that are drawn from,
        one of each law a request, once more. The other rules, and one-hot laws, read nothing of the
        drafter's."""
        size = jnp.dtype(self.dtype).itemsize
        drafted = self.draft_vocabulary or self.vocabulary
        target, draft = self.rows * self.vocabulary, self.requests * self.slots * drafted
        if self.rule != "rejection":
            return size * target
        if self.one_hot:
            return size * (target + self.requests * self.vocabulary)
        return size * (target + draft + self.requests * (self.vocabulary + drafted))


CASES = (
    Case(8, 7, 49152, dtype="float32"),
    Case(8, 7, 49152, dtype="float32", rule="coupled"),
    Case(8, 7, 49152, dtype="float32", rule="greedy"),
    Case(8, 7, 49152, 8192, dtype="float32"),
    Case(8, 7, 49152, dtype="float32", one_hot=True),
    Case(1, 7, 151936),
    Case(32, 7, 32000),
    Case(32, 7, 151936),
    Case(32, 7, 151936, 32768),
    Case(32, 7, 151936, rule="coupled"),
    Case(32, 7, 151936, rule="greedy"),
    Case(32, 7, 151936, one_hot=True),
    Case(7, 7, 262144),
    Case(128, 7, 151936),
)


def make_inputs(
    case: Case, seed: int = 0
) -> tuple[jax.Array, jax.Array, VerifyPlan, Drafts, Requests]:
    """Positional arguments of ``accept_block``: a drafter that resembles its target, drafts drawn
    from it (its best ones, if it is certain), temperature 1, nobody filters."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shape = case.requests, case.slots, case.vocabulary
    target_BCV = 2 * jax.random.normal(keys[0], (shape[0], shape[1] + 1, shape[2]))
    d2t_U = None
    draft_BGU = target_BCV[:, :-1]
    if case.draft_vocabulary is not None:
        every_V = jax.random.permutation(keys[1], case.vocabulary)
        d2t_U = jnp.sort(every_V[: case.draft_vocabulary]).astype(jnp.int32)
        draft_BGU = draft_BGU[..., d2t_U]
    draft_BGU = draft_BGU + jax.random.normal(keys[2], draft_BGU.shape)
    draft_BGU = draft_BGU.astype(case.dtype)
    logits_BGU: jax.Array | OneHot = draft_BGU
    index_BG = jax.random.categorical(keys[3], draft_BGU.astype(jnp.float32)).astype(jnp.int32)
    if case.one_hot:
        logits_BGU, index_BG = ONE_HOT, jnp.argmax(draft_BGU, axis=-1).astype(jnp.int32)

    slot_BC, column_BC = jnp.indices((case.requests, case.slots + 1), dtype=jnp.int32)
    row_BC = jnp.arange(case.rows, dtype=jnp.int32).reshape(slot_BC.shape)
    length_B = jnp.full(case.requests, case.slots, jnp.int32)
    plan = VerifyPlan(slot_BC.reshape(-1), column_BC.reshape(-1), row_BC, length_B)
    request_B = jnp.arange(case.requests, dtype=jnp.int32)
    requests = Requests(
        jnp.ones(case.requests), random.fold_in(random.seed_key(seed), request_B), 100 + request_B
    )
    logits_TV = target_BCV.reshape(case.rows, case.vocabulary).astype(case.dtype)
    floor_T = jnp.full(case.rows, -jnp.inf)
    return logits_TV, floor_T, plan, Drafts(index_BG, logits_BGU, d2t_U), requests
