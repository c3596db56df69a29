"""The majority vote of signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpisign.bitmap import ops
from mpisign.bitmap.ops import Count
from mpisign.policy import StepContext
from mpisign.rules.rule import Rule

__all__ = ["MajorityVote"]


@dataclass(frozen=True)
class MajorityVote(Rule):
    """``sign(sum_m sign(u_m))``, coordinate by coordinate, each rank one vote.

    Votes are counted bit-sliced on whole words (``bitmap.host.majority``). For +-1 messages the
    sign of the mean, the median and the trimmed mean are all this rule.

    Source: Bernstein et al., "signSGD with Majority Vote is Communication Efficient and Fault Tolerant",
    2018, Algorithm 1.
    """

    name = "vote"
    votes = True

    def decide(
        self, messages: Sequence[torch.Tensor], out: torch.Tensor, context: StepContext, first_word: int
    ) -> Count:
        return ops.majority(
            [message[0] for message in messages],
            out[0],
            ties=context.policy.ties,
            key=context.ties_key,
            first_word=first_word,
            nonzeros=[message[1] for message in messages] if len(messages[0]) > 1 else None,
            out_nonzero=out[1] if len(out) > 1 else None,
            tied=context.tied,
        )
