"""How ranks wait: never in silence, and never for ever if the user has set a limit.

What counts is time spent waiting while this process runs. A rank, or a whole job, that a scheduler has stopped and
continued has not waited meanwhile, and as it does not stop and continue all ranks at one moment, a wait in which this
one was stopped may last longer by as much, up to twice as long. If one rank alone is stopped, the others have waited.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from mpisign.alarm import traceback_after
from mpisign.errors import ConsistencyError
from mpisign.presence import Presence
from mpisign.survival import RanksLostError, is_loss
from mpisign.trace import Tracer

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Pending", "Watchdog"]

logger = logging.getLogger(__name__)

SPIN_SECONDS = 0.0002  # a wait this short is worth the core; ranks may outnumber cores, so yield even then
NAP_SHARE = 0.05  # after that sleep a twentieth of the time waited so far, which delays nothing by more than 5 %
NAP_SECONDS = 0.001  # and at most this long
STOPPED_SECONDS = 0.1  # a nap that took longer than this was no nap: the process was stopped, or got no core
SUSPENDED_SECONDS = 1.0  # and one that took longer than this was a stop, of which other ranks know
LISTEN_SECONDS = 0.01  # after so long a wait other ranks may ask where this one is

_yield: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))


class Pending:
    """A nonblocking operation of MPI's, with all that it reads and writes."""

    __slots__ = ("buffers", "request")

    def __init__(self, request: MPI.Request, buffers: tuple[object, ...]) -> None:
        self.request, self.buffers = request, buffers


class _Clock:
    """How long a wait has lasted while this process ran, read once a nap.

    Attributes:
        waited: seconds in which it ran.
        stopped: seconds in which it was stopped.
    """

    def __init__(self) -> None:
        self.waited = self.stopped = 0.0
        self._last = time.monotonic()

    def tick(self) -> float:
        """Read the time; returns ``waited``."""
        now = time.monotonic()
        nap, self._last = now - self._last, now
        self.waited += min(nap, STOPPED_SECONDS)
        if nap > SUSPENDED_SECONDS:
            self.stopped += nap
        return self.waited


