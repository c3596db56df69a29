"""The plain average."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpisign.backends import Count, backend_for
from mpisign.codecs import Codec, Counts
from mpisign.errors import OptionError
from mpisign.policy import Policy, StepContext
from mpisign.rules.rule import PieceRule, TallyRule, ValueRule

__all__ = ["Mean", "MeanOfSigns", "RecodedMean"]


@dataclass(frozen=True)
class Mean(ValueRule):
    """``(1/V) sum_m u_m``, summed in the order of the ranks, so that every exchange rounds alike.

    Args:
        of_all: divide by the number M of all ranks instead of the V that vote: what running sums need (EF21),
            in which a rank that abstains has changed nothing.
        shares: M weights instead of ``1/M`` (with ``of_all``), each of one rank for good: a rank that leaves takes its
            own along, and what remains need not add up to 1.
    """

    of_all: bool = False
    shares: tuple[float, ...] | None = None
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
        block = backend_for(out.device).rows  # so that the running sum stays in a cache
        for lo in range(0, out.shape[-1], block):
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
class RecodedMean(Mean, PieceRule):
    """The mean goes down in the codec of the way up, and what that loses is added the next time.

    Whoever decides keeps the error: ``q = mean + e``, ``C(q)`` goes down, ``e <- q - C(q)`` stays. Where q overflows,
    it begins again at 0.

    Source: Tang et al., "DoubleSqueeze: Parallel Stochastic Gradient Descent with Double-Pass Error-Compensated
    Compression", 2019, Algorithm 1.
    """

    name = "recoded_mean"
    keeps = True

    def recode(
        self,
        messages: Sequence[torch.Tensor],
        kept: torch.Tensor,
        out: torch.Tensor,
        codec: Codec,
        context: StepContext,
        first_word: int,
    ) -> None:
        """See :meth:`PieceRule.recode`; the error is what is ``kept``."""
        for message, weight in zip(messages, self.weights(context), strict=True):
            codec.add(message, kept, weight)
        kept.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)  # else it would stay so, and the parameters become so
        codec.encode(kept, out, context, first_word)
        codec.add(out, kept, -1.0)


@dataclass(frozen=True)
class MeanOfSigns(TallyRule):
    """``(1/V) sum_m sign(u_m)``: counted, not added up, so that what comes down is ``ceil(log2(M + 1))`` bits.

    Row i of a decision has bit i of how many vote +1. Where messages can say nothing, too (two planes), +1 is two
    marks, nothing is one and -1 is none, and a row more may be needed. Exact up to the last division.

    Source: Liu et al., "Communication Efficient Distributed Training with Distributed Lion", 2024, Algorithm 1 (Avg).
    """

    name = "mean_of_signs"
    elects = False

    def down(self, codec: Codec, policy: Policy, size: int) -> Codec:
        marks = codec.planes(policy)
        return Counts(marks, (marks * size).bit_length())

    def decide(
        self, messages: Sequence[torch.Tensor], out: torch.Tensor, context: StepContext, first_word: int
    ) -> Count:
        self.tally(messages, out[None])
        return 0

    def tally_shape(self, planes: int, voters: int) -> tuple[int, int]:
        """The marks."""
        return 1, (planes * voters).bit_length()

    def tally(self, messages: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        marks = [message[0] for message in messages]
        if len(messages[0]) > 1:
            marks += [~(message[0] ^ message[1]) for message in messages]
        backend_for(out.device).count(marks, out[0])

    def settle(
        self,
        tally: torch.Tensor,
        out: torch.Tensor,
        context: StepContext,
        first_word: int,
        voted: torch.Tensor | None = None,
    ) -> Count:
        """They are the decision."""
        planes = min(tally.shape[1], len(out))
        out[:planes].copy_(tally[0, :planes])
        out[planes:].zero_()
        return 0

    def decide_spoken(
        self,
        messages: Sequence[torch.Tensor],
        spoken: Sequence[torch.Tensor],
        out: torch.Tensor,
        moved: torch.Tensor,
        context: StepContext,
        first_word: int,
    ) -> Count:
        return self.decide(messages, out, context, first_word)  # whoever decodes knows who has spoken
