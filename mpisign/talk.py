"""What ranks do together besides the messages of a step: they meet, and tell each other things.

All of it begins with the same small all-gather, the *call*, whatever it is for. So ranks that do different things
meet in it and are told, where other messages of theirs would be mistaken for each other. What they tell is numbers, or
JSON that is checked; only a user's own objects are pickled. Whatever another rank sends, the worst that it can do here,
unless it misuses MPI itself, is to make the others raise an error.
"""

from __future__ import annotations

import logging
import pickle as pickles
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mpisign import encoding, errors
from mpisign.cuts import cut
from mpisign.differences import first_difference
from mpisign.encoding import LIMIT_BYTES
from mpisign.errors import ConsistencyError, MpisignError, OptionError
from mpisign.group import Group
from mpisign.presence import Presence
from mpisign.trace import Tracer
from mpisign.watchdog import Pending, Watchdog

if TYPE_CHECKING:
    from mpi4py import MPI

    from mpisign.membership import Membership

__all__ = ["ACTS", "CALL_FIELDS", "EXIT", "Talk"]

logger = logging.getLogger(__name__)

CALL_FIELDS = 7  # how many numbers a call has, whatever it is for
EXIT = "exit"
FAILURE = "a failure"  # of a rank, which takes part in this instead of what the others do
ACCOUNT = "the account of a failure"
ACTS = (
    EXIT,
    FAILURE,
    ACCOUNT,
    "init()",
    "barrier()",
    "broadcast_object()",
    "allgather_object()",
    "broadcast_parameters()",
    "broadcast_optimizer_state()",
    "check_consistency()",
    "agreement()",
    "a comparison of layouts",
    "a comparison of options",
    "a plan",
    "checkpoint.save()",
    "checkpoint.wait()",
    "checkpoint.load()",
    "checkpoint.newest()",
    "timeline()",
    "the doctor",
    "average()",
    "allreduce()",
    "allgather()",
    "broadcast()",
    "calibration",
    "the end of a call",
    "a recovery",
    "Standby()",
)
"""What ranks do together besides steps. A call begins with -2 - its place here; a step's with a number above 0."""

ACCOUNT_LENGTH = 2000  # characters of an error that another rank is told
NAMED = 3  # ranks in a message; when a file system fails, it fails for many
OBJECTS_LIMIT_BYTES = 1 << 40  # of all ranks together; nobody has memory for more
CLOCK_TRIES = 5
CLOCK_TAG = 0x6D74
CLOCK_LIMIT = 2**61  # nanoseconds, 73 years: differences of two times fit into 64 bits


