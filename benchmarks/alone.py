"""A job on any machine with a GPU: over MPI where there is one, and of this process alone where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import mpisign
from mpisign import session
from mpisign.group import Group
from mpisign.trace import Tracer
from mpisign.watchdog import Watchdog

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["job"]


@contextmanager
def job() -> Iterator[MPI.Comm | None]:
    """Join the job that mpirun has started. **Collective.**

    Without an MPI library it is a job of one rank, whose messages are copied to itself. Its collectives are those of
    a step by all-gather; for anything else there is no way.

    Yields:
        The communicator of all ranks, or None without MPI.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError):  # mpi4py can be installed where MPI itself is not
        tracer = Tracer()
        alone = session.Session(Group.alone(_Myself(), gpus=True), Watchdog(tracer, None, None), tracer)
        session._session = alone
        try:
            yield None
        finally:
            session._session = None
        return
    mpisign.init()
    try:
        yield MPI.COMM_WORLD
    finally:
        mpisign.shutdown()


class _Myself:
    """What :class:`mpi4py.MPI.Comm` is to a rank without others."""

    def Iallgather(self, sent: Any, received: Any) -> _Done:  # noqa: N802 - mpi4py's names
        received.reshape(-1)[:] = sent.reshape(-1)
        return _Done()

    Iallreduce = Iallgather


class _Done:
    """A request that is over."""

    def Test(self) -> bool:  # noqa: N802
        return True
