"""Where this process is among the ranks, as they are now, and who is told when that changes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mpisign.membership import MembershipChange
from mpisign.session import current, known

__all__ = [
    "cross_rank",
    "cross_size",
    "device",
    "local_rank",
    "local_size",
    "node_rank",
    "num_nodes",
    "on_membership_change",
    "rank",
    "size",
]


def rank() -> int:
    """This process's number in the job, 0 .. size() - 1."""
    return known("rank()").rank


def size() -> int:
    """How many processes train together."""
    return known("size()").size


def local_rank() -> int:
    """This process's number among those on its node, from MPI's shared-memory split."""
    return known("local_rank()").group.local_rank


def local_size() -> int:
    """How many of the job's processes run on this node."""
    return known("local_size()").group.local_size


def node_rank() -> int:
    """This node's number, 0 .. num_nodes() - 1, by the lowest rank on it."""
    return known("node_rank()").group.node_rank


def num_nodes() -> int:
    """How many nodes the job runs on."""
    return known("num_nodes()").group.num_nodes


def cross_rank() -> int:
    """This process's number among those with its :func:`local_rank`, one a node; as Horovod has it."""
    return known("cross_rank()").group.cross_rank


def cross_size() -> int:
    """On how many nodes there is a process with this one's :func:`local_rank`; fewer than all if nodes differ."""
    return known("cross_size()").group.cross_size


def device() -> torch.device:
    """The device this process should use: ``cuda:(local_rank % device_count)``, or the CPU if there is none."""
    place = known("device()").group.local_rank
    if torch.cuda.is_available():
        return torch.device("cuda", place % torch.cuda.device_count())
    return torch.device("cpu")


def on_membership_change(callback: Callable[[MembershipChange], object]) -> Callable[[], None]:
    """Let ``callback(change)`` be called on every rank after ranks have died and the others have gone on.

    It is told the new :class:`MembershipChange`; :func:`rank`, :func:`size` and the like are the new ones already. It
    must not call what needs other ranks, as a step may be under way. Without ``init(on_failure="continue")`` it is
    never called. Not collective.

    Returns:
        A function that takes it back.
    """
    membership = current("on_membership_change()").membership
    return (lambda: None) if membership is None else membership.tell(callback)
