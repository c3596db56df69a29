"""A round that ends on all ranks that are left, or on none, if some die in it, or are found to have lied."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

from mpisign.errors import AuditError
from mpisign.exchange.plan import Plan
from mpisign.exchange.round import Round
from mpisign.group import Group
from mpisign.membership import Membership
from mpisign.processes import die

__all__ = ["survive"]

logger = logging.getLogger(__name__)

LIAR_SECONDS = 10.0  # to be gone
LOOK_SECONDS = 0.001

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
            if remake is None:
                raise
            liars: set[int] = set()
            if isinstance(error, AuditError):
                liars = _go_without(error, membership)
            elif not membership.is_loss(error):
                raise
            counts = membership.recover(rounds[-1] if rounds else None)
            if liars.intersection(membership.group.identities):
                raise  # they have not ended
            if counts:
                return rounds[-1]
            plan.store.drop()
            plan.store.unsummed |= any(its.summed for its in rounds)  # what was summed was dropped
            rounds.clear()


def _go_without(lie: AuditError, membership: Membership) -> set[int]:
    """Let those end who have been found to lie, or to say falsely that others do, and wait until they have.

    Returns:
        Their identities.

    Raises:
        AuditError: they have not, or too few would be left.
    """
    group, named = membership.group, set(lie.ranks)
    liars = {group.identities[rank] for rank in named}
    if membership.too_few(liars):
        raise lie
    if group.rank in named:
        logger.critical("rank %d ends, so that the others can go on: %s", group.identity, lie)
        die()
    if group.rank == min(set(range(group.size)) - named):
        logger.critical("%s: the job goes on without ranks %s", lie, sorted(liars))
    end = time.monotonic() + LIAR_SECONDS
    while not (named <= _dead(group) or group.comm.Is_revoked()):
        if time.monotonic() > end:
            raise lie
        time.sleep(LOOK_SECONDS)
    return liars


def _dead(group: Group) -> set[int]:
    """The ranks of a group that MPI knows to be dead; it hears of that in its calls."""
    with contextlib.suppress(Exception):  # which say so, too
        group.comm.Iprobe()
    failed = group.comm.Get_failed()
    return set(failed.Translate_ranks(list(range(failed.Get_size())), group.comm.Get_group()))
