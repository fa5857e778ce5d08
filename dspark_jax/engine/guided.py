"""What the requests of a round make of its law: penalties and biases, and the masks of grammars.

A mask depends on the text before it. So whoever decodes by a grammar has no more than one round in
flight, whose drafts the host reads before it launches the rest; while the devices draft, it sees
whether the grammars go on at all.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

import jax

from dspark_jax.engine.grammar import goes_on, read_masks
from dspark_jax.engine.inputs import Asks, DraftNews
from dspark_jax.engine.seats import Tenant
from dspark_jax.engine.shaping import Masks, Shaping, no_masks, shaping_of


def shaping_by(asks: Asks, tenants: Sequence[Tenant], num_slots: int) -> Shaping | None:
    """What shapes the laws of a round, by the requests as they were asked, whatever a prompt has
    got since; None where that is not asked."""
    if asks != "shaped":
        return None
    return shaping_of({tenant.slot: tenant.reader.request for tenant in tenants}, num_slots)


def end_with_grammars(tenants: Sequence[Tenant], num_tokens: int) -> list[Tenant]:
    """End those whose grammars allow no further token, of a vocabulary of so many; returns them."""
    guided = [(tenant, tenant.guide) for tenant in tenants if tenant.decoding and tenant.guide]
    going = goes_on([guide for _, guide in guided], num_tokens) if guided else []
    over = [tenant for (tenant, _), goes in zip(guided, going, strict=True) if not goes]
    for tenant in over:
        tenant.mailbox.report(tenant.reader.end_with_grammar())
    return over


def masks_by(
    tenants: Sequence[Tenant],
    news: DraftNews | None,
    beginning: Set[int],
    sizes: tuple[int, int, int],
) -> Masks:
    """The masks of a round by the grammars of those who decode; others are free.

    Args:
        tenants: of the round.
        news: of the drafts, for which the host waits here; None without any.
        beginning: slots that do not draft yet.
        sizes: slots, columns and tokens of the vocabulary.
    """
    masks, (_, num_columns, num_tokens) = no_masks(*sizes), sizes
    guided = {t.slot: t.guide for t in tenants if t.decoding and t.guide}
    if not guided:
        return masks
    drafts = {}
    if news is not None:
        token_BG = jax.device_get(news.token_BG)[:, : num_columns - 1]
        drafts = {slot: token_BG[slot].tolist() for slot in guided.keys() - beginning}
    blocks = [(guide, drafts.get(slot, ())) for slot, guide in guided.items()]
    word_NCX, count_N = read_masks(blocks, num_columns, num_tokens)
    slots = list(guided)
    masks.allowed_BCX[slots], masks.usable_B[slots] = word_NCX, count_N
    return masks
