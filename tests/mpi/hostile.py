"""A rank that sends something else than it should, at one place of one operation, and what the others make of it."""

from __future__ import annotations

import atexit
import contextlib
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import mpisign
from mpisign import encoding
from mpisign import joining as ways_in
from mpisign import session as sessions
from mpisign.checkpoint import saving
from mpisign.group import Channels
from mpisign.session import current
from mpisign.talk import Talk
from mpisign.watchdog import Pending

if TYPE_CHECKING:
    from mpi4py import MPI

PATIENCE = 0.3  # seconds after which a rank that is still waited for, and is through, will not come any more
LONG = 10.0  # the same where nobody is waited for in vain
OVER_TAG = 17
SENDS = ("Iallgather", "Iallgatherv", "Ialltoall", "Igatherv", "Iallreduce", "Ibcast")
SENDS_AT_ONCE = ("Allgather", "Bcast", "Send", "Sendrecv")

Change = Callable[[np.ndarray], None]
"""Gets the bytes of a message, (n,) uint8, and changes them. Other lengths are tried in jobs of their own."""

buried: list[Any] = []  # sessions that ended in the middle of something: MPI may still write to their buffers
untouched: list[MPI.Comm] = []  # their channels that have carried nothing: MPI has only some 65,000 communicators


class AloneError(Exception):
    """This rank waits for one that will not come."""


