"""An alarm clock for where Python stands still: in the start of MPI and at its end.

The system's own clocks go on while a scheduler has stopped the job, and would end it at the moment it continues. So a
shell beside this process counts seconds: it is of the same job, and stops and continues with it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["ring", "traceback_after"]

STEP_SECONDS = 1.0  # what a stop may count for, and how long the shell outlives this process
STEPS = 10  # and shorter times are counted in so many steps
FOREVER = 1e9

_COUNT = 'n=$1; while [ "$n" -gt 0 ]; do sleep "$2" && kill -0 "$3" || exit; n=$((n-1)); done; '
_RING = '{ echo "$4" >> "/proc/$3/fd/2"; } 2>/dev/null; kill -ALRM "$3"'


def ring(seconds: float, text: str) -> subprocess.Popen[bytes] | None:
    """Let SIGALRM end this process after so many seconds in which it was not stopped. None if that cannot be done.

    Args:
        text: is written to stderr then.
    """
    if seconds > FOREVER or signal.getsignal(signal.SIGALRM) != signal.SIG_DFL:
        return None
    step = min(STEP_SECONDS, seconds / STEPS)
    count = str(round(seconds / step)), f"{step:g}"
    command = ["sh", "-c", _COUNT + _RING, "mpisign alarm", *count, str(os.getpid()), text]
    none = subprocess.DEVNULL  # mpirun waits for whoever holds the ranks' output
    try:
        return subprocess.Popen(command, stdin=none, stdout=none, stderr=none)
    except OSError:
        return None


@contextmanager
def traceback_after(seconds: float, end: bool) -> Iterator[None]:
    """What takes longer than ``seconds`` inside is shown as a traceback, and if ``end``, ends this process."""
    with contextlib.ExitStack() as undo:
        try:
            text = f"MPI has not started within {seconds:g} s; stall_timeout is over. Has every rank come to init()?"
            if end and (shell := ring(seconds, text)) is not None:
                undo.callback(shell.wait)
                undo.callback(shell.kill)
                faulthandler.register(signal.SIGALRM, file=sys.__stderr__, chain=True)  # type: ignore[arg-type]
                undo.callback(faulthandler.unregister, signal.SIGALRM)
            else:
                faulthandler.dump_traceback_later(seconds, exit=end, file=sys.__stderr__)  # type: ignore[arg-type]
                undo.callback(faulthandler.cancel_dump_traceback_later)
        except (ValueError, AttributeError, OSError, RuntimeError, OverflowError):  # no stderr, or for ever
            pass
        yield
