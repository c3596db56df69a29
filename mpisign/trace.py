"""What a rank does and when: named spans in a ring buffer, which reports, stall messages and timeline are read from.

A span costs about a microsecond and a step has a few dozen, so they are always on.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager
from itertools import islice
from time import perf_counter_ns
from typing import Any, NamedTuple

import torch

__all__ = ["OTHER", "PHASES", "PHASE_OF", "Span", "Tracer"]

PHASES = ("pack", "exchange", "decide", "unpack")
"""What the seconds of a step are told by."""

PHASE_OF = {
    "handshake": "exchange",
    "sum of memories": "exchange",
    "pack": "pack",
    "maximum": "exchange",
    "send": "exchange",
    "header": "exchange",
    "phase 1": "exchange",
    "decide": "decide",
    "phase 2": "exchange",
    "phase 3": "exchange",
    "phase 4": "exchange",
    "unpack": "unpack",
    "count of ties": "exchange",
}
"""The spans of a step. Together, without what lies inside another, they are its time but for Python between them."""

OTHER = "other calls"
"""The phase of all other spans, such as ``barrier()``."""

CAPACITY = 1 << 15  # spans, about 5 MB


class Span(NamedTuple):
    """Something this rank did. Times are nanoseconds of :func:`time.perf_counter_ns`; -1: of no step or message.

    Attributes:
        inner: nanoseconds of spans inside it.
    """

    name: str
    step: int
    message: int
    begin: int
    end: int
    inner: int = 0


class Tracer:
    """The latest ``capacity`` spans of this rank, and those that are open.

    Attributes:
        step: number of the exchange that goes on, or -1 outside.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.step = -1
        self._spans: deque[Span] = deque(maxlen=capacity)
        self._count = 0  # of all spans ever
        self._open: list[_Open] = []

    def keep(self, capacity: int) -> None:
        """From now on the latest so many."""
        self._spans = deque(self._spans, maxlen=capacity)

    @property
    def capacity(self) -> int:
        """How many spans are kept."""
        return self._spans.maxlen or 0

    def span(self, name: str, message: int = -1) -> AbstractContextManager[None]:
        """A context that takes down when it began and ended; torch's profiler sees ``mpisign::<phase>``.

        Args:
            message: which of the step's messages it is about.
        """
        return _Open(self, name, message)

    def stepping(self, step: int) -> AbstractContextManager[None]:
        """What is done inside belongs to this step."""
        return _Stepping(self, step)

    def spans(self, since: int = 0) -> list[Span]:
        """The spans that are still there, in the order in which they ended; of the ``since``-th ever and later."""
        kept = min(self._count - since, len(self._spans))
        return list(islice(reversed(self._spans), kept))[::-1]

    def mark(self) -> int:
        """How many spans have ended so far, to be given to :meth:`spans` and :meth:`seconds`."""
        return self._count

    def seconds(self, since: int) -> dict[str, float]:
        """Seconds by phase, of the spans of steps that have ended since then."""
        total = dict.fromkeys(PHASES, 0)
        for span in islice(reversed(self._spans), min(self._count - since, len(self._spans))):
            if span.name in PHASE_OF:
                total[PHASE_OF[span.name]] += span.end - span.begin - span.inner
        return {phase: nanoseconds * 1e-9 for phase, nanoseconds in total.items()}

    def where(self) -> str:
        """What goes on, for messages: ``"step 17, bucket 3, phase 1"``, ``"barrier()"``; "" if no span is open."""
        if not self._open:
            return ""
        span = self._open[-1]
        parts = [f"step {self.step}"] if self.step >= 0 and span.name in PHASE_OF else []
        parts += [f"bucket {span.message}"] if span.message >= 0 else []
        return ", ".join([*parts, span.name])

    def _ended(self, span: Span) -> None:
        self._spans.append(span)
        self._count += 1


class _Stepping(AbstractContextManager[None]):
    """See :meth:`Tracer.stepping`."""

    __slots__ = ("_step", "_tracer")

    def __init__(self, tracer: Tracer, step: int) -> None:
        self._tracer, self._step = tracer, step

    def __enter__(self) -> None:
        self._tracer.step = self._step

    def __exit__(self, *exception: Any) -> None:
        self._tracer.step = -1


class _Open(AbstractContextManager[None]):
    """A span that has begun."""

    __slots__ = ("_began", "_inner", "_record", "_tracer", "message", "name")

    def __init__(self, tracer: Tracer, name: str, message: int) -> None:
        self._tracer, self.name, self.message = tracer, name, message
        self._record: AbstractContextManager[object] | None = None
        self._inner = 0

    def __enter__(self) -> None:
        self._tracer._open.append(self)
        if torch._C._autograd._profiler_enabled():
            self._record = torch.profiler.record_function(f"mpisign::{PHASE_OF.get(self.name, self.name)}")
            self._record.__enter__()
        self._began = perf_counter_ns()

    def __exit__(self, *exception: Any) -> None:
        ended = perf_counter_ns()
        if self._record is not None:
            self._record.__exit__(*exception)
        tracer = self._tracer
        tracer._open.remove(self)
        if tracer._open:
            tracer._open[-1]._inner += ended - self._began
        tracer._ended(Span(self.name, tracer.step, self.message, self._began, ended, self._inner))
