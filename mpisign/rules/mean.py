"""The plain average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpisign.bitmap import ops
from mpisign.bitmap.host import words_for
from mpisign.bitmap.ops import Count
from mpisign.bitmap.tensors import blocks
from mpisign.codecs import Codec
from mpisign.codecs.sign_bits import add_signs
from mpisign.errors import OptionError
from mpisign.policy import Policy, StepContext
from mpisign.rules.rule import Rule

__all__ = ["Mean", "MeanOfSigns"]

BLOCK = 32768  # elements, so that the running sum stays in cache


@dataclass(frozen=True)
class Mean(Rule):
    """``(1/V) sum_m u_m``, summed in the order of the ranks, so that every exchange rounds alike.

    Args:
        of_all: divide by the number M of all ranks instead of the V that vote: what running sums need (EF21),
            in which a rank that abstains has changed nothing.
        shares: M weights instead of ``1/M`` (with ``of_all``), each of one rank for good: a rank that leaves takes its
            own along, and what remains need not add up to 1.
        reencodes: send the mean down in the codec of the way up, what that loses being added the next time
            (DoubleSqueeze).
    """

    of_all: bool = False
    shares: tuple[float, ...] | None = None
    reencodes: bool = False
    name = "mean"

    def check(self, size: int) -> None:
        if self.shares is not None and len(self.shares) != size:
            raise OptionError(f"{len(self.shares)} weights were given for {size} ranks: give one for each rank")

    def check_left(self, identities: Sequence[int]) -> None:
        if self.shares is None:
            self.check(len(identities))
        elif max(identities) >= len(self.shares):
            raise OptionError(
                f"{len(self.shares)} weights were given, and a rank has come whose number would be {max(identities)}: "
                f"give one for each rank that may ever come"
            )

    def weights(self, context: StepContext) -> Sequence[float]:
        if self.shares is not None:
            return [self.shares[context.identity_of(rank)] for rank in context.voters]
        return [1.0 / (context.size if self.of_all else len(context.voters))] * len(context.voters)

    def decide(
        self, messages: Sequence[torch.Tensor], out: torch.Tensor, context: StepContext, first_word: int
    ) -> Count:
        count = context.size if self.of_all else len(messages)
        block = out.shape[-1] if out.is_cuda else BLOCK
        for lo in range(0, out.shape[-1], max(block, 1)):
            total = out[:, lo : lo + block]
            parts = [message[:, lo : lo + block] for message in messages]
            if self.shares is not None:
                weights = self.weights(context)
                torch.mul(parts[0], weights[0], out=total)
                for weight, part in zip(weights[1:], parts[1:], strict=True):
                    total.add_(part, alpha=weight)
                continue
            total.copy_(parts[0])
            for part in parts[1:]:
                total.add_(part)
            total.div_(count)
        return 0


@dataclass(frozen=True)
class MeanOfSigns(Rule):
    """``(1/V) sum_m sign(u_m)``: counted, not added up, so that what comes down is ``ceil(log2(M + 1))`` bits.

    Row i of a decision has bit i of how many vote +1. Where messages can say nothing, too (two planes), +1 is two
    marks, nothing is one and -1 is none, and a row more may be needed. Exact up to the last division.

    Source: Liu et al., "Communication Efficient Distributed Training with Distributed Lion", 2024, Algorithm 1 (Avg).
    """

    name = "mean_of_signs"
    tallies = True

    def planes_down(self, codec: Codec, policy: Policy, size: int) -> int:
        return (codec.planes_up(policy) * size).bit_length()

    def decide(
        self, messages: Sequence[torch.Tensor], out: torch.Tensor, context: StepContext, first_word: int
    ) -> Count:
        marks = [message[0] for message in messages]
        if len(messages[0]) > 1:
            marks += [~(message[0] ^ message[1]) for message in messages]
        ops.count(marks, out)
        return 0

    def decode(self, decision: torch.Tensor, out: torch.Tensor, codec: Codec, context: StepContext) -> None:
        marks = codec.planes_up(context.policy) * len(context.voters)
        # Where c marks were made, 2c is 2^rows - 1 plus the sum of 2^i times bit i as a sign; 2c / marks - 1 is sought.
        for span in blocks(out.numel(), out.device):
            part = out[span].fill_(2 ** len(decision) - 1 - marks)
            first = span.start // 32
            for bit, plane in enumerate(decision[:, first : first + words_for(part.numel())]):
                add_signs(plane, part, 2.0**bit)
            part.div_(marks)
