"""What another rank needs to end a round as this one has: all headers and decisions, or the messages themselves.

Decisions stay in a plan's buffers until all ranks have sent messages of the next round. Where ranks decide for
themselves, or keep something by what they decide, it takes all messages, of which a copy is made: those of the next
round may come before all are done with this one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from mpisign import encoding
from mpisign.encoding import Optional
from mpisign.exchange.decider import Deciding
from mpisign.exchange.flight import Flight
from mpisign.exchange.header import Handshake, Heard
from mpisign.exchange.plan import Plan
from mpisign.exchange.ties import Ties
from mpisign.lateness import Late
from mpisign.layout import Bucket
from mpisign.rules import PieceRule, VectorRule
from mpisign.session import Session, current
from mpisign.transfer import as_bytes

__all__ = ["Handover", "settled", "taken"]

SPOKEN = (
    Optional(int),
    ([Optional(int)], int, [int], bool, bool, int, (Optional(int), float)),
)  # ties, and a handshake


class Handover:
    """Of one round, whose messages have all been decided here.

    Attributes:
        ties: of all ranks, which are known.
        handshake: which a rank whose messages had all left before it may not have heard.
    """

    def __init__(self, plan: Plan, flights: Sequence[Flight], ties: Ties, handshake: Handshake) -> None:
        self._plan, self._flights, self.ties, self.handshake = plan, flights, ties, handshake
        self._copies = {its: _received(plan, its).clone() for its in range(len(flights)) if _by_messages(plan, its)}

    def told(self) -> bytes:
        """All of it, in the order of the messages."""
        spoken = encoding.encode([self.ties.counted(), dataclasses.astuple(self.handshake)])
        parts = [np.array([len(spoken)], np.int64).view(np.uint8), np.frombuffer(spoken, np.uint8)]
        for index in range(len(self._flights)):
            parts.append(self._plan.headers[index].said)
            its = self._copies.get(index)
            parts.append(as_bytes(self._plan.exchanges[index].decision if its is None else its))
        return np.concatenate(parts).tobytes()


def settled(plan: Plan, step: int, flights: Sequence[Flight], handshake: Handshake, session: Session) -> Handover:
    """Of a round that is closed, after the ranks' ties are added up. **Collective.**"""
    ties = Ties(plan, step, flights, session)
    ties.ask()
    ties.add_up()
    ties.counted()
    return Handover(plan, flights, ties, handshake)


def taken(
    plan: Plan,
    step: int,
    flights: Sequence[Flight],
    told: bytes,
    deciding: Callable[[Bucket, Heard], Deciding],
) -> Handover:
    """End a round that has sent all its messages with what :meth:`Handover.told` says.

    Args:
        deciding: who decides on a message, where that must be done here.
    """
    session = current()
    raw = torch.frombuffer(bytearray(told), dtype=torch.uint8)
    at = 8 + int(raw[:8].view(torch.int64))
    count, spoken = encoding.decode(raw[8:at].numpy().tobytes(), SPOKEN, plan.group.rank)
    joined_for, bytes_sent, gradients, fresh, void, posted, late = spoken
    handshake = Handshake(tuple(joined_for), bytes_sent, tuple(gradients), fresh, void, posted, Late(*late))
    for index, flight in enumerate(flights):
        header = plan.headers[index]
        header.hear(raw[at : at + header.size].numpy())
        at += header.size
        by_messages = _by_messages(plan, index)
        target = _received(plan, index) if by_messages else plan.exchanges[index].decision
        part = raw[at : at + target.nbytes].clone().view(target.dtype).view(target.shape)  # clone: aligned
        at += target.nbytes
        if flight.heard is None:
            flight.heard = header.heard(session)
        if by_messages and flight.pending is not None:  # else what this rank keeps has been changed already
            exchange = plan.exchanges[index]
            for message, its in zip(exchange.received, part, strict=True):
                message.copy_(its)
            deciding(flight.bucket, flight.heard).decide(exchange.received, exchange.decision, 0, counts=False)
        elif not by_messages:
            target.copy_(part)
        flight.header = flight.pending = None
    ties = Ties(plan, step, flights, session)
    ties.know(count)
    return Handover(plan, flights, ties, handshake)


def _by_messages(plan: Plan, index: int) -> bool:
    """Whether a message's decision must be made here, from all ranks' messages."""
    if plan.exchanges[index].name != "allgather":
        return False
    method = plan.layout.buckets[index].method
    rule = method.rule
    own = isinstance(rule, VectorRule) and rule.personal
    keeps = isinstance(rule, PieceRule) and rule.keeps
    return own or keeps or rule.down(method.codec, plan.policy, plan.group.size) is None


def _received(plan: Plan, index: int) -> torch.Tensor:
    return torch.stack(list(plan.exchanges[index].received))
