"""A torch optimizer around a torch optimizer: what it hands through."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.optim import Optimizer

from mpisign import wrapping
from mpisign.report import StepReport
from mpisign.scaling import LossScale, scaler_of
from mpisign.session import current

__all__ = ["Wrapper"]


# What a copy does not take along, besides hooks.
OF_A_PROCESS = {"_plan", "_session", "report", "_synchronized", "_skip", "_loss_scale", "step", "_overlap"}
OF_A_PROCESS |= {"_checks", "_buddies", "found_inf", "grad_scale"}  # the last two are GradScaler's


def _passed_through(name: str, doc: str) -> Any:  # a copied reference would go stale when a state is loaded
    return property(lambda self: getattr(self.wrapped, name), lambda self, it: setattr(self.wrapped, name, it), doc=doc)


class Wrapper(Optimizer):
    """Has the groups, the state and the defaults of the optimizer inside, and none of its other attributes."""

    wrapped: Optimizer
    report: StepReport | None
    _synchronized: bool  # p.grad is a decision
    _loss_scale: LossScale

    def _groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's parameter groups themselves."""
        scaler = scaler_of(sys._getframe(1))
        if scaler is None:
            return self.wrapped.param_groups
        if self._synchronized:  # p.grad is a decision, which no scale is in
            return self._loss_scale.stand_in(scaler, self.report, current().rank, self.wrapped)
        self._loss_scale.visited(scaler, self.wrapped)
        return self.wrapped.param_groups

    param_groups: Any = property(_groups, lambda self, groups: setattr(self.wrapped, "param_groups", groups))
    state = _passed_through("state", "The wrapped optimizer's state itself.")
    defaults = _passed_through("defaults", "The wrapped optimizer's defaults themselves.")

    if not TYPE_CHECKING:  # else no misspelt attribute would be an error to a type checker

        def __getattr__(self, name: str) -> NoReturn:
            raise wrapping.no_attribute(self, self.__dict__.get("wrapped"), name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as torch does."""
        self.wrapped.zero_grad(set_to_none)
        self._forget_gradients()

    def _forget_gradients(self) -> None:
        self._synchronized = False
        self._loss_scale.reset()

    def _parameters(self) -> list[torch.Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def __getstate__(self) -> dict[str, Any]:
        hooks = ("_optimizer_", "_zero_grad_profile", "_opt_called", "_warned_")
        return {k: v for k, v in self.__dict__.items() if k not in OF_A_PROCESS and not k.startswith(hooks)}
