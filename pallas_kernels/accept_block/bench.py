"""Times of verification: ``python -m pallas_kernels.accept_block.bench [--json]``.

The implementation ``composition`` is what the operation replaces, put together in the usual way:
both laws by log-softmax, the chance of every draft, the residual of the slot that fell, a draw.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from pallas_kernels import benchmark, random
from pallas_kernels.accept_block import xla
from pallas_kernels.accept_block.api import accept_block
from pallas_kernels.accept_block.cases import CASES, make_inputs
from pallas_kernels.accept_block.rule import (
    Drafts,
    OneHot,
    Requests,
    VerifyPlan,
    acceptance_chance,
    leading,
)
from pallas_kernels.benchmark import Way, Work


def composition(
    logits_TV: jax.Array, floor_T: jax.Array, plan: VerifyPlan, drafts: Drafts, requests: Requests
) -> tuple[jax.Array, jax.Array]:
    """int32 accepted_B and next_B of rejection at temperatures above 0; every law is written out.

    Takes what ``accept_block`` takes.
    """
    assert drafts.logits_BGU is not None
    assert not isinstance(drafts.logits_BGU, OneHot)
    num_requests, num_slots = drafts.index_BG.shape
    kept_TV = jnp.where(logits_TV >= floor_T[:, None], logits_TV, -jnp.inf).astype(jnp.float32)
    temperature_B11 = requests.temperature_B[:, None, None]
    target_BCV = jax.nn.log_softmax(kept_TV[plan.row_BC] / temperature_B11)
    draft_BGU = jax.nn.log_softmax(drafts.logits_BGU.astype(jnp.float32) / temperature_B11)
    target_BG1 = jnp.take_along_axis(target_BCV[:, :-1], drafts.token_BG[..., None], axis=-1)
    draft_BG1 = jnp.take_along_axis(draft_BGU, drafts.index_BG[..., None], axis=-1)
    chance_BG = acceptance_chance(target_BG1, draft_BG1)[..., 0]

    key_B2, anchor_B = requests.key_B2, requests.anchor_position_B
    accept_key_BG2 = random.stream_key(
        key_B2[:, None], random.ACCEPT, anchor_B[:, None], jnp.arange(num_slots)
    )
    accepted_B = leading(random.uniform(accept_key_BG2, 1)[..., 0] < chance_BG, plan.length_B)

    request_B = jnp.arange(num_requests)
    target_BV = target_BCV[request_B, accepted_B]
    draft_BU = draft_BGU[request_B, jnp.minimum(accepted_B, num_slots - 1)]
    excess_BV = xla.excess(target_BV, draft_BU, drafts.d2t_U)
    mass_B1 = jnp.sum(excess_BV, axis=-1, keepdims=True)
    fell_B1 = (accepted_B < plan.length_B)[:, None] & (mass_B1 > xla.LEAST_MASS)
    law_BV = jnp.where(fell_B1, jnp.log(excess_BV / mass_B1), target_BV)
    next_key_B2 = random.stream_key(key_B2, random.RESIDUAL, anchor_B, accepted_B)
    noise_BV = random.gumbel(next_key_B2, law_BV.shape[-1])
    return accepted_B, jnp.argmax(law_BV + noise_BV, axis=-1).astype(jnp.int32)


def works() -> Iterator[Work]:
    """The cases that this device is to run: a CPU serves in float32, and would take minutes for
    the others."""
    for case in CASES:
        if not benchmark.on_gpu() and case.dtype != "float32":
            continue
        inputs = functools.partial(make_inputs, case)
        ways = {
            name: Way(functools.partial(accept_block, rule=case.rule, implementation=name), inputs)
            for name in benchmark.implementations()
        }
        if case.rule == "rejection" and not case.one_hot:
            ways["composition"] = Way(composition, inputs)
        yield Work(case.name, case.least_bytes, 0, ways)


if __name__ == "__main__":
    print(benchmark.command("Times of accept_block on this device.", works()))
