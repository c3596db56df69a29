"""Lion's two averages: a short one is sent, a long one is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mpisign.memory.memory import Memory, State
from mpisign.memory.momentum import check_decay
from mpisign.policy import StepContext

__all__ = ["LionMomentum"]


@dataclass(frozen=True)
class LionMomentum(Memory):
    """``u = beta1 m + (1 - beta1) g`` is sent, then ``m <- beta2 m + (1 - beta2) g``.

    Source: Chen et al., "Symbolic Discovery of Optimization Algorithms", 2023, Algorithm 2; on workers:
    Liu et al., "Communication Efficient Distributed Training with Distributed Lion", 2024, Algorithm 1.
    """

    beta1: float = 0.9
    beta2: float = 0.99
    name = "lion"
    fields: ClassVar[tuple[str, ...]] = ("momentum",)

    def __post_init__(self) -> None:
        check_decay("beta1", self.beta1)
        check_decay("beta2", self.beta2)

    @property
    def betas(self) -> tuple[float, float]:
        return self.beta1, self.beta2

    def __call__(
        self, gradient: Tensor, state: State, scratch: Tensor, context: StepContext, first_word: int
    ) -> Tensor:
        momentum = state["momentum"]
        signed = torch.lerp(momentum, gradient, 1.0 - self.beta1, out=scratch[: gradient.numel()])
        momentum.lerp_(gradient, 1.0 - self.beta2)
        return signed
