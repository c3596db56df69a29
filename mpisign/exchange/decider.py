"""What this rank decides of a bucket, from all ranks' messages."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch

from mpisign.backends import WORD, Count, backend_for
from mpisign.exchange import rows
from mpisign.exchange.header import Bools, Heard
from mpisign.layout import Bucket, Layout, Segment
from mpisign.memory.store import MemoryStore
from mpisign.policy import StepContext
from mpisign.rules import BallotRule, PieceRule, TallyRule, VectorRule

__all__ = ["Decider", "Deciding", "Run"]

Run = tuple[int, int, tuple[int, ...]]
"""(start, stop, voters) of consecutive items."""


class Decider:
    """Decides one bucket, or this rank's shard of it. What its rule keeps is in ``store``."""

    def __init__(self, layout: Layout, bucket: Bucket, store: MemoryStore) -> None:
        self._layout, self._bucket, self._store = layout, bucket, store
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
        if isinstance(rule, PieceRule):
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
            ties = ties + rule.decide(voting, out[:, span], here, self._first_word(start, span))
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

    def tally(
        self, heard: Heard, ranks: Sequence[int], ballots: Sequence[torch.Tensor], out: torch.Tensor, start: int
    ) -> None:
        """Count the ballots of some ``ranks``, items ``start .. start + out.shape[2]``, into a tally (C, p, k)."""
        rule = self._bucket.method.rule
        assert isinstance(rule, TallyRule)
        for run_start, run_stop, voters in self.runs(heard):
            span = self._overlap(run_start, run_stop, start, out)
            if span is not None:
                who = frozenset(voters)  # of maybe thousands
                voting = [ballot[:, span] for rank, ballot in zip(ranks, ballots, strict=True) if rank in who]
                _count(rule, voting, out[:, :, span])
        for place, spoken in heard.spoken.items():
            segment, voters = self._bucket.segments[place], heard.voters(place)
            span = self._overlap(segment.start, segment.stop, start, out)
            if span is None:
                continue
            voting = []
            for rank, ballot in zip(ranks, ballots, strict=True):
                if rank in voters:
                    voting.append(ballot[:, span] & self._spoken_words(segment, spoken[rank], start, span, out.device))
            _count(rule, voting, out[:, :, span])

    def settle(
        self,
        heard: Heard,
        context: StepContext,
        tallies: Sequence[torch.Tensor],
        total: torch.Tensor,
        out: torch.Tensor,
        start: int,
    ) -> Count:
        """What :meth:`decide` would, from the tallies (C, p, k) of all ballots. Returns the ties.

        Args:
            total: scratch for their sum, (C, q, k); itself the one tally, if there is but one.
        """
        rule = self._bucket.method.rule
        assert isinstance(rule, TallyRule)
        if len(tallies) > 1:
            rule.merge(tallies, total)
        ties: Count = 0
        for run_start, run_stop, ranks in self.runs(heard):
            span = self._overlap(run_start, run_stop, start, out)
            if span is not None and ranks:
                here, first_word = dataclasses.replace(context, voters=ranks), self._first_word(start, span)
                ties = ties + rule.settle(total[:, :, span], out[:, span], here, first_word)
        for place, rows_of in heard.spoken.items():
            segment, ranks = self._bucket.segments[place], heard.voters(place)
            span = self._overlap(segment.start, segment.stop, start, out)
            if span is None or not ranks:
                continue
            speaking = self._spoken_words(segment, rows_of[list(ranks)], start, span, out.device)
            voted = torch.empty((len(ranks).bit_length(), speaking.shape[1]), dtype=WORD, device=out.device)
            backend_for(out.device).count(list(speaking), voted)
            here, first_word = dataclasses.replace(context, voters=ranks), self._first_word(start, span)
            decided = out[:, span]
            if rule.elects and len(out) == 1:  # "do not move" is said by the headers
                decided = torch.stack([decided[0], torch.empty_like(decided[0])])
            ties = ties + rule.settle(total[:, :, span], decided, here, first_word, voted)
            out[:, span] = decided[: len(out)]
        return ties

    def remember(self, decision: torch.Tensor) -> None:
        """Keep a decision (1, length) for the next time."""
        if self._previous is not None:
            for segment in self._bucket.segments:
                self._kept(segment).copy_(decision[0, segment.start : segment.stop])

    def _kept(self, segment: Segment) -> torch.Tensor:
        parameter = self._layout.parameters[segment.index]
        return self._store.piece(parameter, 0, segment.numel, self._bucket.dtype)

    def _overlap(self, lo: int, hi: int, start: int, out: torch.Tensor) -> slice | None:
        """Items ``lo .. hi`` of the bucket, as far as they are in ``out`` (..., k)."""
        lo, hi = max(lo, start), min(hi, start + out.shape[-1])
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
        spoken = list(self._spoken_words(segment, heard.spoken[place][list(ranks)], start, span, out.device))
        voting = [messages[rank][:, span] & its for rank, its in zip(ranks, spoken, strict=True)]
        moved = out[1, span] if len(out) > 1 and rule.elects else torch.empty_like(spoken[0], dtype=WORD)
        here = dataclasses.replace(context, voters=ranks)
        return rule.decide_spoken(voting, spoken, out[:, span], moved, here, self._first_word(start, span))

    def _spoken_words(
        self, segment: Segment, speaking: Bools, start: int, span: slice, device: torch.device
    ) -> torch.Tensor:
        """Bitmaps (..., k) of the rows (..., R) that speak, for the items in ``span``, of those from ``start``."""
        shape, strides = tuple(self._layout.parameters[segment.index].shape), self._layout.strides[segment.index]
        words: torch.Tensor = rows.spoken_words(speaking, shape, strides, backend_for(device), device)
        its: torch.Tensor = words[..., span.start + start - segment.start : span.stop + start - segment.start]
        return its

    def _first_word(self, start: int, span: slice) -> int:
        return self._bucket.first_word + start + int(span.start)

    def _recode(
        self,
        rule: PieceRule,
        heard: Heard,
        context: StepContext,
        messages: Sequence[torch.Tensor],
        out: torch.Tensor,
        start: int,
    ) -> None:
        """The pieces that lie in ``out``, in the codec again."""
        # Where several ranks decide this, all do it alike.
        context = dataclasses.replace(context, zeros_key=context.ties_key, identity=0, secret="")
        for place, segment in enumerate(self._bucket.segments):
            ranks = heard.voters(place)
            for piece in segment.pieces:
                if ranks and start <= piece.start and piece.stop <= start + out.shape[1]:
                    span = slice(piece.start - start, piece.stop - start)
                    parameter = self._layout.parameters[segment.index]
                    rule.recode(
                        [messages[rank][:, span] for rank in ranks],
                        self._store.piece(parameter, piece.lo, piece.hi) if rule.keeps else parameter.new_empty(0),
                        out[:, span],
                        piece.codec,
                        dataclasses.replace(context, voters=ranks),
                        piece.first_word,
                    )


