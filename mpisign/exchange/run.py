"""A round from its beginning to its end."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mpisign.bitmap.located import Located
from mpisign.exchange import header
from mpisign.exchange.header import Handshake, Intent
from mpisign.exchange.plan import Plan
from mpisign.exchange.round import Round
from mpisign.exchange.sink import NoSink, Sink
from mpisign.report import StepReport

__all__ = ["run", "sit_out"]


def run(
    plan: Plan,
    step: int,
    values: Located,
    abstention: int,
    unscale: float,
    intent: Intent,
    sink: Sink,
    remake: Callable[[], Plan] | None = None,
) -> tuple[Handshake, StepReport]:
    """Let ``values``, by parameter, become the decision, in ``sink``. **Collective.**

    Args:
        remake: see :meth:`Round.open`.
    """
    a_round = Round(plan, step, abstention=abstention, unscale=unscale, intent=intent)
    handshake = a_round.open(remake)
    a_round.prepare(values)
    for batch in a_round.plan.batches:
        a_round.submit(batch, values.chosen(batch.places))
    a_round.close()
    return handshake, a_round.commit(sink)


def sit_out(
    plan: Plan, step: int, joined_for: int, remake: Callable[[], Plan] | None = None
) -> tuple[Handshake, StepReport]:
    """Take part without a gradient; no parameter changes here. **Collective.**"""
    a_round = Round(plan, step, abstention=header.JOINED, intent=Intent(joined_for))
    handshake = a_round.open(remake)
    plan = a_round.plan
    if not handshake.all_joined:
        nothing: list[torch.Tensor | None] = [None] * len(plan.layout.parameters)
        a_round.prepare(nothing)
        for batch in plan.batches:
            a_round.submit(batch, [None] * len(batch.places))
        a_round.close()
    running = (batch.places for batch in plan.batches if batch.method.memory.running)
    return handshake, a_round.commit(NoSink(plan.layout, frozenset(place for its in running for place in its)))
