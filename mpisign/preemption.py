"""Stopping in time: a signal on any rank becomes an answer that all ranks get after the same step.

A queue warns a job before it takes the nodes away: by SIGTERM, or by a signal of your choice (``--signal``). It may
warn the ranks one after another, or only one. Here the handler only takes a note, which travels with the next call
that ranks make together; every step and every other collective function begins with one.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from types import FrameType
from typing import Any

from mpisign.errors import OptionError
from mpisign.exit_words import REQUEUE_EXIT_CODE
from mpisign.session import Session, current

__all__ = ["REQUEUE_EXIT_CODE", "stop_on_signal", "stop_requested"]

ECHO_SECONDS = 1.0  # launcher and batch script may both pass the same signal on: that is not a second one


def stop_on_signal(*signals: int) -> None:
    """Let signals ask for a stop instead of ending the process; :func:`stop_requested` tells. Not collective.

    Call it after :func:`mpisign.init`, in the main thread, before DataLoader workers are started.
    :func:`mpisign.shutdown` puts the former handlers back. A second SIGTERM (or SIGINT) more than a second after
    the first acts as it did before, so that a job that is stuck can be ended. Open MPI's mpirun passes SIGUSR1 on to
    all ranks, but ends the job at a SIGTERM of its own: let a batch script send it the former.

    Args:
        signals: default ``SIGUSR1`` and ``SIGTERM``.

    Raises:
        OptionError: one of the signals cannot be caught.

    Example::

        mpisign.init()
        mpisign.stop_on_signal()
        for step in range(start, steps):
            train_one_step()  # where no DistributedSignOptimizer steps, call mpisign.barrier() here
            if mpisign.stop_requested():
                mpisign.checkpoint.save("checkpoints", model=model, optimizer=optimizer, step=step + 1)
                sys.exit(mpisign.REQUEUE_EXIT_CODE)
    """
    session = current("stop_on_signal()")
    for number in signals or (signal.SIGUSR1, signal.SIGTERM):
        before = signal.getsignal(number)
        note = _Note(number, session, before.former if isinstance(before, _Note) else before)
        try:
            signal.signal(number, note)
        except OSError as error:
            raise OptionError(f"signal {number!r} cannot be caught: {error}") from error
        session.farewells.callback(note.step_aside)


def stop_requested() -> bool:
    """Whether any rank had been asked to stop when all ranks last did something together. Not collective.

    The answer is the same on all ranks after the same step, and stays once it is True.
    """
    return current("stop_requested()").stopping


@dataclass
class _Note:
    """The handler of one signal. ``former``: the one before it, None if it was not Python's."""

    number: int
    session: Session
    former: Any
    heard: float | None = None  # when, in seconds of the monotonic clock

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        a_child = os.getpid() != self.session.process  # forked, with our handlers: a DataLoader's worker
        if a_child or (self.heard is not None and now - self.heard > ECHO_SECONDS):
            if self.number in (signal.SIGTERM, signal.SIGINT):
                self.step_aside()
                signal.raise_signal(self.number)
            return
        self.heard = self.heard or now
        self.session.wants_stop = True

    def step_aside(self) -> None:
        now: object = signal.getsignal(self.number)
        if now is self:
            signal.signal(self.number, signal.SIG_DFL if self.former is None else self.former)
