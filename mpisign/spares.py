"""Ranks that wait until others have died: they leave the others before the first step, and come in between steps."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Protocol, TypeVar

from mpisign.errors import OptionError
from mpisign.exit_words import tell_that_it_waits
from mpisign.positions import STEPS_IN, VOTES, WAITS, Position, voting
from mpisign.regrouping import Job, Living

__all__ = ["STANDBY", "Spares"]

T = TypeVar("T")

logger = logging.getLogger(__name__)

HandOver = Callable[[tuple[int, ...]], None]

STANDBY = "Standby()"
STEP_IN, OVER = range(2)  # orders to those who wait


class Acts(Protocol):
    """What they need of a :class:`mpisign.membership.Membership`."""

    number: int

    def do(self, body: Callable[[], T], *, raises: bool) -> T: ...
    def recover(self) -> bool: ...
    def is_loss(self, error: BaseException | None) -> bool: ...
    def announce(self, before: tuple[int, ...], seconds: float) -> None: ...
    def lose_what_goes_on(self, act: None) -> None: ...
    def without_mpi(self) -> None: ...


class Spares:
    """Of one job; on a rank that votes, and on one that waits.

    Args:
        number: how many, the last ranks of the job, are to wait.

    Attributes:
        number: how many there were.
        wanted: how many ranks are to vote.
        identities: of those that wait, or will.
        waits: how this process stands: one of ``VOTES``, ``WAITS`` and ``STEPS_IN``.
        leave_now: this process knows that all have come to where spares leave.
        have_left: they have.
    """

    def __init__(self, membership: Acts, job: Job, living: Living, number: int) -> None:
        self._membership, self._job, self._living = membership, job, living
        self.number, self.wanted = number, job.group.size - number
        self.identities = job.group.identities[self.wanted :]
        self.waits = WAITS if job.group.identity in self.identities else VOTES
        self.leave_now = self.have_left = not number
        self._leader = job.group.identities[0]

    @property
    def trainers(self) -> int:
        """How many ranks of the group are to train: all, but for spares that have not left yet."""
        return self._job.group.size - (0 if self.have_left else len(self.identities))

    def to_train(self, there: tuple[int, ...]) -> tuple[int, ...]:
        """Those of these ranks that are to train, as all that know ``there`` find alike."""
        return there if self.have_left else tuple(its for its in there if its < self.wanted)

    @property
    def is_one_that_waits(self) -> bool:
        """Whether this process is a spare, and has left the others."""
        return self.have_left and self.waits != VOTES

    def demand_that_they_have_left(self) -> None:
        """Raise :class:`OptionError` if spares would vote, as nobody has said where they are to wait."""
        if not self.have_left:
            raise OptionError(
                f"init(spares={self.number}) keeps ranks that wait, and nothing says where: make "
                f"mpisign.Standby(model=model, optimizer=optimizer, ...) before the first step"
            )

    def heard(self, positions: Sequence[Position]) -> list[Position]:
        """Ranks have died, and all that live are at these positions. Returns those of the voters."""
        self.leave_now = self.have_left = self.leave_now or any(its.apart for its in positions)
        voters = voting(positions) if self.have_left else list(positions)
        stay = [its for its in positions if its.waits != VOTES and not (self.have_left and its in voters)]
        self.identities = tuple(its.identity for its in stay)
        return voters

    def regrouped(self, *, voting: bool) -> None:
        """A recovery is over, and this process is one of those who vote, or wait. Before, a spare may still do both."""
        if self.waits != VOTES and self.have_left:
            self.waits = VOTES if voting else WAITS

    def form(self, members: Sequence[int], generation: int, there: tuple[int, ...] = ()) -> bool:
        """Make those with these identities the group. **Collective** over all. Returns whether this process is in."""
        former = self._job.group
        group = self._living.group_of(members, former.identity, former.gpus, generation)
        self._leader = members[0]
        if group is None:
            tell_that_it_waits(generation)
            return False
        self._job.replace(group, there)
        return True

    def leave(self) -> None:
        """Let spares leave the others. **Collective** over all."""
        membership = self._membership
        # Who has been told in a recovery that all have come here has nobody to meet.
        membership.do(lambda: None if self.have_left else self._job.meet(STANDBY), raises=False)
        self.leave_now = True
        while not self.have_left:
            try:
                members = [its for its in self._living.identities if its not in self.identities]
                self.form(members, self._job.group.generation + 1, self._job.there)
                self.have_left = True
            except Exception as error:
                if not membership.is_loss(error):
                    raise
                membership.recover()
        if not self.is_one_that_waits:
            membership.do(lambda: self._job.meet(STANDBY), raises=False)  # from here on all know the same to be there

    def let_in(self, hand_over: HandOver) -> bool:
        """Let as many vote from now on as have died, if there are so many. **Collective** over those who vote.

        Args:
            hand_over: gives all that they need to the spares with these identities; **collective** over the new group.

        Returns:
            Whether there was one.
        """
        membership = self._membership
        began = perf_counter()
        before: tuple[int, ...] = ()

        def body() -> bool:
            nonlocal before
            if not self.identities:
                return False
            before = self._job.group.identities
            group, joining = self._job.group, self.identities[: max(0, self.wanted - self._job.group.size)]
            if group.rank == 0:
                for spare in self.identities:
                    self._living.order(spare, [STEP_IN, len(joining), group.generation + 1, membership.number])
            self._enlarge(joining, group.generation + 1)
            hand_over(joining)
            return True

        came = membership.do(body, raises=False)
        if came:
            membership.announce(before, perf_counter() - began)
        return came

    def wait(self, hand_over: HandOver) -> None:
        """Wait, as a spare, until there is a place. The same as :meth:`let_in`, from the other side.

        Raises:
            SystemExit: the job has ended.
        """

        began = perf_counter()

        def body() -> tuple[int, ...]:
            nonlocal began
            joining: tuple[int, ...] = ()
            while self._job.group.identity not in joining:
                order, most, generation, number = self._living.await_order(self._leader)
                if order == OVER:
                    self._end()
                self._membership.number, joining = number, self.identities[:most]
                self._enlarge(joining, generation)
            began = perf_counter()
            hand_over(joining)
            self.waits = STEPS_IN
            return joining

        joined = self._membership.do(body, raises=False)
        self.waits = VOTES
        here = tuple(its for its in self._job.group.identities if its not in joined)
        self._membership.announce(here, perf_counter() - began)

    def _end(self) -> None:
        logger.info("spare %d was not needed", self._job.group.identity)
        self._job.ended = True
        self._membership.without_mpi()
        sys.exit(0)

    def _enlarge(self, joining: tuple[int, ...], generation: int) -> None:
        """A group with some more. **Collective** over all."""
        former = self._job.group
        members = [its for its in self._living.identities if its not in self.identities or its in joining]
        if self.form(members, generation, self._job.there) and self.waits == VOTES:
            self._membership.lose_what_goes_on(None)
            self._living.give_up(former.comms())
        self.identities = tuple(its for its in self.identities if its not in joining)

    def dismiss(self) -> None:
        """Tell those who wait that the job has ended."""
        if self.have_left and self._job.group.rank == 0:
            for spare in self.identities:
                try:
                    self._living.order(spare, [OVER, 0, 0, 0])
                except Exception as error:
                    logger.debug("%s", error)  # it has died, too
