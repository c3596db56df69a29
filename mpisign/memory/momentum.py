"""Momentum on the worker, before the sign: Signum."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

from torch import Tensor

from mpisign.errors import OptionError
from mpisign.memory.memory import Memory, State
from mpisign.policy import StepContext

__all__ = ["Momentum", "check_decay"]


def check_decay(name: str, value: float) -> None:
    """Raise :class:`OptionError` unless ``value`` is a decay rate in [0, 1)."""
    if not (isinstance(value, Real) and 0.0 <= value < 1.0):
        raise OptionError(f"{name}={value!r} must be in [0, 1), e.g. {name}=0.9")


@dataclass(frozen=True)
class Momentum(Memory):
    """``v <- beta v + (1 - beta) g``, and v is sent: an exponential average of the local gradients.

    Source: Bernstein et al., "signSGD: Compressed Optimisation for Non-Convex Problems", 2018, Algorithm 2.
    """

    beta: float = 0.9
    name = "momentum"
    fields: ClassVar[tuple[str, ...]] = ("momentum",)

    def __post_init__(self) -> None:
        check_decay("momentum", self.beta)

    @property
    def betas(self) -> tuple[float, float]:
        return self.beta, self.beta

    def __call__(
        self, gradient: Tensor, state: State, scratch: Tensor, context: StepContext, first_word: int
    ) -> Tensor:
        return state["momentum"].lerp_(gradient, 1.0 - self.beta)
