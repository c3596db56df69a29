"""Who votes on what: a message cut into runs of coordinates that have the same voters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch

from mpisign.bitmap.ops import Count
from mpisign.layout import Bucket
from mpisign.policy import StepContext
from mpisign.rules import Rule

__all__ = ["Decide", "decide_runs", "runs_of"]

Decide = Callable[[Sequence[torch.Tensor], torch.Tensor, int], None]
"""``decide(messages, out, start)``: decide items ``start .. start + out.shape[1]`` of a bucket from the M
ranks' messages (planes_up, k), in the order of the ranks, into ``out`` (planes_down, k)."""

Run = tuple[int, int, tuple[int, ...]]


def runs_of(bucket: Bucket, voters: Sequence[tuple[int, ...]]) -> list[Run]:
    """(start, stop, ranks that vote) for consecutive items; usually one run, the whole bucket.

    Args:
        voters: the voting ranks of each parameter, by its index in the layout.
    """
    if voters and voters.count(voters[0]) == len(voters):
        return [(bucket.segments[0].start, bucket.segments[-1].stop, voters[0])]
    runs: list[Run] = []
    for segment in bucket.segments:
        ranks = voters[segment.index]
        if runs and runs[-1][2] == ranks:
            runs[-1] = (runs[-1][0], segment.stop, ranks)
        else:
            runs.append((segment.start, segment.stop, ranks))
    return runs


def decide_runs(
    rule: Rule,
    context: StepContext,
    bucket: Bucket,
    runs: Sequence[Run],
    messages: Sequence[torch.Tensor],
    out: torch.Tensor,
    start: int,
    *,
    previous: torch.Tensor | None = None,
    tied: torch.Tensor | None = None,
) -> Count:
    """Apply ``rule`` to each run that overlaps the items from ``start`` on; returns the ties.

    Args:
        previous, tied: as in :class:`~mpisign.policy.StepContext`, the first for all of ``out``.
    """
    ties: Count = 0
    end = start + out.shape[1]
    for run_start, run_stop, ranks in runs:
        lo, hi = max(run_start, start), min(run_stop, end)
        if lo >= hi or not ranks:
            continue
        voting, target, before = [messages[rank] for rank in ranks], out, previous
        if hi - lo < out.shape[1]:
            span = slice(lo - start, hi - start)
            voting, target = [message[:, span] for message in voting], out[:, span]
            before = None if previous is None else previous[:, span]
        here = dataclasses.replace(context, voters=ranks, previous=before, tied=tied)
        ties = ties + rule.decide(voting, target, here, bucket.first_word + lo)
    return ties
