"""Rounds that are dropped on the way and run again, beside a job in which none is: nothing may differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import parts
import rounds
import torch
from parts import Grads

from mpisign.method import Method
from mpisign.policy import Policy
from mpisign.report import StepReport

SHAPES = ((4, 70), (33,), (), (0,), (100,))
STEPS = 4


def draw(tensors: Sequence[torch.Tensor], step: int, rank: int, size: int, attempt: int = 0) -> Grads:
    """Other ones in each attempt. There are rows of zeros, from step 1 on a missing gradient, in step 2 a NaN."""
    drawn: list[Any] = parts.draw(tensors, step, rank, attempt)
    drawn[0][(rank + attempt) % 4] = drawn[0][3] = 0
    if step > 0 and rank == size - 1:
        drawn[1 if attempt == 0 else 4] = None
    if step == 2 and rank == 0:
        place, bad = (1, torch.inf) if attempt == 0 else (4, torch.nan)
        drawn[place] = torch.full_like(tensors[place], bad) if drawn[place] is None else drawn[place]
        drawn[place][7] = bad
    return drawn


def put(made: rounds.Job, drawn: Grads) -> None:
    """Let these be what crosses the wire."""
    if not made.plan.exchanges_models:
        parts.give(made.tensors, drawn)
        return
    for tensor, value in zip(made.tensors, drawn, strict=True):
        tensor.data.copy_(torch.zeros_like(tensor) if value is None else value.nan_to_num(1.0, 1.0, 1.0))


def found(made: rounds.Job) -> list[torch.Tensor | None]:
    return parts.copies([t if made.plan.exchanges_models else t.grad for t in made.tensors])


def told(report: StepReport) -> dict[str, Any]:
    """What is the same in each repetition, and the agreement."""
    fields = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    shares = str(report.agreement()) if fields.pop("_agreement") is not None else ""  # as text, since NaN is not NaN
    del fields["seconds"], fields["exposed_seconds"]
    return {**fields, "ties": str(report.ties), "agreement": shares}


def kept(made: rounds.Job) -> dict[str, Any]:
    """What this rank remembers, as a checkpoint has it."""
    state = made.store.state_dict(list(made.tensors), 0, None, "")
    return {"memory": made.memories(), "rows": state["rows"]}


def same_kept(ours: dict[str, Any], theirs: dict[str, Any]) -> bool:
    return ours["rows"] == theirs["rows"] and parts.same(ours["memory"], theirs["memory"])


def check_that_drops_leave_no_trace(
    method: Method, exchange: str, cap: float | None, shares: Sequence[float] = (0.0, 0.3, 0.5, 1.0), **steps: Any
) -> None:
    """Run the same steps with and without rounds that are dropped after some batches. **Collective.**

    Args:
        shares: of the batches that have been submitted when a round is dropped.
        steps: how the steps that count are run.
    """
    group = rounds.session().group
    ours, theirs = (
        rounds.job(parts.parameters(*SHAPES), method, policy=Policy("rows"), exchange=exchange, cap=cap)
        for _ in range(2)
    )
    if ours.store.secret:
        ours.store.secret = theirs.store.secret = "ab" * 32  # so that they draw the same private noise
    everything = len(ours.plan.batches)
    for step in range(STEPS):
        before = kept(ours)
        for attempt, count in enumerate((int(share * everything) for share in shares), 1):
            drawn = draw(ours.tensors, step, group.rank, group.size, attempt)
            put(ours, drawn)
            given = found(ours)
            ours.drop(step, count)
            assert parts.same(found(ours), given), "what was to be decided on stays"
            assert same_kept(kept(ours), before), (step, count)
        reports = []
        for made, options in ((ours, {"reversible": step % 2 == 0, **steps}), (theirs, {})):
            put(made, draw(made.tensors, step, group.rank, group.size))
            reports.append(told(made.run(step, **options)))
        assert reports[0] == reports[1], step
        assert parts.same(found(ours), found(theirs)), step
        assert same_kept(kept(ours), kept(theirs)), step
