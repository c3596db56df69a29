"""Which exchange a bucket takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch

from mpisign import cost
from mpisign.errors import OptionError
from mpisign.exchange.allgather import AllGather
from mpisign.exchange.decider import Deciding
from mpisign.exchange.hierarchical import Hierarchical
from mpisign.exchange.staging import Held
from mpisign.exchange.two_phase import TwoPhase
from mpisign.group import Channels, Group
from mpisign.method import Method
from mpisign.network import Network
from mpisign.policy import Policy, check_choice
from mpisign.rules import PieceRule, TallyRule, VectorRule
from mpisign.session import Session
from mpisign.warning import warn
from mpisign.watchdog import Pending

__all__ = ["CHOICES", "Choice", "Exchange", "cap_bytes", "check_exchange", "choose", "named", "planes_of", "shards_for"]

Choice = Literal["auto", "allgather", "two_phase", "hierarchical"]
CHOICES: tuple[Choice, ...] = get_args(Choice)

SECOND_PHASE_BYTES = 65536
"""What a second latency is worth: about 50 us at 10 Gbit/s."""

CAP_MB, CAP_MB_OF_GPUS, CAP_MB_EARLY = 1.0, 16.0, 0.25
"""A GPU's host is busy with each message, by estimate, for as long as the copying of 2 or 3 MiB takes."""


class Exchange(Protocol):
    """One bucket's way across MPI in one or more phases, with its buffers, which live as long as it does.

    ``push`` begins to bring ``message`` (planes_up, length) to where MPI reads it; ``post`` starts phase 0. When a
    phase is over, ``go_on`` does what this rank has to do then, with what ``deciding`` offers, and starts the next one;
    None says that it was the last. Now ``decision`` (planes_down, length) is valid until the next ``post``; and where
    every rank gets every message, ``received``, M of (planes_up, length).

    Where a rank decides for others, items are cut into shards of ``shard`` items (0 where every rank decides for
    itself): ``owners`` says who decides one, and then who counts for it, and ``held`` gives the ballots on which this
    rank decides, or which it counts, when phase 0 is over.

    Phases with the same number share a communicator, so each is begun for all buckets in the same order on all ranks;
    a bucket may be in one while the next is in an earlier one.
    """

    name: str
    message: torch.Tensor
    decision: torch.Tensor
    received: Sequence[torch.Tensor]
    bytes_sent: int
    shard: int

    def push(self) -> None: ...
    def post(self, session: Session, channels: Channels) -> Pending: ...
    def go_on(self, session: Session, channels: Channels, phase: int, deciding: Deciding) -> Pending | None: ...
    def owners(self, shard: int) -> tuple[int, ...]: ...
    def held(self) -> Sequence[Held]: ...


def check_exchange(option: str, method: Method) -> None:
    """Warn if a method cannot take ``option`` and takes another; see :func:`named`.

    Raises:
        OptionError: ``option`` is unknown, or asks for shards where none can be decided.
    """
    check_choice("exchange", option, CHOICES)
    if option == "hierarchical" and not isinstance(method.rule, TallyRule):
        shards = not isinstance(method.rule, VectorRule) and method.rule.down(method.codec, Policy(), 2) is not None
        warn(
            f"exchange='hierarchical' counts ballots inside each node, and the rule {method.rule.name!r} of "
            f"{method.name} does not count: it takes {'two_phase' if shards else 'allgather'}"
        )
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


def cap_bytes(
    bucket_cap_mb: float | None,
    methods: Sequence[Method],
    policy: Policy,
    group: Group,
    network: Network,
    *,
    early: bool = False,
) -> float:
    """To which size a message may grow, the same on all ranks.

    Args:
        bucket_cap_mb: what the user has said; None for nothing.
        early: messages leave while backward runs, and the last one cannot hide.
    """
    if bucket_cap_mb is not None:
        return bucket_cap_mb * (1 << 20)
    default = (CAP_MB_OF_GPUS if group.gpus else CAP_MB) if not early else CAP_MB_EARLY
    if network.links is None or group.gpus > early or any(isinstance(m.rule, PieceRule) for m in methods):
        return default * (1 << 20)
    up, down = planes_of(methods[0], policy, group.size) if methods else (1, 1)
    message = cost.Message(default * (1 << 20), up, down or 1)
    return cost.cap(network.links, group.nodes, cost.choose(network.links, group.nodes, message)[0], message)


