"""The job: who we are, how we talk, how we end. The only module that owns a communicator.

``init()`` duplicates the communicator it is given, so that the library's messages never meet the user's.
Everything else asks :func:`current` for it afresh at each use and keeps no copy of its own.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from mpisign.channel import Channel
from mpisign.errors import AlreadyInitializedError, NotInitializedError, OptionError
from mpisign.launch import check_not_alone
from mpisign.policy import check_positive

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = [
    "World",
    "barrier",
    "current",
    "device",
    "init",
    "is_initialized",
    "local_rank",
    "local_size",
    "node_rank",
    "num_nodes",
    "rank",
    "shutdown",
    "size",
]


@dataclass
class World(Channel):
    """This process's place in the job. Made by :func:`init`.

    ``comm``: a private duplicate; ``local_rank``, ``local_size``: among the ranks that share this node's
    memory; ``node_rank``, ``num_nodes``: nodes are numbered by their lowest rank; ``gpus``: every rank has one that
    torch can use.
    """

    local_rank: int
    local_size: int
    node_rank: int
    num_nodes: int
    gpus: bool = False
    optimizers: int = 0  # how many have taken a number here
    process: int = field(default_factory=os.getpid)
    _previous_hook: Callable[..., Any] | None = field(default=None, repr=False)

    def next_number(self) -> int:
        """A number for an optimizer, the same on all ranks if they make theirs in the same order."""
        self.optimizers += 1
        return self.optimizers


_world: World | None = None


def current(caller: str = "this function") -> World:
    """The job this process belongs to. Raises :class:`NotInitializedError`, naming ``caller``."""
    if _world is None:
        raise NotInitializedError(f"{caller} needs the job's ranks: call mpisign.init() first")
    return _world


def init(
    comm: MPI.Comm | None = None,
    *,
    abort_on_exception: bool = True,
    stall_warning: float | None = 60.0,
    stall_timeout: float | None = None,
) -> None:
    """Join the job: learn ranks and nodes, and get a private communicator. **Collective.**

    Args:
        comm: the ranks that train together; default ``MPI.COMM_WORLD``. It is duplicated, not kept.
        abort_on_exception: a process that dies of an uncaught exception prints its traceback and takes the
            whole job down at once, instead of leaving the others to wait for ever.
        stall_warning: seconds in one exchange after which a waiting rank says so; None for never.
        stall_timeout: seconds after which it aborts the job; None for never.

    Raises:
        AlreadyInitializedError: called twice.
        LaunchError: MPI sees one process, but the launcher started several.
        OptionError: a time that is not positive.
    """
    global _world
    if _world is not None:
        raise AlreadyInitializedError(
            f"rank {_world.rank}: mpisign.init() was called before; call it once, or mpisign.shutdown() first "
            f"(mpisign.is_initialized() tells)"
        )
    for name, seconds in (("stall_warning", stall_warning), ("stall_timeout", stall_timeout)):
        if seconds is not None:
            check_positive(name, seconds, " of seconds, or None for never")

    from mpi4py import MPI  # not at import: a spawned DataLoader worker that starts MPI hangs the job

    if comm is None:
        comm = MPI.COMM_WORLD
    elif not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
        raise OptionError(f"comm={comm!r} is no communicator with this process in it: do not call init() outside it")
    if comm == MPI.COMM_WORLD:
        library = MPI.Get_library_version().split("\n")[0].split(",")[0].strip("\0 ")
        check_not_alone(os.environ, comm.Get_size(), library)
    mine = comm.Dup()
    node = mine.Split_type(MPI.COMM_TYPE_SHARED)
    leader = node.bcast(mine.rank, root=0)
    known, gpus = zip(*mine.allgather((leader, _has_gpu())), strict=True)
    leaders = sorted(set(known))
    _world = World(
        comm=mine,
        rank=mine.rank,
        size=mine.size,
        local_rank=node.rank,
        local_size=node.size,
        node_rank=leaders.index(leader),
        num_nodes=len(leaders),
        gpus=all(gpus),
        stall_warning=stall_warning,
        stall_timeout=stall_timeout,
    )
    node.Free()
    if abort_on_exception:
        _world._previous_hook = sys.excepthook
        sys.excepthook = _abort_on_exception
    atexit.register(shutdown)


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


def shutdown() -> None:
    """Leave the job: free the communicator, restore the exception hook. **Collective.** Harmless if not in one.

    Called at exit if you do not. MPI itself stays up (mpi4py finalizes it when Python exits), so :func:`init`
    may be called again. A rank that leaves while others are in a step is an error to them, not a hang.
    """
    global _world
    if _world is None:
        return
    from mpi4py import MPI

    leaving, _world = _world, None
    atexit.unregister(shutdown)
    if leaving._previous_hook is not None and sys.excepthook is _abort_on_exception:
        sys.excepthook = leaving._previous_hook
    if leaving.process != os.getpid() or MPI.Is_finalized():
        return  # a forked child is not a rank, and after MPI.Finalize() there is nobody to tell
    if leaving.say_goodbye():
        leaving.comm.Free()


def _abort_on_exception(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    world = _world
    previous = world._previous_hook if world is not None else None
    (previous or sys.__excepthook__)(kind, value, trace)
    if world is None or world.process != os.getpid():
        return
    from mpi4py import MPI

    if not MPI.Is_finalized():
        code = 130 if issubclass(kind, KeyboardInterrupt) else 1
        world.abort(f"rank {world.rank} of {world.size} died of {kind.__name__}", code)


def is_initialized() -> bool:
    """Whether :func:`init` has been called, and :func:`shutdown` not since."""
    return _world is not None


def rank() -> int:
    """This process's number in the job, 0 .. size() - 1."""
    return current("rank()").rank


def size() -> int:
    """How many processes train together."""
    return current("size()").size


def local_rank() -> int:
    """This process's number among those on its node, from MPI's shared-memory split."""
    return current("local_rank()").local_rank


def local_size() -> int:
    """How many of the job's processes run on this node."""
    return current("local_size()").local_size


def node_rank() -> int:
    """This node's number, 0 .. num_nodes() - 1, by the lowest rank on it."""
    return current("node_rank()").node_rank


def num_nodes() -> int:
    """How many nodes the job runs on."""
    return current("num_nodes()").num_nodes


def device() -> torch.device:
    """The device this process should use: ``cuda:(local_rank % device_count)``, or the CPU if there is none."""
    place = current("device()").local_rank
    if torch.cuda.is_available():
        return torch.device("cuda", place % torch.cuda.device_count())
    return torch.device("cpu")


def barrier() -> None:
    """Wait until every rank has come here. **Collective.**"""
    current("barrier()").meet("barrier()")