class Watchdog:
    """Waits, warns, and ends the job.

    Args:
        tracer: knows what goes on.
        stall_warning: seconds of waiting until a warning, and again each time they have doubled; None for never.
        stall_timeout: seconds of waiting until the job is aborted; None for never.

    Attributes:
        comm, rank, size: who waits, for messages and to end all; the first is None until there is a group.
        broken: where this rank was interrupted, or "". The others wait for it there, so the job can only end.
        survives: the job outlives its ranks: MPI's error that one has died becomes RanksLostError, and breaks nothing.
    """

    def __init__(self, tracer: Tracer, stall_warning: float | None, stall_timeout: float | None) -> None:
        self._tracer, self._warning, self.stall_timeout = tracer, stall_warning, stall_timeout
        times = [seconds for seconds in (stall_warning, stall_timeout) if seconds is not None]
        self._announce_at = min(times) / 2 if times else float("inf")
        self._posted: set[Pending] = set()
        self.comm: MPI.Comm | None = None
        self.rank, self.size = 0, 1
        self.broken = ""
        self.survives = False
        self._talking = _Unbroken(self, naming=True)

    def post(self, request: MPI.Request, *buffers: object) -> Pending:
        """Keep a request and what it reads and writes alive until it is waited for, whatever comes between."""
        pending = Pending(request, buffers)
        self._posted.add(pending)
        return pending

    def wait(self, pending: Pending, presence: Presence) -> None:
        """Wait for a collective operation. Every rank must wait for the same ones, in the same order.

        Raises:
            ConsistencyError: MPI says that the ranks' messages do not fit each other.
        """
        presence.begin()
        with self._talking:
            if not pending.request.Test():
                self._wait(pending.request, presence)
        self._posted.discard(pending)

    def test(self, pending: Pending) -> bool:
        """Whether an operation is over, without waiting; each call also lets MPI go on with it.

        It is to be counted as a wait (:meth:`Presence.begin`) when all ranks are at the same place again.
        """
        with self._talking:
            over = bool(pending.request.Test())
        if over:
            self._posted.discard(pending)
        return over

    def drain(self, seconds: float) -> None:
        """Wait until operations that were revoked are over, so that MPI writes nowhere any more; at most so long."""
        from mpi4py import MPI

        end = time.monotonic() + seconds
        while self._posted and time.monotonic() < end:
            for pending in list(self._posted):
                try:
                    over = pending.request.Test()
                except MPI.Exception:
                    continue  # one of its parts, which is over with that
                if over:
                    self._posted.discard(pending)

    def _wait(self, request: MPI.Request, presence: Presence) -> None:
        clock, waited, warn_at = _Clock(), 0.0, self._warning
        while not request.Test():
            _yield() if waited < SPIN_SECONDS else time.sleep(min(waited * NAP_SHARE, NAP_SECONDS))
            waited = clock.tick()
            if waited < LISTEN_SECONDS:
                continue
            presence.listen(self._where())
            if waited >= self._announce_at:
                presence.announce(self._where())
            if warn_at is not None and waited >= warn_at:
                logger.warning("%s", self._stalled(waited, presence.missing()))
                warn_at *= 2
            if self._is_over(clock):
                self._give_up(waited, presence.missing())

    def wait_for_thread(self, lock: Any, what: str, number: Callable[[], int]) -> None:
        """Acquire a lock that another thread has during an operation; ``number`` tells one operation from the next."""
        clock, warn_at, began = _Clock(), self._warning, number()
        while not lock.acquire(timeout=STOPPED_SECONDS / 10):
            if number() != began:
                clock, warn_at, began = _Clock(), self._warning, number()
            waited, where = clock.tick(), f"{what}, for another thread of this process, which is in {self._where()}"
            if warn_at is not None and waited >= warn_at:
                logger.warning("%s", self._stalled(waited, "", where))
                warn_at *= 2
            if self._is_over(clock):
                self._give_up(waited, "", where)

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Watch a call of MPI's that blocks, from a thread. Raises as :meth:`wait` does."""
        if self._warning is None and self.stall_timeout is None:
            with _Unbroken(self, what, naming=True):
                yield
            return
        done = threading.Event()
        watching = threading.Thread(target=self._watch, args=(what, done), name="mpisign watchdog", daemon=True)
        watching.start()
        try:
            with _Unbroken(self, what, naming=True):
                yield
        finally:
            done.set()

    def _watch(self, what: str, done: threading.Event) -> None:
        clock, warn_at = _Clock(), self._warning
        while not done.wait(STOPPED_SECONDS / 10):
            waited = clock.tick()
            if warn_at is not None and waited >= warn_at:
                logger.warning("%s", self._stalled(waited, "", what))
                warn_at *= 2
            if self._is_over(clock):
                self._give_up(waited, "", what)

    def _is_over(self, clock: _Clock) -> bool:
        limit = self.stall_timeout
        return limit is not None and clock.waited >= limit + min(clock.stopped, limit)

    @contextmanager
    def guard_start(self) -> Iterator[None]:
        """Watch the start of MPI, in which Python stands still.

        What is shown at the end of ``stall_timeout`` (or, without one, of ``stall_warning``) is a traceback.
        """
        seconds = self.stall_timeout or self._warning
        if seconds is None or "mpi4py.MPI" in sys.modules:
            yield
            return
        with traceback_after(seconds, end=self.stall_timeout is not None):
            yield

    def unbroken(self, what: str = "") -> AbstractContextManager[None]:
        """An exception inside leaves the others in the middle of something: nothing may follow.

        What was posted by then is kept for ever, as MPI may still write there.
        """
        return _Unbroken(self, what)

    def abort(self, reason: str, code: int = 1) -> None:
        """End every process of the job at once, saying why."""
        from mpi4py import MPI

        logger.critical("%s: aborting the job", reason)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # a closed pipe must not keep the job alive
                stream.flush()
        if threading.current_thread() is not threading.main_thread() and MPI.Query_thread() != MPI.THREAD_MULTIPLE:
            os._exit(code)  # the launcher ends the others
        (self.comm or MPI.COMM_WORLD).Abort(code)

    def _give_up(self, waited: float, missing: str, what: str = "") -> None:
        self.abort(f"{self._stalled(waited, missing, what)}; stall_timeout={self.stall_timeout:g} is over")

    def _stalled(self, waited: float, missing: str, what: str = "") -> str:
        return f"rank {self.rank} of {self.size} has waited {waited:.3g} s in {what or self._where()}" + (
            missing and f"; {missing}"
        )

    def _where(self) -> str:
        return self._tracer.where() or "an exchange"


class _Unbroken(AbstractContextManager[None]):
    """See :meth:`Watchdog.unbroken`; with ``naming``, MPI's own errors become ConsistencyError. A step enters many."""

    __slots__ = ("_dog", "_naming", "_what")

    def __init__(self, dog: Watchdog, what: str = "", *, naming: bool = False) -> None:
        self._dog, self._what, self._naming = dog, what, naming

    def __enter__(self) -> None:
        """Nothing is to be done before."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            return
        dog = self._dog
        where = self._what or dog._where()
        if dog.survives and is_loss(error, dog.comm):
            if isinstance(error, RanksLostError):
                return
            raise RanksLostError(f"rank {dog.rank} of {dog.size}: in {where}: {error}") from error
        dog.broken = dog.broken or where
        if self._naming and type(error).__module__.partition(".")[0] == "mpi4py":
            raise ConsistencyError(
                f"rank {dog.rank} of {dog.size}: MPI has failed in {where}: {error}. A rank has sent something else "
                f"than the others expect, or has died"
            ) from error
