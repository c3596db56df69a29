"""What a rank does that has no batches left: it takes part in the others' exchanges, and then goes on from the last."""

from __future__ import annotations

from collections.abc import Callable

from mpisign import sync, wrapping
from mpisign.errors import SynchronizationError
from mpisign.exchange.header import Handshake
from mpisign.exchange.run import sit_out
from mpisign.planned import Planned
from mpisign.report import StepReport

__all__ = ["join"]


def join(optimizer: Planned, afterwards: Callable[[], None] = lambda: None) -> int:
    """Sit out until all have joined; those who came early get parameters and state of the last. **Collective.**

    Args:
        afterwards: what to do after each exchange that was sat out.

    Returns:
        The last rank to join.
    """
    joined_for = 0
    while True:
        handshake, report = _sit_out(optimizer, joined_for)
        if handshake.all_joined:
            break
        optimizer.report = report
        optimizer._exchanges += 1
        optimizer._agreed()
        joined_for += 1
        optimizer._checks.heard(optimizer._current_plan(), handshake, report)
        afterwards()
    waits = [steps for steps in handshake.joined_for if steps is not None]
    last = waits.index(min(waits))
    if max(waits) > min(waits):
        named = [(str(place), p) for place, p in enumerate(optimizer._parameters())]
        sync.broadcast_parameters(named, root_rank=last)
        with wrapping.without_methods(optimizer.wrapped):
            sync.broadcast_optimizer_state(optimizer.wrapped, root_rank=last)
    return last


def _sit_out(optimizer: Planned, joined_for: int) -> tuple[Handshake, StepReport]:
    """Take part in a step without a gradient; no parameter changes here."""
    plan = optimizer._told_plan()
    if plan.exchanges_models:
        raise SynchronizationError(
            f"{optimizer.method.name} exchanges models, which no rank can sit out: give all the same number of batches"
        )
    optimizer._checks.sits_out()
    return sit_out(plan, optimizer._exchanges, joined_for, optimizer._remade_plan, optimizer._overlap.sitting_out())