class Line:
    """A hostile rank's communicator: in its ``number``-th send it sends what ``change`` makes of the message."""

    def __init__(self, comm: MPI.Comm, number: int, change: Change, others: Others, told: Line | None = None) -> None:
        self._comm, self._number, self._change, self._others = comm, number, change, others
        self._top = told or self
        self.sent: list[str] = []  # how, each time
        self.touched = False
        self.kept: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._comm, name)
        self.touched = True
        if name in SENDS or name in SENDS_AT_ONCE:
            return lambda *args, **kwargs: self._send(name, found, list(args), kwargs)
        if name == "Recv":
            return self._receive
        if name == "Split_type":
            return lambda *args: Line(found(*args), self._number, self._change, self._others, self._top)
        return found

    def _send(self, name: str, call: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
        from mpi4py import MPI

        if name in ("Ibcast", "Bcast") and kwargs["root"] != self._comm.rank:
            return call(*args, **kwargs)
        if args[0] is MPI.IN_PLACE:
            args[1] = self._message(name, args[1], copied=False)
        else:
            args[0] = self._message(name, args[0], copied=name not in ("Ibcast", "Bcast"))
        if name == "Sendrecv":  # the other may be gone: then no answer comes
            call, (message, rank, tag) = getattr(self._comm, "Send"), args[:3]  # noqa: B009 - mypy knows no Send
            call(message, rank, tag)
            return self._receive(*args[3:])
        return call(*args, **kwargs)

    def _message(self, name: str, given: Any, copied: bool) -> Any:
        self._top.sent.append(name)
        if len(self._top.sent) - 1 != self._number:
            return given
        array = given[0] if isinstance(given, list) else given
        mine = np.array(array, copy=True) if copied else array
        self._change(mine.reshape(-1).view(np.uint8))
        self._top.kept.append(mine)
        return [mine, *given[1:]] if isinstance(given, list) else mine

    def _receive(self, into: np.ndarray, rank: int, tag: int) -> None:
        request = self._comm.Irecv(into, rank, tag)
        self._top.kept += [into, request]
        self._others.wait_for(request)


class Others:
    """Knows which ranks are through, and gives up waiting for those who are."""

    def __init__(self, comm: MPI.Comm, hostile: int, patience: float) -> None:
        self._comm, self._hostile, self._patience = comm, hostile, patience
        self._since: float | None = None
        self._requests: list[MPI.Request] = []

    def tell(self) -> None:
        """This rank is through."""
        for rank in range(self._comm.size):
            if rank != self._comm.rank:
                self._requests.append(self._comm.Isend(np.zeros(1), rank, OVER_TAG))

    def wait_for(self, request: MPI.Request) -> None:
        """Return when a request is over, which is not taken note of. Raises AloneError."""
        while not request.Get_status():
            time.sleep(0)
            self._look()
            if self._since is not None and time.monotonic() - self._since > self._patience:
                raise AloneError

    def _look(self) -> None:
        """The hostile rank gives up when any other is through, and these when it is."""
        from mpi4py import MPI

        source = MPI.ANY_SOURCE if self._comm.rank == self._hostile else self._hostile
        if self._since is None and self._comm.Iprobe(source, OVER_TAG):
            self._since = time.monotonic()

    def settle(self) -> None:
        """Take all notes in. **Collective.**"""
        for _ in range(self._comm.size - 1):
            self._comm.Recv(np.zeros(1), tag=OVER_TAG)
        for request in self._requests:
            request.Wait()
        self._comm.Barrier()


def start_anew(comm: MPI.Comm) -> None:
    """Forget the session, wherever it is, and join again. **Collective.**"""
    leave(comm)
    mpisign.init(stall_timeout=60.0)


def leave(comm: MPI.Comm) -> None:
    """Forget the session without a word to the others. **Collective.**"""
    leaving, sessions._session = sessions._session, None
    atexit.unregister(sessions._shutdown_at_exit)
    saving._pending = None
    if leaving is not None:
        leaving.farewells.pop_all()
        if leaving.last_words is not None:
            leaving.last_words.remove()
        buried.append(leaving)
    comm.Barrier()
    while untouched:
        untouched.pop().Free()


def attack(
    comm: MPI.Comm,
    hostile: int,
    operation: Callable[[], object],
    number: int,
    change: Change,
    joining: bool = False,
    patience: float = PATIENCE,
) -> tuple[list[BaseException | None], list[str]]:
    """Let a rank send something else in its ``number``-th send of an operation. **Collective.**

    Args:
        joining: the operation itself makes the session.
        patience: seconds; longer than any rank may be kept from running where all of them come through.

    Returns:
        What each rank has met, the same on all; and how the hostile rank has sent, each time.
    """
    others = Others(comm, hostile, patience)
    line: Line | None = None  # the other ranks have one, too: in what blocks they wait for ever without
    if comm.rank != hostile:
        number = -1
    with contextlib.ExitStack() as stack:
        stack.enter_context(_impatient(others))
        if joining:
            leave(comm)
            duplicate = ways_in._duplicate

            def mine(*args: Any) -> Any:
                nonlocal line
                line = Line(duplicate(*args), number, change, others)
                return line

            stack.callback(setattr, ways_in, "_duplicate", duplicate)
            ways_in._duplicate = mine  # type: ignore[assignment]
        else:
            session = current()
            line = Line(session.group.comm, number, change, others)
            channels = Channels(*(Line(one, number, change, others, line) for one in session.group.channels))
            for name, its in (("comm", line), ("channels", channels)):
                object.__setattr__(session.group, name, its)
        met: BaseException | None = None
        try:
            operation()
        except Exception as error:
            met = error
        others.tell()
        others.settle()
    if line is not None:
        buried.append(line)
        if not joining:
            object.__setattr__(session.group, "comm", line._comm)
            object.__setattr__(session.group, "channels", Channels(*(one._comm for one in channels)))
            touched = [any(flags) for flags in zip(*comm.allgather([one.touched for one in channels]), strict=True)]
            untouched.extend(one._comm for one, used in zip(channels, touched, strict=True) if not used)
    return comm.allgather(_portable(met)), comm.bcast(line.sent if line is not None else [], hostile)


@contextlib.contextmanager
def _impatient(others: Others) -> Iterator[None]:
    """Waits of sessions end when the rank that is waited for is through."""
    wait = Talk.wait

    def waiting(talk: Talk, pending: Pending) -> None:
        with contextlib.suppress(RuntimeError):  # MPI's own errors are for the real wait
            others.wait_for(pending.request)
        wait(talk, pending)

    Talk.wait = waiting  # type: ignore[method-assign]
    try:
        yield
    finally:
        Talk.wait = wait  # type: ignore[method-assign]


def _portable(error: BaseException | None) -> BaseException | None:
    """The error, without what cannot be sent."""
    if error is None or isinstance(error, (mpisign.MpisignError, AloneError)):
        return None if error is None else type(error)(*map(str, error.args))
    return RuntimeError(f"{type(error).__name__}: {error}")


class Bomb:
    """What, unpickled, makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def bomb(marker: Path) -> bytes:
    return pickle.dumps(Bomb(marker), protocol=0)


@contextlib.contextmanager
def says(playing: bool, number: int, message: bytes) -> Iterator[None]:
    """If ``playing``, this rank's ``number``-th JSON is ``message``."""
    encode, count = encoding.encode, 0

    def instead(value: Any) -> bytes:
        nonlocal count
        count += 1
        return message if count - 1 == number else encode(value)

    if playing:
        encoding.encode = instead
    try:
        yield
    finally:
        encoding.encode = encode
