"""The plain average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpisign.bitmap.ops import Count
from mpisign.policy import Turn
from mpisign.rules.rule import Rule

__all__ = ["Mean"]

BLOCK = 32768  # elements, so that the running sum stays in cache


@dataclass(frozen=True)
class Mean(Rule):
    """``(1/V) sum_m u_m``, summed in the order of the ranks, so that every exchange rounds alike.

    Args:
        of_all: divide by the number M of all ranks instead of the V that vote: what running sums need (EF21),
            in which a rank that abstains has changed nothing.
        shares: M weights instead of ``1/M`` (with ``of_all``).
        reencodes: send the mean down in the codec of the way up, what that loses being added the next time
            (DoubleSqueeze).
    """

    of_all: bool = False
    shares: tuple[float, ...] | None = None
    reencodes: bool = False
    name = "mean"

    def weights(self, turn: Turn) -> Sequence[float]:
        if self.shares is not None:
            return [self.shares[rank] for rank in turn.voters]
        return [1.0 / (turn.size if self.of_all else len(turn.voters))] * len(turn.voters)

    def decide(self, messages: Sequence[torch.Tensor], out: torch.Tensor, turn: Turn, first_word: int) -> Count:
        count = turn.size if self.of_all else len(messages)
        block = out.shape[-1] if out.is_cuda else BLOCK
        for lo in range(0, out.shape[-1], max(block, 1)):
            total = out[:, lo : lo + block]
            parts = [message[:, lo : lo + block] for message in messages]
            if self.shares is not None:
                torch.mul(parts[0], self.shares[turn.voters[0]], out=total)
                for rank, part in zip(turn.voters[1:], parts[1:], strict=True):
                    total.add_(part, alpha=self.shares[rank])
                continue
            total.copy_(parts[0])
            for part in parts[1:]:
                total.add_(part)
            total.div_(count)
        return 0
