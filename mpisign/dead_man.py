"""A dead man's switch: the kernel ends this process unless it says in time that it goes on.

A process that was stopped for too long is ended before any of its threads does anything else, which none of them could
promise.
"""

from __future__ import annotations

import ctypes
import signal
import sys

__all__ = ["Switch"]

MONOTONIC = 1  # Linux's CLOCK_MONOTONIC


class _Event(ctypes.Structure):
    """Linux's struct sigevent: ``notify`` is 0 for a signal."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("rest", ctypes.c_char * 48),
    )


class _Times(ctypes.Structure):
    """Struct itimerspec: seconds and nanoseconds between signals, and until the first."""

    _fields_ = tuple((name, ctypes.c_long) for name in ("every", "every_ns", "first", "first_ns"))


class Switch:
    """Ends this process by ``SIGRTMAX`` when it was not put off for so many seconds.

    It does nothing where there is no Linux. A forked child has none.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._timer = seconds, ctypes.c_void_p()
        self._library: ctypes.CDLL | None = None
        if sys.platform != "linux":
            return
        library = ctypes.CDLL(None)
        if not hasattr(library, "timer_create"):
            library = ctypes.CDLL("librt.so.1")
        event = _Event(None, signal.SIGRTMAX, 0)  # which has no handler: that would run while other threads do
        if library.timer_create(MONOTONIC, ctypes.byref(event), ctypes.byref(self._timer)) == 0:
            self._library = library

    def put_off(self) -> None:
        """This process goes on."""
        self._set(self._seconds)

    def release(self) -> None:
        """It need not say so any more."""
        self._set(0.0)

    def _set(self, seconds: float) -> None:
        if self._library is not None:
            whole = int(seconds)
            times = _Times(0, 0, whole, int((seconds - whole) * 1e9))
            self._library.timer_settime(self._timer, 0, ctypes.byref(times), None)
