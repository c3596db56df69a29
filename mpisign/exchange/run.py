"""A round from its beginning to its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from mpisign.bitmap.located import Located
from mpisign.errors import ConsistencyError
from mpisign.exchange import header
from mpisign.exchange.header import Handshake, Intent
from mpisign.exchange.plan import Plan
from mpisign.exchange.round import Round
from mpisign.exchange.sink import NoSink, Sink
from mpisign.exchange.surviving import survive
from mpisign.report import StepReport
from mpisign.session import current

__all__ = ["NOTHING", "Early", "run", "sit_out"]


@dataclass(frozen=True)
class Early:
    """What has left before a step.

    Attributes:
        plan: what all ranks have agreed on in their last step; nobody sends early by another. None if there is none.
        round: with the messages that this rank has sent; None if there are none.
        void: they must not count.
        dropped: is called where what has left, on whatever rank, has been dropped on all. **Collective.**
    """

    plan: Plan | None = None
    round: Round | None = None
    void: bool = False
    dropped: Callable[[], None] = lambda: None


NOTHING = Early()


def run(
    plan: Plan,
    step: int,
    values: Located,
    abstention: int,
    unscale: float,
    intent: Intent,
    sink: Sink,
    remake: Callable[[], Plan] | None = None,
    early: Early = Early(),
) -> tuple[Handshake, StepReport]:
    """Let ``values``, by parameter, become the decision, in ``sink``. **Collective.**

    Args:
        remake: see :meth:`Round.begin`; makes it anew also when ranks have died.
    """

    def attempt(plan: Plan, first: bool, begun: Callable[[Round], None]) -> Round:
        a_round = _opened(plan, step, abstention, unscale, intent, early if first else NOTHING, begun)
        a_round.begin(remake)
        a_round.prepare(values)
        for batch in a_round.plan.batches[a_round.submitted :]:
            a_round.submit(batch, values.chosen(batch.places))
        a_round.close()
        return a_round

    a_round = _closed(attempt, plan, remake)
    return a_round.agreed, a_round.commit(sink)


def sit_out(
    plan: Plan,
    step: int,
    joined_for: int,
    remake: Callable[[], Plan] | None = None,
    early: Early = Early(),
    at_end: Callable[[Handshake], None] = lambda handshake: None,
) -> tuple[Handshake, StepReport]:
    """Take part without a gradient; no parameter changes here. **Collective.**

    Args:
        at_end: what is done when all have joined, by all, or by none.
    """

    def attempt(plan: Plan, first: bool, begun: Callable[[Round], None]) -> Round:
        a_round = _opened(plan, step, header.JOINED, 1.0, Intent(joined_for), early if first else NOTHING, begun)
        a_round.begin(remake)
        plan = a_round.plan
        if a_round.agreed.all_joined:
            at_end(a_round.agreed)
            return a_round
        nothing: list[torch.Tensor | None] = [None] * len(plan.layout.parameters)
        a_round.prepare(nothing)
        for batch in plan.batches:
            a_round.submit(batch, [None] * len(batch.places))
        a_round.close()
        return a_round

    a_round = _closed(attempt, plan, remake)
    plan = a_round.plan
    running = (batch.places for batch in plan.batches if batch.method.memory.running)
    sink = NoSink(plan.layout, frozenset(place for its in running for place in its))
    return a_round.agreed, a_round.commit(sink)


def _closed(
    attempt: Callable[[Plan, bool, Callable[[Round], None]], Round], plan: Plan, remake: Callable[[], Plan] | None
) -> Round:
    """The round that counts, whoever dies in it."""
    membership = current().membership
    if membership is None:
        return attempt(plan, True, _nobody)
    membership.spares.demand_that_they_have_left()
    with membership.an_act():
        return survive(attempt, plan, remake, membership)


def _nobody(a_round: Round) -> None:
    """Is told of a round where nobody needs to know."""


def _opened(
    plan: Plan,
    step: int,
    abstention: int,
    unscale: float,
    intent: Intent,
    early: Early,
    begun: Callable[[Round], None],
) -> Round:
    """The round that counts, after its handshake: what has left early goes on in it, or is dropped on all ranks."""
    if early.round is not None:
        intent = replace(intent, posted=early.round.submitted, void=early.void)
    if early.round is not None and not early.void:
        a_round = early.round
        a_round.intend(intent)
    else:
        a_round = Round(plan, step, abstention=abstention, unscale=unscale, intent=intent)
    begun(a_round)
    handshake = a_round.open()
    if not handshake.posted or not (handshake.void or handshake.fresh):
        return a_round
    left = early.round
    if left is None:
        if early.plan is None or handshake.posted > len(early.plan.batches):
            raise ConsistencyError(
                f"a rank says that it has sent {handshake.posted} messages before step {step}, which cannot be (this "
                f"is rank {plan.group.rank}): run the same version of mpisign on every rank"
            )
        left = Round(early.plan, step, abstention=header.JOINED, reversible=True)
    left.abandon(handshake.posted)
    early.dropped()
    again = Round(plan, step, abstention=abstention, unscale=unscale, intent=intent)
    again.replace(a_round, left)
    begun(again)
    return again
