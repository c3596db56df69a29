"""The ranks' private channel: how they wait, meet and tell each other things without ever hanging in silence.

Everything ranks do together begins with the same small all-gather, the *call*, whatever it is for. So ranks that
do different things meet in it and are told, where other messages of theirs would be mistaken for each other.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from mpisign.errors import ConsistencyError

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["ACTS", "CALL_FIELDS", "EXIT", "Channel", "first_difference", "minority"]

T = TypeVar("T")

logger = logging.getLogger(__name__)

SPIN_SECONDS = 0.0002  # a wait this short is worth the core; ranks may outnumber cores, so yield even then
NAP_SHARE = 0.05  # after that sleep a twentieth of the time waited so far, which delays nothing by more than 5 %
NAP_SECONDS = 0.001  # and at most this long

CALL_FIELDS = 4  # how many numbers a call has, whatever it is for
EXIT = "exit"
ACTS = (
    EXIT,
    "barrier()",
    "broadcast_object()",
    "allgather_object()",
    "broadcast_parameters()",
    "broadcast_optimizer_state()",
    "check_consistency()",
    "agreement()",
    "a comparison of layouts",
    "checkpoint.save()",
    "checkpoint.wait()",
    "checkpoint.load()",
    "checkpoint.newest()",
)
"""What ranks do together besides steps. A call begins with -2 - its place here; a step's with a number above 0."""

_UNHEARD = -1
_yield: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))


