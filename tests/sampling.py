"""Samplers of several ranks in one process, which takes their parts in turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from mpisign import ElasticSampler, session
from mpisign.group import Group
from mpisign.session import Session
from mpisign.trace import Tracer
from mpisign.watchdog import Watchdog


class Ranks:
    """Ranks with nothing between them, by identity."""

    def __init__(self, patch: pytest.MonkeyPatch, count: int, *, vote: bool = True) -> None:
        self._patch, self._vote = patch, vote
        self.identities = tuple(range(count))
        self.sessions = {who: self._session(who) for who in self.identities}

    def _group(self, identity: int, generation: int) -> Group:
        rank, size = self.identities.index(identity), len(self.identities)
        nowhere: Any = None
        args = nowhere, nowhere, nowhere, nowhere, rank, size, (0,) * size, generation, self.identities
        return Group(*args)

    def _session(self, identity: int) -> Session:
        tracer = Tracer()
        made = Session(self._group(identity, 0), Watchdog(tracer, None, None), tracer)
        if self._vote:
            made.next_number()
        return made

    def change(self, identities: Sequence[int], *, died: bool = False) -> None:
        """Between two steps; or as others have ``died``, which ranks find where they just are."""
        self.identities = tuple(sorted(identities))
        generation = 1 + max(it.group.generation for it in self.sessions.values())
        self.sessions = {who: self.sessions.get(who) or self._session(who) for who in self.identities}
        for who, its in self.sessions.items():
            its.replace(self._group(who, generation), its.there if died else ())

    def commit(self, counted: Sequence[int], *, whole: bool = True) -> None:
        for its in self.sessions.values():
            its.committed(tuple(counted))
            its.whole = whole

    def part(self) -> None:
        """A window has ended, whose decision comes later."""
        for its in self.sessions.values():
            its.parted += 1

    def each(self) -> Iterator[int]:
        """This process is each of them in turn."""
        for who in self.identities:
            self._patch.setattr(session, "_session", self.sessions[who])
            yield who


def samplers(ranks: Ranks, samples: int, **options: Any) -> dict[int, ElasticSampler]:
    return {who: ElasticSampler(range(samples), **options) for who in ranks.each()}


def same_position(ranks: Ranks, ours: dict[int, ElasticSampler]) -> dict[str, Any]:
    """Of all ranks."""
    states = [ours[who].state_dict() for who in ranks.each()]
    assert all(state == states[0] for state in states)
    return states[0]
