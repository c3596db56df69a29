"""Where each process is when ranks have died: what all tell each other, and what follows of it for all alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["BODY", "CLOSING", "DONE", "FAILED", "STEPS_IN", "VOTES", "WAITS", "Position", "voting"]

BODY, CLOSING, DONE, FAILED = range(4)
VOTES, WAITS, STEPS_IN = range(3)  # the last if the act counts that goes on


class Position(NamedTuple):
    """Where a rank is: the last act that it has begun, and how far it has come in it."""

    identity: int
    gpu: int
    generation: int
    number: int
    state: int
    raises: int  # that act is not repeated, but the user is told
    leaving: int  # it has ended all else, and leaves the job
    given: int  # the last act whose decision it has
    network: int  # what it knows of the ways between ranks
    good: int  # the generation of the last group in which it has closed an act
    waits: int  # it is a spare, as all that are not VOTES
    apart: int  # it knows that all have come to where spares leave the others
    stopping: int  # it has heard that a rank wants to stop


def voting(positions: Sequence[Position]) -> list[Position]:
    """Those who vote, and those who step in by an act that counts."""
    voters = [its for its in positions if its.waits == VOTES]

    def counts(number: int) -> bool:
        return any(its.number > number or (its.number == number and its.state == DONE) for its in voters)

    return [its for its in positions if its in voters or (its.waits == STEPS_IN and counts(its.number))]
