"""What a rank does that has no batches left: it takes part in the others' exchanges, and then goes on from the last."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mpisign import sync, wrapping
from mpisign.errors import SynchronizationError
from mpisign.exchange.header import Handshake
from mpisign.exchange.run import sit_out
from mpisign.planned import Planned
from mpisign.report import StepReport
from mpisign.session import current

__all__ = ["join"]

logger = logging.getLogger(__name__)


def join(optimizer: Planned, afterwards: Callable[[], None] = lambda: None) -> int:
    """Sit out until all have joined; those who came early get parameters and state of the last. **Collective.**

    Args:
        afterwards: what to do after each exchange that was sat out.

    Returns:
        The last rank to join.
    """
    joined_for = 0
    last: list[int] = []

    def at_end(handshake: Handshake) -> None:
        last[:] = [_go_on_from_last(optimizer, handshake)]

    while True:
        handshake, report = _sit_out(optimizer, joined_for, at_end)
        if handshake.all_joined:
            _warn_of_what_is_gone(handshake)
            return last[0]
        optimizer.report = report
        optimizer._exchanges += 1
        optimizer._agreed()
        joined_for += 1
        optimizer._checks.heard(optimizer._current_plan(), handshake, report)
        afterwards()


def _warn_of_what_is_gone(handshake: Handshake) -> None:
    """All that are left have joined: exchanges after that were those of ranks that have died."""
    alone = min(steps for steps in handshake.joined_for if steps is not None)
    if alone and current().rank == 0:
        logger.warning(
            "the last %d exchanges are gone: all that had not joined yet have died, and nobody else has applied what "
            "was decided. Training goes on from the parameters of the last rank to join that is left",
            alone,
        )


def _go_on_from_last(optimizer: Planned, handshake: Handshake) -> int:
    """Let those who came early have what the last to join has. Returns who that is. **Collective.**"""
    waits = [steps for steps in handshake.joined_for if steps is not None]
    last = waits.index(min(waits))
    if max(waits) > min(waits):
        with _as_before(optimizer):
            named = [(str(place), p) for place, p in enumerate(optimizer._parameters())]
            sync.broadcast_parameters(named, root_rank=last)
            with wrapping.without_methods(optimizer.wrapped):
                sync.broadcast_optimizer_state(optimizer.wrapped, root_rank=last)
            sync.broadcast_memory(optimizer, last)
    return last


@contextmanager
def _as_before(optimizer: Planned) -> Iterator[None]:
    """Where the job outlives its ranks: if one dies inside, parameters and state are what they were before."""
    membership = current().membership
    if membership is None:
        yield
        return
    parameters = [(p, p.detach().clone()) for p in optimizer._parameters()]
    state = copy.deepcopy(optimizer.wrapped.state_dict())
    try:
        yield
    except Exception as error:
        if membership.is_loss(error):
            for parameter, before in parameters:
                parameter.detach().copy_(before)
            optimizer.wrapped.load_state_dict(state)
        raise


def _sit_out(optimizer: Planned, joined_for: int, at_end: Callable[[Handshake], None]) -> tuple[Handshake, StepReport]:
    """Take part in a step without a gradient; no parameter changes here."""
    plan = optimizer._told_plan()
    if plan.exchanges_models:
        raise SynchronizationError(
            f"{optimizer.method.name} exchanges models, which no rank can sit out: give all the same number of batches"
        )
    optimizer._checks.sits_out()
    early = optimizer._overlap.sitting_out()
    return sit_out(plan, optimizer._exchanges, joined_for, optimizer._remade_plan, early, at_end)
