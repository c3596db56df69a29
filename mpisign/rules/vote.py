"""The majority vote of signs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from mpisign.bitmap import host
from mpisign.policy import Turn

__all__ = ["MajorityVote"]


@dataclass(frozen=True)
class MajorityVote:
    """``sign(sum_m sign(u_m))``, coordinate by coordinate, each rank one vote.

    Votes are counted bit-sliced on whole words (:func:`mpisign.bitmap.host.majority`). For +-1 messages the
    sign of the mean, the median and the trimmed mean are all this rule.

    Source: Bernstein et al., "signSGD with Majority Vote is Communication Efficient and Fault Tolerant",
    2018, Algorithm 1.
    """

    name = "vote"
    shardable = True
    votes = True

    def decide(self, messages: Sequence[npt.NDArray[Any]], out: npt.NDArray[Any], turn: Turn, first_word: int) -> int:
        return host.majority(
            [message[0] for message in messages],
            out[0],
            ties=turn.policy.ties,
            key=turn.ties_key,
            first_word=first_word,
            nonzeros=[message[1] for message in messages] if len(messages[0]) > 1 else None,
            out_nonzero=out[1] if len(out) > 1 else None,
        )
