"""How many ranks have voted +1 on each coordinate, bit by bit: what a mean of signs comes down in."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mpisign.backends import Flag, backend_for
from mpisign.bitmap.host import words_for
from mpisign.codecs.codec import Codec, Planes
from mpisign.codecs.sign_bits import add_signs
from mpisign.policy import Policy, StepContext

__all__ = ["Counts"]


@dataclass(frozen=True)
class Counts(Codec):
    """Row i has bit i of how many marks were made. It comes down only; nothing is encoded in it.

    Args:
        marks: how many a rank makes at most: 1 for +1; or 2 for +1, one for nothing and none for -1.
        rows: enough for all ranks' marks.
    """

    marks: int
    rows: int
    name = "counts"
    elementwise = True

    def length(self, elements: int) -> int:
        return words_for(elements)

    def planes(self, policy: Policy) -> int:
        return self.rows

    def encode(self, values: torch.Tensor, message: Planes, context: StepContext, first_word: int) -> Flag:
        raise NotImplementedError("counts are made by a rule")

    def add(self, message: torch.Tensor, out: torch.Tensor, alpha: float) -> None:
        raise NotImplementedError("what counts are worth depends on who has voted: see decode()")

    def decode(self, decision: torch.Tensor, out: torch.Tensor, context: StepContext | None = None) -> None:
        # Of c marks out of m, 2c is 2^rows - 1 plus the sum of 2^i times bit i as a sign; 2c / m - 1 is sought.
        for span in backend_for(out.device).blocks(out.numel()):
            part = out[span].fill_(2 ** len(decision) - 1)
            first = span.start // 32
            for bit, plane in enumerate(decision[:, first : first + words_for(part.numel())]):
                add_signs(plane, part, 2.0**bit)
            assert context is not None
            if context.speakers is None:
                made = self.marks * len(context.voters)
                part.sub_(made).div_(made)
            else:
                by = context.speakers[span].to(part.dtype) * self.marks
                part.sub_(by).div_(by.clamp_(min=1))
