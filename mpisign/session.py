"""The job: who we are, how we talk, how we end.

``init()`` makes the one :class:`Session` of this process, which owns the group of ranks that train together, the
watchdog and the tracer. Everything else asks :func:`current` for it, and it for the group, afresh at each use, and
keeps no group of its own: a group can be replaced between two steps.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from mpisign import heartbeat
from mpisign import timeline as timelines
from mpisign.alarm import ring
from mpisign.differences import minority
from mpisign.errors import AlreadyInitializedError, ConsistencyError, MpisignError, NotInitializedError, OptionError
from mpisign.exit_words import REQUEUE_EXIT_CODE, tell_group
from mpisign.group import Group
from mpisign.joining import Failure, coded_options, joined, told_options, wrong_failure, wrong_options
from mpisign.last_words import LastWords, end_with
from mpisign.launch import check_not_alone, import_mpi
from mpisign.membership import Membership
from mpisign.network import Network
from mpisign.plain import uncompiled
from mpisign.processes import check_may_start, exit_code, leave_mpi_to_us, whose_child
from mpisign.talk import Talk
from mpisign.trace import Tracer
from mpisign.turns import Turns
from mpisign.vigil import ON_DEAD_TRAINING
from mpisign.watchdog import Watchdog

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = [
    "Session",
    "barrier",
    "collective",
    "current",
    "init",
    "is_initialized",
    "known",
    "operation",
    "shutdown",
    "timeline",
]

F = TypeVar("F", bound=Callable[..., Any])

logger = logging.getLogger(__name__)

NODE_MAP_VARIABLE = "MPISIGN_NODE_OF"
"""For tests: ``0,0,0,1`` is what ``init(node_of=[0, 0, 0, 1])`` is."""

DEAD_TRAINING_VARIABLE = "MPISIGN_ON_DEAD_TRAINING"

TEARDOWN_SECONDS = 10.0  # Python's own, before MPI_Finalize, on a busy machine: nobody waits for others then


class Session(Talk):
    """This process's part in the job. Made by :func:`init`.

    Attributes:
        process: its number with the operating system; a forked child inherits a session and is no rank.
        pickle: whether users' objects may be pickled.
        token: what the job is called, at random; the same on all ranks.
        on_dead_training: one of ``ON_DEAD_TRAINING``.
        farewells: done when all leave together, and may be collective.
        network: what is known of the ways between the group's ranks.
        turn: what a thread of this process must have to talk to other ranks.
        commits: how many exchanges have been committed here.
        counted: whose gradients could count in the last of them, by identities.
        whole: whether all that was done by then was in it, and not only what was done before a window parted.
        parted: how many windows of local steps have ended whose decision comes later.
        there: who is there, as all ranks know at the same step, and not when each finds that others have died.
    """

    def __init__(
        self,
        group: Group,
        watchdog: Watchdog,
        tracer: Tracer,
        *,
        pickle: bool = True,
        on_dead_training: str = ON_DEAD_TRAINING[0],
    ) -> None:
        super().__init__(watchdog, tracer, pickle=pickle)
        self.on_dead_training = on_dead_training
        self.process = os.getpid()
        self.token = secrets.token_hex(8)
        self.farewells = ExitStack()
        self.farewells.callback(self._free)  # the last, also if one before it has failed here: the others free theirs
        self.turn, self.network = Turns(watchdog), Network()
        self._optimizers = self.commits = self.parted = 0
        self.counted, self.whole = tuple[int, ...](), True
        self.last_words: LastWords | None = None
        self.replace(group)

    def replace(self, group: Group, there: tuple[int, ...] = ()) -> Group | None:
        """Go on with another group, between two steps. **Collective** over its ranks.

        A rank that the others leave out goes on with a group of its own, so that it, and they, can leave the job alone.
        Call :func:`mpisign.checkpoint.wait` before; a save in the background may miss its part else.

        Returns:
            The former group, whose communicators now are the caller's to free.
        """
        before, self.group, self.there = getattr(self, "group", None), group, there or group.identities
        if before is not None and before.identities[0] != group.identities[0]:
            self.clocks.clear()  # they tell how far a rank 0 is ahead that is no more
        if before is not None:
            self._former_network, self.network = self.network, Network()
        self._presence = group.presence
        self.watchdog.comm, self.watchdog.rank, self.watchdog.size = group.comm, group.rank, group.size
        tell_group(group)
        return before

    def network_told(self) -> int:
        """What this rank knows of the ways between ranks, as a number for :meth:`regrouped`."""
        return int(self.network.asked) + 2 * self.network.shares

    def regrouped(self, told: Sequence[int]) -> None:
        """Ranks have died, and what those that are left knew of the ways between them was ``told``."""
        before, asked = self._former_network, any(its & 1 for its in told)
        known = all(its & 1 for its in told)  # else some have not heard what was found
        self.network = Network(all(its & 2 for its in told), asked, before.links if known else None)

    def _free(self) -> None:
        if not self.watchdog.broken and not (self.membership is not None and self.membership.recovered):
            self.group.free(self.watchdog)

    @property
    def has_optimizers(self) -> bool:
        """Whether there has been a DistributedSignOptimizer."""
        return self._optimizers > 0

    def committed(self, identities: tuple[int, ...]) -> None:
        """An exchange between these ranks is over, and what it has decided is applied now."""
        self.commits, self.counted, self.whole, self.there = self.commits + 1, identities, True, identities

    def next_number(self) -> int:
        """A number for an optimizer, the same on all ranks if they make theirs in the same order."""
        self._optimizers += 1
        return self._optimizers


_session: Session | None = None
_joining = threading.Lock()
_finalize_timeout: tuple[int, float | None] = -1, None  # process and stall_timeout of the latest session


def current(caller: str = "this function") -> Session:
    """The session of this rank.

    Raises:
        NotInitializedError: naming ``caller``: there is none, or this process is no rank.
    """
    session = known(caller)
    if session.process != os.getpid():
        raise NotInitializedError(_no_rank(caller))
    return session


def known(caller: str) -> Session:
    """The same, or in a forked child its parent's, which tells who that is. Nothing may be sent there."""
    if _session is None:
        if whose_child():
            raise NotInitializedError(_no_rank(caller))
        raise NotInitializedError(f"{caller} needs the job's ranks: call mpisign.init() first")
    return _session


