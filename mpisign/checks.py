"""What is looked at in every step of an optimizer besides the vote: options, averages, signs of death."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from mpisign.averages import Alike, warn_of_averaging
from mpisign.exchange.header import Handshake, Intent
from mpisign.exchange.plan import Plan
from mpisign.hyperparameters import Hyperparameters
from mpisign.lateness import Lateness
from mpisign.method import Method
from mpisign.report import StepReport
from mpisign.session import current
from mpisign.vigil import Vigil
from mpisign.wrapping import warn_of_momentum

__all__ = ["StepChecks"]


class StepChecks:
    """Of one optimizer: what this rank tells in its handshakes, and what it makes of what others tell."""

    def __init__(self) -> None:
        self._hyperparameters, self._alike, self._vigil = Hyperparameters(), Alike(), Vigil()
        self._lateness = Lateness()
        self._begun = self._told_of_momentum = False

    def options(self, optimizer: Optimizer, methods: Sequence[Method]) -> None:
        """Warn, once, of what makes another method of a vote; ``methods`` are those of the parameter groups."""
        self._told_of_momentum = self._told_of_momentum or warn_of_momentum(optimizer, methods)

    def intent(
        self,
        plan: Plan,
        optimizer: Optimizer,
        methods: Sequence[Method],
        step: int,
        values: Sequence[torch.Tensor | None],
    ) -> Intent:
        """What to tell before an exchange of ``values`` that ``optimizer`` will apply."""
        if not self._begun:
            warn_of_averaging(plan.layout.parameters)
            self._begun = True
        if plan.exchanges_models:  # replicas differ, and so may their steps
            return Intent(lateness=self._lateness)
        applied = self._hyperparameters.tell(optimizer, step)
        if self._hyperparameters.changed:  # schedulers may turn momentum on
            self.options(optimizer, methods)
        private = any(method.memory.private for method in plan.layout.methods)
        gradients = 0 if private else self._alike.digest(values, plan.group.size)  # which would tell of data
        lines = self._hyperparameters.lines
        return Intent(applied=applied, lines=lines, gradients=gradients, lateness=self._lateness)

    def heard(self, plan: Plan, handshake: Handshake, report: StepReport) -> None:
        """What all have told, and what came of it.

        Raises:
            DeadTrainingError: on all ranks, if nobody has voted for long and the job shall end then.
        """
        self._alike.heard(handshake.gradients)
        if not handshake.all_joined:
            session = current()
            named = list(zip(plan.layout.names, plan.layout.parameters, strict=True)) if report.skipped else ()
            self._vigil.heard(report, session.rank, session.on_dead_training, named)

    def stepped(self, done: bool) -> None:
        """Whether this rank has made the step of its own that precedes an exchange of models."""
        self._vigil.stepped(done, current().rank)

    def applied(self, optimizer: Optimizer) -> None:
        """A decision is applied some time after its vote."""
        self._hyperparameters.applied(optimizer)

    def sits_out(self) -> None:
        """This rank has no gradient in this step."""
        self._hyperparameters.forget()
