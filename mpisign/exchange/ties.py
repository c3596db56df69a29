"""How many ties all ranks have counted in a round."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpisign.backends import Count
from mpisign.exchange import reporting
from mpisign.exchange.flight import Flight
from mpisign.exchange.plan import Plan
from mpisign.session import Session
from mpisign.watchdog import Pending

__all__ = ["Ties"]


class Ties:
    """Of one round that is closed. Once they are counted, they are known, and nothing is asked again."""

    def __init__(self, plan: Plan, step: int, flights: Sequence[Flight], session: Session) -> None:
        self._plan, self._step, self._flights, self._session = plan, step, flights, session
        self._adding: tuple[Pending, np.ndarray] | None = None
        self._known = False
        self._count: int | None = None

    def know(self, count: int | None) -> None:
        """They are so many, as another rank says."""
        self._known, self._count = True, count

    def ask(self) -> None:
        """Let a GPU say how many it has found."""
        plan = self._plan
        if not self._known and plan.answers is not None and plan.counts is not None and plan.elects:
            plan.answers.ask("ties", plan.counts[0])
            plan.answers.asked()

    def add_up(self) -> None:
        """Begin to add up the ranks' ties, where there are votes."""
        plan, session = self._plan, self._session
        if self._known or not plan.elects:
            return
        counting_ties = [flight.deciding for flight in self._flights if flight.bucket.method.elects and flight.deciding]
        ties: Count = sum(deciding.ties for deciding in counting_ties)
        if plan.answers is not None:
            with session.tracer.span("decide"):
                ties = int(ties) + plan.answers.told("ties")
        counting, counted = np.array([[int(ties)], [0]], np.int64)
        self._adding = session.post(session.group.comm.Iallreduce(counting, counted), counting, counted), counted

    def counted(self) -> int | None:
        """Those of all ranks, when they are added up; None where there are no votes."""
        if not self._known and self._adding is not None:
            pending, counted = self._adding
            with self._session.tracer.span("count of ties"):
                self._session.wait(pending)
            self._count = reporting.checked(self._plan, self._step, int(counted[0]))
        self._known = True
        return self._count