def planes_of(method: Method, policy: Policy, size: int) -> tuple[int, int]:
    """How many planes go up and come down among ``size`` ranks; of the second 0 if no decision comes down."""
    down = method.rule.down(method.codec, policy, size)
    return method.codec.planes(policy), 0 if down is None else down.planes(policy)


def shards_for(option: str, method: Method, size: int) -> int:
    """Into how many parts the layout must cut parameters: M where a rule of pieces decides shard by shard."""
    two_phase = option in ("two_phase", "hierarchical") or (option == "auto" and size > 2)
    return size if isinstance(method.rule, PieceRule) and two_phase else 1


def choose(
    option: str,
    method: Method,
    length: int,
    dtype: torch.dtype,
    planes_up: int,
    planes_down: int,
    group: Group,
    network: Network,
    device: torch.device,
) -> Exchange:
    """Make the exchange of one bucket of ``length`` items on ``device``: the one that :func:`named` says.

    Args:
        planes_down: 0 where no decision comes down.
    """
    name, _ = named(option, method, length * dtype.itemsize, planes_up, planes_down, group, network)
    if name == "hierarchical":
        assert isinstance(method.rule, TallyRule)
        return Hierarchical(length, dtype, planes_up, planes_down, group, device, method.rule)
    kind = TwoPhase if name == "two_phase" else AllGather
    return kind(length, dtype, planes_up, planes_down, group, device)


def named(
    option: str, method: Method, plane: int, planes_up: int, planes_down: int, group: Group, network: Network
) -> tuple[str, str]:
    """Which exchange messages of ``plane`` bytes a plane take, and why, in words.

    A rule that needs whole vectors always gets all-gather, and one on values two phases instead of a hierarchy.
    ``"auto"`` takes what a message is soonest across with, by the model of :mod:`mpisign.cost`, where the links have
    been measured. Else, and for methods whose result depends on it, it goes by sizes: it takes all-gather unless that
    sends at least 64 KiB more than two phases do, which is never so with one or two ranks; and a hierarchy in place of
    these where several ranks of a node share its card, and 64 KiB are saved there.
    """
    if planes_down == 0 or isinstance(method.rule, VectorRule):
        return "allgather", "allgather: the rule needs all messages"
    if isinstance(method.rule, PieceRule):  # the layout was cut for it, so it is the same for every bucket
        name = "two_phase" if shards_for(option, method, group.size) > 1 else "allgather"
        return name, f"{name}: by the number of ranks, as the method's result depends on it"
    tallies = isinstance(method.rule, TallyRule) and network.shares
    if option != "auto":
        name = "two_phase" if option == "hierarchical" and not tallies else option
        return name, f"{name}: exchange={option!r}"
    if network.links is not None:
        among = cost.EXCHANGES if tallies else ("allgather", "two_phase")
        message = cost.Message(plane, planes_up, planes_down)
        return cost.choose(network.links, group.nodes, message, among)
    name = _by_size(method, plane, planes_up, planes_down, group, tallies)
    return name, f"{name}: by size, as no link was measured"


def _by_size(method: Method, plane: int, planes_up: int, planes_down: int, group: Group, tallies: bool) -> str:
    ranks, nodes, largest = group.size, group.nodes.number, group.nodes.fullest
    flat = (ranks - 1) * plane * planes_up, (ranks - 1) / ranks * plane * (planes_up + planes_down)
    if tallies and nodes > 1 and group.nodes.lanes > 1:
        assert isinstance(method.rule, TallyRule)
        counts, planes = method.rule.tally_shape(planes_up, largest)
        by_card = (nodes - 1) / nodes * plane * (counts * planes + planes_down)
        if largest * min(flat) * (ranks - largest) / (ranks - 1) - by_card >= SECOND_PHASE_BYTES:
            return "hierarchical"
    return "two_phase" if flat[0] - flat[1] >= SECOND_PHASE_BYTES else "allgather"
