"""What ranks do together once for a plan that some of them have just made, after they have agreed on what is in it."""

from __future__ import annotations

import gc
import logging
import operator
from collections.abc import Callable
from functools import reduce

from mpisign.calibration import links_of
from mpisign.errors import MpisignError
from mpisign.exchange.hierarchical import Hierarchical
from mpisign.exchange.node_memory import NodeMemory
from mpisign.exchange.plan import Plan
from mpisign.group import Channels
from mpisign.session import Session

__all__ = ["settled"]

logger = logging.getLogger(__name__)

LOOKED_AT = 60  # lines, as many as a number has bits


def settled(plan: Plan, session: Session, remake: Callable[[], Plan] | None) -> Plan:
    """The plan with all that it shares with other ranks; or another, if that is not to be had. **Collective.**

    Args:
        remake: makes it anew with what is known of the network now.

    Raises:
        MpisignError: it has to be made anew, and nobody can.
    """
    if plan.asks and remake is not None:
        session.network.links, session.network.asked = links_of(session), True
        plan = remake()
    if not _share(plan, session):
        if remake is None:
            raise MpisignError("the ranks of a node cannot share memory, and this plan demands it")
        plan = remake()
    if plan.early:
        plan.use.channels = _line(plan, session)
    plan.use.settled = True
    return plan


def _line(plan: Plan, session: Session) -> Channels:
    """The optimizer's own channels: those of one that is gone on all ranks, or new ones. **Collective.**

    MPI may have no more than two thousand communicators, and a job may make hundreds of optimizers, one a trial.
    """
    group = session.group
    if group.lines and plan.number not in group.lines:
        gc.collect()  # schedulers make cycles, in which optimizers stay for long
        numbers = list(group.lines)[:LOOKED_AT]
        unused = sum(1 << place for place, number in enumerate(numbers) if number not in group.users)
        on_all = reduce(operator.and_, map(int, session.meet("a plan", unused)))
        if on_all:
            place = (on_all & -on_all).bit_length() - 1
            group.lines[plan.number] = group.lines.pop(numbers[place])
    group.users[plan.number] = plan.use  # which is there as long as a message may be on its way
    return group.line(plan.number, session.watchdog)


def _share(plan: Plan, session: Session) -> bool:
    """Give hierarchical exchanges their part of the node's memory. Returns whether it was there."""
    before = session.network.sharing.pop(plan.number, None)
    if before is not None:  # a report of its last step, say, would keep it, and there may not be room for both
        before.give_back()
    exchanges = [one for one in plan.exchanges if isinstance(one, Hierarchical)]
    if not exchanges:
        return True
    if not session.network.shares:  # known since this rank made its plan; others may have made theirs anew
        return False
    ends = [0]
    for exchange in exchanges:
        ends.append(ends[-1] + -(-exchange.node_bytes // 64) * 64)
    memory, why = NodeMemory.share(session, ends[-1])
    if memory is None:
        session.network.shares = False
        if session.rank == 0:
            logger.warning("no exchange is hierarchical in this job, and messages take two phases: %s", why)
        return False
    for exchange, start in zip(exchanges, ends[:-1], strict=True):
        exchange.attach(memory.bytes[start : start + exchange.node_bytes])
        plan.use.given.append(exchange.detach)
    session.network.sharing[plan.number] = plan.use
    return True
