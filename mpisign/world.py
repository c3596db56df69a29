"""The job: who we are, how we talk, how we end. The only module that owns a communicator.

``init()`` duplicates the communicator it is given, so that the library's messages never meet the user's.
Everything else asks :func:`current` for it afresh at each use and keeps no copy of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from mpisign.errors import AlreadyInitializedError, ConsistencyError, NotInitializedError
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

logger = logging.getLogger(__name__)

SPIN_SECONDS = 0.0002  # a wait this short is worth the core; ranks may outnumber cores, so yield even then
NAP_SHARE = 0.05  # after that sleep a twentieth of the time waited so far, which delays nothing by more than 5 %
NAP_SECONDS = 0.001  # and at most this long
CALL_FIELDS = 4  # how many numbers a call has, whatever it is for
EXIT = "exit"
ACTS = (
    EXIT,
    "barrier()",
    "broadcast_object()",
    "allgather_object()",
    "broadcast_parameters()",
    "broadcast_optimizer_state()",
    "check_consistency()",
    "agreement()",
)
"""What ranks do together besides steps. A call begins with -2 - its place here; a step's with a number above 0."""
_UNHEARD = -1

_yield: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))


@dataclass
class World:
    """This process's place in the job. Made by :func:`init`.

    ``comm``: a private duplicate; ``local_rank``, ``local_size``: among the ranks that share this node's
    memory; ``node_rank``, ``num_nodes``: nodes are numbered by their lowest rank.
    """

    comm: MPI.Comm
    rank: int
    size: int
    local_rank: int
    local_size: int
    node_rank: int
    num_nodes: int
    stall_warning: float | None
    stall_timeout: float | None
    _parted: bool = False  # a rank has left before the others: nothing collective can work any more
    _previous_hook: Callable[..., Any] | None = field(default=None, repr=False)

    def wait(self, request: MPI.Request, what: str, missing: Callable[[], str] | None = None) -> None:
        """Wait for a request without losing sight of time.

        Logs a warning after ``stall_warning`` seconds, and again each time the wait has doubled; aborts the
        job after ``stall_timeout`` seconds.

        Args:
            request: a nonblocking MPI operation.
            what: step and phase for the message, e.g. ``"step 17, roll call"``.
            missing: says, if it can be told, whom this rank waits for.
        """
        began = time.monotonic()
        warn_at = self.stall_warning
        while not request.Test():
            waited = time.monotonic() - began
            _yield() if waited < SPIN_SECONDS else time.sleep(min(waited * NAP_SHARE, NAP_SECONDS))
            if warn_at is not None and waited >= warn_at:
                logger.warning("%s", self._stalled(waited, what, missing))
                warn_at *= 2
            if self.stall_timeout is not None and waited >= self.stall_timeout:
                self.abort(f"{self._stalled(waited, what, missing)}; stall_timeout={self.stall_timeout:g} is over")

    def _stalled(self, waited: float, what: str, missing: Callable[[], str] | None) -> str:
        whom = missing() if missing is not None else ""
        return f"rank {self.rank} of {self.size} has waited {waited:.3g} s in {what}" + (whom and f"; {whom}")

    def call(self, mine: npt.NDArray[np.int64], what: str) -> npt.NDArray[np.int64]:
        """All-gather a few numbers, the same few from everyone: (fields,) int64 to (M, fields). **Collective.**

        Everything that ranks do together begins with such a call, so that ranks that do different things meet in
        it, and are told, where other messages of theirs would be mistaken for each other.
        """
        if self._parted:
            raise ConsistencyError(f"rank {self.rank}: a rank has left the job before the others; it can only end now")
        heard = np.full((self.size, mine.size), _UNHEARD, np.int64)

        def missing() -> str:
            # Only a hint in a warning: what has arrived so far, read while MPI still owns the buffer.
            unheard = [rank for rank in range(self.size) if rank != self.rank and heard[rank, 0] == _UNHEARD]
            return f"not heard from yet: ranks {unheard}" if unheard else ""

        self.wait(self.comm.Iallgather(mine, heard), what, missing)
        return heard

    def meet(self, act: str) -> None:
        """Make sure that all ranks are about to do the same thing, one of ``ACTS``. **Collective.**

        Raises:
            ConsistencyError: on every rank, saying who does what.
        """
        self.demand_same_act(self.call(_act_call(act), act))

    def demand_same_act(self, heard: npt.NDArray[np.int64]) -> None:
        """Raise :class:`ConsistencyError` if a call, (M, fields), shows ranks that do different things."""
        acts = [_act_name(code) for code in heard[:, 0].tolist()]
        if len(set(acts)) > 1:
            self._parted = EXIT in acts
            who = "; ".join(
                f"ranks {[rank for rank, its in enumerate(acts) if its == act]} "
                + ("have left the job" if act == EXIT else f"are in {act}")
                for act in sorted(set(acts))
            )
            raise ConsistencyError(
                f"ranks do different things: {who} (this is rank {self.rank}). Every rank must make the same calls in "
                f"the same order; where ranks have different numbers of batches, call optimizer.join() on every rank "
                f"when its batches end"
            )

    def say_goodbye(self) -> bool:
        """Meet the others before leaving, as MPI_Finalize would wait for them in silence. **Collective.**

        Returns:
            Whether all leave together. If not, the others get an error, and this rank is past doing anything about it.
        """
        try:
            self.meet(EXIT)
        except ConsistencyError as error:
            logger.error("%s", error)
            return False
        return True

    def abort(self, reason: str, code: int = 1) -> None:
        """End every process of the job at once, saying why."""
        logger.critical("%s: aborting the job", reason)
        _flush()
        self.comm.Abort(code)


