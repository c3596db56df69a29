"""What this rank's packing has found, besides the bits: where its ballot ends, and rows of zeros."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mpisign.backends import First
from mpisign.exchange import rows
from mpisign.exchange.header import Bools
from mpisign.exchange.plan import Batch, Plan

__all__ = ["push_and_ask", "rows_of_zeros"]


def push_and_ask(plan: Plan, batch: Batch, first: First) -> tuple[int, dict[int, bool]]:
    """On a GPU: push all messages, and with one wait, for the first of them, hear what its packing has found.

    Returns:
        The place at which the ballot ends; and by bucket, whether some word may stand for a row of zeros.
    """
    assert plan.answers is not None
    told = {bucket.index: plan.spoken[bucket.index] for bucket in batch.buckets}
    asked = {index: words for index, words in told.items() if words is not None and index not in plan.scattered}
    plan.answers.ask("first", first)
    for index, words in asked.items():
        plan.answers.ask(index, plan.backend.any_zero(words))
    for place, bucket in enumerate(batch.buckets):
        plan.exchanges[bucket.index].push()
        if place == 0:
            plan.answers.asked()
    return plan.answers.told("first"), {index: bool(plan.answers.told(index)) for index in asked}


def rows_of_zeros(
    plan: Plan, batch: Batch, votes: Bools, zeros: Mapping[int, bool] | None
) -> tuple[Bools, dict[int, dict[int, Bools]]]:
    """Which segments have rows of zeros, and, by bucket, on which rows of those that are told this rank votes."""
    found = np.zeros(len(votes), np.bool_)
    spoken: dict[int, dict[int, Bools]] = {}
    end = 0
    for bucket, planes in zip(batch.buckets, batch.encoder.rows, strict=True):
        words, start, end = plan.spoken[bucket.index], end, end + len(bucket.segments)
        look = bool(plan.told) or bucket.index in plan.scattered
        if words is None or not votes[start:end].any():
            continue
        if not look and not (plan.backend.any_zero(words) if zeros is None else zeros[bucket.index]):
            continue
        for place, segment in enumerate(bucket.segments):
            at = start + place
            if not votes[at]:
                continue
            shape, strides = tuple(plan.layout.parameters[segment.index].shape), plan.layout.strides[segment.index]
            mine = slice(segment.start, segment.stop)
            zero = rows.zero_rows(words[mine], shape, strides, plan.backend)
            found[at] = zero is not None
            if segment.name in plan.told:
                speaks = np.ones(rows.count_rows(shape), np.bool_) if zero is None else ~zero
                spoken.setdefault(bucket.index, {})[place] = speaks
                if zero is not None:  # an abstention's bits are 0
                    planes[0][mine] &= rows.spoken_words(speaks, shape, strides, plan.backend, words.device)
    return found, spoken
