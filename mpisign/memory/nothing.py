"""No memory: the gradient itself is sent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

__all__ = ["Nothing"]


@dataclass(frozen=True)
class Nothing:
    """``u = g``."""

    name = "nothing"
    fields: ClassVar[tuple[str, ...]] = ()
    elementwise = True

    def __call__(self, gradient: torch.Tensor, state: dict[str, torch.Tensor], scratch: torch.Tensor) -> torch.Tensor:
        return gradient
