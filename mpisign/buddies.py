"""What a rank owes to the parameters by error feedback, kept by another, too: it is not lost when the rank dies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from mpisign.cuts import cut, together
from mpisign.errors import OptionError
from mpisign.exchange.header import Handshake
from mpisign.group import Group
from mpisign.memory.store import MemoryStore, state_dtype
from mpisign.method import Method
from mpisign.policy import check_integer
from mpisign.report import StepReport
from mpisign.session import Session, current
from mpisign.transfer import as_bytes
from mpisign.watchdog import Pending

__all__ = ["Buddies", "check_buddy_every"]

TAG = 0x6D77

Bytes = npt.NDArray[np.uint8]


def check_buddy_every(buddy_every: int | None, methods: Sequence[Method]) -> int | None:
    """Raise :class:`OptionError` if there is nothing to keep, or nobody would need it."""
    if buddy_every is None:
        return None
    if not any(method.memory.owed for method in methods):
        raise OptionError(
            f"buddy_every={buddy_every!r} keeps copies of what error feedback owes to the parameters, and method="
            f"{methods[0].name} has no error feedback: leave it out"
        )
    if current("DistributedSignOptimizer()").membership is None:
        raise OptionError(f"buddy_every={buddy_every!r} is for a job that goes on: init(on_failure='continue')")
    return check_integer("buddy_every", buddy_every, 1)


@dataclass
class _Copy:
    """Of what a rank owes: its identity, the bytes of all fields, and the learning rates in whose units they are."""

    whose: int
    fields: list[tuple[torch.Tensor, str]]
    message: Bytes
    rates: dict[torch.Tensor, float]


class _Arrival:
    """A request that remembers whether it has come about, or has failed with a rank that has died."""

    def __init__(self, request: Any) -> None:
        self._request = request
        self.there = self._over = False

    def Test(self) -> bool:  # noqa: N802 - mpi4py's name
        if not self._over:
            self._over = True  # also where the next line raises
            self.there = self._over = bool(self._request.Test())
        return self._over


@dataclass
class _Coming:
    """A copy that is on its way, and with it this rank's own to the next."""

    copy: _Copy
    arrival: _Arrival
    pending: list[Pending]


class Buddies:
    """Of one optimizer. Each rank sends what it owes to the next, and adds what a dead one has owed to its own.

    A copy travels while training goes on. It costs twice the fields' memory on the host, and three times meanwhile.

    Args:
        every: after how many exchanges a copy is made; None for never.
    """

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._group: Group | None = None  # among which the last copies were made
        self._copy: _Copy | None = None
        self._coming: _Coming | None = None

    def exchanged(
        self,
        store: MemoryStore,
        parameters: Sequence[torch.Tensor],
        exchanges: int,
        handshake: Handshake,
        report: StepReport,
    ) -> None:
        """So many exchanges are over, and what the last has left in memory counts. **Collective** in every so many."""
        session = current("DistributedSignOptimizer.step()")
        membership = session.membership
        if self._every is None or membership is None:
            return
        if report.generation != session.group.generation or not all(its is None for its in handshake.joined_for):
            return  # ranks have died since, or have joined: the next exchange of all is the same on all
        changed, self._group = self._group is not session.group, session.group
        if self._coming is not None and self._coming.arrival.there:
            self._copy = self._coming.copy
        if changed:
            self._coming = None  # what has not come is lost
            self._inherit(store, session.group)
        try:
            if self._coming is not None:
                self._coming.arrival.Test()
            if session.size > 1 and (changed or exchanges % self._every == 0):
                self._send(session, store, parameters)
        except Exception as error:
            if not membership.is_loss(error):
                raise
            membership.recover()

    def _send(self, session: Session, store: MemoryStore, parameters: Sequence[torch.Tensor]) -> None:
        """Let copies travel, after the last ones have come. **Collective.**"""
        if self._coming is not None:
            for pending in self._coming.pending:
                session.wait(pending)
            self._copy, self._coming = self._coming.copy, None
        fields = [(p, field) for p in parameters if p.requires_grad for field in store.memory_of(p).owed]
        if not fields:
            return  # all that owe are frozen, on every rank
        mine = np.concatenate([as_bytes(store.of(parameter)[field]) for parameter, field in fields])
        comm, rank, size = session.group.comm, session.rank, session.size
        heard = np.empty_like(mine)
        parts = list(cut(mine.size))
        to, whose = (rank + 1) % size, (rank - 1) % size
        gets = _Arrival(together([comm.Irecv(heard[at : at + length], whose, TAG) for at, length in parts]))
        sends = together([comm.Isend(mine[at : at + length], to, TAG) for at, length in parts])
        copy = _Copy(session.group.identities[whose], fields, heard, store.rates())
        self._coming = _Coming(copy, gets, [session.post(sends, mine), session.post(cast("Any", gets), heard)])

    def _inherit(self, store: MemoryStore, group: Group) -> None:
        """Owe what the rank has owed whose copy this one has, if it has died."""
        copy, self._copy = self._copy, None
        if copy is None or copy.whose in group.identities:
            return
        rates, at = store.rates(), 0
        for parameter, field in copy.fields:
            size = parameter.numel() * state_dtype(parameter.dtype).itemsize
            theirs = torch.from_numpy(copy.message[at : at + size].copy()).view(state_dtype(parameter.dtype))
            at += size
            if not parameter.requires_grad or field not in store.memory_of(parameter).owed:
                continue  # it has been frozen since, or has another method
            factor = 1.0
            if field in store.memory_of(parameter).follows_lr and parameter in rates:
                factor = copy.rates.get(parameter, rates[parameter]) / rates[parameter]
            mine = store.of(parameter)[field]
            mine.add_(theirs.to(mine.device), alpha=factor)
