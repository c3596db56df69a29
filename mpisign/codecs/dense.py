"""Full precision: the baseline that compression is measured against."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpisign.backends import Flag, backend_for
from mpisign.codecs.codec import Codec, Planes
from mpisign.policy import StepContext

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense(Codec):
    """Every coordinate as fp32; fp64 for fp64 parameters. 16-bit gradients travel as fp32, losing nothing."""

    name = "dense"
    elementwise = True
    plain = True

    def wire_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if dtype == torch.float64 else torch.float32

    def length(self, elements: int) -> int:
        return elements

    def encode(self, values: torch.Tensor, message: Planes, context: StepContext, first_word: int) -> Flag:
        message[0].copy_(values)
        return backend_for(values.device).all_finite(values)

    def add(self, message: torch.Tensor, out: torch.Tensor, alpha: float) -> None:
        out.add_(message[0], alpha=alpha)

    def decode(self, decision: torch.Tensor, out: torch.Tensor, context: StepContext | None = None) -> None:
        out.copy_(decision[0])
