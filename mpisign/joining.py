"""How ranks come together: what :func:`mpisign.init` is told, compared, and their first group."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mpisign import heartbeat
from mpisign.errors import ConsistencyError, OptionError
from mpisign.group import Group, check_node_map
from mpisign.policy import check_choice, check_integer, check_positive
from mpisign.presence import Presence
from mpisign.survival import can_survive, how_to_survive
from mpisign.trace import Tracer
from mpisign.vigil import ON_DEAD_TRAINING
from mpisign.watchdog import Watchdog

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["ON_FAILURE", "Failure", "coded_options", "joined", "told_options", "wrong_failure", "wrong_options"]

ON_FAILURE = ("abort", "continue")
FAILURE_VARIABLE = "MPISIGN_ON_FAILURE"
SPARES_BIT = 18  # of the options' code, from which on these are; before them is min_ranks
LINKS_BIT = 32  # and from which on milliseconds are


def wrong_options(times: dict[str, float | None], on_dead_training: str) -> OptionError | None:
    """What is wrong with them. Only this rank may have been told it, and the others must hear of it first."""
    try:
        for name, seconds in times.items():
            if seconds is not None:
                check_positive(name, seconds, " of seconds, or None for never")
        check_choice("on_dead_training", on_dead_training, ON_DEAD_TRAINING)
    except OptionError as error:
        return error
    return None


class Failure(NamedTuple):
    """What shall be done when a rank dies: options of :func:`mpisign.init`."""

    on_failure: str
    min_ranks: int | None
    detect_links: float | None
    spares: int = 0

    @classmethod
    def wanted(cls, on_failure: str | None, *others: Any) -> Failure:
        """What the arguments say, in this order, and where they do not say ``on_failure``, the variable."""
        return cls(on_failure or os.environ.get(FAILURE_VARIABLE) or ON_FAILURE[0], *others)

    @property
    def survives(self) -> bool:
        """The job goes on."""
        return self.on_failure == "continue"


def wrong_failure(failure: Failure, size: int) -> OptionError | None:
    """The same of what shall be done when a rank dies. MPI must have been started."""
    on_failure, min_ranks, detect_links, spares = failure
    try:
        by_variable = on_failure == os.environ.get(FAILURE_VARIABLE)
        check_choice(FAILURE_VARIABLE if by_variable else "on_failure", on_failure, ON_FAILURE)
        if min_ranks is not None and on_failure == "abort":
            raise OptionError(f"min_ranks={min_ranks!r} says with how many ranks a job goes on: on_failure='continue'")
        if min_ranks is not None and check_integer("min_ranks", min_ranks, 1) > size:
            raise OptionError(f"min_ranks={min_ranks} are more than the {size} ranks that this job has")
        if check_integer("spares", spares, 0) and on_failure == "abort":
            raise OptionError(f"spares={spares} step in when a rank dies, in a job that goes on: on_failure='continue'")
        if spares >= size:
            raise OptionError(f"spares={spares} of {size} ranks leave nobody to train: start more ranks")
        if on_failure == "continue" and not can_survive():
            raise OptionError(f"on_failure='continue' needs an MPI that survives a rank (ULFM), and {how_to_survive()}")
        if detect_links is not None:
            if on_failure == "abort":
                raise OptionError(
                    f"detect_links={detect_links!r} lets a job go on without silent ranks: on_failure='continue'"
                )
            heartbeat.check(detect_links)
    except OptionError as error:
        return error
    return None


def joined(
    comm: MPI.Comm, watchdog: Watchdog, tracer: Tracer, node_of: Sequence[int] | None, wrong: OptionError | None
) -> Group:
    """The job's first group. **Collective.** Raises ``wrong``, and an error on the others, who may try again."""
    places = None
    try:
        places = check_node_map(node_of, comm.Get_size())
    except OptionError as error:
        wrong = error
    identity = comm.Get_rank() if wrong is None else -1
    try:
        return Group.form(_duplicate(comm, watchdog, tracer), watchdog, places, 0, identity, _has_gpu())
    except ConsistencyError:
        if wrong is not None:
            raise wrong from None
        raise


def coded_options(pickle: bool, on_dead_training: str, failure: Failure) -> int:
    """All options that must be the same on all ranks, as one number."""
    code = int(pickle) + 2 * ON_DEAD_TRAINING.index(on_dead_training) + 4 * failure.survives
    code += 8 * (failure.min_ranks or 0) + (failure.spares << SPARES_BIT)
    return code + (round(1000 * (failure.detect_links or 0.0)) << LINKS_BIT)


def told_options(code: int, other: int) -> str:
    """The options that a rank has told, as far as they differ from another's."""
    mine, theirs = [
        (
            f"pickle={bool(its & 1)}",
            f"on_dead_training={ON_DEAD_TRAINING[its >> 1 & 1]!r}",
            f"on_failure={ON_FAILURE[its >> 2 & 1]!r}",
            f"min_ranks={(its >> 3) % (1 << SPARES_BIT - 3) or None}",
            f"spares={(its >> SPARES_BIT) % (1 << LINKS_BIT - SPARES_BIT)}",
            f"detect_links={(its >> LINKS_BIT) / 1000 or None}",
        )
        for its in (code, other)
    ]
    return ", ".join(here for here, there in zip(mine, theirs, strict=True) if here != there)


def _duplicate(comm: MPI.Comm, watchdog: Watchdog, tracer: Tracer) -> MPI.Comm:
    """A private communicator of the same ranks; the first thing that all ranks do together. **Collective.**"""
    watchdog.comm, watchdog.rank, watchdog.size = comm, comm.Get_rank(), comm.Get_size()
    presence = Presence(comm)
    with tracer.span("init()"):
        mine, request = comm.Idup()
        watchdog.wait(watchdog.post(request, mine), presence)
        watchdog.comm = mine
        of_mine = Presence(mine)
        watchdog.wait(watchdog.post(mine.Ibarrier()), of_mine)
    with watchdog.guard("init()"):  # nothing of this must be left on the communicators
        presence.drain()
        of_mine.drain()
    return mine


def _has_gpu() -> bool:
    """Whether torch can use one. NVML knows; CUDA, once asked, heeds no CUDA_VISIBLE_DEVICES and survives no fork."""
    variable = "PYTORCH_NVML_BASED_CUDA_CHECK"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        return torch.cuda.is_available()
    finally:
        os.environ.pop(variable)
        if before is not None:
            os.environ[variable] = before
