"""Silence as a failure, with ``init(detect_links=)``: MPI's detector of heartbeats, and the thread that keeps it going.

Open MPI sends and looks for heartbeats only inside its calls. A rank that evaluates for ten seconds would be taken for
dead, so a thread of this process calls MPI all the time; torch lets it run beside whatever it computes.

Who has been silent itself hears nothing of the others either: it would take those for dead that are well, and Open MPI
would tell all others so, when it has woken or its link is mended, which believe that. So it ends before it has looked:
when it was stopped for too long, or when other machines do not answer and the ranks of the rest may not go on.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable, Sequence, Set
from typing import Protocol

from mpisign.dead_man import Switch
from mpisign.errors import OptionError
from mpisign.links import Links, addresses
from mpisign.policy import check_positive
from mpisign.survival import is_on
from mpisign.vendors import flags_of

__all__ = ["begin", "check", "guard", "leave", "look", "started_for"]

CALLS = 40  # of MPI while a rank may be silent
LOOKS = 10  # for answers of other machines
STOPPED = 0.7  # of a silence: a fifth of it may be over when a rank stops, after its last heartbeat
CUT_OFF = 0.6  # of it: and another rank's last heartbeat may be as old when the link is cut
LEAST_SECONDS = 2.5  # without an answer: each machine is asked once a second

DETECTOR = "OMPI_MCA_mpi_ft_detector"
TIMEOUT = "OMPI_MCA_mpi_ft_detector_timeout"

_stop = threading.Event()
_thread: threading.Thread | None = None


class Guarded(Protocol):
    """A group of ranks of which this process is one."""

    @property
    def is_alone(self) -> bool:
        """Whether nobody else is there, who could hear it."""

    def too_few(self, without: Set[int]) -> str:
        """Why the others than these, by their numbers in the job's first group, may not go on; empty if they may."""

    def stop(self, why: str) -> None:
        """End this process."""


_guarded: tuple[Guarded, Links] | None = None


def check(seconds: float) -> None:
    """Raise :class:`OptionError` unless MPI was started to take a rank for dead that is silent for so long."""
    check_positive("detect_links", seconds, " of seconds, or None for never")
    flags = flags_of("Open MPI")
    assert flags is not None
    how = f"start it with {flags.to_outlive(seconds)}"
    told = started_for()
    if told is None:
        raise OptionError(f"detect_links={seconds:g} needs MPI's detector, which is off in this run: {how}")
    if told != f"{seconds:g}":
        raise OptionError(f"detect_links={seconds:g}, but this run was started with {TIMEOUT}={told!r}: {how}")
    from mpi4py import MPI

    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise OptionError(
            f"detect_links={seconds:g} needs a thread that calls MPI beside this one, which MPI was not started for: "
            f"unset MPI4PY_RC_THREADS and MPI4PY_RC_THREAD_LEVEL, and set no mpi4py.rc.thread_level"
        )


def started_for() -> str | None:
    """Seconds of silence for which MPI was started, as they were typed; None without a detector."""
    return os.environ.get(TIMEOUT, "") if is_on(DETECTOR) else None


def begin(seconds: float) -> None:
    """Keep MPI called until Python exits, in a process of which ``check(seconds)`` is true."""
    global _thread
    if _thread is None:
        _thread = threading.Thread(target=_beat, args=(seconds,), name="mpisign heartbeat", daemon=True)
        _thread.start()
        atexit.register(_end)


def guard(it: Guarded, gathered: Callable[[list[str]], Sequence[Sequence[str]]]) -> None:
    """After :func:`begin`, end this process when the others go on without it, or are about to.

    Args:
        gathered: tells all ranks of something, and gives what each has told. **Collective.**
    """
    global _guarded
    if _thread is not None:
        here = addresses()
        _guarded = it, Links(gathered(here), here)


def leave() -> None:
    """The others are done with this process, or it with them: nothing is to be ended any more."""
    global _guarded
    _guarded = None


def _beat(silence: float) -> None:
    from mpi4py import MPI

    switch, looked = Switch(STOPPED * silence), time.monotonic()
    try:
        while not (_stop.wait(silence / CALLS) or MPI.Is_finalized()):
            guarded = _guarded
            if guarded is None or guarded[0].is_alone:
                switch.release()
            else:
                switch.put_off()
                if time.monotonic() - looked > silence / LOOKS:
                    looked = time.monotonic()
                    look(*guarded, max(CUT_OFF * silence, LEAST_SECONDS))
            MPI.COMM_SELF.Iprobe()
    finally:
        switch.release()


def look(it: Guarded, its_links: Links, seconds: float) -> None:
    """End this process if machines have not answered for so long, and the ranks of the others may not go on."""
    silent = its_links.silent(seconds)
    if silent and (why := it.too_few(silent)):
        it.stop(f"the machines of ranks {sorted(silent)} have not answered for {seconds:g} s: {why}")


def _end() -> None:
    """Before MPI is finalized."""
    _stop.set()
    if _thread is not None:
        _thread.join(1.0)
