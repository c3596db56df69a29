"""What a process that dies of an uncaught exception does after it has said so, and how it goes."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from mpisign.exit_words import is_told
from mpisign.processes import die, end_at_once

__all__ = ["LastWords", "end_alone", "end_with"]


class LastWords:
    """A ``sys.excepthook`` that calls the one before it, and then ``die(kind of the exception)``, until it is removed.

    Others may have put theirs around it (``torch.distributed`` does) and will call it for ever: then it does nothing of
    its own.
    """

    def __init__(self, die: Callable[[type[BaseException]], None]) -> None:
        self._previous, self._die = sys.excepthook, die
        self._removed = False
        sys.excepthook = self

    def __call__(self, kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
        self._previous(kind, value, trace)
        if self._removed:
            return
        held = sys.stderr
        if isinstance(held, io.StringIO) and sys.__stderr__ is not None:
            # torch.distributed prints what hooks before its own have written when they return, and this one does not.
            sys.stderr = sys.__stderr__
            sys.stderr.write(held.getvalue())
            sys.stderr.flush()
        self._die(kind)

    def remove(self) -> None:
        """Put the hook before it back, if nobody has put another around it."""
        self._removed = True
        if sys.excepthook is self:
            sys.excepthook = self._previous


def end_alone(code: int) -> None:
    """End this process at once, so that the others see it, and go on."""
    end_at_once(code) if is_told() else die()


def end_with(session: Any, code: int, why: str) -> None:
    """End the whole job as this process fails, or this process alone, where the others can go on.

    Args:
        session: :class:`mpisign.session.Session`.
        why: what this rank has done.
    """
    if session.process != os.getpid():
        return
    from mpi4py import MPI

    if session.membership is not None:
        end_alone(code)
    elif not MPI.Is_finalized():
        session.watchdog.abort(f"rank {session.rank} of {session.size} {why}", code)
