"""Which process is a rank: the one that has started MPI. Its children, forked or spawned, are none.

A forked child has its parent's connections, and MPI does not know of it: whatever the child says is taken for what its
parent says next. It must not end MPI either, which mpi4py does when Python exits.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from mpisign.errors import LaunchError

__all__ = [
    "check_may_start",
    "die",
    "end_at_once",
    "end_without_mpi",
    "exit_code",
    "leave_mpi_to_us",
    "watch_exit",
    "whose_child",
]

_forked_by = 0  # the process with MPI whose fork this one, or a parent of this one, is
_code = 0  # what sys.exit() was called with, as far as it is watched
_done: Callable[[], object] = int  # what the script has done
_done_then: object = None  # when it called sys.exit()
_mpi_is_ours = False  # mpi4py does not end MPI
_without_mpi = False  # MPI would not end any more


def whose_child() -> str:
    """Why this process is no rank, "" if nothing is known against it."""
    if _forked_by:
        return f"process {_forked_by}, in which MPI runs, has forked it (a DataLoader's worker, or os.fork())"
    if _is_being_spawned():
        return "multiprocessing has started it"  # and does not say yet from which process
    parent = multiprocessing.parent_process()
    return "" if parent is None else f"multiprocessing has started it, from process {parent.pid}"


def check_may_start() -> None:
    """Raise :class:`LaunchError` where MPI must not be started: it would hang, or speak for another process."""
    if _forked_by or _is_worker():
        raise LaunchError(
            f"init() in process {os.getpid()}, which is no rank: {whose_child()}. Call it once in the main process, "
            f"and give workers what they need (rank, size, a seed) as arguments"
        )
    if _is_being_spawned():
        raise LaunchError(
            f"init() in process {os.getpid()}, which is no rank: {whose_child()}, and it imports the main script anew. "
            f"Put what the script does under `if __name__ == '__main__':`"
        )


def leave_mpi_to_us() -> None:
    """Let mpi4py, if it is not there yet, not end MPI when Python exits: where ranks have died, that never returns."""
    global _mpi_is_ours
    import mpi4py

    if "mpi4py.MPI" not in sys.modules:
        mpi4py.rc.finalize = False
        _mpi_is_ours = True


def watch_exit(done: Callable[[], object]) -> None:
    """Take note of what ``sys.exit()`` is called with.

    Args:
        done: gives something else each time that the script has done more; then it has caught that SystemExit.
    """
    global _done
    _done = done
    sys.exit = _exit


def exit_code() -> int:
    """What ``sys.exit()`` has said this process shall exit with, as Python ends; 0 if it was not called."""
    return _code & 0xFF if _done_then == _done() else 0


def end_without_mpi() -> None:
    """MPI cannot be ended: this process shall leave it as it is when Python exits."""
    global _without_mpi
    if not _without_mpi and not _mpi_is_ours:
        sys.exit = _exit
    _without_mpi = True


def end_at_once(code: int) -> NoReturn:
    """End this process, and nothing that belongs to others."""
    _flush()
    os._exit(code)


def die() -> None:
    """Die so that other ranks hear of it: Open MPI's mpirun tells them of signals, but not of an exit with an error."""
    _flush()
    os.kill(os.getpid(), signal.SIGKILL)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none
            stream.flush()


def _is_worker() -> bool:
    loading = sys.modules.get("torch.utils.data")
    return loading is not None and loading.get_worker_info() is not None


def _is_being_spawned() -> bool:
    """Whether this process imports its parent's main script, before it does what it was started for."""
    return getattr(multiprocessing.current_process(), "_inheriting", False)


def _after_fork() -> None:
    global _forked_by
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized():
        return
    if not _forked_by:
        sys.exit = _exit
    _forked_by = os.getppid()


def _exit(code: str | int | None = None, /) -> NoReturn:
    """``sys.exit()`` of a process that ends by itself; if it raises SystemExit, it is taken for one that ends well."""
    global _code, _done_then
    _done_then = _done()
    _code = code if isinstance(code, int) else int(code is not None)
    raise SystemExit(code)


def _leave() -> None:
    """End what must not, or would not, end MPI, after whatever else was to be done at exit since this was imported."""
    if _forked_by or (_without_mpi and not _mpi_is_ours):
        if _without_mpi:  # which is registered before this
            logging.shutdown()
        end_at_once(1 if hasattr(sys, "last_value") else _code & 0xFF)
    if _mpi_is_ours and not _without_mpi:
        from mpi4py import MPI

        if MPI.Is_initialized() and not MPI.Is_finalized():
            MPI.Finalize()


atexit.register(_leave)
os.register_at_fork(after_in_child=_after_fork)
