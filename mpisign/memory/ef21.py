"""EF21: compress the change of an estimate, not the gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import torch
from torch import Tensor

from mpisign.backends import backend_for
from mpisign.codecs.codec import Codec
from mpisign.errors import OptionError
from mpisign.memory.memory import Memory, State
from mpisign.memory.momentum import check_decay
from mpisign.policy import StepContext

__all__ = ["EF21", "ef21_step_size"]


@dataclass(frozen=True)
class EF21(Memory):
    """``c = C(v - G)``, ``G <- G + c``; all keep ``a <- a + mean c``, which is the mean of all G, and apply it.

    v is the gradient, or with ``momentum`` its running average (EF21-SGDM). With ``shares`` w (EF21-W), rank m's v is
    ``gradient / (M w_m)`` and the mean is weighted by w.

    Source: Richtarik et al., "EF21: A New, Simpler, Theoretically Better, and Practically Faster Error Feedback",
    2021, Algorithm 2; Fatkhullin et al., "Momentum Provably Improves Error Feedback!", 2023, Algorithm 1 (SGDM);
    "Error Feedback Reloaded", 2024, Algorithm 3 (W).
    """

    momentum: float = 0.0
    shares: tuple[float, ...] | None = None
    feedback = True
    running = True
    common: ClassVar[tuple[str, ...]] = ("average",)
    summed = "average"

    def __post_init__(self) -> None:
        check_decay("momentum", self.momentum)

    @property
    def name(self) -> str:  # type: ignore[override]
        """That of what is kept, which with momentum is something else."""
        return "ef21_sgdm" if self.momentum else "ef21"

    @property
    def fields(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("estimate", "average", "momentum") if self.momentum else ("estimate", "average")

    def __call__(
        self, gradient: Tensor, state: State, scratch: Tensor, context: StepContext, first_word: int
    ) -> Tensor:
        tracked = state["momentum"].lerp_(gradient, 1.0 - self.momentum) if self.momentum else gradient
        change = scratch[: gradient.numel()]
        if self.shares is None:
            return torch.sub(tracked, state["estimate"], out=change)
        return torch.div(tracked, context.size * self.shares[context.identity], out=change).sub_(state["estimate"])

    def sent(self, message: Tensor, codec: Codec, state: State) -> None:
        codec.add(message, state["estimate"], 1.0)

    def received(self, decision: Tensor, state: State) -> None:
        for span in backend_for(decision.device).blocks(decision.numel()):
            decision[span].copy_(state["average"][span].add_(decision[span]))

    def share(self, state: State, context: StepContext) -> Tensor:
        return state["estimate"] * (1.0 / context.size if self.shares is None else self.shares[context.identity])


def check_smoothness(smoothness: Iterable[float]) -> list[float]:
    """The ranks' constants as numbers. Raises :class:`OptionError` unless all are positive."""
    try:
        constants = [float(constant) for constant in smoothness]
    except (TypeError, ValueError):
        constants = []
    if not constants or not all(0.0 < constant < math.inf for constant in constants):
        raise OptionError(f"smoothness={smoothness!r} must be one positive constant for each rank, e.g. [1.0, 2.5]")
    return constants


def ef21_step_size(
    smoothness: Iterable[float], contraction: float, *, weighted: bool = False, global_smoothness: float | None = None
) -> float:
    """The largest step size for which theory gives EF21 its rate: ``1 / (L + L' xi)``.

    ``xi = sqrt(1 - alpha) / (1 - sqrt(1 - alpha))``; L' is the quadratic mean of the ranks' constants for EF21, and
    their arithmetic mean for EF21-W, which is what it gains.

    Args:
        smoothness: L_m, the Lipschitz constant of each rank's gradient.
        contraction: alpha, in (0, 1]: k/n for top-k; for the scaled sign ``||p||_1^2 / (n ||p||_2^2)``.
        weighted: for EF21-W.
        global_smoothness: L of the mean function; default the arithmetic mean of L_m, which bounds it.

    Raises:
        OptionError: a constant is out of range.
    """
    constants = check_smoothness(smoothness)
    if not (isinstance(contraction, Real) and 0.0 < contraction <= 1.0):
        raise OptionError(f"contraction={contraction!r} must be in (0, 1], e.g. k/n for top-k")
    arithmetic = sum(constants) / len(constants)
    quadratic = math.sqrt(sum(constant**2 for constant in constants) / len(constants))
    root = math.sqrt(1.0 - contraction)
    whole = arithmetic if global_smoothness is None else global_smoothness
    return 1.0 / (whole + (arithmetic if weighted else quadratic) * root / (1.0 - root))
