"""Ranks that leave between two steps."""

from __future__ import annotations

import weakref
from collections.abc import Collection

from mpisign.group import Group
from mpisign.session import current

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
