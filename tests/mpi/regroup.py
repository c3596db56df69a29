"""Ranks that leave between two steps, and jobs of some of the ranks."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import mpisign
from mpisign.group import Group
from mpisign.session import current

if TYPE_CHECKING:
    from mpi4py import MPI

LEAVERS = {"the last leaves": -1, "the first leaves": 0, "one in the middle leaves": 1}


def part(leavers: Collection[int]) -> bool:
    """Let ranks leave the group, each for a group of its own; whether this rank stays. **Collective** over all."""
    session = current()
    before = session.group
    gone = before.rank in {leaver % before.size for leaver in leavers}
    comm = before.comm.Split(1 + before.rank if gone else 0, before.rank)
    node_of = None if gone else [n for r, n in enumerate(before.node_of) if r not in {x % before.size for x in leavers}]
    after = Group.form(comm, session.watchdog, node_of, before.generation + 1, before.identity, before.gpus)
    assert session.replace(after) is before
    before.free(session.watchdog)
    return not gone


def watched() -> list[weakref.ref[object]]:
    """Weak references to the present group and its communicators."""
    group = current().group
    return [weakref.ref(it) for it in (group, group.comm, group.node, group.lane)]


@contextmanager
def job_of(comm: MPI.Comm, ranks: int) -> Iterator[bool]:
    """A job of the first ``ranks`` ranks; whether this one is in it."""
    mpisign.shutdown()
    part = comm.Split(int(comm.rank < ranks))
    if comm.rank < ranks:
        mpisign.init(part)
    yield comm.rank < ranks
    mpisign.shutdown()
    part.Free()
    comm.Barrier()
