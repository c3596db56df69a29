"""Loss scales: who takes GradScaler's out of the gradients, and when, so that none is ever taken out of a decision."""

from __future__ import annotations

import gc
import weakref
from types import FrameType
from typing import Any, TypeVar

import torch
from torch.amp import GradScaler

from mpisign.errors import SynchronizationError
from mpisign.exchange import header
from mpisign.report import StepReport

__all__ = ["LossScale", "living", "scaler_of", "scaler_says"]

T = TypeVar("T")

ADVICE = "call scaler.unscale_(optimizer) before optimizer.synchronize(), with the DistributedSignOptimizer itself"


def living(kind: type[T]) -> list[T]:
    """All objects of a class in this process. It looks at every object that there is, in some 50 ms."""
    return [it for it in gc.get_objects() if issubclass(type(it), kind)]


def scaler_of(frame: FrameType) -> GradScaler | None:
    """The GradScaler that unscales, or checks, an optimizer's gradients in this frame: it tells nobody."""
    its = frame.f_locals.get("self") if frame.f_code.co_name == "_unscale_grads_" else None
    return its if isinstance(its, GradScaler) else None


def scaler_says(optimizer: Any) -> tuple[int, float]:
    """Why this rank abstains, if GradScaler says so, and what to multiply its gradients with.

    GradScaler leaves ``found_inf`` and ``grad_scale`` on an optimizer for the length of its ``step()``.
    """
    left = vars(optimizer)
    found_inf, scale = left.get("found_inf"), left.get("grad_scale")
    abstention = header.SCALER_INF if found_inf is not None and float(found_inf) > 0 else header.VOTES
    return abstention, 1.0 if scale is None else 1.0 / float(scale)


class LossScale:
    """The scale in one optimizer's gradients, from backward to the step.

    Whoever follows torch calls ``unscale_()`` before ``synchronize()``, or leaves all to ``scaler.step()``. Whoever
    follows Horovod calls it after. The decision is no gradient then: nothing is to be divided, and a scale must have
    been taken out before the vote, or momenta, and methods that send magnitudes, would have taken it in.
    """

    def __init__(self) -> None:
        self._looked = False  # for the scaler of somebody who follows Horovod
        self._known: weakref.ref[GradScaler] | None = None
        self.reset()

    def reset(self) -> None:
        """The gradients of another step come."""
        self._before = False  # a scaler has unscaled them, before the vote
        self._taken: float | None = None  # the scale that the vote has taken out itself
        self._after = False  # and its scaler has come for it afterwards

    def visited(self, scaler: GradScaler, wrapped: torch.optim.Optimizer) -> None:
        """A scaler looks at the gradients before the vote."""
        self._before, self._known, self._looked = True, weakref.ref(scaler), True

    def says(self, optimizer: Any, *, alone: bool = False) -> tuple[int, float]:
        """Before the vote: why this rank abstains, if a scaler says so, and what to multiply its gradients with.

        Args:
            alone: the step comes later, and a scaler may come before it.
        """
        abstention, unscale = scaler_says(optimizer)
        if alone and not (self._looked or self._before):
            found = _only(living(GradScaler))
            self._looked, self._known = True, None if found is None else weakref.ref(found)
        known = self._scaler()
        if known is not None and _has_unscaled(known, optimizer.wrapped):
            self._before, unscale = True, 1.0
        elif known is not None and alone and not self._before:
            self._taken = known.get_scale()
            unscale = 1.0 / self._taken
        return abstention, unscale

    def scales(self, optimizer: Any) -> bool:
        """Whether a scaler has a say in these gradients, after :meth:`says`."""
        return self._before or self._taken is not None or vars(optimizer).get("found_inf") is not None

    def _scaler(self) -> GradScaler | None:
        return None if self._known is None else self._known()

    def stand_in(
        self, scaler: GradScaler, report: StepReport | None, rank: int, wrapped: torch.optim.Optimizer
    ) -> list[dict[str, Any]]:
        """After the vote: what a scaler shall unscale instead of the decision, and find an Inf in if this rank had one.

        Raises:
            SynchronizationError: it is too late.
        """
        self._check_inside(scaler, wrapped)
        if not self._before and self._taken != scaler.get_scale():
            raise SynchronizationError(
                f"optimizer.synchronize() has voted on gradients with this GradScaler's scale in them, and could not "
                f"know which scale it was: {ADVICE}"
            )
        self._after, self._known = True, weakref.ref(scaler)
        finite = report is None or not (
            rank in report.ended_at or report.abstentions.get(rank) == header.REASONS[header.NON_FINITE]
        )
        device = next((p.device for group in wrapped.param_groups for p in group["params"]), torch.device("cpu"))
        of_it = torch.zeros(1, device=device, requires_grad=True)
        of_it.grad = torch.full_like(of_it, 0.0 if finite else float("inf"))
        return [{"params": [of_it]}]

    def check(self, votes: bool, optimizer: Any) -> None:
        """At the step, after the vote: whether a scaler has done what the vote took for granted.

        Args:
            votes: all methods count votes, which are the same in gradients of any scale.

        Raises:
            SynchronizationError: it has not.
        """
        if self._taken is None or self._after:
            return
        self._check_inside(self._scaler(), optimizer.wrapped)
        self._known = None  # it is another optimizer's
        if not votes:
            raise SynchronizationError(
                "synchronize() has taken the scale of a GradScaler out of the gradients, and the scaler has not come "
                f"for it: {ADVICE}, or, if these gradients were not scaled, go on: this step is left out, and from "
                "the next one on they are taken as they are"
            )

    def _check_inside(self, scaler: GradScaler | None, wrapped: torch.optim.Optimizer) -> None:
        if self._taken is not None and scaler is not None and _has_unscaled(scaler, wrapped):
            raise SynchronizationError(
                "scaler.unscale_() was given the optimizer that is inside, after the vote, and has divided the "
                f"decision: {ADVICE}"
            )


def _only(scalers: list[GradScaler]) -> GradScaler | None:
    """The one that has scaled a loss, or one of several that scale alike."""
    used = [scaler for scaler in scalers if scaler.is_enabled() and scaler._scale is not None]
    return used[0] if len({scaler.get_scale() for scaler in used}) == 1 else None


def _has_unscaled(scaler: GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    """Whether it has done so since its last update, by its own books."""
    state = getattr(scaler, "_per_optimizer_states", {}).get(id(optimizer))
    return state is not None and getattr(state["stage"], "name", "") == "UNSCALED"
