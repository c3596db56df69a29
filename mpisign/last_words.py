"""What a process that dies of an uncaught exception does after it has said so."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from types import TracebackType

__all__ = ["LastWords"]


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
