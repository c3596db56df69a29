"""No memory: the gradient itself is sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mpisign.memory.memory import Memory
from mpisign.policy import Turn

__all__ = ["Nothing"]


@dataclass(frozen=True)
class Nothing(Memory):
    """``u = g``."""

    name = "nothing"

    def many(
        self,
        gradients: list[torch.Tensor],
        states: dict[str, list[torch.Tensor]],
        scratch: Callable[[], list[torch.Tensor]],
        turn: Turn,
    ) -> list[torch.Tensor]:
        return gradients
