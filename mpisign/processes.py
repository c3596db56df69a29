"""Which process is a rank: the one that has started MPI. Its children, forked or spawned, are none.

A forked child has its parent's connections, and MPI does not know of it: whatever the child says is taken for what its
parent says next. It must not end MPI either, which mpi4py does when Python exits.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
from typing import NoReturn

from mpisign.errors import LaunchError

__all__ = ["check_may_start", "whose_child"]

_forked_by = 0  # the process with MPI whose fork this one, or a parent of this one, is
_code = 0  # what a forked child will exit with


def whose_child() -> str:
    """Why this process is no rank, "" if nothing is known against it."""
    if _forked_by:
        return f"process {_forked_by}, in which MPI runs, has forked it (a DataLoader's worker, or os.fork())"
    parent = multiprocessing.parent_process()
    return "" if parent is None else f"multiprocessing has started it, from process {parent.pid}"


def check_may_start() -> None:
    """Raise :class:`LaunchError` where MPI must not be started: it would hang, or speak for another process."""
    if _forked_by or _is_worker():
        raise LaunchError(
            f"init() in process {os.getpid()}, which is no rank: {whose_child()}. Call it once in the main process, "
            f"and give workers what they need (rank, size, a seed) as arguments"
        )
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise LaunchError(
            f"init() in process {os.getpid()}, which is no rank: {whose_child()}, and it imports the main script anew. "
            f"Put what the script does under `if __name__ == '__main__':`"
        )


def _is_worker() -> bool:
    loading = sys.modules.get("torch.utils.data")
    return loading is not None and loading.get_worker_info() is not None


def _after_fork() -> None:
    global _forked_by
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized() or mpi.Is_finalized():
        return
    if not _forked_by:
        sys.exit = _exit
    _forked_by = os.getppid()


def _exit(code: str | int | None = None, /) -> NoReturn:
    """``sys.exit()`` of a forked child; one that raises SystemExit by itself is taken for one that has ended well."""
    global _code
    _code = code if isinstance(code, int) else int(code is not None)
    raise SystemExit(code)


def _leave() -> None:
    """End a forked child before mpi4py ends MPI, after whatever else was to be done at exit since this was imported."""
    if _forked_by:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(1 if hasattr(sys, "last_value") else _code & 0xFF)


atexit.register(_leave)
os.register_at_fork(after_in_child=_after_fork)
