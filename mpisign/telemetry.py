"""What a step did and how long it took: spans for the profiler, seconds and a report for the user."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from mpisign.errors import MpisignError

__all__ = ["PHASES", "StepReport", "Stopwatch"]

PHASES = ("pack", "exchange", "decide", "unpack")


class Stopwatch:
    """Seconds per phase of one step. Each span also appears in the torch profiler as ``mpisign::<phase>``."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)

    def span(self, phase: str) -> Span:
        """A context: count the time spent inside to ``phase``."""
        return Span(self.seconds, phase)


class Span:
    """See :meth:`Stopwatch.span`. A step has a dozen, so they must cost next to nothing."""

    def __init__(self, seconds: dict[str, float], phase: str) -> None:
        self._seconds, self._phase = seconds, phase
        self._record: AbstractContextManager[object] | None = None

    def __enter__(self) -> None:
        if torch._C._autograd._profiler_enabled():
            self._record = torch.profiler.record_function(f"mpisign::{self._phase}")
            self._record.__enter__()
        self._began = time.perf_counter()

    def __exit__(self, *exception: Any) -> None:
        self._seconds[self._phase] += time.perf_counter() - self._began
        if self._record is not None:
            self._record.__exit__(*exception)


@dataclass(frozen=True)
class StepReport:
    """What the last ``synchronize()`` (or ``step()``) did. The same on every rank but for ``seconds``.

    Attributes:
        step: number of the exchange, from 0.
        method: the method's name, e.g. ``"signum"``.
        exchange: how each bucket crossed MPI, e.g. ``("two_phase", "allgather")``.
        bytes_sent: bytes this rank handed to MPI for other ranks: messages and headers.
        header_bytes: how many of them were headers.
        voters: the ranks whose gradient was heard.
        abstentions: rank -> why it did not vote: ``"non-finite gradient"``, ``"inf found by GradScaler"``,
            ``"joined"`` (out of batches), ``"no gradient"``.
        skipped: nobody voted; parameters and optimizer state stay as they are, on every rank.
        ties: coordinates with as many votes for as against; None for a rule that has no ties.
        seconds: wall time of this rank in ``pack`` (memory and codec), ``exchange`` (MPI, with the wait for
            slower ranks), ``decide`` (count the votes) and ``unpack``.
    """

    step: int
    method: str
    exchange: tuple[str, ...]
    bytes_sent: int
    header_bytes: int
    voters: tuple[int, ...]
    abstentions: Mapping[int, str]
    skipped: bool
    ties: int | None
    seconds: Mapping[str, float]
    _agreement: Callable[[], list[float]] | None = field(default=None, repr=False, compare=False)

    def agreement(self) -> list[float]:
        """The share of coordinates on which each rank's ballot agreed with the decision. **Collective.**

        Coordinates on which a rank abstained or the decision was "do not move" do not count; the share of a
        rank that did not vote is NaN. It costs a pass over the bitmaps, which live until the next step.

        Returns:
            M shares in [0, 1], by rank.

        Raises:
            MpisignError: the next step has overwritten the bitmaps, or the method casts no votes.
        """
        if self._agreement is None:
            raise MpisignError(f"method {self.method!r} casts no votes, so there is nothing to agree with")
        return self._agreement()
