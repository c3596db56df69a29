"""Which exchange a bucket takes."""

from __future__ import annotations

from typing import Protocol

import torch

from mpisign.errors import OptionError
from mpisign.exchange.allgather import AllGather
from mpisign.exchange.decider import Deciding
from mpisign.exchange.two_phase import TwoPhase
from mpisign.group import Group
from mpisign.method import Method
from mpisign.policy import Policy, check_choice
from mpisign.rules import RecodedMean, VectorRule
from mpisign.session import Session
from mpisign.watchdog import Pending

__all__ = ["CHOICES", "Exchange", "cap_bytes", "check_exchange", "choose", "shards_for"]

CHOICES = ("auto", "allgather", "two_phase")

SECOND_PHASE_BYTES = 65536
"""What a second latency is worth: about 50 us at 10 Gbit/s."""

CAP_MB, CAP_MB_OF_GPUS = 1.0, 16.0
"""A GPU's host is busy with each message, by estimate, for as long as the copying of 2 or 3 MiB takes."""


class Exchange(Protocol):
    """One bucket's way across MPI in one or more phases, with its buffers, which live as long as it does.

    ``push`` begins to bring ``message`` (planes_up, length) to where MPI reads it; ``post`` starts phase 0. When a
    phase is over, ``go_on`` does what this rank has to do then, with what ``decide`` offers, and starts the next one;
    None says that it was the last. Now ``decision`` (planes_down, length) is valid until the next ``post``; and where
    every rank gets every message, ``received`` (M, planes_up, length).

    Phases with the same number share a communicator, so each is begun for all buckets in the same order on all ranks;
    a bucket may be in one while the next is in an earlier one.
    """

    name: str
    message: torch.Tensor
    decision: torch.Tensor
    received: torch.Tensor
    bytes_sent: int

    def push(self) -> None: ...
    def post(self, session: Session) -> Pending: ...
    def go_on(self, session: Session, phase: int, decide: Deciding) -> Pending | None: ...
    def counts_ties_for(self, rank: int) -> bool: ...


def check_exchange(option: str, method: Method) -> None:
    """Raise :class:`OptionError` if ``option`` is unknown or the method cannot be decided shard by shard."""
    check_choice("exchange", option, CHOICES)
    if option == "two_phase" and isinstance(method.rule, VectorRule):
        raise OptionError(
            f"exchange='two_phase' decides shards, but the rule {method.rule.name!r} needs whole vectors: "
            f"use exchange='allgather' (or 'auto', which takes it)"
        )
    if option == "two_phase" and method.rule.down(method.codec, Policy(), 2) is None:
        raise OptionError(
            f"exchange='two_phase' sends a decision in the form of a message, but the {method.rule.name} of "
            f"{method.codec.name} messages has another: use exchange='allgather' (or 'auto', which takes it)"
        )


def cap_bytes(bucket_cap_mb: float | None, group: Group) -> float:
    """To which size a message may grow, the same on all ranks; None for the default."""
    default = CAP_MB_OF_GPUS if group.gpus else CAP_MB
    return (default if bucket_cap_mb is None else bucket_cap_mb) * (1 << 20)


def shards_for(option: str, method: Method, size: int) -> int:
    """Into how many parts the layout must cut parameters: M where a re-encoding rule decides shard by shard."""
    two_phase = option == "two_phase" or (option == "auto" and size > 2)
    return size if isinstance(method.rule, RecodedMean) and two_phase else 1


def choose(
    option: str,
    method: Method,
    length: int,
    dtype: torch.dtype,
    planes_up: int,
    planes_down: int,
    group: Group,
    device: torch.device,
) -> Exchange:
    """Make the exchange of one bucket of ``length`` items on ``device``.

    Args:
        planes_down: 0 where no decision comes down.

    ``"auto"`` takes all-gather unless it would send at least 64 KiB more than two-phase does, which is never
    so with one or two ranks; a rule that needs whole vectors always gets all-gather.
    """
    message = length * dtype.itemsize * planes_up
    decision = length * dtype.itemsize * planes_down
    saved = (group.size - 1) * message - (group.size - 1) / group.size * (message + decision)
    pays = planes_down > 0 and not isinstance(method.rule, VectorRule) and saved >= SECOND_PHASE_BYTES
    if isinstance(method.rule, RecodedMean):  # the layout was cut for it, so it is the same for every bucket
        pays = shards_for(option, method, group.size) > 1
    kind = TwoPhase if option == "two_phase" or (option == "auto" and pays) else AllGather
    return kind(length, dtype, planes_up, planes_down, group, device)
