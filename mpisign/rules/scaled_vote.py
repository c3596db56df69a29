"""The majority's sign, and how far to go: the median of what the voters say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mpisign.backends import backend_for
from mpisign.codecs import Codec, ScaledRows
from mpisign.errors import OptionError
from mpisign.policy import Policy, StepContext
from mpisign.rules.rule import PieceRule

__all__ = ["ScaledVote"]


@dataclass(frozen=True)
class ScaledVote(PieceRule):
    """Coordinate by coordinate the majority's sign, times the median of the voters' scales of its row.

    Fewer than half of the voters move neither beyond what the others say. Of an even number of scales, the median is
    the mean of the two in the middle. A scale of 0 counts, and its rank has no sign on that row: a row that most ranks
    do not use stays where it is. A scale that is negative or not finite is an abstention of its rank on that row.
    """

    name = "scaled_vote"

    def down(self, codec: Codec, policy: Policy, size: int) -> Codec:
        if not isinstance(codec, ScaledRows):
            raise OptionError(f"the rule {self.name!r} votes on signs with scales, not on {codec.name!r}: ScaledRows()")
        return replace(codec, silence=True) if policy.ties == "zero" else codec

    def recode(
        self,
        messages: Sequence[torch.Tensor],
        kept: torch.Tensor,
        out: torch.Tensor,
        codec: Codec,
        context: StepContext,
        first_word: int,
    ) -> None:
        assert isinstance(codec, ScaledRows)
        if not codec.elements:
            return
        said = torch.stack([codec.split(message[0])[0] for message in messages])
        median, speak = median_of_scales(said)
        out[:, : codec.scales] = 0
        codec.split(out[0])[0].copy_(median)
        nonzeros = [codec.split(message[1])[1] for message in messages] if len(messages[0]) > 1 else None
        moved = codec.split(out[1])[1] if len(out) > 1 else None
        backend = backend_for(out.device)
        if backend.together or not bool(speak.all()):  # asking a GPU takes longer than reading ones
            spoken = [codec.words_of(its) for its in speak]
            nonzeros = spoken if nonzeros is None else [a & b for a, b in zip(nonzeros, spoken, strict=True)]
        ballots = [codec.split(message[0])[1] for message in messages]
        if nonzeros is not None:
            ballots = [ballot & its for ballot, its in zip(ballots, nonzeros, strict=True)]
            moved = torch.empty_like(ballots[0]) if moved is None else moved  # which says it of rows that stay anyway
        backend.majority(
            ballots,
            codec.split(out[0])[1],
            ties=context.policy.ties,
            key=context.ties_key,
            first_word=first_word,
            nonzeros=nonzeros,
            out_nonzero=moved,
        )


def median_of_scales(said: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' medians (r,) of the voters' scales ``said`` (V, r), and who has a sign on which row: (V, r) bools.

    0 where nobody has said a scale that is one.
    """
    valid = said.isfinite() & (said >= 0)
    ordered = torch.where(valid, said + 0.0, torch.inf).sort(dim=0).values
    count = valid.sum(0)
    middle = torch.stack([(count - 1).clamp_(min=0) // 2, (count // 2).clamp_(max=len(said) - 1)])
    low, high = torch.take_along_dim(ordered, middle, dim=0)
    median = torch.where(count > 0, low.mul(0.5).add_(high, alpha=0.5), 0.0)
    return median, valid & (said > 0)
