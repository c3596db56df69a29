"""One bit for each coordinate: its sign. A second plane where zeros abstain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mpisign.bitmap import host
from mpisign.bitmap.tensors import format_of, raw_bits
from mpisign.policy import Policy, Turn

__all__ = ["SignBits"]


@dataclass(frozen=True)
class SignBits:
    """Signs as uint32 words, 32 coordinates a word (the wire format of :mod:`mpisign.bitmap.host`).

    Row 0 holds the signs. Row 1, "does it speak at all", goes up if ``zeros="abstain"``, and comes down if a
    decision can be "do not move": then, and if ``ties="zero"``.
    """

    name = "sign_bits"
    elementwise = True

    def wire_dtype(self, dtype: torch.dtype) -> np.dtype[np.generic]:
        return np.dtype(np.uint32)

    def length(self, elements: int) -> int:
        return host.words_for(elements)

    def planes_up(self, policy: Policy) -> int:
        return 2 if policy.zeros == "abstain" else 1

    def planes_down(self, policy: Policy) -> int:
        return 2 if policy.zeros == "abstain" or policy.ties == "zero" else 1

    def encode(self, values: torch.Tensor, message: npt.NDArray[Any], turn: Turn, first_word: int) -> bool:
        return host.pack(
            raw_bits(values),
            format_of(values.dtype),
            message[0],
            zeros=turn.policy.zeros,
            key=turn.zeros_key,
            first_word=first_word,
            nonzero=message[1] if len(message) > 1 else None,
        )

    def decode(self, decision: npt.NDArray[Any], out: torch.Tensor) -> None:
        host.unpack(
            decision[0],
            format_of(out.dtype),
            raw_bits(out),
            nonzero=decision[1] if len(decision) > 1 else None,
        )