def _act_call(act: str) -> npt.NDArray[np.int64]:
    return np.array([-2 - ACTS.index(act)] + [0] * (CALL_FIELDS - 1), np.int64)


def _act_name(code: int) -> str:
    return ACTS[-2 - code] if code < 0 else "step()"


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
        library = MPI.Get_library_version().split("\n")[0].split(",")[0].strip("\0 ")
        check_not_alone(os.environ, comm.Get_size(), library)
    mine = comm.Dup()
    node = mine.Split_type(MPI.COMM_TYPE_SHARED)
    leader = node.bcast(mine.rank, root=0)
    leaders = sorted(set(mine.allgather(leader)))
    _world = World(
        comm=mine,
        rank=mine.rank,
        size=mine.size,
        local_rank=node.rank,
        local_size=node.size,
        node_rank=leaders.index(leader),
        num_nodes=len(leaders),
        stall_warning=stall_warning,
        stall_timeout=stall_timeout,
    )
    node.Free()
    if abort_on_exception:
        _world._previous_hook = sys.excepthook
        sys.excepthook = _abort_on_exception
    atexit.register(shutdown)


def shutdown() -> None:
    """Leave the job: free the communicator, restore the exception hook. **Collective.** Harmless if not in one.

    Called at exit if you do not. MPI itself stays up (mpi4py finalizes it when Python exits), so :func:`init`
    may be called again. A rank that leaves while others are in a step is an error to them, not a hang.
    """
    global _world
    if _world is None:
        return
    leaving, _world = _world, None
    atexit.unregister(shutdown)
    if leaving._previous_hook is not None and sys.excepthook is _abort_on_exception:
        sys.excepthook = leaving._previous_hook
    if leaving.say_goodbye():
        leaving.comm.Free()


def _abort_on_exception(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    world = _world
    previous = world._previous_hook if world is not None else None
    (previous or sys.__excepthook__)(kind, value, trace)
    if world is None:
        return
    if world.size > 1:
        logger.critical("rank %d of %d died of %s: aborting the job", world.rank, world.size, kind.__name__)
    _flush()
    world.comm.Abort(130 if issubclass(kind, KeyboardInterrupt) else 1)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe must not keep the job alive
            stream.flush()


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
