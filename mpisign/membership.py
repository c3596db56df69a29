"""How a job goes on when ranks die, with ``init(on_failure="continue")``: who is left, and what of it counts.

All that ranks do together is a sequence of *acts*: an exchange of an optimizer, or a call such as ``average()``. Each
begins with a call of all, so a rank that has begun one knows that all others are done with the one before, but for
hearing how it has ended. When ranks have died, whoever finds out revokes the group's communicators, so that all do;
they shrink it, and tell each other in which act they are. Then the last act counts for all or for none:

- Whoever has its decision (or has heard that all were at its end) gives it to those who have not.
- If nobody has, it is void: survivors do it again, or are told by :class:`~mpisign.MembershipChangedError`.

Spares take part in shrinking, and in nothing else. One steps in by an act, too, in which it is given all that it needs
(:mod:`mpisign.standby`): it votes from then on if the act counts, and waits on if not.

A round's decision stays in its plan's buffers until all ranks have sent messages of the next, which each does after it
has applied it: it is kept without a copy.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from mpisign import heartbeat
from mpisign.errors import MembershipChangedError
from mpisign.group import Group
from mpisign.last_words import end_alone
from mpisign.positions import BODY, CLOSING, DONE, FAILED, Position
from mpisign.processes import end_without_mpi, watch_exit
from mpisign.regrouping import Job, Living
from mpisign.spares import Spares
from mpisign.survival import is_loss

__all__ = ["QUORUM_EXIT_CODE", "Act", "Membership", "MembershipChange", "has_quorum"]

T = TypeVar("T")

logger = logging.getLogger(__name__)

QUORUM_EXIT_CODE = 86
"""What ranks exit with that were left on the smaller side, or counted out."""

TRIES = 100  # of a recovery, in which others die
LINGER_SECONDS = 1.0  # for those who are still about to hear that all leave


class MembershipChange(NamedTuple):
    """What callbacks of :func:`mpisign.on_membership_change` are told.

    Attributes:
        generation: how many groups this job has had before this one.
        members: the identities of its ranks, in the order of their numbers: their numbers in the job's first group.
        lost: the identities of those that have died since the last one.
        joined: the identities of spares that have stepped in.
    """

    generation: int
    members: tuple[int, ...]
    lost: tuple[int, ...]
    joined: tuple[int, ...] = ()


class Act(Protocol):
    """An exchange that can be ended by what another rank has of it."""

    def told(self) -> bytes:
        """All that another rank needs to end it alike; from when it is closed until the next one is."""

    def take(self, told: bytes) -> None:
        """Close it with that."""


class Recoverable(Protocol):
    """Has something under way between acts."""

    def lost(self, recovering: Act | None) -> None:
        """Forget it, but for the act that is being recovered."""


class Membership:
    """Of one session whose job outlives its ranks.

    Args:
        min_ranks: with fewer, the job stops.
        spares: how many, the last ones, are to wait.

    Attributes:
        recovered: ranks have died: MPI cannot be ended in the usual way any more.
        acting: an act goes on, of which all that is done now is a part.
        number: of the last act that has begun; a spare that comes in before the next takes the others'.
        spares: those that wait, or will.
    """

    def __init__(self, job: Job, min_ranks: int, spares: int = 0) -> None:
        self._job, self._min_ranks = job, min_ranks
        self._living = Living(job.group, job.watchdog)
        self.spares = Spares(self, job, self._living, spares)
        self._good = job.group  # the last in which an act has been closed, which quorums are of
        self.number, self._state, self._counted = 0, DONE, True
        self._raises = self._leaving = self._pending = False
        self._last: tuple[int, Act | None] = -1, None  # the last exchange that was closed, with its number
        self._callbacks: list[Callable[[MembershipChange], object]] = []
        self._recoverables: weakref.WeakSet[Recoverable] = weakref.WeakSet()
        self._seconds = 0.0
        watch_exit(lambda: self.number)
        self.recovered = self.acting = False
        heartbeat.guard(self, lambda its: job.gather_values(its, [str], "init()"))

    def tell(self, callback: Callable[[MembershipChange], object]) -> Callable[[], None]:
        """Call it after each recovery. Returns what ends that."""
        self._callbacks.append(callback)

        def end() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return end

    def watch(self, it: Recoverable) -> None:
        """Tell it, as long as it lives, before the group is replaced."""
        self._recoverables.add(it)

    def lose_what_goes_on(self, act: Act | None) -> None:
        """Let everything that is watched forget what is under way, but for this act."""
        for it in list(self._recoverables):
            it.lost(act)

    @property
    def group(self) -> Group:
        """The ranks as they are now."""
        return self._job.group

    def seconds(self) -> float:
        """How long recoveries have taken since this was asked last."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def is_loss(self, error: BaseException | None) -> bool:
        """Whether an error means that ranks have died."""
        return is_loss(error, self._job.group.comm)

    # ----------------------------------------------------------------------------------------------- acts

    def called(self) -> None:
        """All ranks' next call is made: with the first of an act, it has begun."""
        if self.acting and not self._counted:
            self.number, self._state, self._counted = self.number + 1, BODY, True

    @contextmanager
    def an_act(self, *, raises: bool = False) -> Iterator[None]:
        """What is done inside is one act.

        Args:
            raises: it is not repeated if ranks die in it.

        Raises:
            MembershipChangedError: ranks have died in this act, as others have found before this one has begun it.
        """
        if self._pending and raises:
            self._pending = False
            raise self._error()
        self._pending = False
        self.acting, self._counted, self._raises = True, False, raises
        try:
            yield
        except BaseException:
            if self._counted and self._state != DONE:
                self._state = FAILED
            raise
        finally:
            self.acting = False
            if not self._counted:  # this rank has called nobody
                self._state, self._counted = DONE, True

    def closed(self, act: Act | None) -> None:
        """The act that goes on counts: nothing can go wrong in it any more. An exchange's is what others may need."""
        self._state, self._good = DONE, self._job.group
        if act is not None:
            self._last = self.number, act

    def do(self, body: Callable[[], T], *, raises: bool) -> T:
        """Do something with all ranks, and make sure that all have done it, or none.

        Raises:
            MembershipChangedError: on all ranks, with ``raises``: ranks have died meanwhile, and it does not count.
        """
        while True:
            with self.an_act(raises=raises):
                ended, between = False, self._job.group.identities
                try:
                    result = body()
                    ended, between = True, self._job.group.identities
                    self.close()
                    return result
                except Exception as error:
                    if not self.is_loss(error):
                        raise
                    if self.recover() and ended:
                        self._job.there = between  # as on those who had closed it before
                        return result
                    if raises:
                        self._pending = False
                        raise self._error() from error

    def close(self) -> None:
        """Come to the end of an act, together."""
        if self._counted:  # it has called the others
            self._state = CLOSING
            self._job.meet("the end of a call")
            self.closed(None)
            self._job.there = self._job.group.identities

    def _error(self) -> MembershipChangedError:
        group = self._job.group
        return MembershipChangedError(
            f"ranks have died, and what all were about to do has not come about: {group.size} go on, of which this is "
            f"rank {group.rank} (identities {list(group.identities)}, generation {group.generation}). Do it again"
        )

    def leave(self, body: Callable[[], object]) -> None:
        """Do the last thing of all: leave the job together, whoever dies meanwhile."""
        self._leaving = True
        with self.an_act():
            while True:
                try:
                    body()
                    self.closed(None)
                    return
                except Exception as error:
                    if not self.is_loss(error):
                        raise
                    if self.recover():
                        return

    def part(self, farewells: ExitStack) -> None:
        """Do what is done when all leave; nobody waits for those who have died, or are done."""
        failed = False
        if self.spares.number:
            self.without_mpi()  # of which a spare that has died unseen would be a part
        self.spares.dismiss()
        try:
            farewells.close()
        except Exception as error:
            if not self.is_loss(error):
                raise
            failed = True
            logger.error("a rank has died while all have left the job, and not all that is done then is done")
        if failed or self.recovered:
            self.without_mpi()
            try:
                request = self._job.group.comm.Ibarrier()
                end = time.monotonic() + LINGER_SECONDS
                while not request.Test() and time.monotonic() < end:
                    time.sleep(0.001)
            except Exception as error:
                logger.debug("%s", error)  # whoever is not here any more was the first to be done

    def without_mpi(self) -> None:
        """End this process, when it comes to that, without ending MPI."""
        self.recovered = True
        end_without_mpi()

    # ------------------------------------------------------------------------------------------- recovery

    def recover(self, act: Act | None = None) -> bool:
        """Replace the group by one of those who live. **Collective** over them, and over those who wait.

        Args:
            act: the exchange that goes on; it is closed, if some rank had come so far.

        Returns:
            Whether the act that goes on, or was the last, counts. If not, its number is free again.

        Raises:
            SystemExit: too few are left, and this process has to end.
        """
        began, before = perf_counter(), self._job.group.identities
        acting, began_it, self.acting = self.acting, self.acting and self._counted, False
        self.without_mpi()
        self.lose_what_goes_on(act)
        with self._job.tracer.span("recovery"):
            for _ in range(TRIES):
                try:
                    positions = self._regroup()
                    voting, counts = any(its.identity == self._job.group.identity for its in positions), False
                    if voting:
                        counts = self._settle(positions, act)
                    self.spares.regrouped(voting=voting)
                    self._good = self._job.group
                    break
                except Exception as error:
                    if not self.is_loss(error):
                        raise
            else:
                self.stop(f"ranks have died in each of {TRIES} tries to go on")
        self.announce(before, perf_counter() - began)
        self.acting = acting
        if not counts:
            self.number, self._counted = self.number - 1, not acting
        self._state = DONE
        return counts and began_it

    def _regroup(self) -> list[Position]:
        """A new group, after the present one has failed. Raises what MPI does if others die meanwhile.

        Returns:
            Where its ranks are.
        """
        living, job = self._living, self._job
        living.shrink(job.group)
        positions, members = self._told()
        living.identities = tuple(its.identity for its in positions)
        voting = self.spares.heard(positions)
        self._check_quorum(positions, voting, members)
        job.stopping = any(its.stopping for its in positions)
        generation = max(its.generation for its in positions) + 1
        if self.spares.form([its.identity for its in voting], generation, job.there):
            job.regrouped([its.network for its in voting])
        return voting

    def _told(self) -> tuple[list[Position], tuple[int, ...]]:
        """Where all are, by their new numbers, and the identities of the last group that is known to have worked."""
        group = self._job.group
        members = np.zeros(len(self._living.places), np.int64)
        members[list(self._good.identities)] = 1
        mine = Position(
            group.identity,
            int(group.gpus),
            group.generation,
            self.number,
            self._state if self._counted else DONE,
            int(self._state in (BODY, CLOSING) and self._counted and self._raises),
            int(self._leaving),
            self._last[0],
            self._job.network_told(),
            self._good.generation,
            self.spares.waits,
            int(self.spares.leave_now),
            int(self._job.stopping),
        )
        heard = self._living.tell_all(np.concatenate([np.array(mine, np.int64), members]))
        positions = [Position(*its) for its in heard[:, : len(mine)].tolist()]
        latest = max(range(len(positions)), key=lambda rank: positions[rank].good)
        return positions, tuple(np.flatnonzero(heard[latest, len(mine) :]).tolist())

    def _check_quorum(
        self, positions: Sequence[Position], voting: Sequence[Position], members: tuple[int, ...]
    ) -> None:
        here = tuple(its.identity for its in positions)
        if not voting:
            self.stop("it is a spare, and reaches nobody whom it could replace")
        if all(its.leaving for its in voting):  # who is missing may have left before
            return
        if why := self._too_few(here, members):
            self.stop(why)

    def _too_few(self, here: Sequence[int], members: Sequence[int]) -> str:
        """Why these, spares among them, may not go on after ``members``; empty if they may."""
        if not has_quorum(here, members):
            return f"ranks {list(here)} are all that this one reaches of {list(members)}, and that is no majority"
        return f"ranks {list(here)} are left, and min_ranks={self._min_ranks}" if len(here) < self._min_ranks else ""

    @property
    def is_alone(self) -> bool:
        """Whether all other processes of the job have died."""
        return len(self._living.identities) == 1

    def too_few(self, without: Set[int]) -> str:
        """Why the job may not go on without the ranks with these identities; empty if it may."""
        voters = self._good.identities
        if self.spares.is_one_that_waits:  # which has not heard of all groups
            voters = tuple(its for its in self._living.identities if its not in self.spares.identities)
        return self._too_few(sorted({*voters, *self.spares.identities} - without), voters)

    def stop(self, why: str) -> None:
        """End this process, and touch no other."""
        logger.critical("rank %d stops: %s", self._job.group.identity, why)
        self._job.ended = True
        self.without_mpi()
        if threading.current_thread() is threading.main_thread():
            sys.exit(QUORUM_EXIT_CODE)
        end_alone(QUORUM_EXIT_CODE)

    def _settle(self, positions: Sequence[Position], act: Act | None) -> bool:
        """Let the last act count for all, or for none. Returns whether this rank's does."""
        top = max(its.number for its in positions)
        counts = any(its.number == top and its.state == DONE for its in positions)
        before = top if counts else top - 1  # the last that counts
        needy = [rank for rank, its in enumerate(positions) if its.number == before and its.state == BODY]
        givers = [rank for rank, its in enumerate(positions) if its.given == before]
        if needy and givers:
            self._give(needy, givers[0], act)
        elif self._job.group.rank in needy:  # others have ended it with an error
            return False
        raises = any(its.raises for its in positions if its.number == top and not counts)
        self._pending |= raises and self.number < top
        return self.number <= before

    def _give(self, needy: Sequence[int], giver: int, act: Act | None) -> None:
        """Let those in need close their exchange by what ``giver`` has of it. **Collective.**"""
        job = self._job
        told = b""
        if job.group.rank == giver:
            last = self._last[1]
            assert last is not None
            told = last.told()
        told = job.spread_bytes(told, giver, "a recovery", 1 << 40)
        if job.group.rank in needy:
            assert act is not None
            act.take(told)
            self.closed(act)

    def announce(self, before: tuple[int, ...], seconds: float) -> None:
        """Tell that these ranks have been replaced by those that are here now, and how long it took."""
        if self.spares.is_one_that_waits:
            return
        self._seconds += seconds
        group = self._job.group
        alive = {*group.identities, *self.spares.identities}
        lost = tuple(its for its in before if its not in alive)
        joined = tuple(its for its in group.identities if its not in before)
        if group.rank == 0:
            what = [f"ranks {list(lost)} have died"] * bool(lost) + [f"spares {list(joined)} step in"] * bool(joined)
            logger.warning(
                "%s; %d go on (identities %s, generation %d, after %.3f s)",
                " and ".join(what) or "nobody has died",
                group.size,
                list(group.identities),
                group.generation,
                seconds,
            )
        for callback in list(self._callbacks):
            try:
                callback(MembershipChange(group.generation, group.identities, lost, joined))
            except Exception:
                logger.exception("a callback of on_membership_change() has failed")


def has_quorum(here: Sequence[int], members: Sequence[int]) -> bool:
    """Whether these of the ``members`` may go on: more than half, or exactly half with the lowest identity."""
    there = set(here) & set(members)
    return 2 * len(there) > len(members) or (2 * len(there) == len(members) and min(members) in there)