def _count(rule: TallyRule, ballots: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    if ballots:
        rule.tally(ballots, out)
    else:
        out.zero_()


class Deciding:
    """What an exchange asks for when messages are here, of one bucket in one step: decisions on some of its items.

    Args:
        deciding: a context for the time it takes.
        counts: where a GPU adds up ties: those that are this rank's to count, and the others.

    Attributes:
        ties: those that are this rank's to count.
    """

    def __init__(
        self,
        decider: Decider,
        heard: Heard,
        context: StepContext,
        counts: torch.Tensor | None,
        deciding: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._decider, self._heard, self._context, self._counts = decider, heard, context, counts
        self._deciding = deciding
        self.ties: Count = 0

    def decide(self, messages: Sequence[torch.Tensor], out: torch.Tensor, start: int, *, counts: bool = True) -> None:
        """Items ``start .. start + out.shape[1]``, from all M ranks' messages of them.

        Args:
            counts: ties are this rank's to count, as nobody else does.
        """
        if not len(out):
            return
        tied = None if self._counts is None else self._counts[0 if counts else 1]
        with self._deciding():
            ties = self._decider.decide(self._heard, self._context, messages, out, start, tied)
        if counts:
            self.ties = self.ties + ties

    def tally(self, ranks: Sequence[int], ballots: Sequence[torch.Tensor], out: torch.Tensor, start: int) -> None:
        """Count what ``ranks`` have voted on items ``start .. start + out.shape[2]``: see :meth:`TallyRule.tally`."""
        with self._deciding():
            self._decider.tally(self._heard, ranks, ballots, out, start)

    def settle(self, tallies: Sequence[torch.Tensor], total: torch.Tensor, out: torch.Tensor, start: int) -> None:
        """Items ``start .. start + out.shape[1]``, on the host, from tallies of all ballots: see :class:`TallyRule`.

        Args:
            total: scratch for their sum; itself the one tally, if there is but one.
        """
        with self._deciding():
            self.ties = self.ties + self._decider.settle(self._heard, self._context, tallies, total, out, start)
