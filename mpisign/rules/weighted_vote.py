"""A vote in which ranks weigh as much as they have been right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpisign.backends import backend_for
from mpisign.bitmap.host import words_for
from mpisign.codecs import Codec, Trits
from mpisign.errors import OptionError
from mpisign.policy import Policy, StepContext
from mpisign.rules.rule import PieceRule

__all__ = ["WeightedVote"]

SCALE = 64.0  # weights are whole numbers of 1/64, so that sums are exact, and the same in any order and on any machine
ZEROS = {"coin": "coin", "positive": "positive", "zero": "abstain"}  # by what a tie is


@dataclass(frozen=True)
class WeightedVote(PieceRule):
    """``sign(sum_m w_m sign(u_m))``, ``w_m = log((1 - p_m) / p_m)``, p_m the share of rank m's signs that are wrong.

    What is wrong is guessed from the plain majority on the parameter, or the part of it that a shard has: of n signs,
    c against it, ``p_m = (c + 1) / (n + 2)``. A rank that flips its signs has a negative weight, and so helps. Weights
    are sums of votes, so a hostile majority has them all.

    The paper's server counts over the steps; this counts anew in each, and so keeps nothing.

    Source: Park & Lee, "SignSGD with Federated Defense: Harnessing Adversarial Attacks through Gradient Sign
    Decoding", 2024 (signSGD-FD).
    """

    name = "weighted_vote"

    def down(self, codec: Codec, policy: Policy, size: int) -> Codec:
        if not isinstance(codec, Trits):
            raise OptionError(f"the rule {self.name!r} weighs votes that can be none, not {codec.name!r}: use Trits()")
        return codec

    def recode(
        self,
        messages: Sequence[torch.Tensor],
        kept: torch.Tensor,
        out: torch.Tensor,
        codec: Codec,
        context: StepContext,
        first_word: int,
    ) -> None:
        backend, k = backend_for(out.device), out.shape[1]
        nonzeros = [message[1] for message in messages]
        ballots = [message[0] & its for message, its in zip(messages, nonzeros, strict=True)]
        backend.majority(ballots, out[0], ties="zero", nonzeros=nonzeros, out_nonzero=out[1])
        counts = [
            backend.agreement(ballot, out[0], 32 * k, its, out[1])
            for ballot, its in zip(ballots, nonzeros, strict=True)
        ]
        told: list[Any] = list(counts)
        if backend.together:  # with one wait
            told = torch.stack([torch.stack(pair) for pair in told]).tolist()
        weights = [weight(both - same, both) for same, both in told]
        for span in backend.blocks(32 * k):
            here = slice(span.start // 32, words_for(span.stop))
            total = torch.zeros(span.stop - span.start, device=out.device)
            vote = torch.empty_like(total)
            for ballot, its, its_weight in zip(ballots, nonzeros, weights, strict=True):
                backend.unpack(ballot[here], vote, nonzero=its[here])
                total.add_(vote, alpha=its_weight)
            at, key = first_word + here.start, context.ties_key
            zeros = ZEROS[context.policy.ties]
            decided = out[1, here] if zeros == "abstain" else None
            backend.pack(total, out[0, here], zeros=zeros, key=key, first_word=at, nonzero=decided)
        if ZEROS[context.policy.ties] != "abstain":
            out[1] = nonzeros[0]
            for its in nonzeros[1:]:
                out[1] |= its


def weight(wrong: int, votes: int) -> float:
    """The log-odds of being right of a rank that was ``wrong`` in so many of its ``votes``, in 1/64."""
    return float(round(SCALE * math.log((votes - wrong + 1) / (wrong + 1))))