@dataclass
class Channel:
    """A communicator of the library's own, watched: ``rank``, ``size``, and the stall times of ``init()``."""

    comm: MPI.Comm
    rank: int
    size: int
    stall_warning: float | None
    stall_timeout: float | None
    parted: bool = field(default=False, init=False)  # a rank has left before the others: all can only end
    broken: str = field(default="", init=False)  # where this rank was interrupted; the others wait for it there
    wants_stop: bool = field(default=False, init=False)  # this rank has been asked to stop
    stopping: bool = field(default=False, init=False)  # some rank had been, when all last called: the same on all
    farewells: ExitStack = field(default_factory=ExitStack, init=False, repr=False)  # done when all leave together
    _orphans: list[object] = field(default_factory=list, init=False, repr=False)

    def wait(self, request: MPI.Request, what: str, missing: Callable[[], str] | None = None) -> None:
        """Wait for a request without losing sight of time.

        Logs a warning after ``stall_warning`` seconds, and again each time the wait has doubled; aborts the
        job after ``stall_timeout`` seconds.

        Args:
            request: a nonblocking MPI operation.
            what: step and phase for the message, e.g. ``"step 17, handshake"``.
            missing: says, if it can be told, whom this rank waits for.
        """
        began = time.monotonic()
        warn_at = self.stall_warning
        with self.unbroken(what, request):
            while not request.Test():
                waited = time.monotonic() - began
                _yield() if waited < SPIN_SECONDS else time.sleep(min(waited * NAP_SHARE, NAP_SECONDS))
                if warn_at is not None and waited >= warn_at:
                    logger.warning("%s", self._stalled(waited, what, missing))
                    warn_at *= 2
                if self.stall_timeout is not None and waited >= self.stall_timeout:
                    self.abort(f"{self._stalled(waited, what, missing)}; stall_timeout={self.stall_timeout:g} is over")

    @contextmanager
    def unbroken(self, what: str, *pending: object) -> Iterator[None]:
        """An exception inside leaves the others in the middle of something: nothing may follow on this channel.

        What is ``pending`` (requests, which hold their buffers) is kept for ever, as MPI may still write there.
        """
        try:
            yield
        except BaseException:
            self.broken = self.broken or what
            self._orphans += pending
            raise

    def _stalled(self, waited: float, what: str, missing: Callable[[], str] | None) -> str:
        whom = missing() if missing is not None else ""
        return f"rank {self.rank} of {self.size} has waited {waited:.3g} s in {what}" + (whom and f"; {whom}")

    def call(self, mine: npt.NDArray[np.int64], what: str) -> npt.NDArray[np.int64]:
        """All-gather a few numbers, the same few from everyone: (fields,) int64 to (M, fields). **Collective.**

        The wish to stop travels as the lowest bit of the last number, so that no number may need more than 63 bits.
        """
        if self.broken:
            raise ConsistencyError(
                f"rank {self.rank} was interrupted in {self.broken}, where the other ranks still wait for it: this job "
                f"can only end"
            )
        if self.parted:
            raise ConsistencyError(f"rank {self.rank}: a rank has left the job before the others; it can only end now")
        said, heard = mine.copy(), np.full((self.size, mine.size), _UNHEARD, np.int64)
        said[-1] = 2 * mine[-1] + self.wants_stop

        def missing() -> str:
            # Only a hint in a warning: what has arrived so far, read while MPI still owns the buffer.
            unheard = [rank for rank in range(self.size) if rank != self.rank and heard[rank, 0] == _UNHEARD]
            return f"not heard from yet: ranks {unheard}" if unheard else ""

        self.wait(self.comm.Iallgather(said, heard), what, missing)
        self.stopping = bool((heard[:, -1] & 1).any())
        heard[:, -1] >>= 1
        return heard

    def meet(self, act: str, number: int = 0) -> npt.NDArray[np.int64]:
        """Make sure that all ranks are about to do the same thing, one of ``ACTS``. **Collective.**

        Returns:
            Every rank's ``number``: (M,).

        Raises:
            ConsistencyError: on every rank, saying who does what.
        """
        mine = np.zeros(CALL_FIELDS, np.int64)
        mine[:2] = -2 - ACTS.index(act), number
        heard = self.call(mine, act)
        self.demand_same_act(heard)
        return heard[:, 1]

    def demand_same_act(self, heard: npt.NDArray[np.int64]) -> None:
        """Raise :class:`ConsistencyError` if a call, (M, fields), shows ranks that do different things."""
        acts = [ACTS[-2 - code] if code < 0 else "step()" for code in heard[:, 0].tolist()]
        if len(set(acts)) > 1:
            self.parted = EXIT in acts
            who = "; ".join(
                f"ranks {[rank for rank, its in enumerate(acts) if its == act]} "
                + ("have left the job" if act == EXIT else f"are in {act}")
                for act in sorted(set(acts))
            )
            raise ConsistencyError(
                f"ranks do different things: {who} (this is rank {self.rank}). Every rank must make the same calls in "
                f"the same order; where ranks have different numbers of batches, call optimizer.join() on every rank "
                f"when its batches end"
            )

    def gather(self, obj: Any, act: str) -> list[Any]:
        """Every rank's object, pickled, on every rank. **Collective.** Begins with :meth:`meet`."""
        mine = np.frombuffer(pickle.dumps(obj), np.uint8)  # before the others depend on it: it may fail
        sizes = self.meet(act, mine.size).tolist()
        heard = np.empty(sum(sizes), np.uint8)
        self.wait(self.comm.Iallgatherv(mine, [heard, sizes]), act)
        ends = np.cumsum(sizes).tolist()
        return [pickle.loads(heard[end - size : end].data) for size, end in zip(sizes, ends, strict=True)]

    def spread(self, obj: Any, root: int, act: str) -> Any:
        """``root``'s object, pickled, on every rank. **Collective.** Begins with :meth:`meet`."""
        message = np.frombuffer(bytearray(pickle.dumps(obj) if self.rank == root else b""), np.uint8)
        size = int(self.meet(act, message.size)[root])
        if self.rank != root:
            message = np.empty(size, np.uint8)
        self.wait(self.comm.Ibcast(message, root=root), act)
        return obj if self.rank == root else pickle.loads(message.data)

    def say_goodbye(self) -> bool:
        """Meet the others before leaving, as MPI_Finalize would wait for them in silence. **Collective.**

        What is in ``farewells`` is done after that, and may be collective.

        Returns:
            Whether all leave together. If not, the others get an error, and this rank is past doing anything about it.
        """
        if self.broken and self.size > 1:
            self.abort(f"rank {self.rank} leaves the job; it was interrupted in {self.broken}, where the others wait")
        try:
            self.meet(EXIT)
        except ConsistencyError as error:
            logger.error("%s", error)
            return False
        self.farewells.close()
        return True

    def abort(self, reason: str, code: int = 1) -> None:
        """End every process of the job at once, saying why."""
        logger.critical("%s: aborting the job", reason)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # a closed pipe must not keep the job alive
                stream.flush()
        self.comm.Abort(code)


def minority(values: Sequence[T]) -> tuple[list[int], T]:
    """The ranks whose value is not the most common one (of equals, rank 0's is), and that common value."""
    usual = max(values, key=lambda value: (values.count(value), value == values[0]))
    return [rank for rank, value in enumerate(values) if value != usual], usual


def first_difference(mine: Sequence[str], theirs: Sequence[str]) -> tuple[str, str]:
    """The first pair of lines that differ; where one side has ended it is "nothing more"."""
    pairs = zip_longest(mine, theirs, fillvalue="nothing more")
    return next(((here, there) for here, there in pairs if here != there), ("nothing more", "nothing more"))
