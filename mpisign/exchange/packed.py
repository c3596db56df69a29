"""What this rank's packing has found, besides the bits: where its ballot ends, and rows of zeros."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mpisign.backends import First
from mpisign.exchange import rows
from mpisign.exchange.header import Bools
from mpisign.exchange.plan import Batch, Plan

__all__ = ["Packed", "rows_of_zeros"]


class Packed:
    """A batch that is packed, or will be as soon as a GPU has come so far.

    On a GPU messages are pushed at once, and with one wait, for the first of them, it is heard what packing has found.

    Args:
        votes: by segment, whether there is a gradient.
        first: the segment at which the ballot ends; None if nothing was packed.

    Attributes:
        pushed: messages are on their way to the host.
    """

    def __init__(self, plan: Plan, batch: Batch, votes: Bools, first: First | None) -> None:
        self.batch, self.votes = batch, votes
        self._first: First = len(batch.encoder.segments) if first is None else first
        self._answers = None if first is None else batch.answers
        self.pushed = self._answers is not None and not plan.told  # else rows of zeros may change messages yet
        self._asked: list[int] = []
        if self._answers is None:
            return
        self._answers.ask("first", self._first)
        if self.pushed:
            for bucket in batch.buckets:
                words = plan.spoken[bucket.index]
                if words is not None:
                    self._answers.ask(bucket.index, plan.backend.any_zero(words))
                    self._asked.append(bucket.index)
            plan.exchanges[batch.buckets[0].index].push()
        self._answers.asked()
        for bucket in batch.buckets[1:] if self.pushed else ():
            plan.exchanges[bucket.index].push()

    def ready(self) -> bool:
        """Whether it is, without waiting."""
        return self._answers is None or self._answers.ready()

    def told(self) -> tuple[int, dict[int, bool] | None]:
        """The place at which the ballot ends; by bucket, whether some word may stand for a row of zeros, if known."""
        if self._answers is None:
            return int(self._first), None
        zeros = {index: bool(self._answers.told(index)) for index in self._asked} if self.pushed else None
        return self._answers.told("first"), zeros


def rows_of_zeros(
    plan: Plan, batch: Batch, votes: Bools, zeros: Mapping[int, bool] | None
) -> tuple[Bools, dict[int, dict[int, Bools]]]:
    """Which segments have rows of zeros, and, by bucket, on which rows of those that are told this rank votes."""
    found = np.zeros(len(votes), np.bool_)
    spoken: dict[int, dict[int, Bools]] = {}
    end = 0
    for bucket, planes in zip(batch.buckets, batch.encoder.rows, strict=True):
        words, start, end = plan.spoken[bucket.index], end, end + len(bucket.segments)
        if words is None or not votes[start:end].any():
            continue
        look = bool(plan.backend.any_zero(words) if zeros is None else zeros[bucket.index])
        spans = [(segment.start, segment.stop) for segment in bucket.segments]
        looks = plan.backend.zero_words(words, spans) if look else [False] * len(spans)
        for place, segment in enumerate(bucket.segments):
            at, told = start + place, segment.name in plan.told
            closer = looks[place] or segment.index in plan.scattered
            if not votes[at] or not (closer or told):
                continue
            shape, strides = tuple(plan.layout.parameters[segment.index].shape), plan.layout.strides[segment.index]
            mine = slice(segment.start, segment.stop)
            zero = rows.zero_rows(words[mine], shape, strides, plan.backend) if closer else None
            found[at] = zero is not None
            if told:
                speaks = np.ones(rows.count_rows(shape), np.bool_) if zero is None else ~zero
                spoken.setdefault(bucket.index, {})[place] = speaks
                if zero is not None:  # an abstention's bits are 0
                    planes[0][mine] &= rows.spoken_words(speaks, shape, strides, plan.backend, words.device)
    return found, spoken
