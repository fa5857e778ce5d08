"""What a plan does on the devices: the half of a round that is the same in every process.

One process plans. Where a mesh has devices of several, the others are told the plans and launch
what they say (:func:`follow`); what rounds report they never read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from dspark_jax.engine.compiled import Programs
from dspark_jax.engine.inputs import Asks, DraftNews, RoundInput, RoundReport, Weights
from dspark_jax.engine.plan import Admission, HostPlan, Keep
from dspark_jax.engine.pool import Pool
from dspark_jax.engine.programs import BY_SLOT
from dspark_jax.engine.shaping import Masks
from dspark_jax.engine.state import DecodeState, slot_values
from dspark_jax.models.drafters.heads import DraftBlock
from dspark_jax.scheduler.shape import Shape, Sizes

IN_FLIGHT = 2  # rounds that the host launches before it reads the first of them


class Launcher:
    """A state on the devices, and the programs that change it. Nothing here waits for them.

    Attributes:
        weights: arguments of every round.
        state: None before the first plan.
        pool: stored prefixes; None before there is one.
    """

    def __init__(self, programs: Programs, weights: Weights) -> None:
        """Nothing is allocated before there is a plan."""
        self.programs, self.weights = programs, weights
        self.state: DecodeState | None = None
        self.pool: Pool | None = None

    def begin(self, plan: HostPlan) -> None:
        """The state in the sizes of a plan, after what is to be stored of it was copied."""
        for keep in plan.keeps:
            self._keep(keep, plan.sizes_before)
        if plan.start is not None:
            self.state = self.programs.new_state(plan.start)
        state, self.state = self.state, None  # which is not kept beside the one that it becomes
        for move in plan.moves:
            origin_B = self.programs.put(move.origin_B, BY_SLOT)
            state = self.programs.move(move.old, move.new)(state, origin_B)
        self.state = state

    def _keep(self, keep: Keep, sizes: Sizes) -> None:
        """A text out of its slot."""
        copies = self.programs.copies(sizes, keep.slot, keep.kept)
        self.pool = self.programs.keep(sizes)(self.state, self._stored(), copies)

    def admit(self, admission: Admission, sizes: Sizes) -> None:
        """A request into its slot, with what is stored of its prompt."""
        form = self.programs.form(sizes)
        values = slot_values(admission.request, admission.generation, form)
        put = self.programs.put((np.int32(admission.slot), values))
        self.state = self.programs.admit(sizes)(self.state, *put)
        if admission.prefix.count:
            copies = self.programs.copies(sizes, admission.slot, admission.prefix)
            restore = self.programs.restore(sizes)
            self.state = restore(self.weights, self.state, self._stored(), copies)

    def _stored(self) -> Pool:
        """The pool, which is made when it is needed first."""
        if self.pool is None:
            self.pool = self.programs.new_pool()
        return self.pool

    def draft(
        self, plan: HostPlan, given: RoundInput, steps_per_s_T: np.ndarray | None
    ) -> tuple[DraftBlock | None, DraftNews | None]:
        """The drafts of a plan ahead of its round; see
        :func:`~dspark_jax.engine.round.draft_ahead`. None where the round drafts itself, or
        nobody."""
        shape = plan.shape
        if not shape.num_draft or (steps_per_s_T is None and plan.asks != "shaped"):
            return None, None
        put = None if steps_per_s_T is None else self.programs.put(steps_per_s_T)
        program = self.programs.draft(shape.sizes, shape.num_chunks, plan.asks)
        found: tuple[DraftBlock, DraftNews] = program(self.weights, self.state, given, put)
        return found

    def run(
        self,
        plan: HostPlan,
        given: RoundInput,
        block: DraftBlock | None,
        chosen: tuple[Shape, Asks, Masks | None],
    ) -> RoundReport:
        """The round itself.

        Args:
            plan: of the round.
            given: likewise.
            block: of :meth:`draft`.
            chosen: since then: the shape of the round, the kind of its program, and masks where
                that is a shaped one.
        """
        shape, kind, masks = chosen
        if block is not None and shape.num_draft:
            given = given.replace(block=block)  # type: ignore[attr-defined]
        if masks is not None:
            told = {"shaping": plan.shaping, "masks": masks}
            told = {name: self.programs.placed(name, value) for name, value in told.items()}
            given = given.replace(**told)  # type: ignore[attr-defined]
        program = self.programs.round(shape, kind)
        report: RoundReport
        self.state, report = program(self.weights, self.state, given)
        return report


def follow(launcher: Launcher, hear: Callable[[], Any]) -> None:
    """Launch what another process plans, until it has no more plans.

    Args:
        launcher: of this process.
        hear: gives what :class:`~dspark_jax.engine.loop.Loop` tells: a plan, temperatures and
            speeds; then what it chose for the round; in the end nothing.
    """
    in_flight: deque[RoundReport] = deque()
    while said := hear():
        plan, temperature_BG, steps_per_s_T = said
        launcher.begin(plan)
        for admission in plan.admissions:
            launcher.admit(admission, plan.shape.sizes)
        given = launcher.programs.round_input(plan, temperature_BG)
        block, _ = launcher.draft(plan, given, steps_per_s_T)
        in_flight.append(launcher.run(plan, given, block, hear()))
        if len(in_flight) > IN_FLIGHT:
            jax.block_until_ready(in_flight.popleft())  # what failed there is raised here
