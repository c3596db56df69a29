"""How scripts/chaos brings a fault about in a training that runs, and waits until all are back from it."""

from __future__ import annotations

import contextlib
import signal
import time

from chaos_faults import Fault
from chaos_job import Launch, Struck

from mpisign.membership import has_quorum

__all__ = ["back_from", "can_strike", "strike"]

LATER_SECONDS = 2.0  # within this from when all are back, those who were counted out are let go on
RECOVERY_SECONDS = 0.1  # within this from the first kill comes the one in a recovery


def can_strike(launch: Launch, fault: Fault) -> bool:
    """Whether it comes to anything: a link between hosts does only where ranks live on several."""
    return fault.kind not in ("cut", "flicker") or len(launch.hosts_of_the_living()) > 1


def strike(launch: Launch, fault: Fault) -> Struck | None:
    """Bring it about. Returns None if the training has ended before. Raises :class:`chaos_job.HangError`."""
    launch.read()
    living = launch.living()
    if len(living) < 2 or not launch.runs:
        return None
    first, second = fault.strikes(living)
    struck = Struck(fault, launch.number, len(living), time.monotonic(), [first], [])
    come_about = {
        "kill": _kill,
        "two": _kill,
        "recovery": _kill,
        "spare": _kill_spare,
        "stop": _stop,
        "silence": _silence,
        "node": _kill_node,
        "cut": _cut,
        "flicker": _flicker,
        "stretch": _stretch,
        "slow": _order,
        "nan": _order,
        "segfault": _order_to_die,
        "exception": _order_to_die,
        "save": _order_to_die,
    }[fault.kind](launch, struck, first, second)
    return struck if come_about else None


def _kill(launch: Launch, struck: Struck, first: int, second: int) -> bool:
    struck.at, struck.victims = launch.kill(first), [first]
    if struck.fault.kind == "kill":
        return True
    if struck.fault.kind == "recovery":
        time.sleep(struck.fault.delay * RECOVERY_SECONDS)
    struck.last = launch.kill(second)
    struck.struck = struck.victims = [first, second]
    return True


def _kill_spare(launch: Launch, struck: Struck, first: int, second: int) -> bool:
    struck.at, struck.victims = launch.kill(first), [first]
    if spares := launch.waiting():
        time.sleep(struck.fault.delay * RECOVERY_SECONDS)
        struck.last = launch.kill(spares[0])
        struck.struck = [first, spares[0]]
    return True


def _kill_node(launch: Launch, struck: Struck, first: int, second: int) -> bool:
    idle = launch.waiting_beside(first)
    struck.struck = struck.victims = launch.beside(first)
    struck.at = launch.kill(first)
    for rank in [*struck.victims[1:], *idle]:
        struck.last = launch.kill(rank)
    return True


def _silence(launch: Launch, struck: Struck, first: int, second: int) -> bool:
    launch.signal(first, signal.SIGSTOP)
    struck.at, struck.victims = time.monotonic(), [first]
    launch.count_out([first], lambda: launch.signal(first, signal.SIGCONT))
    return True


def _cut(launch: Launch, struck: Struck, first: int, second: int) -> bool:
    living, here = launch.living(), launch.beside(first)
    there = [rank for rank in living if rank not in here]
    stays = has_quorum(there, living)
    struck.struck = struck.victims = here if stays else there
    launch.set_link(first, "down")
    struck.at = time.monotonic()
    idle = [rank for rank in launch.waiting() if (rank in launch.waiting_beside(first)) == stays]
    launch.count_out([*struck.victims, *idle], lambda: launch.set_link(first, "up"))
    return True


def _flicker(launch: Launch, struck: Struck, first: int, second: int) -> bool:
    launch.set_link(first, "down")
    try:
        launch.pause(struck.fault.seconds)
    finally:
        launch.set_link(first, "up")
    struck.at = time.monotonic()
    return launch.runs


def _stop(launch: Launch, struck: Struck, first: int, second: int) -> bool:
    launch.signal(first, signal.SIGSTOP)
    try:
        launch.pause(struck.fault.seconds)
    finally:
        launch.signal(first, signal.SIGCONT)
    struck.at = time.monotonic()
    return launch.runs


def _stretch(launch: Launch, struck: Struck, first: int, second: int) -> bool:
    if not _order(launch, struck, second, first):
        return False
    launch.pause(struck.fault.delay * (struck.fault.seconds - 0.5))
    struck.at, struck.victims, struck.struck = launch.kill(first), [first], [first, second]
    return True


def _order(launch: Launch, struck: Struck, first: int, second: int) -> bool:
    return _told(launch, struck, first, "order") is not None


def _order_to_die(launch: Launch, struck: Struck, first: int, second: int) -> bool:
    at = _told(launch, struck, first, "fault")
    if at is None:
        return False
    struck.at, struck.victims = at, [first]
    launch.killed.append(first)
    return True


def _told(launch: Launch, struck: Struck, rank: int, what: str) -> float | None:
    """Tell a rank to harm itself. Returns when it does, or None if the training ends before."""
    fault, since = struck.fault, time.monotonic()
    launch.order(rank, kind=fault.kind, delay=fault.delay, seconds=fault.seconds, steps=fault.steps, place=fault.place)
    if not launch.wait(lambda: launch.has(rank, what, since), f"rank {rank} does not do as it is told"):
        return None
    told = next(record for record in reversed(launch.records[rank]) if record["what"] == what)
    struck.at = float(told["at"]) + float(told["delay"] if what == "fault" else 0.0)
    return struck.at


def back_from(launch: Launch, struck: Struck) -> bool:
    """Wait until all that live make steps again. Returns whether the job runs. Raises :class:`chaos_job.HangError`."""
    kind, whom = struck.fault.kind, struck.struck[-1]
    after = f"no steps on all after {kind!r} on rank {', '.join(map(str, struck.struck))}"
    if kind in ("slow", "nan") and not launch.wait(lambda: launch.has(whom, "order over", struck.at), after):
        return False
    with contextlib.suppress(ValueError):
        time.sleep(struck.at - time.monotonic())  # it is about to die
    launch.wait_for_steps(struck.at, after)
    launch.let_them_end(struck.fault.delay * LATER_SECONDS)
    return launch.runs
