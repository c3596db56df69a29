"""mpisign.presence on real ranks: who is named, whatever notices have been left from earlier waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from mpisign.presence import Presence

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi(min_size=2)

NOBODY = "all ranks wait here, so the network or MPI does not deliver"


@pytest.fixture
def presence(comm: MPI.Comm) -> Iterator[Presence]:
    own = comm.Dup()
    yield Presence(own)
    own.Barrier()
    own.Free()


def listen(presence: Presence, where: str, until: Callable[[], bool]) -> None:
    """As a rank does that waits, until something is so."""
    deadline = time.monotonic() + 30.0
    while not until():
        assert time.monotonic() < deadline, presence.missing()
        presence.listen(where)


def wait_together(presence: Presence, where: str, comm: MPI.Comm, until: Callable[[], bool]) -> None:
    """And go on answering until it is so on all ranks."""
    presence.announce(where)
    listen(presence, where, until)
    listen(presence, where, comm.Ibarrier().Test)


def silent(comm: MPI.Comm, *heard: int) -> str:
    return f"not heard from yet: ranks {[rank for rank in range(comm.size) if rank not in heard]}"


def test_who_has_told_nothing_is_missing(comm: MPI.Comm, presence: Presence) -> None:
    presence.begin()
    assert presence.missing() == silent(comm, comm.rank)


def test_who_waits_here_is_not(comm: MPI.Comm, presence: Presence) -> None:
    presence.begin()
    wait_together(presence, "here", comm, lambda: presence.missing() == NOBODY)


def test_who_has_not_announced_itself_answers(comm: MPI.Comm, presence: Presence) -> None:
    """A rank that has just come has no reason yet to say that it waits."""
    presence.begin()
    if comm.rank == 0:
        wait_together(presence, "here", comm, lambda: presence.missing() == NOBODY)
    else:
        listen(presence, "here", comm.Ibarrier().Test)


def test_who_has_gone_on_from_here_is_not_missing(comm: MPI.Comm, presence: Presence) -> None:
    """MPI lets one rank out of a collective before another; that one is told where the others still wait."""
    ahead = comm.size - 1
    presence.begin()
    if comm.rank != ahead:
        wait_together(presence, "the first", comm, lambda: presence.missing() == NOBODY)
        return
    presence.begin()
    said = "; ".join(f"rank {rank} waits in the first" for rank in range(ahead))
    wait_together(presence, "the second", comm, lambda: presence.missing() == said)


def test_an_old_notice_does_not_say_where_a_rank_is(comm: MPI.Comm, presence: Presence) -> None:
    """The last rank was late; the others waited, told it so, have gone on since, and do not come."""
    late = comm.size - 1
    presence.begin()
    if comm.rank != late:
        presence.announce("the first")
        comm.Barrier()
    else:
        comm.Barrier()
        presence.begin()
        presence.announce("the second")
        listen(presence, "the second", lambda: len(presence._heard) == late)
        assert presence.missing() == silent(comm, late)


def test_answers_come_to_an_end(comm: MPI.Comm, presence: Presence) -> None:
    """Else two ranks that wait would talk all the time."""
    presence.begin()
    wait_together(presence, "here", comm, lambda: presence.missing() == NOBODY)
    for _ in range(3):  # what was on its way, and the answers to it
        comm.Barrier()
        presence.listen("here")
    heard = dict(presence._heard)
    presence._heard.clear()
    for _ in range(3):
        comm.Barrier()
        presence.listen("here")
    assert presence._heard == {}
    assert len(heard) == comm.size - 1
