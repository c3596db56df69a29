"""What ranks tell each other besides the messages: the handshake before, the participation header after packing.

A header could ride in front of every message. It does not, for two reasons. Messages of different sizes must
never meet in a collective (that is a hang or garbage, not an error), so the layout must be agreed on *before*
the first of them: the handshake, one small all-gather of fixed size. And whether a rank votes is known only
*after* its last gradient was looked at, while its first bucket is long on its way: the participation header,
posted when packing ends and read before anything is decided. Messages stay pure words, cut and received in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpisign.errors import ConsistencyError
from mpisign.layout import FORMAT_VERSION, Layout
from mpisign.session import Session
from mpisign.talk import minority

__all__ = ["REASONS", "Handshake", "Participation", "exchange_participation", "shake_hands"]

VOTES, NON_FINITE, SCALER_INF, JOINED, NO_GRADIENT = range(5)
REASONS = {
    NON_FINITE: "non-finite gradient",
    SCALER_INF: "inf found by GradScaler",
    JOINED: "joined",
    NO_GRADIENT: "no gradient",
}


@dataclass(frozen=True)
class Handshake:
    """Who is here: ``joined_for[r]``, the exchanges rank r has sat out since ``join()``, or None if it trains."""

    joined_for: tuple[int | None, ...]
    bytes_sent: int

    @property
    def all_joined(self) -> bool:
        return all(steps is not None for steps in self.joined_for)


@dataclass(frozen=True)
class Participation:
    """Who votes: ``status[r]`` is VOTES or a key of REASONS; ``voters[i]`` the ranks that vote on parameter i."""

    status: tuple[int, ...]
    voters: tuple[tuple[int, ...], ...]
    bytes_sent: int


def shake_hands(
    session: Session, layout: Layout, fingerprint: int, settings: Sequence[str], step: int, joined_for: int | None
) -> Handshake:
    """Make sure that all ranks mean the same bits by the same step. **Collective.**

    Raises:
        ConsistencyError: on every rank, naming those that differ and in what.
    """
    mine = np.array([FORMAT_VERSION, step, fingerprint, 0 if joined_for is None else joined_for + 1], dtype=np.int64)
    with session.tracer.span("handshake"):
        heard = session.call(mine)
    if not (heard[:, :3] == mine[:3]).all():
        _explain(session, layout, settings, heard)
    if (heard[:, 3] < 0).any():
        odd = np.flatnonzero(heard[:, 3] < 0).tolist()
        raise ConsistencyError(f"ranks {odd} say that they have sat out less than no steps (this is {session.rank})")
    joined = tuple(None if field == 0 else int(field) - 1 for field in heard[:, 3])
    return Handshake(joined, (session.size - 1) * mine.nbytes)


def _explain(session: Session, layout: Layout, settings: Sequence[str], heard: np.ndarray) -> None:
    """All ranks have seen the mismatch, so they can talk about it: raise the error that says what differs."""
    session.demand_same_act(heard)
    for column, what in ((0, "wire format"), (1, "step")):
        values = heard[:, column].tolist()
        if len(set(values)) > 1:
            odd, usual = minority(values)
            said = ", ".join(f"rank {rank} at {values[rank]}" for rank in odd)
            raise ConsistencyError(
                f"ranks are not at the same {what}: {said}, the others at {usual} (this is rank {session.rank}). "
                "Every rank must call step() (or synchronize()) the same number of times and resume from the "
                "same checkpoint; a rank that runs out of batches calls optimizer.join()"
            )
    fingerprints = heard[:, 2].tolist()
    odd, usual = minority(fingerprints)
    usual_rank = fingerprints.index(usual)
    here, there = session.compare([*settings, *layout.lines()], odd[0], usual_rank, "a comparison of layouts")
    raise ConsistencyError(
        f"ranks {odd} have another layout than the others (this is rank {session.rank}); the first difference is "
        f"{here} on rank {odd[0]}, {there} on rank {usual_rank}. Build the same model, with the same parameters "
        f"frozen, and pass the same options on every rank"
    )


def exchange_participation(session: Session, status: int, present: Sequence[bool]) -> Participation:
    """Tell the others whether this rank votes, and on which parameters it has a gradient. **Collective.**"""
    bits = np.packbits(np.asarray(present, np.bool_), bitorder="little")
    mine = np.concatenate([np.array([status], np.uint8), bits])
    heard = np.empty((session.size, mine.size), np.uint8)
    with session.tracer.span("participation"):
        session.wait(session.post(session.group.comm.Iallgather(mine, heard), mine, heard))
    statuses = tuple(int(code) for code in heard[:, 0])
    unknown = [rank for rank, code in enumerate(statuses) if code != VOTES and code not in REASONS]
    if unknown:
        raise ConsistencyError(
            f"ranks {unknown} abstain for a reason that this mpisign does not know ({statuses[unknown[0]]}; this is "
            f"rank {session.rank}): run the same version on every rank"
        )
    voting = [rank for rank, code in enumerate(statuses) if code == VOTES]
    has = np.unpackbits(heard[:, 1:], axis=1, count=len(present), bitorder="little")
    if has[voting].all():
        voters = (tuple(voting),) * len(present)
    else:
        voters = tuple(tuple(rank for rank in voting if has[rank, i]) for i in range(len(present)))
    return Participation(statuses, voters, (session.size - 1) * mine.nbytes)
