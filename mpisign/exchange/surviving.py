"""A round that ends on all ranks that are left, or on none, if some die in it."""

from __future__ import annotations

from collections.abc import Callable

from mpisign.exchange.plan import Plan
from mpisign.exchange.round import Round
from mpisign.membership import Membership

__all__ = ["survive"]

Attempt = Callable[[Plan, bool, Callable[[Round], None]], Round]
"""Takes a plan, whether something may have left early by it, and whom to tell of a round. Returns one that is over."""


def survive(attempt: Attempt, plan: Plan, remake: Callable[[], Plan] | None, membership: Membership) -> Round:
    """A round that is over on all ranks: only its commit is left, which needs nobody. **Collective.**

    Call it in an act. A round that has come nowhere near its end on any rank is run again, among those that are left,
    from the memories with which it had begun.
    """
    rounds: list[Round] = []
    first = True
    while True:
        try:
            if remake is not None and plan.group is not membership.group:
                plan, first = remake(), False
            a_round = attempt(plan, first, rounds.append)
            a_round.settle()
            if a_round.agreed.all_joined:
                membership.close()
            else:
                membership.closed(a_round)
            return a_round
        except Exception as error:
            if not membership.is_loss(error) or remake is None:
                raise
            if membership.recover(rounds[-1] if rounds else None):
                return rounds[-1]
            plan.store.drop()
            plan.store.unsummed |= any(its.summed for its in rounds)  # what was summed was dropped
            rounds.clear()
