"""Full precision: the baseline that compression is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mpisign.bitmap import host
from mpisign.bitmap.tensors import format_of, raw_bits
from mpisign.policy import Policy, Turn

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense:
    """Every coordinate as fp32; fp64 for fp64 parameters. 16-bit gradients travel as fp32, losing nothing."""

    name = "dense"
    elementwise = True

    def wire_dtype(self, dtype: torch.dtype) -> np.dtype[np.generic]:
        return np.dtype(np.float64 if dtype == torch.float64 else np.float32)

    def length(self, elements: int) -> int:
        return elements

    def planes_up(self, policy: Policy) -> int:
        return 1

    def planes_down(self, policy: Policy) -> int:
        return 1

    def encode(self, values: torch.Tensor, message: npt.NDArray[Any], turn: Turn, first_word: int) -> bool:
        torch.from_numpy(message[0]).copy_(values)
        return host.all_finite(raw_bits(values), format_of(values.dtype))

    def decode(self, decision: npt.NDArray[Any], out: torch.Tensor) -> None:
        out.copy_(torch.from_numpy(decision[0]))
