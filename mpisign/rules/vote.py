"""The majority vote of signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpisign.backends import Count, backend_for
from mpisign.codecs import Codec, Trits
from mpisign.policy import Policy, StepContext
from mpisign.rules.rule import TallyRule

__all__ = ["MajorityVote"]


@dataclass(frozen=True)
class MajorityVote(TallyRule):
    """``sign(sum_m sign(u_m))``, coordinate by coordinate, each rank one vote.

    Votes are counted bit-sliced on whole words (``bitmap.host.majority``). For +-1 messages the
    sign of the mean, the median and the trimmed mean are all this rule.

    Source: Bernstein et al., "signSGD with Majority Vote is Communication Efficient and Fault Tolerant",
    2018, Algorithm 1.
    """

    name = "vote"

    def down(self, codec: Codec, policy: Policy, size: int) -> Codec:
        """Signs, and where a decision can be "do not move", a plane that says so."""
        return Trits() if codec.planes(policy) > 1 or policy.ties == "zero" else codec

    def decide(
        self, messages: Sequence[torch.Tensor], out: torch.Tensor, context: StepContext, first_word: int
    ) -> Count:
        return backend_for(out.device).majority(
            [message[0] for message in messages],
            out[0],
            ties=context.policy.ties,
            key=context.ties_key,
            first_word=first_word,
            nonzeros=[message[1] for message in messages] if len(messages[0]) > 1 else None,
            out_nonzero=out[1] if len(out) > 1 else None,
            tied=context.tied,
        )

    def decide_spoken(
        self,
        messages: Sequence[torch.Tensor],
        spoken: Sequence[torch.Tensor],
        out: torch.Tensor,
        moved: torch.Tensor,
        context: StepContext,
        first_word: int,
    ) -> Count:
        return backend_for(out.device).majority(
            [message[0] for message in messages],
            out[0],
            ties=context.policy.ties,
            key=context.ties_key,
            first_word=first_word,
            nonzeros=spoken,
            out_nonzero=moved,
            tied=context.tied,
        )

    def tally_shape(self, planes: int, voters: int) -> tuple[int, int]:
        """How many have voted +1 and, where messages say who votes, how many have voted."""
        return planes, voters.bit_length()

    def tally(self, messages: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        backend = backend_for(out.device)
        if len(out) == 1:
            backend.count([message[0] for message in messages], out[0])
        else:  # a sign where its rank does not vote is none
            backend.count([message[0] & message[1] for message in messages], out[0])
            backend.count([message[1] for message in messages], out[1])

    def settle(
        self,
        tally: torch.Tensor,
        out: torch.Tensor,
        context: StepContext,
        first_word: int,
        voted: torch.Tensor | None = None,
    ) -> Count:
        if len(tally) > 1:
            voted = tally[1]
        return backend_for(out.device).decide_counts(
            tally[0],
            len(context.voters) if voted is None else voted,
            out[0],
            ties=context.policy.ties,
            key=context.ties_key,
            first_word=first_word,
            out_nonzero=out[1] if len(out) > 1 else None,
            tied=context.tied,
        )
