"""One operation at a time: ranks take each other's messages in order, whichever of their threads has begun."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from mpisign.errors import LaunchError
from mpisign.watchdog import Watchdog

__all__ = ["Turns"]


class Turns:
    """Who is in an operation: a thread of this process, until the operation is over; the others wait."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog
        self._lock = threading.RLock()
        self._first = threading.get_ident()
        self._count = 0

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Inside, no other thread is in an operation.

        Raises:
            LaunchError: MPI was started for one thread, and this is another.
        """
        if threading.get_ident() != self._first:
            _check_level(what)
        if not self._lock.acquire(blocking=False):
            self._watchdog.wait_for_thread(self._lock, what, lambda: self._count)
        try:
            self._count += 1
            yield
        finally:
            self._lock.release()

    def may_talk(self) -> bool:
        """Whether MPI was started for this thread, too."""
        return threading.get_ident() == self._first or _may_talk()

    @contextmanager
    def at_once(self) -> Iterator[bool]:
        """The same without waiting: whether this thread may talk to other ranks now."""
        mine = self.may_talk() and self._lock.acquire(blocking=False)
        try:
            yield mine
        finally:
            if mine:
                self._lock.release()


def _may_talk() -> bool:
    from mpi4py import MPI

    return MPI.Query_thread() >= MPI.THREAD_SERIALIZED or MPI.Is_thread_main()


def _check_level(what: str) -> None:
    if not _may_talk():
        raise LaunchError(
            f"{what} in another thread than the one that has started MPI, which was started for that one alone: unset "
            f"MPI4PY_RC_THREADS and MPI4PY_RC_THREAD_LEVEL, set mpi4py.rc.thread_level = 'multiple' before init(), or "
            f"call it in the main thread"
        )
