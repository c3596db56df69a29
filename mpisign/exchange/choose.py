"""Which exchange a bucket takes."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mpisign.errors import OptionError
from mpisign.exchange.allgather import AllGather
from mpisign.exchange.runs import Decide
from mpisign.exchange.two_phase import TwoPhase
from mpisign.policy import check_choice
from mpisign.rules import Rule
from mpisign.world import World

__all__ = ["CHOICES", "Exchange", "check_exchange", "choose"]

CHOICES = ("auto", "allgather", "two_phase")

SECOND_PHASE_BYTES = 65536
"""What a second latency is worth: about 50 us at 10 Gbit/s."""


class Exchange(Protocol):
    """One bucket's way across MPI, with its buffers, which live as long as it does.

    ``start`` sends ``message`` (planes_up, length); ``settle`` waits for the others' and decides what is this
    rank's to decide; ``finish`` returns the decision (planes_down, length), valid until the next ``start``.
    Each is called once a step, for all buckets in the same order on all ranks.
    """

    name: str
    message: npt.NDArray[Any]
    bytes_sent: int

    def start(self, world: World) -> None: ...
    def settle(self, decide: Decide, world: World, what: str) -> None: ...
    def finish(self, world: World, what: str) -> npt.NDArray[Any]: ...
    def counts_ties_for(self, rank: int) -> bool: ...


def check_exchange(option: str, rule: Rule) -> None:
    """Raise :class:`OptionError` if ``option`` is unknown or the rule cannot be decided shard by shard."""
    check_choice("exchange", option, CHOICES)
    if option == "two_phase" and not rule.shardable:
        raise OptionError(
            f"exchange='two_phase' decides shards, but the rule {rule.name!r} needs whole vectors: "
            f"use exchange='allgather' (or 'auto', which takes it)"
        )


def choose(
    option: str,
    rule: Rule,
    length: int,
    dtype: np.dtype[np.generic],
    planes_up: int,
    planes_down: int,
    world: World,
) -> Exchange:
    """Make the exchange of one bucket of ``length`` items.

    ``"auto"`` takes all-gather unless it would send at least 64 KiB more than two-phase does, which is never
    so with one or two ranks; a rule that needs whole vectors always gets all-gather.
    """
    message = length * dtype.itemsize * planes_up
    decision = length * dtype.itemsize * planes_down
    saved = (world.size - 1) * message - (world.size - 1) / world.size * (message + decision)
    two_phase = option == "two_phase" or (option == "auto" and rule.shardable and saved >= SECOND_PHASE_BYTES)
    kind = TwoPhase if two_phase else AllGather
    return kind(length, dtype, planes_up, planes_down, world)