def _no_rank(caller: str) -> str:
    return (
        f"{caller} in process {os.getpid()}, which is no rank: {whose_child()}. Call it in the main process, and give "
        f"workers what they need (rank, size, a seed) as arguments"
    )


@contextmanager
def operation(caller: str) -> Iterator[Session]:
    """The session of this rank, for something that ranks do together: its other threads wait until that is over.

    Nested in one thread, it is one operation. Raises as :func:`current` and :class:`Turns` do.
    """
    session = current(caller)
    with session.turn(caller):
        if session is not _session:  # while this thread has waited, another has left the job
            raise NotInitializedError(f"{caller}: another thread has left the job meanwhile")
        yield session


def collective(caller: str, *, repeats: bool = True) -> Callable[[F], F]:
    """A function that is one :func:`operation`, and counts on all ranks or none, if the job outlives its ranks.

    Args:
        repeats: it is done again if ranks die meanwhile, as it says the same then; else MembershipChangedError.
    """

    def decorated(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            with operation(caller) as session:
                if session.membership is None or session.membership.acting:
                    return function(*args, **options)
                return session.membership.do(lambda: function(*args, **options), raises=not repeats)

        return cast(F, call)

    return decorated


def init(
    comm: MPI.Comm | None = None,
    *,
    abort_on_exception: bool = True,
    stall_warning: float | None = 60.0,
    stall_timeout: float | None = None,
    node_of: Sequence[int] | None = None,
    pickle: bool = True,
    on_dead_training: Literal["warn", "raise"] | None = None,
    on_failure: Literal["abort", "continue"] | None = None,
    min_ranks: int | None = None,
    detect_links: float | None = None,
    spares: int = 0,
) -> None:
    """Join the job: learn ranks and nodes, and get a private communicator. **Collective.**

    Args:
        comm: the ranks that train together; default ``MPI.COMM_WORLD``. It is duplicated, not kept.
        abort_on_exception: a process that dies of an uncaught exception prints its traceback and takes the
            whole job down at once, instead of leaving the others to wait for ever.
        stall_warning: seconds of waiting for other ranks after which a rank says for which; None for never. It
            counts from the start of MPI in this call to its end after :func:`shutdown`, but only while this
            process runs: what a scheduler has stopped and continued has not waited meanwhile.
        stall_timeout: seconds after which it aborts the job; None for never.
        node_of: (size,) the node of each rank, by any numbers, the same on every rank; default: ranks that share
            memory are on one node. The variable ``MPISIGN_NODE_OF=0,0,0,1`` is another way to say so.
        pickle: False refuses :func:`broadcast_object` and :func:`allgather_object`, which unpickle what other
            ranks send and so run their code. The library itself sends nothing that is run.
        on_dead_training: when nobody has voted for 32 steps in a row (all gradients have a NaN or Inf): ``"warn"``, and
            again each time it has doubled; ``"raise"`` a DeadTrainingError on all ranks. Default: what the variable
            ``MPISIGN_ON_DEAD_TRAINING`` says, else ``"warn"``. While only some ranks cannot vote, both warn.
        on_failure: what happens when a rank dies. ``"abort"``: the job ends. ``"continue"``: those that are left go on
            with the step in which it has died, if they are more than half, or half with the lowest identity; it takes
            Open MPI with ULFM switched on. A rank with an uncaught exception then dies alone, whatever
            ``abort_on_exception`` is. Default: what the variable ``MPISIGN_ON_FAILURE`` says, else ``"abort"``.
        min_ranks: with ``"continue"``, end the job when fewer are left; default 1.
        detect_links: with ``"continue"``, seconds of silence after which a rank counts as dead: its link is cut, its
            node is gone, or it is stopped. A thread answers for a rank that computes. Default: only ends of processes.
        spares: with ``"continue"``, how many ranks, the last ones, do not train until others have died: they wait in
            :class:`mpisign.Standby`, which the script must make before its first step.

    Raises:
        AlreadyInitializedError: called twice.
        LaunchError: there is no MPI; it sees one process, but the launcher started several; or this process is a child
            of a rank's.
        OptionError: a time that is not positive, a choice that there is not, a map of ranks to nodes that does not
            fit, or ``"continue"`` where MPI cannot do that; says what to type.
        ConsistencyError: on every rank, if they pass different options or maps.
    """
    check_may_start()
    with _joining:
        failure = Failure.wanted(on_failure, min_ranks, detect_links, spares)
        _join(comm, abort_on_exception, stall_warning, stall_timeout, node_of, pickle, on_dead_training, failure)


def _join(
    comm: MPI.Comm | None,
    abort_on_exception: bool,
    stall_warning: float | None,
    stall_timeout: float | None,
    node_of: Sequence[int] | None,
    pickle: bool,
    on_dead_training: str | None,
    failure: Failure,
) -> None:
    global _session, _finalize_timeout
    if _session is not None:
        raise AlreadyInitializedError(
            f"rank {_session.rank}: mpisign.init() was called before; call it once, or mpisign.shutdown() first "
            f"(mpisign.is_initialized() tells)"
        )
    if on_dead_training is None:
        on_dead_training = os.environ.get(DEAD_TRAINING_VARIABLE) or ON_DEAD_TRAINING[0]
    wrong = wrong_options({"stall_warning": stall_warning, "stall_timeout": stall_timeout}, on_dead_training)
    if wrong is not None:
        stall_warning = stall_timeout = None
    tracer = Tracer()
    watchdog = Watchdog(tracer, stall_warning, stall_timeout)
    if failure.survives:
        leave_mpi_to_us()
    with watchdog.guard_start():
        MPI = import_mpi()  # noqa: N806 - and not before: a spawned DataLoader worker that starts MPI hangs the job

    if comm is None:
        comm = MPI.COMM_WORLD
    elif not isinstance(comm, MPI.Intracomm) or comm == MPI.COMM_NULL:
        raise OptionError(f"comm={comm!r} is no communicator with this process in it: do not call init() outside it")
    if comm != MPI.COMM_SELF:  # who names that one means to be alone
        library = MPI.Get_library_version().split("\n")[0].split(",")[0].strip("\0 ")
        check_not_alone(os.environ, MPI.COMM_WORLD.Get_size(), library)
    if node_of is None and os.environ.get(NODE_MAP_VARIABLE):
        node_of = [int(place) if place.isdecimal() else -1 for place in os.environ[NODE_MAP_VARIABLE].split(",")]
    wrong = wrong or wrong_failure(failure, comm.Get_size())
    if failure.detect_links is not None and wrong is None:
        heartbeat.begin(failure.detect_links)
    group = joined(comm, watchdog, tracer, node_of, wrong)
    session = Session(group, watchdog, tracer, pickle=pickle, on_dead_training=on_dead_training)
    codes = session.meet("init()", coded_options(pickle, on_dead_training, failure)).tolist()
    odd, usual = minority(codes)
    if odd:
        group.free(watchdog)
        here, there = told_options(codes[odd[0]], usual), told_options(usual, codes[odd[0]])
        raise ConsistencyError(
            f"ranks {odd} have called init({here}) and the others init({there}) (this is rank {session.rank}): pass "
            f"the same on every rank"
        )
    with session.telling("init()"):
        session.align_clocks()
    session.meet("init()")
    if failure.survives:
        watchdog.survives, session.membership = True, Membership(session, failure.min_ranks or 1, failure.spares)
    _session = session
    _finalize_timeout = session.process, stall_timeout
    if abort_on_exception or failure.survives:
        session.last_words = LastWords(functools.partial(_die, session))
    # One rank's variable counts, so that all do the same.
    told = [timelines.wanted(comm) if session.rank == 0 else "", session.token]
    path, session.token = session.spread_value(told, (str, str), 0, "init()")
    if path:
        tracer.keep(timelines.RECORDED)
        session.farewells.callback(_write_timeline, session, path)
    atexit.unregister(_shutdown_at_exit)  # of an earlier session
    atexit.register(_shutdown_at_exit)


def shutdown() -> None:
    """Leave the job: free the communicators, restore the exception hook. **Collective.** Harmless if not in one.

    Called at exit if you do not. MPI itself stays up (mpi4py finalizes it when Python exits), so :func:`init`
    may be called again. A rank that leaves while others are in a step is an error to them, not a hang.
    """
    leaving = _session
    if leaving is None:
        return
    from mpi4py import MPI

    if leaving.process != os.getpid() or MPI.Is_finalized():
        _forget(leaving)  # a forked child is not a rank, and after MPI.Finalize() there is nobody to tell
        return
    with leaving.turn("shutdown()"):
        if _session is leaving:  # no other thread has left meanwhile
            _leave(leaving, MPI.COMM_WORLD.Get_size())


def _forget(leaving: Session) -> None:
    global _session
    _session = None
    if leaving.last_words is not None:
        leaving.last_words.remove()


def _leave(leaving: Session, world: int) -> None:
    global _finalize_timeout
    _forget(leaving)
    if leaving.group.size != world or leaving.ended:
        _finalize_timeout = -1, None
    if not leaving.ended:
        leaving.say_goodbye(leaving.farewells)
    heartbeat.leave()


def _write_timeline(session: Session, path: str) -> None:
    try:
        timelines.write(session, path)
    except MpisignError as error:
        logger.error("%s", error)


def _shutdown_at_exit() -> None:
    """And then MPI_Finalize, where Python stands still and only another process can look at the time.

    It waits for every process that mpirun has started. If some are no ranks of this group, they may train for long yet.
    """
    its, code = _session, exit_code()
    failed = code not in (0, REQUEUE_EXIT_CODE)
    if failed and its is not None and its.membership is not None and not its.ended and its.size > 1:
        why = f"has called sys.exit({code})"
        logger.error("rank %d %s", its.rank, why)
        end_with(its, code, why)
    shutdown()
    process, seconds = _finalize_timeout
    if process != os.getpid() or seconds is None:
        return
    from mpi4py import MPI

    if MPI.Is_finalized():
        return
    text = f"MPI has not ended within {seconds:g} s; stall_timeout is over. Some process of the job does not exit"
    if (shell := ring(seconds + TEARDOWN_SECONDS, text)) is not None:
        shell.returncode = 0  # which nobody waits for


def _die(session: Session, kind: type[BaseException]) -> None:
    end_with(session, 130 if issubclass(kind, KeyboardInterrupt) else 1, f"died of {kind.__name__}")


def is_initialized() -> bool:
    """Whether :func:`init` has been called, and :func:`shutdown` not since; a forked child has its parent's answer.

    There :func:`rank`, :func:`size` and the like answer too; what needs other ranks raises NotInitializedError.
    """
    return _session is not None


@uncompiled
@collective("timeline()")
def timeline(path: str | os.PathLike[str]) -> None:
    """Write what all ranks did lately into one Chrome trace, for https://ui.perfetto.dev. **Collective.**

    It has a row for each rank and phase. Each rank keeps its latest 32,768 spans, which is some hundred steps; with the
    variable ``MPISIGN_TIMELINE=path`` (rank 0's counts) it keeps 500,000, and :func:`shutdown` writes them there;
    of a job of some of MPI's ranks into ``path-4.json``, say, by the number that its rank 0 has among all.

    Args:
        path: rank 0 writes it; a file that is there is replaced when the new one is whole.

    Raises:
        MpisignError: on every rank, if rank 0 cannot write.
    """
    timelines.write(current("timeline()"), path)


@uncompiled
@collective("barrier()")
def barrier() -> None:
    """Wait until every rank has come here. **Collective.**"""
    current("barrier()").meet("barrier()")
