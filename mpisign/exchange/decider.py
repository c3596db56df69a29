"""What this rank decides of a bucket, from all ranks' messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from mpisign.backends import WORD, Backend, Count
from mpisign.exchange import rows
from mpisign.exchange.header import Heard
from mpisign.layout import Bucket, Layout, Segment
from mpisign.memory.store import MemoryStore
from mpisign.policy import StepContext
from mpisign.rules import BallotRule, RecodedMean, VectorRule

__all__ = ["Decider", "Deciding", "Run"]

Run = tuple[int, int, tuple[int, ...]]
"""(start, stop, voters) of consecutive items."""


Deciding = Callable[[Sequence[torch.Tensor], torch.Tensor, int], None]
"""Decides items ``start .. start + out.shape[1]`` of a bucket: (the M ranks' messages of them, out, start)."""


class Decider:
    """Decides one bucket, or this rank's shard of it. What its rule keeps is in ``store``."""

    def __init__(self, layout: Layout, bucket: Bucket, backend: Backend, store: MemoryStore) -> None:
        self._layout, self._bucket, self._backend, self._store = layout, bucket, backend, store
        rule = bucket.method.rule
        self._previous: torch.Tensor | None = None
        if isinstance(rule, VectorRule) and rule.remembers:
            self._previous = torch.zeros((1, bucket.length), dtype=bucket.dtype, device=layout.device)
            for segment in bucket.segments:  # so that they are there from now on
                self._kept(segment)

    def decide(
        self,
        heard: Heard,
        context: StepContext,
        messages: Sequence[torch.Tensor],
        out: torch.Tensor,
        start: int,
        tied: torch.Tensor | None,
    ) -> Count:
        """Decide items ``start .. start + out.shape[1]`` from the M ranks' messages. Returns the ties.

        Args:
            tied: as in :class:`~mpisign.policy.StepContext`.
        """
        rule = self._bucket.method.rule
        if isinstance(rule, RecodedMean):
            self._recode(rule, heard, context, messages, out, start)
            return 0
        if self._previous is not None:
            for segment in self._bucket.segments:
                self._previous[0, segment.start : segment.stop].copy_(self._kept(segment))
        ties: Count = 0
        for run_start, run_stop, ranks in self.runs(heard):
            span = self._overlap(run_start, run_stop, start, out)
            if span is None or not ranks:
                continue
            voting = [messages[rank][:, span] for rank in ranks]
            here = dataclasses.replace(context, tied=tied, previous=self._previous, voters=ranks)
            ties = ties + rule.decide(voting, out[:, span], here, self._bucket.first_word + start + span.start)
        if isinstance(rule, BallotRule):
            for place in heard.spoken:
                here = dataclasses.replace(context, tied=tied, previous=self._previous)
                ties = ties + self._decide_rows(rule, heard, place, here, messages, out, start)
        return ties

    def runs(self, heard: Heard) -> list[Run]:
        """Who votes on what: usually one run, the whole bucket. Segments of which rows are told are left out."""
        segments, told = self._bucket.segments, heard.spoken
        if heard.unanimous is not None:
            return [(segments[0].start, segments[-1].stop, heard.unanimous)]
        if isinstance(self._bucket.method.rule, VectorRule):  # whoever votes votes on everything, with zeros
            return [(segments[0].start, segments[-1].stop, tuple(np.flatnonzero(heard.votes.any(1)).tolist()))]
        runs: list[Run] = []
        for place, segment in enumerate(segments):
            ranks = () if place in told else heard.voters(place)
            if runs and runs[-1][2] == ranks:
                runs[-1] = (runs[-1][0], segment.stop, ranks)
            else:
                runs.append((segment.start, segment.stop, ranks))
        return runs

    def remember(self, decision: torch.Tensor) -> None:
        """Keep a decision (1, length) for the next time."""
        if self._previous is not None:
            for segment in self._bucket.segments:
                self._kept(segment).copy_(decision[0, segment.start : segment.stop])

    def _kept(self, segment: Segment) -> torch.Tensor:
        parameter = self._layout.parameters[segment.index]
        return self._store.piece(parameter, 0, segment.numel, self._bucket.dtype)

    def _overlap(self, lo: int, hi: int, start: int, out: torch.Tensor) -> slice | None:
        """Items ``lo .. hi`` of the bucket, as far as they are in ``out``."""
        lo, hi = max(lo, start), min(hi, start + out.shape[1])
        return slice(lo - start, hi - start) if lo < hi else None

    def _decide_rows(
        self,
        rule: BallotRule,
        heard: Heard,
        place: int,
        context: StepContext,
        messages: Sequence[torch.Tensor],
        out: torch.Tensor,
        start: int,
    ) -> Count:
        """A segment on some of whose rows ranks may abstain."""
        segment, ranks = self._bucket.segments[place], heard.voters(place)
        span = self._overlap(segment.start, segment.stop, start, out)
        if span is None or not ranks:
            return 0
        mine = slice(span.start + start - segment.start, span.stop + start - segment.start)
        shape, strides = self._layout.parameters[segment.index].shape, self._layout.strides[segment.index]
        speaking = heard.spoken[place][list(ranks)]
        spoken = [words[mine] for words in rows.spoken_words(speaking, shape, strides, self._backend, out.device)]
        voting = [messages[rank][:, span] & its for rank, its in zip(ranks, spoken, strict=True)]
        moved = out[1, span] if len(out) > 1 and rule.elects else torch.empty_like(spoken[0], dtype=WORD)
        here = dataclasses.replace(context, voters=ranks)
        first_word = self._bucket.first_word + start + span.start
        return rule.decide_spoken(voting, spoken, out[:, span], moved, here, first_word)

    def _recode(
        self,
        rule: RecodedMean,
        heard: Heard,
        context: StepContext,
        messages: Sequence[torch.Tensor],
        out: torch.Tensor,
        start: int,
    ) -> None:
        """The pieces that lie in ``out``: their mean, with the error kept here, in the codec again."""
        # Where several ranks decide this, all do it alike.
        context = dataclasses.replace(context, zeros_key=context.ties_key)
        for place, segment in enumerate(self._bucket.segments):
            ranks = heard.voters(place)
            for piece in segment.pieces:
                if ranks and start <= piece.start and piece.stop <= start + out.shape[1]:
                    span = slice(piece.start - start, piece.stop - start)
                    rule.recode(
                        [messages[rank][:, span] for rank in ranks],
                        self._store.piece(self._layout.parameters[segment.index], piece.lo, piece.hi),
                        out[:, span],
                        segment.codec,
                        dataclasses.replace(context, voters=ranks),
                        piece.first_word,
                    )
