"""The plain average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mpisign.policy import Turn

__all__ = ["Mean"]

BLOCK = 32768  # elements, so that the running sum stays in cache


@dataclass(frozen=True)
class Mean:
    """``(1/V) sum_m u_m``, summed in the order of the ranks, so that every exchange rounds alike."""

    name = "mean"
    shardable = True
    votes = False

    def decide(self, messages: Sequence[npt.NDArray[Any]], out: npt.NDArray[Any], turn: Turn, first_word: int) -> int:
        for lo in range(0, out.shape[-1], BLOCK):
            span = np.s_[:, lo : lo + BLOCK]
            total = out[span]
            total[...] = messages[0][span]
            for message in messages[1:]:
                total += message[span]
            total /= len(messages)
        return 0