class Talk:
    """Talks on the group's communicator, watched.

    Attributes:
        group: the ranks as they are now.
        wants_stop: this rank has been asked to stop.
        stopping: some rank had been, when all last called: the same on all.
        membership: how the job outlives its ranks; None where it does not.
        ended: this process is no part of the job any more.
    """

    group: Group
    _presence: Presence
    membership: Membership | None = None
    ended = False

    def __init__(self, watchdog: Watchdog, tracer: Tracer, *, pickle: bool) -> None:
        self.watchdog, self.tracer, self._pickle = watchdog, tracer, pickle
        self.wants_stop = self.stopping = False
        self._parted = False  # a rank has left before the others: all can only end
        self._failure = ""  # what this rank is about to tell, as JSON
        self.clocks: list[tuple[int, int]] = []  # (this rank's time, how far rank 0's is ahead), each time they met

    @property
    def rank(self) -> int:
        """This process's number in the group."""
        return self.group.rank

    @property
    def size(self) -> int:
        """How many ranks the group has."""
        return self.group.size

    def post(self, request: MPI.Request, *buffers: object) -> Pending:
        """Keep a nonblocking operation and all that it reads and writes until it is waited for."""
        return self.watchdog.post(request, *buffers)

    def wait(self, pending: Pending) -> None:
        """Wait for a collective operation; see :meth:`mpisign.watchdog.Watchdog.wait`."""
        self.watchdog.wait(pending, self._presence)

    def test(self, pending: Pending) -> bool:
        """Whether a collective operation is over; see :meth:`mpisign.watchdog.Watchdog.test`."""
        return self.watchdog.test(pending)

    def count(self, waits: int) -> None:
        """Count operations that were found to be over by :meth:`test`, when all ranks are at the same place again."""
        for _ in range(waits):
            self._presence.begin()

    # ------------------------------------------------------------------------------------------- meetings

    def call(self, mine: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """All-gather a few numbers, the same few from everyone: (fields,) int64 to (M, fields). **Collective.**

        The wish to stop travels as the lowest bit of the last number, so that no number may need more than 63 bits.
        """
        if self.watchdog.broken:
            raise ConsistencyError(
                f"rank {self.rank} was interrupted in {self.watchdog.broken}, where the other ranks still wait for it: "
                f"this job can only end"
            )
        if self._parted:
            raise ConsistencyError(f"rank {self.rank}: a rank has left the job before the others; it can only end now")
        if self.membership is not None:
            self.membership.called()
        said, heard = mine.copy(), np.empty((self.size, mine.size), np.int64)
        said[-1] = 2 * mine[-1] + self.wants_stop
        self.wait(self.post(self.group.comm.Iallgather(said, heard), said, heard))
        last = heard[:, -1]
        self.stopping |= bool((last & 1).any())
        last >>= 1
        return heard

    def meet(self, act: str, number: int = 0) -> npt.NDArray[np.int64]:
        """Make sure that all ranks are about to do the same thing, one of ``ACTS``. **Collective.**

        Returns:
            Every rank's ``number``: (M,).

        Raises:
            ConsistencyError: on every rank, saying who does what.
        """
        with self.tracer.span(act):
            mine = np.zeros(CALL_FIELDS, np.int64)
            mine[:2] = -2 - ACTS.index(act), number
            heard = self.call(mine)
        self.demand_same_act(heard)
        return heard[:, 1]

    def demand_same_act(self, heard: npt.NDArray[np.int64]) -> None:
        """Raise :class:`ConsistencyError` if a call, (M, fields), shows ranks that do different things."""
        acts = [_act(code) for code in heard[:, 0].tolist()]
        self._parted = self._parted or (EXIT in acts and len(set(acts)) > 1)
        if FAILURE in acts and ACCOUNT not in acts:
            self._hear_failures([rank for rank, its in enumerate(acts) if its == FAILURE])
        if len(set(acts)) > 1:
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

    # -------------------------------------------------------------------------------------- what goes wrong

    def telling(self, act: str) -> Telling:
        """For what a rank does alone before the next call of all: if it raises, that call is an error on every rank.

        The others raise the same kind of error if it is one of mpisign's, else ConsistencyError, whatever they are in.
        **Collective** if it raises: it returns when all have come to their next call. What talks inside must raise on
        all ranks, if it does.

        Args:
            act: what this rank is in, for the others' message.
        """
        return Telling(self, act)

    def tell(self, error: Exception, act: str) -> None:
        """Meet the others in their next call with an error of this rank's. **Collective.**"""
        known = isinstance(error, MpisignError) and error.told  # those who have told it are past it
        lost = self.membership is not None and self.membership.is_loss(error)
        if known or lost or self.watchdog.broken or self._parted:
            return
        text = f"{act} has failed on rank {self.rank} on {platform.node()}: {error}"
        if not isinstance(error, MpisignError):
            text = f"{text} ({type(error).__name__})"
        self._failure = encoding.encode([type(error).__name__, text[:ACCOUNT_LENGTH]]).decode()
        try:
            if self.membership is None or self.membership.acting:
                self.meet(FAILURE)
            else:  # an act of the others, and so of this rank
                self.membership.do(self._fail, raises=False)
        except MpisignError as others:
            logger.debug("%s", others)
        finally:
            self._failure = ""

    def _fail(self) -> None:
        self.meet(FAILURE)
        raise MpisignError(self._failure)

    def _hear_failures(self, failed: list[int]) -> None:
        """Raise what the ranks that have failed tell of it; return if this rank is one of them. **Collective.**"""
        told = self.gather_bytes(self._failure.encode(), ACCOUNT)
        if self._failure:
            return
        accounts = [encoding.decode(told[rank], (str, str), rank) for rank in failed]
        more = f"; and {len(failed) - NAMED} ranks more" if len(failed) > NAMED else ""
        name = accounts[0][0]
        kind: type[MpisignError] = getattr(errors, name) if name in errors.__all__ else ConsistencyError
        texts = "; ".join(encoding.printable(text) for _, text in accounts[:NAMED])
        error = kind(f"{texts}{more} (this is rank {self.rank})")
        error.told = True
        raise error

    # --------------------------------------------------------------------------------------- what is told

    def gather_bytes(self, mine: bytes, act: str, limit: int = LIMIT_BYTES, root: int | None = None) -> list[bytes]:
        """Every rank's bytes, on every rank, or on ``root`` alone (elsewhere []). **Collective.**

        Raises:
            ConsistencyError: on every rank, if one has more than ``limit``.
        """
        sizes = self._check_sizes(self.meet(act, len(mine)), act, limit)
        comm, hears = self.group.comm, root in (None, self.rank)
        message, told = np.frombuffer(mine, np.uint8), [bytearray() for _ in sizes]
        with self.tracer.span(act):
            for start, length in cut(max(sizes), self.size):
                counts = [max(0, min(length, size - start)) for size in sizes]
                part = message[start : start + length]
                heard = self._room(sum(counts) if hears else 0, act)
                if root is None:
                    request = comm.Iallgatherv(part, [heard, counts])
                else:
                    request = comm.Igatherv(part, [heard, counts] if hears else None, root=root)
                self.wait(self.post(request, message, part, heard))
                if hears:
                    for sofar, more in zip(told, np.split(heard, np.cumsum(counts)[:-1]), strict=True):
                        sofar.extend(more.data)
        return [bytes(its) for its in told] if hears else []

    def spread_bytes(self, mine: bytes, root: int, act: str, limit: int = LIMIT_BYTES) -> bytes:
        """``root``'s bytes on every rank. **Collective.** Raises as :meth:`gather_bytes` does."""
        size = self._check_sizes(self.meet(act, len(mine) if self.rank == root else 0), act, limit)[root]
        with self.tracer.span(act):
            message = np.frombuffer(mine, np.uint8).copy() if self.rank == root else self._room(size, act)
            for start, length in cut(size):
                part = message[start : start + length]
                self.wait(self.post(self.group.comm.Ibcast(part, root=root), message, part))
        return mine if self.rank == root else message.tobytes()

    def _room(self, size: int, act: str) -> npt.NDArray[np.uint8]:
        """Memory for what others send. Raises ConsistencyError on this rank alone, so that the job can only end."""
        with self.watchdog.unbroken(act):
            try:
                return np.empty(size, np.uint8)
            except MemoryError as error:
                raise ConsistencyError(
                    f"{act}: the ranks send {size} bytes, for which rank {self.rank} has no memory: send tensors with "
                    f"broadcast_parameters(), and large objects in parts"
                ) from error

    def _check_sizes(self, claimed: npt.NDArray[np.int64], act: str, limit: int) -> list[int]:
        sizes: list[int] = claimed.tolist()
        unfit = [rank for rank, size in enumerate(sizes) if not 0 <= size <= limit]
        if unfit or sum(sizes) > OBJECTS_LIMIT_BYTES:
            whose = f"ranks {unfit} want to send {sizes[unfit[0]]} bytes" if unfit else f"all send {sum(sizes)} bytes"
            raise ConsistencyError(
                f"{act}: {whose}, and at most {min(limit, OBJECTS_LIMIT_BYTES)} can be taken (this is rank "
                f"{self.rank}): send tensors with broadcast_parameters(), and large objects in parts"
            )
        return sizes

    def gather_values(self, mine: Any, schema: Any, act: str) -> list[Any]:
        """Every rank's plain value, as JSON that has the shape ``schema`` says. **Collective.**

        Raises:
            ConsistencyError: a rank has sent something else.
        """
        heard = self.gather_bytes(encoding.encode(mine), act)
        return [encoding.decode(message, schema, sender) for sender, message in enumerate(heard)]

    def spread_value(self, mine: Any, schema: Any, root: int, act: str) -> Any:
        """``root``'s plain value on every rank; ``mine`` is looked at there alone. **Collective.**"""
        message = self.spread_bytes(encoding.encode(mine) if self.rank == root else b"", root, act)
        return encoding.decode(message, schema, root)

    def gather_objects(self, mine: Any, act: str) -> list[Any]:
        """Every rank's object, pickled. **Collective.** Raises OptionError if pickles are turned off."""
        self._check_pickle(act)
        with self.telling(act):
            message = pickles.dumps(mine)
        told = self.gather_bytes(message, act, OBJECTS_LIMIT_BYTES)
        with self.telling(act):
            heard = [pickles.loads(theirs) for theirs in told]
        self.meet(act)
        return heard

    def spread_object(self, mine: Any, root: int, act: str) -> Any:
        """``root``'s object, pickled, on every rank. **Collective.** Raises OptionError if pickles are turned off."""
        self._check_pickle(act)
        with self.telling(act):
            message = pickles.dumps(mine) if self.rank == root else b""
        told = self.spread_bytes(message, root, act, OBJECTS_LIMIT_BYTES)
        with self.telling(act):
            heard = mine if self.rank == root else pickles.loads(told)
        self.meet(act)
        return heard

    def compare(self, lines: Sequence[str], one: int, other: int, act: str) -> tuple[str, str]:
        """The first lines in which rank ``one`` and rank ``other`` differ, on every rank. **Collective.**"""
        theirs = [self.spread_value(list(lines), [str], rank, act) for rank in (one, other)]
        here, there = first_difference(*theirs)
        return encoding.printable(here), encoding.printable(there)

    def _check_pickle(self, act: str) -> None:
        if not self._pickle:
            raise OptionError(
                f"rank {self.rank}: {act} pickles, which init(pickle=False) has turned off: send tensors with "
                f"broadcast_parameters(), or allow it"
            )

    # --------------------------------------------------------------------------------------------- clocks

    def align_clocks(self) -> None:
        """Find out how far rank 0's clock is ahead of this rank's, and add it to ``clocks``. **Collective.**

        Each rank asks rank 0 for the time in turn, a few times; the answer that took the shortest is right within half
        of what it took.

        Raises:
            ConsistencyError: what rank 0 has told is no time.
        """
        comm, asked, told = self.group.comm, np.zeros(1, np.int64), np.zeros(1, np.int64)
        with self.watchdog.guard("the alignment of clocks"):
            if self.rank == 0:
                for rank in range(1, self.size):
                    for _ in range(CLOCK_TRIES):
                        comm.Recv(asked, rank, CLOCK_TAG)
                        told[0] = perf_counter_ns()
                        comm.Send(told, rank, CLOCK_TAG)
                self.clocks.append((perf_counter_ns(), 0))
                return
            tries: list[tuple[int, int, int]] = []  # how long it took, when, the answer
            for _ in range(CLOCK_TRIES):
                began = perf_counter_ns()
                comm.Sendrecv(asked, 0, CLOCK_TAG, told, 0, CLOCK_TAG)
                ended = perf_counter_ns()
                tries.append((ended - began, (began + ended) // 2, int(told[0])))
            # Not before: rank 0 waits for every question, and the ranks behind this one for rank 0.
            wrong = [answer for _, _, answer in tries if not 0 <= answer < CLOCK_LIMIT]
            if wrong:
                raise ConsistencyError(
                    f"rank 0 has told the time {wrong[0]}, which no clock shows (this is rank {self.rank})"
                )
            _, middle, answer = min(tries)
            self.clocks.append((middle, answer - middle))

    # ------------------------------------------------------------------------------------------------ end

    def say_goodbye(self, farewells: ExitStack) -> bool:
        """Meet the others before leaving, as MPI_Finalize would wait for them in silence. **Collective.**

        Returns:
            Whether all leave together. If not, the others get an error, and this rank is past doing anything about it.
        """
        if self.watchdog.broken and self.size > 1:
            self.watchdog.abort(
                f"rank {self.rank} leaves the job; it was interrupted in {self.watchdog.broken}, where the others wait"
            )
        try:
            if self.membership is None:
                self.meet(EXIT)
            else:
                self.membership.leave(lambda: self.meet(EXIT))
        except MpisignError as error:
            logger.error("%s", error)
            return False
        if self.membership is None:
            farewells.close()
        else:
            self.membership.part(farewells)
        return True


class Telling:
    """A block whose errors are told; see :meth:`Talk.telling`. A class, as every step enters some."""

    __slots__ = ("_act", "_talk")

    def __init__(self, talk: Talk, act: str) -> None:
        self._talk, self._act = talk, act

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):  # not an interruption
            self._talk.tell(error, self._act)


def _act(code: int) -> str:
    if code >= 0:
        return "step()"
    return ACTS[-2 - code] if -2 - len(ACTS) < code < -1 else "something that this mpisign does not know"
