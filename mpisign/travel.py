"""``delay=``: differences of parameters leave at a window's end, and travel while the first steps of the next one run.

As gradients that leave while backward runs, they leave before a handshake. Here nothing can change in between but the
plan or a rate, and then they are dropped and leave again in the step that needs the decision.
"""

from __future__ import annotations

import weakref
from typing import Any

from mpisign.exchange.plan import Plan
from mpisign.exchange.run import Early
from mpisign.overlap import Overlap

__all__ = ["Travel"]


class Travel(Overlap):
    """Of the optimizer that exchanges: the round whose messages have left, for its next step to settle."""

    def __init__(self) -> None:
        super().__init__(True, 1)

    def may_leave(self, owner: Any) -> bool:
        """Whether nothing has left, and all ranks have agreed on the plan by which something could."""
        plan = self._plan
        if plan is None or self._round is not None or self._dropped or plan.store.unsummed:
            return False
        return owner._current_plan() is plan

    def depart(self, owner: Any) -> None:
        """Let the gradients that are there now leave, all of them."""
        plan = owner._current_plan()
        values = plan.gradients.read()
        self._set_out(owner, plan)
        assert self._round is not None
        for batch in plan.batches:
            self._round.submit(batch, values.chosen(batch.places), wait=False)

    def advance(self) -> None:
        """Go on with what has arrived."""
        if self._round is not None:
            self._round.advance()

    def early(self, plan: Plan, scaled: bool) -> Early:
        """What this rank has sent before a step by ``plan``."""
        other_rates = self._round is not None and self._rates != self._learning_rates()
        return Early(
            self._plan, self._round, plan is not self._plan or self._dropped or other_rates, self._were_dropped
        )

    def _were_dropped(self) -> None:
        self._restart(self._plan)

    def _install(self, owner: Any, plan: Plan) -> None:
        """No backward makes these gradients, so there are no hooks."""
        self._owner = weakref.ref(owner)
